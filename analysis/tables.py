"""Tables of recorded runs: each function returns a data frame of text, and `markdown` writes it down.

Most tables have a row an arm, and their columns are functions from an arm to a cell.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from analysis.runs import OFF, Run, judged
from analysis.statistics import (
    LINKS,
    Arm,
    application_cost,
    applications,
    arms,
    before_the_end,
    early_peak,
    final_val,
    fisher,
    fluctuation,
    gap,
    grouped,
    holm,
    late,
    link,
    loss,
    p_text,
    paired,
    said,
    spikes,
    srank,
)  # fmt: skip
from config import UserError
from stability.collapse import SIGNALS

Cell = Callable[[Arm], str]
NORM = "largest gradient norm after step 1000"


def markdown(table: pd.DataFrame) -> str:
    return table.to_markdown(index=False, disable_numparse=True) + "\n"


def rows_by_arm(found: Sequence[Arm], columns: Mapping[str, Cell], **first: str) -> pd.DataFrame:
    """A row per arm: `first`, its name, its number of runs, and these columns."""
    heads = {"arm": lambda arm: arm.name, "n": lambda arm: str(len(arm.runs))} | columns
    return pd.DataFrame(first | {head: cell(arm) for head, cell in heads.items()} for arm in found)


def mean(value: Callable[[Run], float], digits: int = 2) -> Cell:
    """A column: the mean of a value over an arm's runs, with its interval."""
    return lambda arm: said([value(run) for run in arm.runs], digits)


def collapsed(arm: Arm) -> str:
    return f"{len(arm.collapsed)} of {len(arm.runs)}"


FELL = {"collapsed": collapsed, "at lr multiple": mean(Run.lr_multiple, 1)}
ENDS = {"final loss": mean(loss)}


def spread(values: Sequence[float], digits: int = 2) -> str:
    """mean [min, max] of the values that are not NaN, or the one value there is; a dash where there is none."""
    values = np.array([value for value in values if not math.isnan(value)])
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if len(values) else "–"
    return f"{values.mean():.{digits}f} [{values.min():.{digits}f}, {values.max():.{digits}f}]"


def overview_table(runs: Sequence[Run]) -> pd.DataFrame:
    """A row per arm: seeds, collapses and where, final losses, largest gradient norm; mean [min, max]."""

    def over_runs(value: Callable[[Run], float], digits: int = 2) -> Cell:
        return lambda arm: spread([value(run) for run in arm.runs], digits)

    def below_floor(run: Run) -> float:
        return math.nan if run.floor is None or run.arm == OFF else run.floor - loss(run)

    columns = {
        "collapsed": collapsed, "at step": over_runs(lambda run: run.end if run.collapse else math.nan, 0),
        "at lr multiple": over_runs(Run.lr_multiple, 1), "final loss": over_runs(loss),
        "below attention-off": over_runs(below_floor), NORM: over_runs(Run.max_grad_norm, 1),
    }  # fmt: skip
    return rows_by_arm(grouped(judged(runs)), columns).rename(columns={"n": "seeds"})


def arms_table(found: Sequence[Arm], baseline: str = "AdamW", more: Mapping[str, Cell] | None = None) -> pd.DataFrame:
    """A row per arm: collapses, where, gradient norm, final loss, and its difference from the baseline's and from the
    attention-off arm's, paired by seed, with p-values of the first adjusted for all rows (Holm). The p-value of a number of
    collapses is Fisher's exact test's against the baseline's, as it is. `more`: columns of one's own."""
    by_name = {arm.name: arm for arm in found}
    if baseline not in by_name:
        raise UserError(f"{baseline}: no such arm; there are {', '.join(by_name)}")
    base, losses = by_name[baseline], {arm.name: arm.by_seed(loss) for arm in found}
    tests = {name: paired(of, losses[baseline]) for name, of in losses.items() if name != baseline}
    adjusted = holm({name: p for name, (_, p) in tests.items()})

    def fell(arm: Arm) -> str:
        p = fisher(len(arm.collapsed), len(arm.runs), len(base.collapsed), len(base.runs))
        return collapsed(arm) + ("" if arm is base else f" (p {p_text(p)})")

    def norms(arm: Arm) -> str:
        found = [run.max_grad_norm() for run in arm.runs]
        return f"{stats.gmean(found):.3g} [{min(found):.3g}, {max(found):.3g}]"

    def against(other: str) -> dict[str, Cell]:
        return {
            f"against {other}": lambda arm: (
                "–" if arm.name == other else said(paired(losses[arm.name], losses[other])[0])
            )
        }

    columns = FELL | {"collapsed": fell, NORM: norms} | ENDS | against(baseline)
    columns |= {"p": lambda arm: p_text(adjusted.get(arm.name, math.nan))} | (against(OFF) if OFF in losses else {})
    return rows_by_arm(found, columns | (more or {}))


