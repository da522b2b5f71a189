"""Measurements of a model in training and what they mean: probes, theorems, metrics, collapse rules, alarm, monitor.

Lives here: measurements and judgements. Does not: training, logging. `probes` and `collapse` need PyTorch alone.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stability.monitor import Monitor as Monitor
else:

    def __getattr__(name: str):
        if name == "Monitor":  # imported when it is asked for, because it imports PyTorch
            from stability.monitor import Monitor

            return Monitor
        raise AttributeError(f"module 'stability' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), "Monitor"])
