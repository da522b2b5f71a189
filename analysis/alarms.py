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
The rule     That of stability/alarm.py, chosen on the building part among some two thousand single conditions, pairs
             and triples.
Rivals       ZClip's z-score of the gradient norm (arXiv 2504.02507, α = 0.97, with its clipping); the gradient norm
             over its median of 100 steps; the loss over its mean of 100 steps in standard deviations of these; the
             fall of attention's stable rank below its largest value so far and the alignment of the Jacobians (the
             paper's two); the largest attention logit; and the rule itself without its condition on the logit.
Intervals    95 %: exact (Clopper–Pearson) for a share of collapses, bootstrap over runs for leads and false alarms.
Aim          95 % of the judged collapses announced with at most one false alarm in 100 000 healthy steps.

Added after the building and before the judging: one false alarm in 1000 healthy steps, and the last of the rivals.
Added after the judging, for both parts alike: the share that a rule announces by chance, and the table by regime.
"""

import functools
import math

import numpy as np
import pandas as pd
from scipy import stats

from analysis.runs import Run
from stability.alarm import HELD, LOGIT, REST
from stability.collapse import WINDOW

HORIZON, AHEAD, LIMITS = 1000, 200, (1000, 10_000, 100_000)
RAMP = ("table2_small", "attention_off", "table3_small", "controls", "rivals", "adaptive", "ramp")
REGIMES = dict.fromkeys(RAMP, "ramp, new seeds") | dict.fromkeys(("margin", "constant", "texts"), "constant rates")
REGIMES |= dict.fromkeys(("late_seeds", "late_controls"), "no decay")
REGIMES |= dict.fromkeys(("clients", "clients_double"), "other programs")
RULE = "saturated, and the loss no longer falls"


def parted(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs that do not repeat another (1500 steps tell), with their "regime": "built on" or one of REGIMES."""
    grids = runs["run"].map(lambda run: run.folder.parent.name)
    built = (grids == "late_collapse") | (grids.isin(RAMP) & (runs["seed"] < 2))
    begin = runs["run"].map(lambda run: tuple(run.steps["train/loss"][:1500]))
    runs = runs.assign(regime=grids.map(REGIMES).mask(built, "built on"), begin=begin)
    return runs.sort_values("steps", kind="stable").drop_duplicates("begin", keep="last").sort_index()


def z_scores(norms: list[float], first: int = 25) -> list[float]:
    """ZClip's z-score of every gradient norm, against the mean and variance of the norms before as ZClip clips them."""
    mean, variance, z = float(np.mean(norms[:first])), float(np.var(norms[:first])), [math.nan] * min(first, len(norms))
    for norm in norms[first:]:
        deviation = variance**0.5
        z.append((norm - mean) / (deviation + 1e-6))
        clipped = mean + 2.5**2 * deviation / z[-1] if z[-1] > 2.5 else norm
        mean = 0.97 * mean + 0.03 * clipped
        variance = 0.97 * variance + 0.03 * (clipped - mean) ** 2
    return z


def saturated(logit: pd.Series) -> pd.Series:
    """Condition 1 of stability/alarm.py at every step: whether the largest logit was above LOGIT for HELD steps."""
    measured = logit[np.isfinite(logit)]
    high, steps = measured > LOGIT, measured.index.to_series().astype(float)
    since = steps.where(high & ~high.shift(fill_value=False)).ffill().where(high, math.inf)
    return logit.index - since.reindex(logit.index, method="ffill") >= HELD


@functools.cache
def scores(run: Run) -> dict[str, np.ndarray]:
    """By rule: the number of each step, shape (steps,), that has to exceed a threshold; NaN: the rule is silent."""
    keys = ["train/loss", "attention/max_logit", "grad_norm", "srank/attention", "jacobian/alignment"]
    loss, logit, norm, rank, alignment = (of for _, of in run.steps.reindex(columns=keys).items())
    mean, deviation = loss.rolling(WINDOW).mean(), loss.rolling(WINDOW).std()
    rises = (mean - mean.cummin()) / deviation
    found = {
        RULE: rises.where(saturated(logit)),
        "the loss no longer falls": rises,
        "spike of the loss": (loss - mean.shift()) / deviation.shift(),
        "spike of the gradient norm (ZClip)": z_scores(norm.tolist()),
        "gradient norm ÷ its median": norm / norm.rolling(WINDOW).median().shift(),
        "fall of the stable rank": rank.cummax() / rank,
        "Jacobian alignment": alignment,
        "largest attention logit": logit,
    }
    return {rule: np.asarray(values, dtype=float) for rule, values in found.items()}


