"""Tables of recorded runs, and the pages and figures of this repository that are made of them.

A table is made of a frame of runs (statistics.judged); most have a row an arm.
"""

import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from analysis import alarms, figures, statistics
from analysis.runs import OFF, Run, load_runs
from analysis.statistics import LINKS, differences, holm, judged, moved, p_text, p_value, said, spread
from config import FIELDS, ROOT, UserError
from engine.plan import paper_table
from stability.collapse import SIGNALS, onset

RESULTS = ROOT / "results"
PAGES = (ROOT / "README.md", RESULTS / "REPORT.md", *sorted(ROOT.glob("docs/*.md")))
# what is recorded, in the order in which scripts/evidence.py runs it
GRIDS = ("table2_small", "attention_off", "table3_small", "controls", "margin", "rivals", "late_collapse", "late_seeds",
         "late_controls", "texts", "adaptive")  # fmt: skip
FIRST = ["AdamW", "MSign (attention)", OFF]
TRUST = "logits move ≤ 1 nat a step"  # remedies/trust.py
COMPARED = ["AdamW", "MSign (attention)", "QK-norm", "attention's lr ÷ 16", TRUST]
# regimes with runs that go back when the alarm rings: a finding, the grid that has its runs of TRUST, and theirs
RESCUES = {"ramp": ("controls", "controls", "rescue"), "no decay": ("late", "late_controls", "late_rescue")}
# regimes in which the logits are bounded: a finding, and the grid of the bounds
BOUNDS = {"ramp": ("controls", "bounded"), "no decay": ("late", "late_bounded")}
# a finding: its grid, and others of which it shows the arms in FIRST
FINDINGS = {
    "layers": ("table2_small", "attention_off"),
    "controls": ("controls", "table2_small", "attention_off"),
    "rivals": ("rivals", "attention_off"),
    "late": ("late_controls", "late_seeds"),
}
# lines of a figure and a table: the grid, and the number by which its arms are named
LINES = {"MSign every P steps": ("table3_small", "msign_period", "P = {}"),
         "only below a stable rank": ("adaptive", "msign_below", "below {:g}")}  # fmt: skip
# programs of others: the stem of the configuration, and its name
CLIENT_GRIDS = ("clients", "clients_double")
CLIENTS = {"nanogpt": "nanoGPT", "gpt2": "Trainer, GPT-2", "llama": "Trainer, Llama"}
ARCHITECTURES = {"small_sigma": "Sigma", "small_llama": "LLaMA", "small_moe": "LLaMA-MoE",
                 "small_gpt_12x64": "NanoGPT 12 × 64", "small_gpt_6x96": "NanoGPT 6 × 96"}  # fmt: skip
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


def counted(fell: pd.Series) -> str:
    return f"{fell.sum()} of {fell.count()}"


def first(values: pd.Series) -> str:
    return f"{values.iloc[0]:.2f}"


def adjusted(groups) -> pd.Series:
    """By arm: the p-value of its differences, adjusted for all arms that have some (Holm), in words."""
    ps = groups.agg(p_value)
    return holm(ps[groups.count() > 0]).map(p_text).reindex(ps.index, fill_value="–")


