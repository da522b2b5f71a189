"""Runs by arm, what is measured of one run, and how arms are compared.

Every interval is Student's at 95 %. Every test is two-sided, and paired by seed: two runs of one seed begin with the
same weights and read the same batches.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from analysis.runs import Run, judged
from stability.collapse import SPIKE, WINDOW

# the paper's chain: a name for a link, its cause and its effect as logged
LINKS = {
    "stable rank, ‖J‖₂": ("srank/attention", "jacobian/sigma1"),
    "alignment, product": ("jacobian/alignment", "jacobian/product"),
    "product, gradient norm": ("jacobian/product", "grad_norm"),
}


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed alone."""

    name: str
    runs: list[Run]

    def values(self, value: Callable[[Run], float]) -> list[float]:
        return [value(run) for run in self.runs]

    def by_seed(self, value: Callable[[Run], float]) -> dict[int, float]:
        return {run.config["seed"]: value(run) for run in self.runs}

    @property
    def collapsed(self) -> list[Run]:
        return [run for run in self.runs if run.collapse]


def grouped(runs: Sequence[Run], name: Callable[[Run], str] = lambda run: run.arm) -> list[Arm]:
    """The runs by arm, in the order of the first of each."""
    return [Arm(one, [run for run in runs if name(run) == one]) for one in dict.fromkeys(map(name, runs))]


def arms(runs: Sequence[Run], name: Callable[[Run], str] = lambda run: run.arm, off: Sequence[Run] = ()) -> list[Arm]:
    """The runs by arm. Their floors are the attention-off runs, of `runs` or else `off`, of the same seed and rate."""
    return grouped(judged(runs, off, same="lr_scale"), name)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval (Student's t); NaN of fewer than two."""
    n = len(values)
    return float(np.mean(values)), float(stats.sem(values) * stats.t.ppf(0.975, n - 1)) if n > 1 else math.nan


def said(values: Sequence[float], digits: int = 2) -> str:
    """mean ± half of the interval, of the values that are not NaN; a dash where there is none."""
    values = [value for value in values if not math.isnan(value)]
    return " ± ".join(f"{x:.{digits}f}" for x in (interval(values) if values else ()) if not math.isnan(x)) or "–"


def p_text(p: float) -> str:
    return "–" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> tuple[list[float], float]:
    """Differences a − b over the seeds that both have, and the p-value of a paired t-test; NaN where all are equal."""
    differences = (pd.Series(a, dtype=float) - pd.Series(b, dtype=float)).dropna().tolist()
    if len(differences) < 2 or np.ptp(differences) == 0:
        return differences, math.nan
    return differences, float(stats.ttest_1samp(differences, 0.0).pvalue)


def holm(ps: Mapping[str, float]) -> dict[str, float]:
    """p-values adjusted for being n (Holm): the smallest times n, the next n − 1, …, none below the one before."""
    ordered = pd.Series(ps, dtype=float).fillna(1.0).sort_values()
    return (ordered * np.arange(len(ordered), 0, -1)).cummax().clip(upper=1.0).to_dict()


def fisher(k: int, n: int, of: int, m: int) -> float:
    """p-value of k of n against `of` of m (Fisher's exact test)."""
    return float(stats.fisher_exact([[k, n - k], [of, m - of]]).pvalue)


def geometric_mean(values: np.ndarray) -> float:
    """exp(mean log) of the positive values, NaN when there are none."""
    positive = values[values > 0]
    return float(stats.gmean(positive)) if len(positive) else math.nan


loss = Run.final_loss


def at_the_end(key: str) -> Callable[[Run], float]:
    return lambda run: run.series(key).iloc[-1]


final_val = at_the_end("val/loss")
srank = at_the_end("srank/attention")  # of attention's matrices, geometric mean


def gap(run: Run) -> float:
    """Validation loss at the end minus final training loss."""
    return final_val(run) - loss(run)


def capped_loss(run: Run) -> float:
    """Final loss, at most the initial one."""
    return min(loss(run), run.steps["train/loss"][1])


def applications(run: Run) -> float:
    """Matrices that were replaced, in a thousand steps."""
    return 1000 * run.series("msign/matrices").sum() / len(run.steps)


def fluctuation(run: Run, window: int = 100) -> float:
    """Standard deviation of log ‖∇‖₂ within windows, median over the windows after the first quarter."""
    logs = np.log(run.steps["grad_norm"].clip(lower=1e-30).to_numpy())[len(run.steps) // 4 :]
    return float(np.median(logs[: len(logs) // window * window].reshape(-1, window).std(1, ddof=1)))


def spikes(run: Run, window: int = 1000, sigmas: float = 7.0) -> float:
    """Gradient norms in a thousand that are 7 σ above the mean of the thousand before (OLMo 2, arXiv 2501.00656)."""
    norms = run.steps["grad_norm"].to_numpy()
    before = np.lib.stride_tricks.sliding_window_view(norms[:-1], window)
    with np.errstate(invalid="ignore"):
        limit = before.mean(1) + sigmas * before.std(1)
    return float(1000 * np.mean(~(norms[window:] < limit)))


def application_cost(run: Run, after: int = 10, before: int = 20) -> float:
    """Mean training loss of the 10 steps after an application above that of the 20 before it, after the first third."""
    losses, period = run.steps["train/loss"].to_numpy(), run.config["msign_period"]
    if not period:
        return math.nan
    steps = np.arange(period, len(losses) - after + 1, period)
    steps = steps[(steps > len(losses) // 3) & (steps >= before)]
    return float(np.mean([losses[s : s + after].mean() - losses[s - before : s].mean() for s in steps]))


def early_peak(run: Run) -> float:
    """Largest gradient norm of the first third of a run, over the median of the whole."""
    norms = run.steps["grad_norm"]
    return norms[WINDOW : len(norms) // 3].max() / norms.median()


def late(run: Run) -> bool:
    """Whether a run failed as the paper's do: no gradient norm of ten medians in the first third, a collapse later."""
    return bool(run.collapse and run.end > len(run.steps) // 3 and early_peak(run) < SPIKE)


def before_the_end(run: Run, key: str) -> pd.Series:
    """Values of `key` between the first quarter and the collapse or the end: what collapse.find_onsets looks at."""
    values = run.series(key)
    return values[(values.index > run.end / 4) & (values.index <= run.end)]


def link(run: Run, cause: str, effect: str, least: int = 8) -> float:
    """Rank correlation (Spearman) of two logged values over the steps `before_the_end` at which both were measured; NaN
    with fewer than `least`. The gradient norm counts by the median of its last 100 steps."""
    both = pd.concat([before_the_end(run, key) for key in (cause, effect)], axis=1, join="inner", keys=(cause, effect))
    if effect == "grad_norm":
        both[effect] = run.steps[effect].replace(math.inf, math.nan).rolling(WINDOW, min_periods=1).median()
    return float(stats.spearmanr(both[cause], both[effect]).statistic) if len(both) >= least else math.nan
