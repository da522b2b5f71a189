"""Measurements of a model in training and what they mean: probes, theorems, metrics, collapse rules.

This package neither trains nor logs. `probes` needs PyTorch alone, `collapse` only the standard library.
"""