def costs(runs: Sequence[Run], baseline: str = "AdamW") -> dict[str, Cell]:
    """Columns for arms_table: time relative to the baseline's median in `runs`, which are of one grid, and peak memory in GiB; a dash
    for arms of other grids."""
    rate = np.median([run.summary["tokens_per_second"] for run in runs if run.arm == baseline])
    here = {run.folder for run in runs}

    def of_grid(value: Callable[[Run], float]) -> Cell:
        return mean(lambda run: value(run) if run.folder in here else math.nan)

    return {
        "time": of_grid(lambda run: rate / run.summary["tokens_per_second"]),
        "peak memory, GiB": of_grid(lambda run: run.summary["peak_memory_gib"]),
    }


def relative_times(runs: Sequence[Run]) -> dict[str, float]:
    """Time relative to that of the longest period, by run, of the runs that the longest period's revision made: others were made in another
    session, on a machine that had other things to do."""
    longest = max(runs, key=lambda run: run.config["msign_period"])
    timed = [run for run in runs if run.code == longest.code]
    period = longest.config["msign_period"]
    rate = np.median([run.summary["tokens_per_second"] for run in timed if run.config["msign_period"] == period])
    return {run.name: rate / run.summary["tokens_per_second"] for run in timed}


def fitted_r(runs: Sequence[Run]) -> float:
    """r of Eq 18, T(P) = T(∞) (1 + r / P), fitted by least squares, in steps an application."""
    times = relative_times(runs)
    inverse = np.array([1 / run.config["msign_period"] for run in runs if run.name in times])
    return float(inverse @ (np.array(list(times.values())) - 1) / (inverse @ inverse))


def period_table(runs: Sequence[Run], off: Sequence[Run] = ()) -> pd.DataFrame:
    """A row per period P: collapses, final loss, and time relative to that of the longest period."""
    times = relative_times(runs)
    columns = FELL | ENDS | {"time": mean(lambda run: times.get(run.name, math.nan))}
    found = arms(runs, lambda run: str(run.config["msign_period"]), off)
    return rows_by_arm(found, columns).rename(columns={"arm": "P"})


def threshold_table(found: Sequence[Arm], periods: Sequence[Arm]) -> pd.DataFrame:
    """A row per arm of `found`: how many matrices it replaced, its collapses and final loss, and the difference, paired by
    seed, from that arm of `periods` which replaced nearly as many (the least ratio), with its p-value as it is."""

    def replaced(arm: Arm) -> float:
        return max(1e-9, float(np.mean([applications(run) for run in arm.runs])))

    def nearest(arm: Arm) -> Arm:
        return min(periods, key=lambda other: abs(math.log(replaced(other) / replaced(arm))))

    near = {arm.name: nearest(arm) for arm in found}
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
    """A row per run that logged a signal: when each of collapse.SIGNALS moved; the first to move in bold.

    With its lead over the gradient norm, in steps, when both moved. Up to the collapse, or over the whole run if it has none.
    """

    def cell(run: Run, name: str) -> str:
        step, lead = run.onsets.signals[name], run.onsets.lead(name)
        if step is None:
            return "not logged" if run.series(SIGNALS[name][0]).empty else "–"
        text = f"{step}" + ("" if lead is None else f" ({lead:+d})")
        return f"**{text}**" if name in run.onsets.first else text

    rows = [
        {"run": run.name, "collapse": str(run.end) if run.collapse else "–"}
        | {name: cell(run, name) for name in SIGNALS}
        | {"gradient norm": str(run.onsets.grad_norm or "–")}
        for run in judged(runs)
        if not all(run.series(key).empty for key, _ in SIGNALS.values())
    ]
    return pd.DataFrame(rows, columns=["run", "collapse", *SIGNALS, "gradient norm"])


