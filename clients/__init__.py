"""Other people's training programs, run unmodified with MSign and recorded in the form of this repository's runs.

A client is such a program: nanoGPT's train.py, or the Trainer of transformers. A module here translates a Config to the
client's own settings, puts MSign around the optimizer and logs what the client computes. Nothing here trains, and no
model is defined here.
"""