# tables: {heading: (column of the frame, what makes an arm's values one text, its arguments)}
COLLAPSED, LOSS = {"collapsed": ("collapsed", counted)}, {"final loss": ("loss", said)}
FELL = COLLAPSED | {"at lr multiple": ("lr_multiple", said, 1)}
NORM = "largest gradient norm after step 1000"
OVERVIEW = COLLAPSED | {
    "at step": ("fell_at", spread, 0), "at lr multiple": ("lr_multiple", spread, 1), "final loss": ("loss", spread),
    "below attention-off": ("below_floor", spread), NORM: ("max_grad_norm", spread, 1),
}  # fmt: skip
FINDING = FELL | {
    NORM: ("max_grad_norm", lambda norms: f"{stats.gmean(norms):.3g} [{norms.min():.3g}, {norms.max():.3g}]"),
    "final loss": ("loss", said), "against AdamW": ("against AdamW", said), "p": ("against AdamW", adjusted),
    f"against {OFF}": (f"against {OFF}", said), "time": ("time", said), "peak memory, GiB": ("memory", said),
}  # fmt: skip
CALM = {
    "std of log gradient norm in 100 steps": ("fluctuation", said), "p": ("calmer", adjusted),
    "spikes in 1000 steps": ("spikes", said, 1), "loss after an application": ("application_cost", said, 3),
}  # fmt: skip
CLIENT = COLLAPSED | {
    "at step": ("fell_at", spread, 0), "at learning rate": ("rate", spread, 3), "largest rise": ("rise", spread),
    "final loss": ("loss", spread), "below attention-off": ("below_floor", spread),
}  # fmt: skip
ARCHITECTURE = FELL | LOSS | {"below attention-off": ("below_floor", said), NORM: ("max_grad_norm", spread, 1)}
REMEDY = COLLAPSED | LOSS | {"above the limit's": ("above", said), "p": ("above", adjusted)}
RESCUE = COLLAPSED | LOSS | {
    "below attention-off": ("below_floor", said), "above the limit's": ("above", said), "p": ("above", adjusted),
    "rang at step": ("rang", spread, 0), "gone back to": ("back_to", spread, 0), "steps lost": ("lost", spread, 0),
}  # fmt: skip
BOUNDED = COLLAPSED | LOSS | {
    "below attention-off": ("below_floor", said), "above QK-norm": ("above", said), "p": ("above", adjusted),
    "largest attention logit": ("logit", spread, 0), "stable rank at the end": ("srank", spread, 1),
}  # fmt: skip
LARGE_BATCH = COLLAPSED | {
    "steps": ("steps", spread, 0), "at step": ("fell_at", spread, 0), "at lr multiple": ("lr_multiple", spread, 1),
    "lowest mean loss": ("lowest", spread), "final loss": ("loss", spread),
    "largest attention logit": ("logit", spread, 0), "largest growth in the first block": ("growth", spread, 0),
}  # fmt: skip
BEST = {"× lr": ("rate", first)} | COLLAPSED | LOSS | {
    "against AdamW": ("against AdamW", said), "p": ("against AdamW", adjusted), "time of a step": ("time", first),
    "at equal time": ("in_time", said), "p at equal time": ("in_time", adjusted),
}  # fmt: skip
SIGNAL = COLLAPSED | {
    "at step": ("fell_at", spread, 0), "logit moves at step": ("logit", spread, 0),
    "bound moves at step": ("bound", spread, 0), "bound moves earlier by": ("earlier", spread, 0),
    "logit ÷ bound": ("tight", spread, 3), "rank correlation": ("rho", spread),
}  # fmt: skip
PERIODS = FELL | LOSS | {"time": ("time", said)}
THRESHOLDS = {"matrices replaced in 1000 steps": ("applications", said, 0)} | COLLAPSED | LOSS | {
    "fixed P of nearly as many": ("fixed", "first"), "its collapses": ("collapsed_fixed", counted),
    "against it": ("difference", said), "p": ("difference", lambda differences: p_text(p_value(differences))),
}  # fmt: skip
# in how many runs each signal was the first to move (collapse.find_onsets)
MOVED_FIRST = {name: ("first", lambda first, name=name: str(sum(name in names for names in first) or "–"))
               for name in (*SIGNALS, "none")}  # fmt: skip
TEXTS = {"training loss": ("loss", said), "validation loss": ("val", said), "difference": ("gap", said),
         "stable rank": ("srank", said, 1)}  # fmt: skip
LEDGER = COLLAPSED | {
    "stable rank": ("srank/attention", said, 1), "‖J(ℓ)‖₂": ("jacobian/sigma1", said, 1),
    "alignment": ("jacobian/alignment", said, 3), "log₁₀ product": ("log10_product", said, 1),
} | {f"ρ({name})": (name, said) for name in LINKS}  # fmt: skip


def markdown(table: pd.DataFrame) -> str:
    return table.to_markdown(index=False, disable_numparse=True) + "\n"


def by_arm(runs: pd.DataFrame, columns: Mapping[str, tuple], *by: str) -> pd.DataFrame:
    """A row per arm, or per values of `by` and arm, in order of appearance: number of runs, and those of the columns
    that the frame has."""
    groups = runs.groupby([*by, "arm"], sort=False)
    cells = {"n": groups.size().map(str)}
    for heading, (column, words, *digits) in columns.items():
        if column in runs:
            cells[heading] = adjusted(groups[column]) if words is adjusted else groups[column].agg(words, *digits)
    return pd.DataFrame(cells).reset_index()