def ledger_table(regimes: Mapping[str, Sequence[Run]]) -> pd.DataFrame:
    """A row per regime and arm: collapses, medians of the chain's quantities between the first quarter and the collapse (or
    the end), and the rank correlation of every link's two sides over the measurements of one run; means over seeds."""

    def median(key: str) -> Callable[[Run], float]:
        return lambda run: before_the_end(run, key).median()

    columns = {
        "collapsed": collapsed, "stable rank": mean(median("srank/attention"), 1), "‖J(ℓ)‖₂": mean(median("jacobian/sigma1"), 1),
        "alignment": mean(median("jacobian/alignment"), 3),
        "log₁₀ product": mean(lambda run: np.log10(median("jacobian/product")(run)), 1),
    } | {f"ρ({name})": mean(lambda run, sides=sides: link(run, *sides)) for name, sides in LINKS.items()}  # fmt: skip
    return pd.concat(rows_by_arm(arms(runs), columns, regime=regime) for regime, runs in regimes.items())


def margin_table(found: Sequence[Arm]) -> pd.DataFrame:
    """A row per arm whose runs differ in learning rate and seed: learning-rate sensitivity (arXiv 2309.14322: the mean over
    rates of min(final loss, initial loss) − best final loss), best loss and its rate, largest rate below which no run collapsed."""
    rows = []
    for arm in found:
        runs = [(run.config["lr_scale"], run.config["seed"], capped_loss(run), bool(run.collapse)) for run in arm.runs]
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


def capped_loss(run: Run) -> float:
    """Final loss, at most the initial one."""
    return min(loss(run), run.steps["train/loss"][1])


def late_table(found: Sequence[Arm]) -> pd.DataFrame:
    """A row per run: did it collapse, was training smooth until then, what moved first."""
    return pd.DataFrame({
        "arm": arm.name, "seed": str(run.config["seed"]), "steps": str(len(run.steps)), "final loss": said([loss(run)]),
        "collapsed at": str(run.end) if run.collapse else "–",
        "largest gradient norm ÷ median, first third": f"{early_peak(run):.1f}",
        "moved first": str(run.onsets), "late": "yes" if late(run) else "no",
    } for arm in found for run in arm.runs)  # fmt: skip


def calm_table(found: Sequence[Arm], baseline: str = "AdamW") -> pd.DataFrame:
    """A row per arm: how much gradient norms fluctuate, with the p-value of the paired difference from the baseline's
    (Holm), how often they spike, and what an application costs."""
    measured = {arm.name: arm.by_seed(fluctuation) for arm in found}
    adjusted = holm({name: paired(of, measured[baseline])[1] for name, of in measured.items() if name != baseline})
    columns = {
        "std of log gradient norm in 100 steps": mean(fluctuation), "p": lambda arm: p_text(adjusted.get(arm.name, math.nan)),
        "spikes in 1000 steps": mean(spikes, 1), "loss after an application": mean(application_cost, 3),
    }  # fmt: skip
    return rows_by_arm(found, columns)


def by_text(runs: Sequence[Run]) -> list[Arm]:
    return grouped(runs, lambda run: run.config["dataset"])


def texts_table(runs: Sequence[Run]) -> pd.DataFrame:
    """A row per text and arm: training and validation loss, their difference, the stable rank of attention at the end."""
    columns = {
        "training loss": mean(loss), "validation loss": mean(final_val), "difference": mean(gap), "stable rank": mean(srank, 1),
    }  # fmt: skip
    return pd.concat(rows_by_arm(arms(text.runs), columns, text=text.name) for text in by_text(runs))


