"""Token files: a reader, and a command that prepares each corpus.

Lives here: what makes or reads tokens. Does not: anything that knows the model.
"""
