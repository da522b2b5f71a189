"""Token files: a reader, and a command that prepares each corpus.

This package makes and reads tokens. It knows nothing of the model.
"""