def ranks_table(grids: Mapping[str, Sequence[Run]]) -> pd.DataFrame:
    """A row per grid and text of three runs or more: over its runs, except those whose attention is held at zero, the rank
    correlation (Spearman) of attention's stable rank at the end with validation minus training loss and with the validation loss."""
    rows = []
    for grid, text in ((grid, text) for grid, runs in grids.items() for text in by_text(runs)):
        of = [run for run in text.runs if not run.series("srank/attention").empty]
        if len(of) >= 3:
            tests = [
                stats.spearmanr([srank(run) for run in of], [value(run) for run in of]) for value in (gap, final_val)
            ]
            cells = [cell for test in tests for cell in (f"{test.statistic:.2f}", p_text(test.pvalue))]
            rows.append([grid, text.name, str(len(of)), *cells])
    return pd.DataFrame(
        rows, columns=["grid", "text", "n", "with the difference", "p", "with the validation loss", "p"]
    )


THEOREMS = {
    "4.2": "product of the Jacobians above its bound",
    "4.4": "‖W‖₂ = ‖W‖_F / √srank(W), every matrix",
    "4.5": "attention's Jacobian below its bound",
    "4.6": "MLP's Jacobian below its bound",
    "4.8": "gradient of W_down above its bound",
    "4.9": "sum of squared gradients above its bound",
    "4.10": "attention gradients of rank ≤ hidden and co-hidden states'",
    "4.12": "condition for a falling stable rank",
}


def theory_table(run: Run) -> pd.DataFrame:
    """A row per theorem, over all measurements of a run: where it holds, how loose it is, where it is empty.

    Looseness in powers of ten, mean [smallest, largest] over measurements. Raises UserError if the run did not log theory/….
    """
    if "theory/4.4/error" not in run.steps:
        raise UserError(f"{run.folder}: did not log both sides of the theorems (theory_every)")

    def of(key: str) -> pd.Series:
        return run.series(f"theory/{key}")

    def percent(key: str) -> str:
        return f"{of(key).mean():.0%}"

    product, bound = run.series("jacobian/product"), run.series("jacobian/bound_4_2")
    above = (product[product != 0] / bound[bound != 0]).dropna()
    gradient, least = (run.by_layer(f"theory/4.8/log10_{side}")[1].ravel() for side in ("measured", "bound"))
    holds = {name: percent(f"{name}/holds") for name in THEOREMS}
    holds |= {"4.2": f"{(above >= 1).mean():.0%}", "4.4": "identity"}
    looseness = {
        "4.2": np.log10(above), "4.5": of("4.5/looseness"), "4.6": of("4.6/looseness"), "4.8": gradient - least,
        "4.9": of("4.9/log10_measured") - of("4.9/log10_bound"),
    }  # fmt: skip
    remarks = {
        "4.2": f"at {len(above)} measurements of the Jacobians",
        "4.4": f"largest relative error {of('4.4/error').max():.0e}",
        "4.5": f"empty (χ = 1) in {percent('4.5/vacuous')} of blocks",
        "4.8": f"smallest alignment a = {of('4.8/a').min():.0e}; "
        f"Jacobian ill-conditioned in {percent('4.8/ill_conditioned')} of blocks",
        "4.10": f"empty (full rank anyway) in {percent('4.10/vacuous')} of blocks; "
        f"true of stable ranks in {percent('4.10/srank_holds')}",
        "4.12": f"the stable rank falls in {percent('4.12/falls')} of matrices, "
        f"as the first-order formula says in {percent('4.12/agrees')}",
    }
    # the Jacobians have a cadence of their own: without a measurement of them nothing is said of Theorem 4.2
    rows = [
        [name, statement, holds[name], spread(looseness.get(name, []), 1), remarks.get(name, "")]
        for name, statement in THEOREMS.items()
        if name != "4.2" or len(above)
    ]
    return pd.DataFrame(rows, columns=["theorem", "statement", "holds in", "looseness, powers of ten", ""])
