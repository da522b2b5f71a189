"""What is measured of a model in training, and what it means: probes, the theorems, metrics, the collapse rules.

Lives here: measurements and judgements. Does not: training, logging. `probes` and `collapse` need PyTorch alone.
"""
