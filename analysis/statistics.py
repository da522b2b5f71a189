"""The frame of runs, which every table and figure is made of, and how values of its arms are put into words.

`judged` makes the frame: a row a run, and as columns the fields of its configuration and what `measured` adds. Every
interval is Student's at 95 %. Every test is two-sided, and paired by seed: two runs of one seed begin with the same
weights and read the same batches.
"""

import functools
import math
from collections.abc import Iterable

import numpy as np
import pandas as pd
from scipy import stats

from analysis.runs import OFF, Run
from config import UserError
from stability.collapse import CLEARLY, SIGNALS, SPIKE, WINDOW, final_loss, find_collapse, onsets_of

# the paper's chain: a name for a link, its cause and its effect as logged
LINKS = {
    "stable rank, ‖J‖₂": ("srank/attention", "jacobian/sigma1"),
    "alignment, product": ("jacobian/alignment", "jacobian/product"),
    "product, gradient norm": ("jacobian/product", "grad_norm"),
}


@functools.cache
def measured(run: Run, floor: float = math.nan) -> dict:
    """A row of the frame, of a run whose model ends at the loss `floor` without attention. NaN: not known."""
    losses, norms, steps = run.steps["train/loss"].tolist(), run.steps["grad_norm"], len(run.steps)
    collapse = find_collapse(losses, norms.tolist(), None if math.isnan(floor) else floor, run.not_finite)
    end, loss = collapse.step if collapse else steps, final_loss(losses)
    val, srank = (run.series(key).iloc[-1:].sum(min_count=1) for key in ("val/loss", "srank/attention"))
    early_peak = norms.iloc[WINDOW : steps // 3].max() / norms.median()
    row = {
        "run": run,
        "arm": run.arm,
        "steps": steps,
        "floor": floor,
        "collapse": collapse,
        "collapsed": bool(collapse),
        "end": end,  # the step of the collapse, or the last one
        "fell_at": end if collapse else math.nan,
        "lr_multiple": run.steps["lr"][end] / run.config["lr"] if collapse else math.nan,  # there, of the paper's
        "loss": loss,  # mean of the last 100 training losses; infinity if one of them is not finite
        "capped_loss": min(loss, losses[0]),  # at most the initial one
        "below_floor": floor - loss,
        "rescued": not collapse and floor - loss >= CLEARLY,  # better than the same model without attention
        "val": val,
        "gap": val - loss,
        "srank": srank,
        "max_grad_norm": norms.iloc[1000 if steps > 1000 else 0 :].max(),  # after step 1000, or in a shorter run
        "early_peak": early_peak,  # largest gradient norm of the first third, over the median of the whole
        # whether it failed as the paper's do: no gradient norm of ten medians in the first third, a collapse later
        "late": bool(collapse) and end > steps // 3 and early_peak < SPIKE,
        "applications": 1000 * run.series("msign/matrices").sum() / steps,  # matrices replaced in 1000 steps
        "tokens_per_second": run.summary.get("tokens_per_second", math.nan),
        "peak_memory_gib": run.summary.get("peak_memory_gib", math.nan),
    }
    return run.config | row


def judged(runs: Iterable[Run], off: Iterable[Run] = (), same: str = "wandb_group") -> pd.DataFrame:
    """The frame of runs. The floor of a run is the final loss of the attention-off run, among `runs` or else in `off`,
    that has the same seed and the same value of the field `same`."""
    runs = list(runs)
    keys = {run: (run.config[same], run.config["seed"]) for run in (*off, *runs)}
    floors = {keys[run]: final_loss(run.steps["train/loss"].tolist()) for run in keys if run.arm == OFF}
    floors = [math.nan if run.arm == OFF else floors.get(keys[run], math.nan) for run in runs]
    frame = pd.DataFrame(map(measured, runs, floors))
    return frame.assign(verdict=[verdict(row) for row in frame.itertuples()])


def verdict(row) -> str:
    """One line of a row of the frame, such as `AdamW: collapsed at step 1450 (9.3x): ...`."""
    if row.collapsed:
        return f"{row.arm}: collapsed at step {row.end} ({row.lr_multiple:.1f}x): {row.collapse.why}"
    text = f"{row.arm}: no collapse, final loss {row.loss:.2f}"
    if math.isnan(row.floor):
        return text
    if row.rescued:
        return f"{text}, {row.below_floor:.2f} below attention-off: attention lives"
    return f"{text}, but not clearly below attention-off ({row.floor:.2f}): attention is of no use"


def moved(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with what moved first up to the collapse, or in the whole run if there is none (find_onsets)."""
    keys = ("grad_norm", *(key for key, _ in SIGNALS.values()))
    logged = [{key: list(run.series(key).items()) for key in keys} for run in runs["run"]]
    onsets = list(map(onsets_of, logged, runs["end"]))
    return runs.assign(onsets=onsets, first=[of.first or ["none"] for of in onsets])


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


def chain(row, least: int = 8) -> dict[str, float]:
    """Of a row of the frame, the medians of the chain's quantities, and the rank correlation (Spearman) of the sides of
    every link over the steps at which both were measured; NaN with fewer than `least`.

    As in collapse.find_onsets, what counts lies between the first quarter and the collapse or the end, and the gradient
    norm counts by the median of its last 100 steps.
    """
    keys = dict.fromkeys(key for sides in LINKS.values() for key in sides)
    values = row.run.steps.reindex(columns=list(keys)).replace(math.inf, math.nan)
    values["grad_norm"] = values["grad_norm"].rolling(WINDOW, min_periods=1).median()
    values = values[(values.index > row.end / 4) & (values.index <= row.end)]
    links = {name: values[a].corr(values[b], "spearman", min_periods=least) for name, (a, b) in LINKS.items()}
    return values.median().to_dict() | links


def said(values: pd.Series, digits: int = 2) -> str:
    """mean ± half of the interval, of the values that are not NaN; a dash where there is none."""
    values = values.dropna()
    numbers = values.mean(), values.sem() * stats.t.ppf(0.975, len(values) - 1)
    return " ± ".join(f"{number:.{digits}f}" for number in numbers if not math.isnan(number)) or "–"


def spread(values: pd.Series, digits: int = 2) -> str:
    """mean [min, max] of the values that are not NaN, or the one value there is; a dash where there is none."""
    values = values.dropna()
    low, middle, high = (f"{value:.{digits}f}" for value in (values.min(), values.mean(), values.max()))
    return "–" if values.empty else middle if len(values) == 1 else f"{middle} [{low}, {high}]"


def p_text(p: float) -> str:
    return "–" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def differences(runs: pd.DataFrame, other: str, value: str = "loss") -> pd.Series:
    """By how much the value of each run differs from that of the arm `other` with its seed; NaN for that arm itself."""
    if other not in set(runs["arm"]):
        raise UserError(f"{other}: no such arm; there are {', '.join(runs['arm'].unique())}")
    values = runs[runs["arm"] == other].set_index("seed")[value]
    return (runs[value] - runs["seed"].map(values)).where(runs["arm"] != other)


def p_value(differences: pd.Series) -> float:
    """Of a t-test of differences, those that are not NaN, against 0; NaN where all are equal."""
    known = differences.dropna()
    return math.nan if known.nunique() < 2 else float(stats.ttest_1samp(known, 0.0).pvalue)


def holm(ps: pd.Series) -> pd.Series:
    """p-values adjusted for being n (Holm): the smallest times n, the next n − 1, …, none below the one before."""
    ordered = ps.fillna(1.0).sort_values()
    return (ordered * np.arange(len(ordered), 0, -1)).cummax().clip(upper=1.0)
