"""Tables of recorded runs: each function returns a data frame of text, and `markdown` writes it down.

Most tables have a row an arm, and their columns are functions from an arm to a cell.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from analysis import statistics
from analysis.runs import OFF, Run, judged
from analysis.statistics import Arm, applications, arms, gap, grouped, loss, p_text, paired, said, srank
from config import UserError
from stability.collapse import SIGNALS

Value = Callable[[Run], float]
Cell = Callable[[Arm], str]
NORM = "largest gradient norm after step 1000"
THEOREMS = {  # a theorem: what it states, and what else is said of its measurements
    "4.2": ("product of the Jacobians above its bound", "at {count[holds]:.0f} measurements of the Jacobians"),
    "4.4": ("‖W‖₂ = ‖W‖_F / √srank(W), every matrix", "largest relative error {max[error]:.0e}"),
    "4.5": ("attention's Jacobian below its bound", "empty (χ = 1) in {mean[vacuous]:.0%} of blocks"),
    "4.6": ("MLP's Jacobian below its bound", ""),
    "4.8": ("gradient of W_down above its bound", "smallest alignment a = {min[a]:.0e}; "
            "Jacobian ill-conditioned in {mean[ill_conditioned]:.0%} of blocks"),
    "4.9": ("sum of squared gradients above its bound", ""),
    "4.10": ("attention gradients of rank ≤ hidden and co-hidden states'", "empty (full rank anyway) in "
             "{mean[vacuous]:.0%} of blocks; true of stable ranks in {mean[srank_holds]:.0%}"),
    "4.12": ("condition for a falling stable rank", "the stable rank falls in {mean[falls]:.0%} of matrices, "
             "as the first-order formula says in {mean[agrees]:.0%}"),
}  # fmt: skip


def markdown(table: pd.DataFrame) -> str:
    return table.to_markdown(index=False, disable_numparse=True) + "\n"


def rows_by_arm(found: Sequence[Arm], columns: Mapping[str, Cell], **first: str) -> pd.DataFrame:
    """A row per arm: `first`, its name, its number of runs, and these columns."""
    heads = {"arm": lambda arm: arm.name, "n": lambda arm: str(len(arm.runs))} | columns
    return pd.DataFrame(first | {head: cell(arm) for head, cell in heads.items()} for arm in found)


def mean(value: Value, digits: int = 2) -> Cell:
    """A column: the mean of a value over an arm's runs, with its interval."""
    return lambda arm: said(arm.values(value), digits)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """mean [min, max] of the values that are not NaN, or the one value there is; a dash where there is none."""
    values = pd.Series(values, dtype=float).dropna()
    low, middle, high = (f"{value:.{digits}f}" for value in (values.min(), values.mean(), values.max()))
    return "–" if values.empty else middle if len(values) == 1 else f"{middle} [{low}, {high}]"


def collapsed(arm: Arm) -> str:
    return f"{len(arm.collapsed)} of {len(arm.runs)}"


FELL = {"collapsed": collapsed, "at lr multiple": mean(Run.lr_multiple, 1)}
ENDS = {"final loss": mean(loss)}


def against(found: Sequence[Arm], other: str, value: Value = loss) -> dict[str, Cell]:
    """Two columns: by how much a value differs from that of the arm `other`, paired by seed, and the p-value, adjusted
    for all rows (Holm)."""
    by_arm = {arm.name: arm.by_seed(value) for arm in found}
    if other not in by_arm:
        raise UserError(f"{other}: no such arm; there are {', '.join(by_arm)}")
    tests = {name: paired(values, by_arm[other]) for name, values in by_arm.items() if name != other}
    ps = statistics.holm({name: p for name, (_, p) in tests.items()}) | {other: math.nan}
    texts = {name: said(differences) for name, (differences, _) in tests.items()} | {other: "–"}
    return {f"against {other}": lambda arm: texts[arm.name], "p": lambda arm: p_text(ps[arm.name])}