def overview_table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row per arm: seeds, collapses and where, final losses, largest gradient norm; mean [min, max]."""
    return by_arm(runs, OVERVIEW).rename(columns={"n": "seeds"})


def arms_table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row per arm: collapses (with Fisher's exact test against AdamW), where, largest gradient norm, final loss, its
    differences from AdamW's and attention-off's, and p-values of the first; costs of runs that are `timed`."""
    others = ["AdamW", *({OFF} & set(runs["arm"]))]
    table = by_arm(runs.assign(**{f"against {other}": differences(runs, other) for other in others}), FINDING)
    counts = pd.crosstab(runs["arm"], runs["collapsed"]).reindex(columns=[True, False], fill_value=0)
    ps = counts.apply(lambda of: stats.fisher_exact([of, counts.loc["AdamW"]]).pvalue, axis=1).drop("AdamW")
    table["collapsed"] += table["arm"].map(ps.map(lambda p: f" (p {p_text(p)})")).fillna("")
    return table


def timed(runs: pd.DataFrame, among: pd.Series, base: pd.Series) -> pd.DataFrame:
    """The runs with their time relative to the median of those that `base` marks; times and memory only of `among`."""
    rates = runs["tokens_per_second"].where(among)
    return runs.assign(time=rates[base].median() / rates, memory=runs["peak_memory_gib"].where(among))


def timed_by_period(runs: pd.DataFrame) -> pd.DataFrame:
    """Times relative to the longest period's, of the runs of its revision: others were made on a busier machine."""
    longest = runs.loc[runs["msign_period"].idxmax()]
    same = runs["run"].map(lambda run: run.code == longest["run"].code)
    return timed(runs, same, runs["msign_period"] == longest["msign_period"])


def fitted_r(runs: pd.DataFrame) -> float:
    """r of Eq 18, T(P) = T(∞) (1 + r / P), fitted by least squares, in steps an application."""
    known = timed_by_period(runs).dropna(subset="time")
    inverse = 1 / known["msign_period"]
    return float(inverse @ (known["time"] - 1) / (inverse @ inverse))


def period_table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row per period P: collapses, final loss, and time relative to that of the longest period."""
    runs = timed_by_period(runs).assign(arm=runs["msign_period"].map(str))
    return by_arm(runs, PERIODS).rename(columns={"arm": "P"})


def threshold_table(runs: pd.DataFrame, periods: pd.DataFrame) -> pd.DataFrame:
    """A row per arm of `runs`: how many matrices it replaced, its collapses and final loss, and the difference from
    that arm of `periods` which replaced nearly as many (the least ratio), with its p-value as it is."""
    counts = periods.groupby("arm")["applications"].mean().clip(lower=1e-9)
    means = runs.groupby("arm")["applications"].transform("mean").clip(lower=1e-9)
    near = means.map(lambda mean: np.log(counts / mean).abs().idxmin())
    runs = runs.assign(near=near, fixed=near + near.map(counts).map(": {:.0f}".format))
    runs = runs.merge(periods, left_on=["near", "seed"], right_on=["arm", "seed"], how="left", suffixes=("", "_fixed"))
    return by_arm(runs.assign(difference=runs["loss"] - runs["loss_fixed"]), THRESHOLDS)


def onsets_table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row per run that logged a signal: the step at which each of collapse.SIGNALS moved, and its lead over the
    gradient norm in steps when both moved; the first to move in bold."""

    def cell(row, name: str) -> str:
        step, lead = row.onsets.signals[name], row.onsets.lead(name)
        if step is None:
            return "not logged" if row.run.series(SIGNALS[name][0]).empty else "–"
        text = f"{step}" + ("" if lead is None else f" ({lead:+d})")
        return f"**{text}**" if name in row.first else text

    table = pd.DataFrame({
        "run": row.name, "collapse": str(row.end) if row.collapsed else "–",
        **{name: cell(row, name) for name in SIGNALS}, "gradient norm": str(row.onsets.grad_norm or "–"),
    } for row in moved(runs).itertuples())  # fmt: skip
    return table[(table[list(SIGNALS)] != "not logged").any(axis=1)]


