"""What else is said to keep training stable: controls of MSign and rival optimizers.

Lives here: updates and optimizers behind one `Config` field each. Does not: MSign itself (`msign.py`), or training.
"""
