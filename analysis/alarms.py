"""Which rules announce a collapse, judged on runs that they were not built on.

The question: from what a run has logged up to step t, will it collapse within the next HORIZON = 1000 steps?

Protocol, written before any signal of the judged part was looked at. Known of that part were which runs collapse, when
and by which rule, which signals were logged how often, and what the report said of them.

Runs         All of GRIDS, ramp, constant, clients and clients_double. Of runs that logged the same losses, as far as
             the shorter goes, only the longest counts. A collapse and its step c are those of find_collapse, with the
             floors of the report; grids without floors have rules 1 and 2 alone.
Building     The learning-rate ramp (table2_small, attention_off, table3_small, controls, rivals, adaptive, ramp) with
             seeds 0 and 1, and the search for a late collapse (late_collapse, constant rates, seed 0).
Judging      Every other run, in four regimes. "ramp, new seeds": those seven grids with seeds 2 to 4. "no decay":
             late_seeds and late_controls. "constant rates": margin, constant and texts. "other programs": clients and
             clients_double, which are other models in other training loops.
Announcement A rule rings at step t when it may use no line after t, its condition holds, and it has not rung in the
             REST = 200 steps before. A ring announces a collapse at c if c − 1000 ≤ t < c. The lead is c − t of the
             first such ring. A collapse counts as announced when its lead is 200 steps or more.
Healthy      All steps of runs without a collapse, the first ones and those of stalled runs too, and those before
             c − 1000 in the others. A ring there is a false alarm. Nothing at or after c counts.
Threshold    Every rule is a number that must exceed a threshold. Of the thresholds with at most one false alarm in
             10 000 healthy steps of the building part, or one in 1000 or 100 000 for further tables, it gets the one
             that announces most collapses of that part; of several, the highest. No other number of a rule is looked
             at again after building.
The rule     That of stability/alarm.py, chosen among some hundred pairs and triples of conditions on the building part.
Rivals       ZClip's z-score of the gradient norm (arXiv 2504.02507, α = 0.97, with its clipping); the gradient norm
             over its median of 100 steps; the loss over its mean of 100 steps in standard deviations of these; the
             fall of attention's stable rank below its largest value so far and the alignment of the Jacobians (the
             paper's two); the largest attention logit; and the rule itself without its condition on the logit.
Intervals    95 %: exact (Clopper–Pearson) for a share of collapses, bootstrap over runs for leads and false alarms.
Aim          95 % of the judged collapses announced with at most one false alarm in 100 000 healthy steps.
"""

import functools
import math

import numpy as np
import pandas as pd
from scipy import stats

from analysis.runs import Run
from stability.alarm import REST, CollapseAlarm
from stability.collapse import WINDOW

HORIZON, AHEAD, LIMITS = 1000, 200, (1000, 10_000, 100_000)
RAMP = ("table2_small", "attention_off", "table3_small", "controls", "rivals", "adaptive", "ramp")
REGIMES = dict.fromkeys(RAMP, "ramp, new seeds") | {"late_seeds": "no decay", "late_controls": "no decay"}
REGIMES |= dict.fromkeys(("margin", "constant", "texts"), "constant rates")
REGIMES |= dict.fromkeys(("clients", "clients_double"), "other programs")