def margin_table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row per arm whose runs differ in rate and seed: learning-rate sensitivity (arXiv 2309.14322: mean over rates of
    min(final, initial loss) − best final loss), best loss and its rate, largest rate below which no run collapsed."""
    rows = []
    for arm, of in runs.groupby("arm", sort=False):
        losses = of.pivot(index="seed", columns="lr_scale", values="capped_loss").dropna()
        safe = losses.columns[~of.groupby("lr_scale")["collapsed"].any().cummax()]
        rows.append({
            "arm": arm, "n": f"{losses.shape[1]} × {len(losses)}",
            "sensitivity, nats": said(losses.sub(losses.min(axis=1), axis=0).mean(axis=1), 3),
            "best loss": said(losses.min(axis=1)), "at × lr": f"{losses.mean().idxmin():g}",
            "no collapse up to × lr": f"{safe[-1]:g}" if len(safe) else f"below {losses.columns[0]:g}",
        })  # fmt: skip
    return pd.DataFrame(rows)


def late_table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row per run: did it collapse, was training smooth until then, what moved first."""
    return pd.DataFrame({
        "arm": row.arm, "seed": str(row.seed), "steps": str(row.steps), "final loss": f"{row.loss:.2f}",
        "collapsed at": str(row.end) if row.collapsed else "–",
        "largest gradient norm ÷ median, first third": f"{row.early_peak:.1f}",
        "moved first": str(row.onsets), "late": "yes" if row.late else "no",
    } for row in moved(runs).itertuples())  # fmt: skip


def calm_table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row per arm: how much gradient norms fluctuate, with the p-value of the difference from AdamW's, how often they
    spike, and what an application costs."""
    measures = (statistics.fluctuation, statistics.spikes, statistics.application_cost)
    runs = runs.assign(**{measure.__name__: runs["run"].map(measure) for measure in measures})
    return by_arm(runs.assign(calmer=differences(runs, "AdamW", "fluctuation")), CALM)


def texts_table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row per text and arm: training and validation loss, their difference, the stable rank at the end."""
    runs = pd.concat(of for _, of in runs.groupby("dataset", sort=False))
    return by_arm(runs.assign(text=runs["dataset"]), TEXTS, "text")


def ranks_table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row per grid and text of three runs or more, but those whose attention is zero: the rank correlation (Spearman)
    of attention's stable rank at the end with the gap and with the validation loss."""
    rows = []
    for names, of in runs.dropna(subset="srank").groupby(["wandb_group", "dataset"], sort=False):
        tests = [stats.spearmanr(of["srank"], of[value]) for value in ("gap", "val")] if len(of) >= 3 else []
        cells = [cell for test in tests for cell in (f"{test.statistic:.2f}", p_text(test.pvalue))]
        rows += [[*names, str(len(of)), *cells]] if cells else []
    heads = ["grid", "text", "n", "with the difference", "p", "with the validation loss", "p"]
    return pd.DataFrame(rows, columns=heads)


def ledger_table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row per regime and arm: collapses and LEDGER; means over seeds."""
    values = pd.DataFrame(map(statistics.chain, runs.itertuples()), index=runs.index)
    return by_arm(runs.join(values.assign(log10_product=np.log10(values["jacobian/product"]))), LEDGER, "regime")


def theory_table(run: Run) -> pd.DataFrame:
    """A row per theorem, over all measurements of a run: where it holds, its looseness in powers of ten (mean [min,
    max]), where it is empty. Raises UserError if the run did not log theory/…."""
    if "theory/4.4/error" not in run.steps:
        raise UserError(f"{run.folder}: did not log both sides of the theorems (theory_every)")
    ratio = run.series("jacobian/product") / run.series("jacobian/bound_4_2").replace(0, math.nan)
    above = np.log10(ratio[ratio > 0])
    sides = [run.by_layer(f"theory/4.8/log10_{side}").stack() for side in ("measured", "bound")]
    rows = []
    for name, (statement, remark) in THEOREMS.items():
        keys = [key for key in run.steps if key.startswith(f"theory/{name}/")]
        of = pd.DataFrame({key.rsplit("/")[-1]: run.series(key) for key in keys})
        if name == "4.2":
            of = pd.DataFrame({"holds": above >= 0, "looseness": above})
        elif name == "4.9":
            of["looseness"] = of["log10_measured"] - of["log10_bound"]
        loose = sides[0] - sides[1] if name == "4.8" else of.get("looseness", pd.Series(dtype=float))
        share = f"{of['holds'].mean():.0%}" if name != "4.4" else "identity"
        holds = f"condition met in {share}" if name == "4.12" else share
        if len(of):  # the Jacobians have a cadence of their own: without a measurement nothing is said of Theorem 4.2
            parts = of.astype(float).agg(["mean", "min", "max", "count"]).T
            rows.append([name, statement, holds, spread(loose, 1), remark.format(**parts)])
    return pd.DataFrame(rows, columns=["theorem", "statement", "holds in", "looseness, powers of ten", ""])


loaded = functools.cache(load_runs)


def packed(grid: str, folder: Path = RESULTS) -> list[Run]:
    """The runs of a recorded grid, but those of TRUST: they came when everything else had been judged."""
    return [run for run in loaded(folder / grid) if run.arm != TRUST]


@functools.cache
def frame(grid: str, folder: Path = RESULTS, off: str = "") -> pd.DataFrame:
    """The runs of a recorded grid, with floors from itself or from the grid `off`."""
    return judged(packed(grid, folder), packed(off, folder) if off else (), same="lr_scale")


def recorded(experiment: str) -> pd.DataFrame:
    """The runs recorded under results/<experiment>, arm by arm, seed by seed."""
    return frame(experiment).sort_values(["arm", "seed"], ignore_index=True)


@functools.cache
def finding(name: str, folder: Path = RESULTS) -> pd.DataFrame:
    """The runs of a finding: the arms in FIRST, whichever of the grids they are in, and the others."""
    own, *others = FINDINGS[name]
    runs = [run for grid in others for run in packed(grid, folder) if run.arm in FIRST] + packed(own, folder)
    return judged(sorted(runs, key=lambda run: [*FIRST, run.arm].index(run.arm)), same="lr_scale")


def numbered(line: str) -> pd.DataFrame:
    """MSign at every period, or below every threshold of the stable rank, the arms named by that number."""
    grid, field, words = LINES[line]
    runs = frame(grid, off="attention_off")
    return runs.assign(line=line, arm=runs[field].map(words.format))


def regimes() -> pd.DataFrame:
    """Recorded runs, by regime, that measured the links of the paper's chain."""
    of = {"ramp": recorded("ramp"), "constant 2 ×": recorded("constant"), "no decay": frame("late_seeds")}
    return pd.concat([runs.assign(regime=regime) for regime, runs in of.items()], ignore_index=True)