class Bells:
    """Where a rule rings in the runs, at any threshold.

    The scores of all runs, of each up to its collapse or its end, stand in one array, with REST steps of NaN before
    each run: no ring silences a step of the next run.
    """

    def __init__(self, runs: pd.DataFrame, rule: str):
        self.collapsed, silence = runs["collapsed"].to_numpy(), np.full(REST, math.nan)
        self.ends = runs["end"].to_numpy() + ~self.collapsed  # the step of the collapse, or the one after the last
        self.sick = self.ends - HORIZON * self.collapsed  # the first step that is not healthy
        self.healthy = np.maximum(self.sick - 1, 0)
        parts = [(silence, scores(run)[rule][: end - 1]) for run, end in zip(runs["run"], self.ends, strict=True)]
        self.scores = np.concatenate(sum(parts, ()))
        self.starts = np.cumsum(REST + self.ends - 1) - self.ends  # the place of step 0

    def rung(self, threshold: float) -> tuple[np.ndarray, np.ndarray]:
        """By run: the number of false alarms, and the lead of a collapse: 0 without a ring, NaN without a collapse."""
        on, place, rings = np.flatnonzero(self.scores > threshold), 0, []
        while place < len(on):
            rings.append(on[place])
            place = np.searchsorted(on, on[place] + REST)
        rings = np.array(rings, dtype=int)
        of = np.searchsorted(self.starts, rings) - 1
        steps = rings - self.starts[of]
        early, leads = steps < self.sick[of], np.where(self.collapsed, 0.0, math.nan)
        np.fmax.at(leads, of[~early], (self.ends[of] - steps)[~early])
        return np.bincount(of[early], minlength=len(leads)), leads


def judged(runs: pd.DataFrame) -> pd.DataFrame:
    """By rule and for each of LIMITS, the runs with their "healthy" steps and "false" alarms, the "lead" of a collapse
    and the "window", the number of steps at which a ring announces the collapse in time. The rule has the best of 300
    quantiles of its scores as its "threshold", or infinity if none will do."""
    built, parts = runs[runs["regime"] == "built on"], []
    for rule in scores(runs["run"].iloc[0]):
        values = np.concatenate([scores(run)[rule] for run in built["run"]])
        values, best = values[np.isfinite(values)], dict.fromkeys(LIMITS, (0, math.inf))
        bells = Bells(built, rule)
        for threshold in np.quantile(values, 1 - np.geomspace(0.5, 0.5 / len(values), 300))[::-1]:
            false, leads = bells.rung(threshold)
            allowed = [limit for limit in LIMITS if false.sum() * limit <= bells.healthy.sum()]
            if not allowed:
                break  # a lower threshold gives no fewer false alarms
            best |= {limit: max(best[limit], ((leads >= AHEAD).sum(), threshold)) for limit in allowed}
        bells = Bells(runs, rule)
        windows = bells.ends - np.maximum(bells.sick, 1) + 1 - AHEAD
        for limit, (_, threshold) in best.items():
            found = dict(zip(("false", "lead"), bells.rung(threshold), strict=True))
            found |= {"healthy": bells.healthy, "window": windows, "rule": rule, "limit": limit, "threshold": threshold}
            parts.append(runs[["regime", "wandb_group", "lr_scale", "collapse", "end"]].assign(**found))
    return pd.concat(parts).sort_values("limit", kind="stable")


def resampled(form: str, statistic, *values: pd.Series) -> str:
    """The statistic and its interval of 95 %, by bootstrap over runs (percentiles)."""
    if len(values[0]) < 2:
        return "–"
    low, high = stats.bootstrap(
        values, statistic, paired=True, method="percentile", n_resamples=2000, rng=0
    ).confidence_interval
    return f"{form} [{form}, {form}]".format(statistic(*map(np.asarray, values), axis=-1), low, high)


def rate(false, healthy, axis: int):
    return 1e4 * false.sum(axis) / healthy.sum(axis)


def alarms_table(found: pd.DataFrame, by: str) -> pd.DataFrame:
    """A row per limit and rule, or regime: collapses announced, their median lead, and false alarms. By chance: by a
    rule that rings at random, in all steps alike, as often as this one does in healthy steps."""
    rows = []
    for (limit, name, threshold), of in found.groupby(["limit", by, "threshold"], sort=False):
        leads = of["lead"].dropna()
        ahead = leads[leads >= AHEAD]
        windows = of.loc[leads.index, "window"]
        interval = stats.binomtest(len(ahead), len(leads)).proportion_ci()
        rows.append({
            "chosen for a false alarm in": f"{limit:,} steps".replace(",", " "), by: name,
            "threshold": "none will do" if math.isinf(threshold) else f"{threshold:.3g}",
            "announced": f"{len(ahead)} of {len(leads)}",
            "share": f"{len(ahead) / len(leads):.0%} [{interval.low:.0%}, {interval.high:.0%}]",
            "share by chance": f"{(1 - np.exp(-of['false'].sum() / of['healthy'].sum() * windows)).mean():.0%}",
            "median lead": resampled("{:.0f}", np.median, ahead),
            "false alarms in 10 000 healthy steps": resampled("{:.1f}", rate, of["false"], of["healthy"]),
        })  # fmt: skip
    return pd.DataFrame(rows)
