"""How a run runs: processes, arithmetic, memory, checkpoints, its record, and many runs side by side.

Lives here: what any training run needs, whatever is measured. Does not: probes, collapse rules, remedies.
"""