def by_config(grids: Iterable[str], names: Mapping[str, str], folder: Path = RESULTS) -> pd.DataFrame:
    """The runs of grids with several configurations, the stem of each named by `names` in the column "model"; a floor
    is that of the same grid, configuration and seed."""
    parts = []
    for grid, (stem, name) in itertools.product(grids, names.items()):
        runs = [run for run in packed(grid, folder) if Path(run.axes["config"]).stem == stem]
        parts += [judged(runs).assign(model=name, panel=name)] if runs else []
    return pd.concat(parts, ignore_index=True)


@functools.cache
def architectures(folder: Path = RESULTS) -> pd.DataFrame:
    """The runs of the paper's other models in small, with what moved first."""
    return moved(by_config(["architectures"], ARCHITECTURES, folder))


def with_trust(runs: pd.DataFrame, grid: str) -> pd.DataFrame:
    """A frame of runs that read one configuration, and those of TRUST in a recorded grid that read it too."""
    config = runs["run"].iloc[0].axes.get("config")
    added = [run for run in loaded(RESULTS / grid) if run.arm == TRUST and run.axes.get("config") == config]
    return judged([*runs["run"], *added], same="lr_scale")


def constant_rates() -> pd.DataFrame:
    """The runs of the grid of constant rates, those of TRUST included."""
    return with_trust(frame("margin"), "margin")


def remedies() -> pd.DataFrame:
    """By regime, the runs of TRUST and of the arms that they are compared with."""
    regimes = {"ramp": (finding("controls"), "controls"), "no decay": (finding("late"), "late_controls")}
    regimes |= {f"{model}, ramp": (of, "architectures") for model, of in architectures().groupby("model", sort=False)}
    parts = []
    for regime, (runs, grid) in regimes.items():
        runs = with_trust(runs, grid)
        runs = runs[runs["arm"].isin(COMPARED)]
        parts.append(runs.assign(regime=regime, above=differences(runs, TRUST)))
    return pd.concat(parts, ignore_index=True)


def bounded() -> pd.DataFrame:
    """By regime, the runs whose attention logits are bounded, in the forward pass or by their weights."""
    parts = []
    for regime, (name, grid) in BOUNDS.items():
        runs = judged([*finding(name)["run"], *packed(grid)], same="lr_scale")
        runs = runs[runs["arm"].isin(COMPARED) | (runs["wandb_group"] == grid)]
        logit = [run.series("attention/max_logit").max() for run in runs["run"]]
        parts.append(runs.assign(regime=regime, above=differences(runs, "QK-norm"), logit=logit))
    return pd.concat(parts, ignore_index=True)