def overview_table(runs: Sequence[Run]) -> pd.DataFrame:
    """A row per arm: seeds, collapses and where, final losses, largest gradient norm; mean [min, max]."""
    values = {
        "at step": (lambda run: run.end if run.collapse else math.nan, 0), "at lr multiple": (Run.lr_multiple, 1),
        "final loss": (loss, 2), "below attention-off": (Run.below_floor, 2), NORM: (Run.max_grad_norm, 1),
    }  # fmt: skip
    columns = {head: lambda arm, of=of: spread(arm.values(of[0]), of[1]) for head, of in values.items()}
    return rows_by_arm(grouped(judged(runs)), {"collapsed": collapsed} | columns).rename(columns={"n": "seeds"})


def arms_table(found: Sequence[Arm], baseline: str = "AdamW", more: Mapping[str, Cell] | None = None) -> pd.DataFrame:
    """A row per arm: collapses (with Fisher's exact test against the baseline), where, largest gradient norm, final
    loss, its differences from the baseline's and attention-off's, and p-values of the first. `more`: more columns."""
    differences = against(found, baseline)
    base = next(arm for arm in found if arm.name == baseline)

    def fell(arm: Arm) -> str:
        p = statistics.fisher(len(arm.collapsed), len(arm.runs), len(base.collapsed), len(base.runs))
        return collapsed(arm) + ("" if arm is base else f" (p {p_text(p)})")

    def norms(arm: Arm) -> str:
        of = arm.values(Run.max_grad_norm)
        return f"{stats.gmean(of):.3g} [{min(of):.3g}, {max(of):.3g}]"

    columns = FELL | {"collapsed": fell, NORM: norms} | ENDS | differences
    if any(arm.name == OFF for arm in found):
        columns |= against(found, OFF) | {"p": differences["p"]}
    return rows_by_arm(found, columns | (more or {}))


def relative_times(runs: Sequence[Run], base: Callable[[Run], bool]) -> dict[Path, float]:
    """Time of each run relative to the median of those which `base` picks, by folder."""
    rate = np.median([run.summary["tokens_per_second"] for run in runs if base(run)])
    return {run.folder: rate / run.summary["tokens_per_second"] for run in runs}


def known(values: Mapping[Path, float]) -> Cell:
    """A column of values by folder; a dash for runs that are not in it."""
    return mean(lambda run: values.get(run.folder, math.nan))


def costs(runs: Sequence[Run], baseline: str = "AdamW") -> dict[str, Cell]:
    """Columns for arms_table: time relative to the baseline's in `runs`, which are of one grid, and peak memory."""
    times = relative_times(runs, lambda run: run.arm == baseline)
    return {
        "time": known(times),
        "peak memory, GiB": known({run.folder: run.summary["peak_memory_gib"] for run in runs}),
    }


def period_times(runs: Sequence[Run]) -> dict[Path, float]:
    """Time relative to the longest period's, of the runs of its revision: others were made on a busier machine."""
    longest = max(runs, key=lambda run: run.config["msign_period"])
    same = [run for run in runs if run.code == longest.code]
    return relative_times(same, lambda run: run.config["msign_period"] == longest.config["msign_period"])


def fitted_r(runs: Sequence[Run]) -> float:
    """r of Eq 18, T(P) = T(∞) (1 + r / P), fitted by least squares, in steps an application."""
    times = period_times(runs)
    inverse = np.array([1 / run.config["msign_period"] for run in runs if run.folder in times])
    return float(inverse @ (np.array(list(times.values())) - 1) / (inverse @ inverse))


def period_table(runs: Sequence[Run], off: Sequence[Run] = ()) -> pd.DataFrame:
    """A row per period P: collapses, final loss, and time relative to that of the longest period."""
    found = arms(runs, lambda run: str(run.config["msign_period"]), off)
    return rows_by_arm(found, FELL | ENDS | {"time": known(period_times(runs))}).rename(columns={"arm": "P"})


def threshold_table(found: Sequence[Arm], periods: Sequence[Arm]) -> pd.DataFrame:
    """A row per arm of `found`: how many matrices it replaced, its collapses and final loss, and the difference from
    that arm of `periods` which replaced nearly as many (the least ratio), with its p-value as it is."""

    def replaced(arm: Arm) -> float:
        return max(1e-9, float(np.mean(arm.values(applications))))

    near = {arm.name: min(periods, key=lambda other: abs(math.log(replaced(other) / replaced(arm)))) for arm in found}
    tests = {arm.name: paired(arm.by_seed(loss), near[arm.name].by_seed(loss)) for arm in found}
    columns = {
        "matrices replaced in 1000 steps": mean(applications, 0), "collapsed": collapsed, **ENDS,
        "fixed P of nearly as many": lambda arm: f"{near[arm.name].name}: {replaced(near[arm.name]):.0f}",
        "its collapses": lambda arm: collapsed(near[arm.name]),
        "against it": lambda arm: said(tests[arm.name][0]), "p": lambda arm: p_text(tests[arm.name][1]),
    }  # fmt: skip
    return rows_by_arm(found, columns)


