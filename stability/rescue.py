"""What a run does when its alarm rings: cfg.on_alarm says it.

tell        Each ring is said on the terminal, in events.jsonl and in W&B, with what moved and what to try.
remedy      The first ring also brings the run back to its last healthy checkpoint, which is one written before any sign
            of a collapse. From there on no step may move an attention logit by more than logit_trust.
half_rate   The same, but from there on the learning rate is halved.

The alarm is that of stability/alarm.py. It misses many collapses, so a collapse (rules 1 and 2 of
stability/collapse.py) counts as a ring of the last two, too. A run goes back once; later rings are only said. Its
folder keeps the lines that were cut off, in abandoned.jsonl, and rescue.json: the step of the ring, "rang", and the one
gone back to, "back_to".
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch.optim import Optimizer

from config import Config, due
from remedies.trust import LogitTrust, inside
from stability.alarm import CollapseAlarm
from stability.collapse import Watch

TRY = "try --logit_trust=1, --qk_norm=True or --attn_lr=0.0625 from the start, or --on_alarm=remedy"


class Rescue:
    """The alarm of a run, and what was done after its first ring; all ranks hold the same.

    path: of the run's rescue.json. tell: returns rank 0's argument on every rank; all ranks call it together.
    went: what rescue.json holds, or None.
    """

    def __init__(self, cfg: Config, path: Path, tell: Callable):
        self.cfg, self.path, self.tell = cfg, path, tell
        self.on = cfg.on_alarm != "off"
        self.went: dict[str, int] | None = None
        self.alarm = CollapseAlarm()

    @property
    def can_go_back(self) -> bool:
        """Whether the next ring brings the run back."""
        return self.cfg.on_alarm in ("remedy", "half_rate") and self.went is None

    @property
    def rate(self) -> float:
        """What the learning rate is multiplied by."""
        return 0.5 if self.went and self.cfg.on_alarm == "half_rate" else 1.0

    def ring(self, step: int, values: Mapping[str, float], watch: Watch) -> str:
        """What to say if the alarm rings at `step`, or the collapse is noticed there; otherwise "".

        values: what was logged of the step. Rank 0 alone measures the logit, so it tells the others.
        """
        if not self.on:
            return ""
        if due(self.cfg.probe_every, step):
            values = {**values, "attention/max_logit": self.tell(values.get("attention/max_logit", math.nan))}
        rung = self.alarm.update(step, values)
        if watch.collapse and watch.collapse.noticed == step and self.can_go_back:
            return str(watch.collapse)
        return f"{rung}; saturated since step {self.alarm.high_since}; {TRY}" if rung else ""

    def go_back(self, rang: int, back_to: int):
        """Record that a ring at step `rang` brings the run back to the checkpoint of `back_to`; on rank 0 alone."""
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({"rang": rang, "back_to": back_to}) + "\n")
        partial.replace(self.path)

    def restore(self, lines: Iterable[Mapping], optimizer: Optimizer):
        """Be as after `lines` of metrics.jsonl, and put a remedy that the run has taken into its optimizer."""
        if not self.on:
            return
        self.alarm = CollapseAlarm()
        for line in lines:
            self.alarm.update(line["iter"], line)
        self.went = self.tell(json.loads(self.path.read_text()) if self.path.is_file() else None)
        if self.went and self.cfg.on_alarm == "remedy":
            inside(optimizer, LogitTrust).limit = self.cfg.logit_trust
