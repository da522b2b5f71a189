"""nanoGPT and the Trainer of transformers as they are, with MSign around their optimizers, recorded as our runs are.

Holds what translates a Config to a client's own settings and logs what it computes. Nothing here defines a model.
"""