def ceilings() -> pd.DataFrame:
    """Final losses of the search of LogitClip's limit: a row per way and limit, a column per learning rate."""
    runs = judged(loaded(RESULTS / "clip_search"))
    losses = runs.pivot(index=["logit_clip_map", "logit_clip"], columns="lr_scale", values="loss")
    table = losses.map("{:.3f}".format).rename(columns="{:g} × lr".format).reset_index()
    return table.assign(logit_clip=table["logit_clip"].map("{:g}".format))


def limits() -> pd.DataFrame:
    """The ramp with limits on a step of a sixteenth of a nat to sixteen, and without one."""
    runs = with_trust(finding("controls"), "controls").query("arm in ['AdamW', @TRUST]")
    runs = judged([*loaded(RESULTS / "limits"), *runs["run"]], same="lr_scale")
    runs = runs.sort_values(["logit_trust", "seed"], ignore_index=True)
    runs["arm"] = runs["logit_trust"].map("{:g}".format).replace("0", "none")
    return runs.assign(above=differences(runs, "1"))


def large_batch() -> pd.DataFrame:
    """The ramp with the paper's 122 880 tokens a step, and AdamW's with 512; one seed."""
    runs = judged(loaded(RESULTS / "large_batch"), same="batch_size")
    runs["tokens a step"] = (runs["batch_size"] * runs["block_size"]).map("{:,}".format).str.replace(",", " ")
    highest = {name: [run.series(key).max() for run in runs["run"]]
               for name, key in (("logit", "attention/max_logit"), ("growth", "residual/gain"))}  # fmt: skip
    lowest = [figures.mean_loss(run).min() for run in runs["run"]]
    arm, panel = runs["arm"].str.removesuffix(" at 512 tokens"), runs["tokens a step"] + " tokens a step"
    return runs.assign(arm=arm, panel=panel, lowest=lowest, **highest)


def step_time(run: Run) -> float:
    """Time of a step in AdamW's, measured (bench_remedies.json), or of MSign from that of an application (Eq 18) to
    all four matrices of attention, of which W_Q and W_K take half."""
    (rows,) = json.loads((RESULTS / "bench_remedies.json").read_text())["tables"].values()
    ratios = {row["implementation"]: float(row["time relative to ours"].split()[0]) for row in rows}
    if period := run.config["msign_period"]:
        share = 0.5 if run.config["msign_targets"] == "W_Q,W_K" else 1.0
        return 1 + share * fitted_r(frame("table3_small", off="attention_off")) / period
    name = "limit on the step" if run.config["logit_trust"] else run.arm.split(",")[0]
    return ratios.get(name, 1.0)


def at_their_best() -> pd.DataFrame:
    """The runs of each method at its best setting: how they differ from AdamW's, at its end and, by the time that their
    steps take, at its end in time."""
    runs = judged(loaded(RESULTS / "best"))
    runs["rate"] = runs["lr"] * runs["lr_scale"] / FIELDS["lr"].default
    runs["time"] = runs["run"].map(step_time)
    ends = (runs["max_steps"] / runs["time"]).astype(int)
    runs["in_time"] = [figures.mean_loss(run)[end] for run, end in zip(runs["run"], ends, strict=True)]
    other = {"against AdamW": differences(runs, "AdamW"), "in_time": differences(runs, "AdamW", "in_time")}
    return runs.assign(**other)