def parted(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs that do not repeat another, with the column "regime": "built on" or a value of REGIMES."""
    grids = runs["run"].map(lambda run: run.folder.parent.name)
    built = (grids == "late_collapse") | (grids.isin(RAMP) & (runs["seed"] < 2))
    runs = runs.assign(regime=grids.map(REGIMES).mask(built, "built on"))
    runs = runs.sort_values("steps", ascending=False, kind="stable")
    seen, new = [], []
    for losses in (run.steps["train/loss"].to_numpy() for run in runs["run"]):
        new.append(not any(np.allclose(losses, other[: len(losses)], rtol=1e-3) for other in seen))
        seen.append(losses)
    return runs[new].sort_index()


def z_scores(norms: np.ndarray, first: int = 25) -> np.ndarray:
    """ZClip's z-score of every gradient norm, against the mean and variance of the norms before as ZClip clips them."""
    mean, variance, z = norms[:first].mean(), norms[:first].var(), np.full(len(norms), math.nan)
    for step in range(first, len(norms)):
        deviation = variance**0.5
        z[step] = (norms[step] - mean) / (deviation + 1e-6)
        clipped = mean + 2.5**2 * deviation / z[step] if z[step] > 2.5 else norms[step]
        mean = 0.97 * mean + 0.03 * clipped
        variance = 0.97 * variance + 0.03 * (clipped - mean) ** 2
    return z


@functools.cache
def scores(run: Run) -> dict[str, np.ndarray]:
    """By rule: the number of each step, shape (steps,), that has to exceed a threshold; NaN: the rule is silent."""
    loss, norm, logit, rank, alignment = (
        run.steps.get(key, pd.Series(math.nan, run.steps.index))
        for key in ("train/loss", "grad_norm", "attention/max_logit", "srank/attention", "jacobian/alignment")
    )
    losses, alarm, rises = loss.rolling(WINDOW), CollapseAlarm(math.inf), []
    for step, *values in zip(loss.index, loss, logit, strict=True):
        alarm.update(step, dict(zip(("train/loss", "attention/max_logit"), values, strict=True)))
        rises.append(alarm.rise)
    found = {
        "attention saturated, loss no longer falls": rises,
        "loss no longer falls": (losses.mean() - losses.mean().cummin()) / losses.std(),
        "spike of the loss": (loss - losses.mean().shift()) / losses.std().shift(),
        "spike of the gradient norm (ZClip)": z_scores(norm.to_numpy()),
        "gradient norm ÷ its median": norm / norm.rolling(WINDOW).median().shift(),
        "fall of the stable rank": rank.cummax() / rank,
        "Jacobian alignment": alignment,
        "largest attention logit": logit,
    }
    return {rule: np.asarray(values, dtype=float) for rule, values in found.items()}


def rung(runs: pd.DataFrame, rule: str, threshold: float) -> pd.DataFrame:
    """A row a run: its "healthy" steps and "false" alarms; if it collapsed its "lead", which is 0 without a ring."""
    rows = []
    for run, steps, collapsed, end in zip(*(runs[name] for name in ("run", "steps", "collapsed", "end")), strict=True):
        end = end if collapsed else steps + 1
        sick = end - HORIZON if collapsed else end  # the first step that is not healthy
        on, rings = 1 + np.flatnonzero(scores(run)[rule][: end - 1] > threshold), []
        while len(on):
            rings.append(on[0])
            on = on[np.searchsorted(on, on[0] + REST) :]
        leads = [end - ring for ring in rings if ring >= sick]
        rows.append((max(sick - 1, 0), len(rings) - len(leads), max(leads, default=0) if collapsed else math.nan))
    return pd.DataFrame(rows, runs.index, columns=["healthy", "false", "lead"])


def chosen(built: pd.DataFrame, rule: str) -> dict[int, float]:
    """{healthy steps for one false alarm: threshold}, of 300 quantiles of the rule's scores; infinity: none will do."""
    values = np.concatenate([scores(run)[rule] for run in built["run"]])
    values = values[np.isfinite(values)]
    best = dict.fromkeys(LIMITS, (0, math.inf))
    for threshold in np.quantile(values, 1 - np.geomspace(0.5, 0.5 / len(values), 300)):
        found = rung(built, rule, threshold)
        for steps in LIMITS:
            if found["false"].sum() * steps <= found["healthy"].sum():
                best[steps] = max(best[steps], ((found["lead"] >= AHEAD).sum(), threshold))
    return {steps: threshold for steps, (_, threshold) in best.items()}


def counted(found: pd.DataFrame) -> dict[str, str]:
    """Cells of a table of `rung` runs, with intervals of 95 %."""
    leads = found["lead"].dropna()
    ahead, cells = leads[leads >= AHEAD], {"announced": f"{(leads >= AHEAD).sum()} of {len(leads)}"}
    if len(leads):
        low, high = stats.binomtest(len(ahead), len(leads)).proportion_ci()
        cells["announced"] += f", {len(ahead) / len(leads):.0%} [{low:.0%}, {high:.0%}]"
    cells["median lead"] = resampled((ahead,), np.median, "{:.0f}") if len(ahead) > 1 else "–"
    rate = resampled(
        (found["false"], found["healthy"]), lambda false, of, axis: 1e4 * false.sum(axis) / of.sum(axis), "{:.1f}"
    )
    return cells | {"false alarms in 10 000 healthy steps": rate}


def resampled(values: tuple, statistic, form: str) -> str:
    """The statistic and its interval of 95 % by bootstrap over runs (percentiles)."""
    of = stats.bootstrap(values, statistic, paired=True, method="percentile", n_resamples=2000, rng=0)
    low, middle, high = map(
        form.format, (of.confidence_interval.low, statistic(*values, axis=0), of.confidence_interval.high)
    )
    return f"{middle} [{low}, {high}]"
