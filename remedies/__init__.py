"""Other ways that are said to keep training stable: controls of MSign and rival optimizers.

This package holds updates and optimizers, each chosen by one field of `Config`. MSign itself is in msign.py.
"""
