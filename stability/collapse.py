"""The rules that call a run collapsed, and that say what moved first; stated once.

A run has collapsed when one of these holds; the collapse is dated to the first step named:

1. not finite  a loss, a gradient norm or a weight is NaN or infinite: that step.
2. loss rose   the 100-step mean loss is 0.1 nats above its own minimum so far, and stays there for 200
               steps: the first of them.
3. stalled     a gradient norm after step 100 exceeds ten times the run's median, and the run's final loss
               (mean of the last 100 steps) is above that of the attention-off arm, the same model with its
               attention held at zero: the first such gradient norm. Attention has become worse than none.

Rules 1 and 2 need nothing but the run, so `Watch` applies them while it trains; rule 3 compares two
finished runs. A run that did not collapse counts as rescued only if its final loss is also clearly, by
0.1 nats, below the attention-off arm's; otherwise attention was merely made harmless.

What moved first: a signal has moved at the first measured step from which on, for 100 steps or more and until the collapse, it
is a factor of two worse than the best it has been so far (for log Z, already a logarithm: ln 2 higher). Worse is lower for the stable rank
and higher for all others. The gradient norm counts by the median of its last 100 steps. The first quarter of the time up to the
collapse is left out: everything moves when training starts. Moving first is not being the cause: hold it against
the same signals of runs that did not collapse, where the rule is applied to the whole run.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import median

WINDOW, RISE, STAYS, SPIKE, CLEARLY = 100, 0.1, 200, 10.0, 0.1
# what a collapse can be labelled with: the logged key, and the direction that is worse
SIGNALS = {
    "stable rank": ("srank/attention", -1),
    "Jacobian alignment": ("jacobian/alignment", 1),
    "attention logits": ("attention/max_logit", 1),
    "log Z": ("log_z", 1),
    "first-block gain": ("residual/gain", 1),
    "precision": ("precision/error", 1),
}


@dataclass(frozen=True)
class Collapse:
    step: int
    noticed: int
    why: str

    def __str__(self) -> str:
        return f"collapsed at step {self.step}: {self.why}"


class Watch:
    """Rules 1 and 2, fed one step at a time.

    `finite`: every value so far was. `suspicious`: the run has collapsed, or its mean loss is up by RISE now,
    so the weights must not replace the last healthy ones.
    """

    def __init__(self):
        self.step = 0
        self.losses = deque(maxlen=WINDOW)
        self.lowest = math.inf
        self.rose_at: int | None = None
        self.finite = True
        self.collapse: Collapse | None = None

    @property
    def suspicious(self) -> bool:
        return self.collapse is not None or self.rose_at is not None

    def not_finite(self, why: str):
        """Rule 1, for a value (a weight, say) found not finite at the current step."""
        self.finite = False
        self.collapse = self.collapse or Collapse(self.step, self.step, why)

    def add(self, loss: float | None, grad_norm: float | None) -> Collapse | None:
        """Take the next step's values (None stands for not finite, as in metrics.jsonl). Returns the collapse so far."""
        self.step += 1
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if value is None or not math.isfinite(value):
                self.not_finite(f"the {name} is not finite")
        if not self.finite:
            return self.collapse
        self.losses.append(loss)
        if len(self.losses) == WINDOW:
            mean = math.fsum(self.losses) / WINDOW
            self.lowest = min(self.lowest, mean)
            if mean - self.lowest < RISE:
                self.rose_at = None
            elif self.rose_at is None:
                self.rose_at = self.step
            elif self.step - self.rose_at >= STAYS and self.collapse is None:
                why = f"mean loss rose from {self.lowest:.2f} to {mean:.2f} and stayed"
                self.collapse = Collapse(self.rose_at, self.step, why)
        return self.collapse


def final_loss(losses: Sequence[float | None]) -> float:
    """Mean of the last 100 training losses; infinity if one of them is not finite."""
    last = losses[-WINDOW:]
    return math.inf if any(v is None for v in last) else math.fsum(last) / len(last)


def find_collapse(
    losses: Sequence[float | None], grad_norms: Sequence[float | None], floor: float | None = None
) -> Collapse | None:
    """The collapse of a recorded run by all three rules; `floor` is the attention-off arm's final loss."""
    watch = Watch()
    for loss, grad_norm in zip(losses, grad_norms, strict=True):
        watch.add(loss, grad_norm)
    if watch.collapse or floor is None:
        return watch.collapse
    end = final_loss(losses)
    high = SPIKE * median(grad_norms)
    spikes = [step for step, norm in enumerate(grad_norms, 1) if step > WINDOW and norm > high]
    if end > floor and spikes:
        why = f"{len(spikes)} gradient norms beyond {SPIKE:g}x the median, final loss {end:.2f} above attention-off's {floor:.2f}"
        return Collapse(spikes[0], len(losses), why)
    return None


def onset(steps: Sequence[int], worse: Sequence[float]) -> int | None:
    """The first step from which on `worse`, on a log scale, growing, is ln 2 above its minimum so far; None if too late to tell."""
    up = [value - best >= math.log(2) for value, best in zip(worse, accumulate(worse, min), strict=True)]
    if not up or not up[-1]:
        return None
    last_not_up = max(i for i, is_up in enumerate(up) if not is_up)  # the first value is its own minimum: never up
    first = steps[last_not_up + 1]
    return first if steps[-1] - first >= WINDOW else None


@dataclass(frozen=True)
class Onsets:
    """When each of SIGNALS and the gradient norm moved, None for never (or not logged)."""

    signals: dict[str, int | None]
    grad_norm: int | None

    @property
    def first(self) -> list[str]:
        """The signals that moved first: several when measured to move at the same step, none when none moved."""
        moved = {name: step for name, step in self.signals.items() if step is not None}
        return [name for name, step in moved.items() if step == min(moved.values())]

    def lead(self, signal: str) -> int | None:
        """Steps by which the signal moved before the gradient norm did; negative when after it."""
        step = self.signals[signal]
        return None if step is None or self.grad_norm is None else self.grad_norm - step

    def __str__(self) -> str:
        """One line, such as `stable rank moved first, at step 75, 1700 steps before the gradient norm`."""
        if not self.first:
            return "nothing moved"
        lead = self.lead(self.first[0])
        against = (
            "the gradient norm never did"
            if lead is None
            else f"{abs(lead)} steps {'before' if lead >= 0 else 'after'} the gradient norm"
        )
        return f"{' and '.join(self.first)} moved first, at step {self.signals[self.first[0]]}; {against}"


def find_onsets(lines: Sequence[Mapping[str, float | None]], until: int | None = None) -> Onsets:
    """What moved first in the lines of a run's metrics up to step `until`, the collapse; None is the whole run."""
    until = until or lines[-1]["iter"]
    lines = [line for line in lines if until / 4 < line["iter"] <= until]

    def series(key: str, direction: int) -> tuple[list[int], list[float]]:
        found = [(line["iter"], line[key]) for line in lines if line.get(key) is not None]
        if key != "log_z":
            found = [(step, math.log(value)) for step, value in found if value > 0]
        return [step for step, _ in found], [direction * value for _, value in found]

    steps, norms = series("grad_norm", 1)
    medians = [median(norms[i - WINDOW : i]) for i in range(WINDOW, len(norms) + 1)]
    signals = {name: onset(*series(key, direction)) for name, (key, direction) in SIGNALS.items()}
    return Onsets(signals, onset(steps[WINDOW - 1 :], medians))
