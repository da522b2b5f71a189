"""An alarm: from what a run has logged so far, will its loss turn within the next thousand steps?

    alarm = CollapseAlarm()
    ...
    if rung := alarm.update(step, line):  # a line of metrics.jsonl, or of Monitor.history
        print(rung)

The rule: attention is saturated, and the loss no longer falls. Exactly, the alarm rings when

1. the largest attention logit was above LOGIT = 200 at every measurement of the last HELD = 300 steps, and
2. the mean loss of the last 100 steps is more than `threshold` standard deviations of these losses above the smallest
   such mean so far.

Logits of hundreds make the rows of attention's softmax one-hot, which happens in healthy runs as well; the second
condition tells them apart. Losses count by differences and ratios alone, so a multiple of the loss, or one with a
constant added, rings at the same steps. After a ring the alarm is silent for REST = 200 steps.

Neither number nor rule comes from theory: LOGIT, HELD and THRESHOLD were chosen on recorded runs of small models whose
collapse was provoked, and analysis/alarms.py judges them on others. A run that logs no attention logit never rings.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from stability.collapse import WINDOW

LOGIT = 200.0  # the largest attention logit, before the softmax, above which attention counts as saturated
HELD = 300  # steps for which it has to stay there
THRESHOLD = 0.56  # standard deviations of the loss; about one false alarm in 10 000 healthy steps where it was chosen
REST = 200  # steps after a ring in which the alarm is silent


@dataclass(frozen=True)
class Alarm:
    """A ring at `step`: `rise` in standard deviations of the loss, and the last largest attention logit measured."""

    step: int
    rise: float
    logit: float

    def __str__(self) -> str:
        text = f"step {self.step}: a collapse may come: attention is saturated (largest logit {self.logit:.0f})"
        return f"{text} and the mean loss is {self.rise:.2f} standard deviations above its lowest"


class CollapseAlarm:
    """Takes the lines of a run in order of their steps; `update` returns an Alarm at a step at which it rings.

    threshold: standard deviations by which the mean loss has to be up. Steps may be missing; then "the last 100 steps"
    are the last 100 losses. `rise` is the last update's number of standard deviations, NaN where condition 1 does not
    hold or 100 losses have not been seen.
    """

    def __init__(self, threshold: float = THRESHOLD):
        self.threshold = threshold
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.lowest = math.inf  # mean loss
        self.logit = math.nan
        self.high_since: int | None = None  # the first of the latest measurements that were all above LOGIT
        self.rang: int | None = None
        self.rise = math.nan

    def update(self, step: int, values: Mapping[str, float | None]) -> Alarm | None:
        """Take what was logged at `step`: "train/loss" or "loss", and "attention/max_logit" where it was measured.

        None and NaN or infinity, which stand for what is not finite, are skipped as if they had not been logged: a loss
        that is not finite is a collapse already, and `collapse.Watch` dates it.
        """
        logit = _finite(values.get("attention/max_logit"))
        if logit is not None:
            self.logit = logit
            if logit <= LOGIT:
                self.high_since = None
            elif self.high_since is None:
                self.high_since = step
        self.rise = math.nan
        loss = _finite(values.get("train/loss", values.get("loss")))
        if loss is None:
            return None
        self.losses.append(loss)
        if len(self.losses) < WINDOW:
            return None
        mean = math.fsum(self.losses) / WINDOW
        self.lowest = min(self.lowest, mean)
        if self.high_since is None or step - self.high_since < HELD:
            return None
        deviation = math.dist(self.losses, [mean] * WINDOW) / math.sqrt(WINDOW - 1)
        self.rise = (mean - self.lowest) / deviation if deviation else 0.0
        if self.rise <= self.threshold or (self.rang is not None and step - self.rang < REST):
            return None
        self.rang = step
        return Alarm(step, self.rise, self.logit)

    def state_dict(self) -> dict:
        """What `load_state_dict` needs to go on: some hundred numbers, which JSON and torch.save both hold."""
        return vars(self) | {"losses": list(self.losses)}

    def load_state_dict(self, state: dict):
        """Restore what `state_dict` returned, the threshold included."""
        vars(self).update(state, losses=deque(state["losses"], WINDOW))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
