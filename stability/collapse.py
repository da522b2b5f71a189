"""When a run has collapsed, and which of its signals moved first. All rules are stated here and nowhere else.

The final loss of a run is its mean training loss over the last 100 steps. The floor is the final loss of the
attention-off run: the same model with its attention matrices set to zero every 100 steps.

A run has collapsed when one of three rules holds:

1. not finite  A loss, a gradient norm, a weight or a moment of the optimizer is NaN or infinite. The collapse is
               dated to the step at which this is found: losses and gradient norms are looked at in every step, weights
               when MSign is applied to them, weights and moments when a checkpoint is written.
2. loss rose   The 100-step mean loss is at least 0.1 nats above its own minimum so far, for 200 steps. The collapse
               is dated to the first of these steps.
3. stalled     A gradient norm after step 100 exceeds ten times the run's median, and the run's final loss is above
               the floor, so that its attention has become worse than none. The collapse is dated to the first such
               gradient norm.

Rules 1 and 2 need the run alone, so `Watch` applies them during training. Rule 3 compares two finished runs. A run
that did not collapse counts as rescued only if its final loss is 0.1 nats or more below the floor; otherwise its
attention has been made harmless but not useful.

SIGNALS lists the logged quantities that may announce a collapse. A signal has moved when it is a factor of two worse
than its best value so far. It must stay so up to the collapse, and for at least 100 steps. It moves at the first of
these steps at which it was measured. Lower is worse for the stable rank, higher is worse for all others. log Z is the
mean over tokens of log Σ exp(logits) of the output; it is a logarithm already, so it moves when it is ln 2 higher. The
gradient norm is judged by the median of its last 100 steps. The first quarter of the time up to the collapse is left
out, of the best value too, because everything moves when training starts. A signal that moves first need not be the
cause: compare it with the same signal in runs that did not collapse, for which the rule looks at the whole run.
"""

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from statistics import median

WINDOW = 100  # steps in a mean loss or a median gradient norm
RISE = 0.1  # nats by which the mean loss rises (rule 2)
STAYS = 200  # steps for which it stays up (rule 2)
SPIKE = 10.0  # a gradient norm this many times the median is a spike (rule 3)
CLEARLY = 0.1  # a run counts as rescued if its final loss is at least this many nats below the floor
# {signal: (its key in metrics.jsonl, the direction that is worse: −1 lower, 1 higher)}
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
    """A collapse and its reason. `step` dates the collapse; at step `noticed` the rule was fulfilled."""

    step: int
    noticed: int
    why: str

    def __str__(self) -> str:
        return f"collapsed at step {self.step}: {self.why}"


class Watch:
    """Rules 1 and 2 for a run in training, which passes in its values step by step.

    `collapse` is the collapse so far, or None. `finite` says whether every value so far was finite. `suspicious` says
    whether the run has collapsed or its mean loss is up by RISE now; a checkpoint written then must not replace the
    last healthy one.
    """

    def __init__(self) -> None:
        self.step = 0
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.lowest = math.inf
        self.rose_at: int | None = None
        self.finite = True
        self.collapse: Collapse | None = None

    @property
    def suspicious(self) -> bool:
        return self.collapse is not None or self.rose_at is not None

    def not_finite(self, why: str):
        """Apply rule 1: at the current step a value, such as a weight, was found that is not finite."""
        self.finite = False
        self.collapse = self.collapse or Collapse(self.step, self.step, why)

    def add(self, loss: float | None, grad_norm: float | None) -> Collapse | None:
        """Take the next step's values, where None means not finite, as in metrics.jsonl. Returns `collapse`."""
        self.step += 1
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if value is None or not math.isfinite(value):
                self.not_finite(f"the {name} is not finite")
        if not self.finite or loss is None:
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
    finite = [v for v in last if v is not None]
    return math.fsum(finite) / len(last) if len(finite) == len(last) else math.inf


def outcome(lines: Sequence[Mapping], collapse: Collapse | None, lr: float, healthy: int) -> dict:
    """What summary.json says of a run: its losses, its largest gradient norm, and its collapse or None.

    lines: of metrics.jsonl. lr: the learning rate that a collapse's is a multiple of. healthy: the step of the last
    checkpoint before any sign of a collapse.
    """
    described = None if collapse is None else asdict(collapse) | {
        "lr_multiple": lines[collapse.step - 1]["lr"] / lr,
        "last_healthy_checkpoint": healthy,
        "onsets": str(find_onsets(lines, collapse.step)),
    }  # fmt: skip
    return {
        "collapse": described,
        "train/loss": final_loss([line["train/loss"] for line in lines]),
        "val/loss": next((line["val/loss"] for line in reversed(lines) if "val/loss" in line), None),
        "max_grad_norm": max(math.inf if line["grad_norm"] is None else line["grad_norm"] for line in lines),
    }