def logit_signals() -> pd.DataFrame:
    """The runs that measure the bound of the logits: when the largest logit and its bound move, up to the collapse or
    the end, and without the first quarter of that time the median of logit over bound and their rank correlation."""
    runs = judged(loaded(RESULTS / "signal"))
    keys = {"logit": "attention/max_logit", "bound": "attention/logit_bound"}
    found = []
    for run, end in zip(runs["run"], runs["end"], strict=True):
        both = pd.DataFrame({name: run.series(key) for name, key in keys.items()}).loc[end // 4 + 1 : end]
        found.append({name: onset(list(both.index), list(np.log(of))) for name, of in both.items()})
        found[-1] |= {"tight": (both["logit"] / both["bound"]).median(), "rho": both.corr("spearman").iloc[0, 1]}
    found = pd.DataFrame(found).astype(float)
    return runs.assign(**found, earlier=found["logit"] - found["bound"])


def rescues() -> pd.DataFrame:
    """By regime, the runs that go back when the alarm rings and those that they are compared with; the steps at which
    it rang, gone back to, and lost between them."""
    parts = []
    for regime, (name, own, grid) in RESCUES.items():
        runs = judged([*with_trust(finding(name), own)["run"], *packed(grid)], same="lr_scale")
        runs = runs[runs["arm"].isin(COMPARED) | (runs["wandb_group"] == grid)]
        steps = {key: [run.summary.get(key, math.nan) for run in runs["run"]] for key in ("rang", "back_to")}
        parts.append(runs.assign(regime=regime, above=differences(runs, TRUST), **steps))
    runs = pd.concat(parts, ignore_index=True)
    return runs.assign(lost=runs["rang"] - runs["back_to"])


def on_gpu(folder: Path = RESULTS) -> pd.DataFrame:
    """The runs of the ramp on an H100: how each computed, when it collapsed, and what had moved first."""
    rows = []
    for run in load_runs(folder / "h100"):
        collapse, cfg = run.summary["collapse"] or {}, run.config
        rows.append({
            "method": "MSign" if cfg["msign_period"] else "AdamW",
            "precision": cfg["dtype"],
            "computed": "with CUDA graphs" if cfg["compile"] == "whole" else "uncompiled, repeatable",
            "steps": run.summary["steps"],
            "collapse, step": collapse.get("step", "none"),
            "first to move": collapse.get("onsets", "–").split(";")[0],
            "final loss": f"{run.summary['train/loss']:.2f}",
        })  # fmt: skip
    return pd.DataFrame(rows)


@functools.cache
def clients(folder: Path = RESULTS) -> pd.DataFrame:
    """The runs of other people's programs."""
    runs = by_config(CLIENT_GRIDS, CLIENTS, folder).rename(columns={"model": "program"})
    top = (runs["lr"] * runs["lr_scale"]).map("{:g}".format)
    means = [figures.mean_loss(run) for run in runs["run"]]
    rises = [(mean - mean.cummin()).max() for mean in means]  # largest rise of the mean loss above its lowest value
    rate = runs["lr_multiple"] * runs["lr"]
    return runs.assign(top=top, panel=runs["program"] + ", ramp to " + top, rate=rate, rise=rises)


def all_grids() -> pd.DataFrame:
    """Every grid but that of the floors."""
    return pd.concat(frame(grid, off="attention_off") for grid in GRIDS if grid != "attention_off")


@functools.cache
def rings() -> pd.DataFrame:
    """What rang in which run, by every rule of `alarms`, of every recorded run."""
    floors = {"late_seeds": "late_controls", "attention_off": ""}
    grids = [frame(grid, off=floors.get(grid, "attention_off")) for grid in GRIDS]
    runs = pd.concat([*grids, recorded("ramp"), recorded("constant"), clients()], ignore_index=True)
    return alarms.judged(alarms.parted(runs))


def alarms_block(by: str) -> pd.DataFrame:
    """By rule, over all judged runs; or by regime, of the rule of stability/alarm.py."""
    judged = rings()["regime"] != "built on"
    return alarms.alarms_table(rings()[judged if by == "rule" else rings()["rule"] == alarms.RULE], by)


def periods(grid: str) -> str:
    runs = frame(grid, off="attention_off")
    return f"{markdown(period_table(runs))}\nr = {fitted_r(runs):.2f} steps an application.\n"


def costs(name: str) -> pd.DataFrame:
    runs = finding(name)
    return arms_table(timed(runs, runs["wandb_group"] == name, runs["arm"] == "AdamW"))


def file(name: str) -> str:
    return (RESULTS / f"{name}.md").read_text()


# kind of a block -> what it shows of the experiment, grid, finding or file of results/ that the block names
BLOCKS: dict[str, Callable[[str], str | pd.DataFrame]] = {
    "table": lambda name: overview_table(recorded(name)),
    "verdicts": lambda name: "".join(f"    {verdict}\n" for verdict in recorded(name).query("seed == 0")["verdict"]),
    "onsets": lambda name: onsets_table(recorded(name)),
    "theorems": lambda name: theory_table(recorded(name)["run"][0]),
    "finding": lambda name: arms_table(finding(name)),
    "costs": costs,
    "calm": lambda name: calm_table(finding(name)),
    "first": lambda name: by_arm(moved(finding(name)), MOVED_FIRST),
    "periods": periods,
    "margin": lambda name: margin_table(frame(name)),
    "best": lambda name: margin_table(constant_rates()),
    "late": lambda name: late_table(frame(name)),
    "texts": lambda name: texts_table(frame(name)),
    "thresholds": lambda name: threshold_table(*map(numbered, reversed(LINES))),
    "ranks": lambda name: ranks_table(all_grids()),
    "ledger": lambda name: ledger_table(regimes()),
    "alarms": alarms_block,
    "cost": lambda name: paper_table() + "\n",
    "architectures": lambda name: by_arm(architectures(), ARCHITECTURE, "model"),
    "remedies": lambda name: by_arm(remedies(), REMEDY, "regime"),
    "signal": lambda name: by_arm(logit_signals(), SIGNAL),
    "at_best": lambda name: by_arm(at_their_best(), BEST),
    "bounded": lambda name: by_arm(bounded(), BOUNDED, "regime"),
    "ceilings": lambda name: ceilings().rename(columns={"logit_clip_map": "way", "logit_clip": "limit, nats"}),
    "limits": lambda name: by_arm(limits(), REMEDY).rename(
        columns={"arm": "limit, nats", "above the limit's": "above that of 1"}
    ),
    "large": lambda name: by_arm(large_batch(), LARGE_BATCH, "tokens a step"),
    "gpu": lambda name: on_gpu(),
    "rescues": lambda name: by_arm(rescues(), RESCUE, "regime"),
    "models_first": lambda name: by_arm(architectures(), MOVED_FIRST, "model"),
    "clients": lambda name: by_arm(clients(), CLIENT, "program", "top"),
    "file": file,
    "targets": lambda name: file(name).split("\n\n")[0] + "\n",  # of a file only the first table
}


def filled(text: str) -> str:
    """`text` with every block between <!-- KIND NAME --> and <!-- end --> made anew; UserError: not in BLOCKS."""

    def block(match: re.Match) -> str:
        kind, name = match.groups()
        if kind not in BLOCKS:
            raise UserError(f"<!-- {kind} {name} -->: no such kind of block; there are {', '.join(BLOCKS)}")
        body = BLOCKS[kind](name)
        return f"<!-- {kind} {name} -->\n\n{body if isinstance(body, str) else markdown(body)}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) (\w+) -->.*?<!-- end -->", block, text, flags=re.DOTALL)


