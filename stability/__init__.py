"""Measurements of a model in training and what they mean: probes, theorems, metrics, collapse rules.

Lives here: measurements and judgements. Does not: training, logging. `probes` and `collapse` need PyTorch alone.
"""
