"""Other ways that are said to keep training stable: controls of MSign, rival optimizers, and limits on logits.

This package holds updates and optimizers, each chosen by one field of `Config`. MSign itself is in msign.py.
"""