def drawn() -> Iterator[tuple[str, Figure]]:
    """Every figure under results/ by its name."""
    for name in FINDINGS:
        yield name, figures.strips(finding(name).assign(panel=""))
    every, below, margin, texts = *map(numbered, LINES), frame("margin"), frame("texts")
    both = pd.concat([every, below]).query("applications > 0")
    margin = margin.assign(line=margin["arm"], arm=margin["lr_scale"])
    for name, runs, x, xlabel in (
        ("table3_small", every.assign(line="MSign (attention)"), "msign_period", "period P of MSign, steps"),
        ("margin", margin, "lr_scale", "constant learning rate, multiples of the paper's"),
        ("adaptive", both, "applications", "matrices replaced in 1000 steps"),
    ):
        words = {"xlabel": xlabel, "ylabel": figures.LOSS, "xscale": "log"}
        yield name, figures.against(runs.assign(panel=""), x, "capped_loss", **words)
    panels = texts["dataset"].map({"stdlib-bytes": "a text of megabytes", "stdlib-small": "a text of 8192 bytes"})
    words = {"xlabel": "stable rank of attention at the end", "ylabel": "validation − training loss, nats"}
    yield "texts", figures.against(texts.assign(line=texts["arm"], panel=panels), "srank", "gap", 3.6, **words)
    yield "calm", figures.fig3(frame("table2_small").query("arm in @FIRST"))
    yield "late_seeds", figures.fig3(frame("late_seeds"))
    yield "architectures", figures.strips(architectures())
    ramps = remedies().query("regime != 'no decay'")
    share = (ramps["lr_multiple"] / ramps["lr_scale"]).where(ramps["collapsed"], 1.0)
    panels = ramps["regime"].replace("ramp", "NanoGPT, ramp") + ramps["lr_scale"].map(
        " to {:g} × the paper's rate".format
    )
    words = "learning rate at the collapse (×), or at the end (dots: no collapse), over the ramp's highest"
    yield "collapse_lr", figures.strips(ramps.assign(share=share, panel=panels), "share", words)
    yield "large_batch", figures.loss_panels(large_batch(), 2)
    yield "clients", figures.loss_panels(clients(), len(CLIENTS))
    for name in ("constant", "ramp"):
        yield name, figures.overview(recorded(name))
        yield f"{name}_heatmaps", figures.heatmaps(recorded(name).query("seed == 0"))