def first_table(found: Sequence[Arm]) -> pd.DataFrame:
    """A row per arm: in how many of its runs each signal was the first to move (collapse.find_onsets)."""

    def counted(name: str) -> Cell:
        return lambda arm: str(sum(name in (run.onsets.first or ["none"]) for run in arm.runs) or "–")

    return rows_by_arm(found, {name: counted(name) for name in (*SIGNALS, "none")})


def onsets_table(runs: Sequence[Run]) -> pd.DataFrame:
    """A row per run that logged a signal: the step at which each of collapse.SIGNALS moved, and its lead over the
    gradient norm in steps when both moved; the first to move in bold."""

    def cell(run: Run, name: str) -> str:
        step, lead = run.onsets.signals[name], run.onsets.lead(name)
        if step is None:
            return "not logged" if run.series(SIGNALS[name][0]).empty else "–"
        text = f"{step}" + ("" if lead is None else f" ({lead:+d})")
        return f"**{text}**" if name in run.onsets.first else text

    logged = [run for run in judged(runs) if not all(run.series(key).empty for key, _ in SIGNALS.values())]
    rows = {"run": [run.name for run in logged], "collapse": [str(run.end) if run.collapse else "–" for run in logged]}
    rows |= {name: [cell(run, name) for run in logged] for name in SIGNALS}
    return pd.DataFrame(rows | {"gradient norm": [str(run.onsets.grad_norm or "–") for run in logged]})


def ledger_table(regimes: Mapping[str, Sequence[Run]]) -> pd.DataFrame:
    """A row per regime and arm: collapses, medians of the chain's quantities `before_the_end`, and the rank correlation
    of every link's two sides over the measurements of one run; means over seeds."""

    def median(key: str) -> Value:
        return lambda run: statistics.before_the_end(run, key).median()

    columns = {
        "collapsed": collapsed, "stable rank": mean(median("srank/attention"), 1),
        "‖J(ℓ)‖₂": mean(median("jacobian/sigma1"), 1), "alignment": mean(median("jacobian/alignment"), 3),
        "log₁₀ product": mean(lambda run: np.log10(median("jacobian/product")(run)), 1),
    }  # fmt: skip
    for name, sides in statistics.LINKS.items():
        columns[f"ρ({name})"] = mean(lambda run, sides=sides: statistics.link(run, *sides))
    return pd.concat(rows_by_arm(arms(runs), columns, regime=regime) for regime, runs in regimes.items())


def margin_table(found: Sequence[Arm]) -> pd.DataFrame:
    """A row per arm whose runs differ in rate and seed: learning-rate sensitivity (arXiv 2309.14322: mean over rates of
    min(final, initial loss) − best final loss), best loss and its rate, largest rate below which no run collapsed."""
    rows = []
    for arm in found:
        runs = [
            (run.config["lr_scale"], run.config["seed"], statistics.capped_loss(run), bool(run.collapse))
            for run in arm.runs
        ]
        frame = pd.DataFrame(runs, columns=["rate", "seed", "loss", "fell"])
        losses = frame.pivot(index="seed", columns="rate", values="loss").dropna()
        safe = losses.columns[~frame.groupby("rate")["fell"].any().cummax()]
        rows.append({
            "arm": arm.name, "n": f"{losses.shape[1]} × {len(losses)}",
            "sensitivity, nats": said(losses.sub(losses.min(axis=1), axis=0).mean(axis=1), 3),
            "best loss": said(losses.min(axis=1)), "at × lr": f"{losses.mean().idxmin():g}",
            "no collapse up to × lr": f"{safe[-1]:g}" if len(safe) else f"below {losses.columns[0]:g}",
        })  # fmt: skip
    return pd.DataFrame(rows)


