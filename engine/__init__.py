"""How a run runs: processes, arithmetic, memory, checkpoints, its record, and many runs side by side.

This package holds what any training run needs, whatever is measured. Probes, collapse rules and remedies are elsewhere.
"""