def find_collapse(
    losses: Sequence[float | None],
    grad_norms: Sequence[float | None],
    floor: float | None = None,
    not_finite: str | None = None,
) -> Collapse | None:
    """The collapse of a recorded run by all three rules, or None. Without `floor`, rule 3 is left out.

    not_finite: what was found not finite at the last step besides losses and gradient norms, a weight or a moment.
    """
    watch = Watch()
    for loss, grad_norm in zip(losses, grad_norms, strict=True):
        watch.add(loss, grad_norm)
    if not_finite:
        watch.not_finite(not_finite)
    if watch.collapse or floor is None:
        return watch.collapse
    final = final_loss(losses)
    norms = [norm for norm in grad_norms if norm is not None]  # all of them, by rule 1
    high = SPIKE * median(norms)
    spikes = [step for step, norm in enumerate(norms, 1) if step > WINDOW and norm > high]
    if final > floor and spikes:
        why = f"{len(spikes)} gradient norms beyond {SPIKE:g}x the median, "
        why += f"final loss {final:.2f} above attention-off's {floor:.2f}"
        return Collapse(spikes[0], len(losses), why)
    return None


def onset(steps: Sequence[int], worse: Sequence[float]) -> int | None:
    """The step at which a signal moves: the first from which on `worse` stays ln 2 or more above its minimum so far.

    worse: the signal's logarithm at the given steps, with a sign such that higher is worse. None when the signal has
    not moved, or moved less than 100 steps before the last of `steps`.
    """
    up = [value - best >= math.log(2) for value, best in zip(worse, accumulate(worse, min), strict=True)]
    if not up or not up[-1]:
        return None
    last_not_up = max(i for i, is_up in enumerate(up) if not is_up)  # exists: the first value is its own minimum
    first = steps[last_not_up + 1]
    return first if steps[-1] - first >= WINDOW else None


@dataclass(frozen=True)
class Onsets:
    """The step at which each of SIGNALS and the gradient norm moved; None if it never did or was not logged."""

    signals: dict[str, int | None]
    grad_norm: int | None

    @property
    def first(self) -> list[str]:
        """The signals that moved first: several if they moved at the same measured step, none if none moved."""
        moved = {name: step for name, step in self.signals.items() if step is not None}
        return [name for name, step in moved.items() if step == min(moved.values())]

    def lead(self, signal: str) -> int | None:
        """Steps by which the signal moved before the gradient norm, negative if it moved after it.

        None if the signal or the gradient norm never moved.
        """
        step = self.signals[signal]
        return None if step is None or self.grad_norm is None else self.grad_norm - step

    def __str__(self) -> str:
        """One line, such as `stable rank moved first, at step 75; 1700 steps before the gradient norm`."""
        if not self.first:
            return "nothing moved"
        lead = self.lead(self.first[0])
        if lead is None:
            against = "the gradient norm never did"
        else:
            against = f"{abs(lead)} steps {'before' if lead >= 0 else 'after'} the gradient norm"
        return f"{' and '.join(self.first)} moved first, at step {self.signals[self.first[0]]}; {against}"


def find_onsets(lines: Sequence[Mapping[str, float | None]], until: int | None = None) -> Onsets:
    """When each signal moved in the lines of a run's metrics.jsonl.

    until: the step of the collapse, beyond which nothing counts; None means the whole run.
    """
    steps = [int(line["iter"] or 0) for line in lines]
    keys = ("grad_norm", *(key for key, _ in SIGNALS.values()))
    logged = {key: [(step, line.get(key)) for step, line in zip(steps, lines, strict=True)] for key in keys}
    known = {key: [(step, value) for step, value in of if value is not None] for key, of in logged.items()}
    return onsets_of(known, until or steps[-1])


def onsets_of(logged: Mapping[str, Sequence[tuple[int, float]]], end: int) -> Onsets:
    """When each signal moved in a run that collapsed, or ended, at the step `end`.

    logged: by key of metrics.jsonl, of the gradient norm and of SIGNALS, the steps at which it was logged, with its
    values.
    """

    def series(key: str, direction: int) -> tuple[list[int], list[float]]:
        """The steps that count, and the logarithms of the values of `key`, higher being worse."""
        found = [(step, value) for step, value in logged[key] if end / 4 < step <= end]
        if key != "log_z":
            found = [(step, math.log(value)) for step, value in found if value > 0]
        return [step for step, _ in found], [direction * value for _, value in found]

    steps, norms = series("grad_norm", 1)
    signals = {name: onset(*series(key, direction)) for name, (key, direction) in SIGNALS.items()}
    return Onsets(signals, onset(steps[WINDOW - 1 :], medians(norms)))


def medians(values: Sequence[float]) -> list[float]:
    """The median of every WINDOW values that follow one another."""
    window = sorted(values[: WINDOW - 1])
    found = []
    for old, new in zip(values, values[WINDOW - 1 :], strict=False):
        insort(window, new)
        found.append((window[WINDOW // 2 - 1] + window[WINDOW // 2]) / 2)
        del window[bisect_left(window, old)]
    return found