def late_table(found: Sequence[Arm]) -> pd.DataFrame:
    """A row per run: did it collapse, was training smooth until then, what moved first."""
    return pd.DataFrame({
        "arm": arm.name, "seed": str(run.config["seed"]), "steps": str(len(run.steps)), "final loss": said([loss(run)]),
        "collapsed at": str(run.end) if run.collapse else "–",
        "largest gradient norm ÷ median, first third": f"{statistics.early_peak(run):.1f}",
        "moved first": str(run.onsets), "late": "yes" if statistics.late(run) else "no",
    } for arm in found for run in arm.runs)  # fmt: skip


def calm_table(found: Sequence[Arm], baseline: str = "AdamW") -> pd.DataFrame:
    """A row per arm: how much gradient norms fluctuate, with the p-value of the difference from the baseline's, how
    often they spike, and what an application costs."""
    columns = {
        "std of log gradient norm in 100 steps": mean(statistics.fluctuation),
        "p": against(found, baseline, statistics.fluctuation)["p"], "spikes in 1000 steps": mean(statistics.spikes, 1),
        "loss after an application": mean(statistics.application_cost, 3),
    }  # fmt: skip
    return rows_by_arm(found, columns)


def by_text(runs: Sequence[Run]) -> list[Arm]:
    return grouped(runs, lambda run: run.config["dataset"])


def texts_table(runs: Sequence[Run]) -> pd.DataFrame:
    """A row per text and arm: training and validation loss, their difference, the stable rank at the end."""
    columns = {"training loss": mean(loss), "validation loss": mean(statistics.final_val), "difference": mean(gap)}
    columns |= {"stable rank": mean(srank, 1)}
    return pd.concat(rows_by_arm(arms(text.runs), columns, text=text.name) for text in by_text(runs))


def ranks_table(grids: Mapping[str, Sequence[Run]]) -> pd.DataFrame:
    """A row per grid and text of three runs or more, but those whose attention is zero: the rank correlation (Spearman)
    of attention's stable rank at the end with the gap and with the validation loss."""
    rows = []
    for grid, text in ((grid, text) for grid, runs in grids.items() for text in by_text(runs)):
        of = [run for run in text.runs if not run.series("srank/attention").empty]
        if len(of) >= 3:
            tests = [stats.spearmanr([*map(srank, of)], [*map(value, of)]) for value in (gap, statistics.final_val)]
            cells = [cell for test in tests for cell in (f"{test.statistic:.2f}", p_text(test.pvalue))]
            rows.append([grid, text.name, str(len(of)), *cells])
    heads = ["grid", "text", "n", "with the difference", "p", "with the validation loss", "p"]
    return pd.DataFrame(rows, columns=heads)


def theory_table(run: Run) -> pd.DataFrame:
    """A row per theorem, over all measurements of a run: where it holds, its looseness in powers of ten (mean [min,
    max]), where it is empty. Raises UserError if the run did not log theory/…."""
    if "theory/4.4/error" not in run.steps:
        raise UserError(f"{run.folder}: did not log both sides of the theorems (theory_every)")
    ratio = run.series("jacobian/product") / run.series("jacobian/bound_4_2").replace(0, math.nan)
    above = np.log10(ratio[ratio > 0])
    measured, bound = (run.by_layer(f"theory/4.8/log10_{side}")[1].ravel() for side in ("measured", "bound"))
    rows = []
    for name, (statement, remark) in THEOREMS.items():
        keys = [key for key in run.steps if key.startswith(f"theory/{name}/")]
        of = pd.DataFrame({key.rsplit("/")[-1]: run.series(key) for key in keys})
        if name == "4.2":
            of = pd.DataFrame({"holds": above >= 0, "looseness": above})
        elif name == "4.9":
            of["looseness"] = of["log10_measured"] - of["log10_bound"]
        loose = measured - bound if name == "4.8" else of.get("looseness", [])
        holds = "identity" if name == "4.4" else f"{of['holds'].mean():.0%}"
        if len(of):  # the Jacobians have a cadence of their own: without a measurement nothing is said of Theorem 4.2
            parts = of.astype(float).agg(["mean", "min", "max", "count"]).T
            rows.append([name, statement, holds, spread(loose, 1), remark.format(**parts)])
    return pd.DataFrame(rows, columns=["theorem", "statement", "holds in", "looseness, powers of ten", ""])
