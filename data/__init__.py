"""Token files: a reader, and a preparation for every corpus.

Lives here: whatever makes or reads tokens. Does not: anything that knows the model.
"""
