"""What the pages of this repository show of its recorded runs: what each of their blocks and figures is made of."""

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from analysis import figures, tables
from analysis.runs import Run, judged, load_runs
from analysis.statistics import Arm, applications, arms, capped_loss, gap, grouped, srank
from config import ROOT, UserError
from engine.plan import paper_table

RESULTS = ROOT / "results"
PAGES = (ROOT / "README.md", RESULTS / "REPORT.md", *sorted(ROOT.glob("docs/*.md")))
# what is recorded, in the order in which scripts/evidence.py runs it
GRIDS = ("table2_small", "attention_off", "table3_small", "controls", "margin", "rivals", "late_collapse", "late_seeds",
         "late_controls", "texts", "adaptive")  # fmt: skip
# a finding: its grid, and the arms of other grids that it is held against
FINDINGS = {
    "layers": ("table2_small", {"attention_off": ["attention off"]}),
    "controls": ("controls", {"table2_small": ["AdamW", "MSign (attention)"], "attention_off": ["attention off"]}),
    "rivals": ("rivals", {"attention_off": ["attention off"]}),
    "late": ("late_controls", {"late_seeds": ["AdamW", "MSign (attention)"]}),
}
FIRST = ["AdamW", "MSign (attention)", "MSign (mlp)", "attention off"]
# MSign at every P and below thresholds of the stable rank
BY_NUMBER = {"MSign every P steps": ("table3_small", "msign_period"),
             "only below a stable rank": ("adaptive", "msign_below")}  # fmt: skip
TEXTS = {"stdlib-bytes": "a text of megabytes", "stdlib-small": "a text of 8192 bytes"}


@functools.cache
def packed(grid: str, folder: Path = RESULTS) -> list[Run]:
    """The runs of a recorded grid, in their order."""
    return load_runs(folder / grid)


def recorded(experiment: str) -> list[Run]:
    """The runs recorded under results/<experiment>, arm by arm, seed by seed."""
    return sorted(packed(experiment), key=lambda run: (FIRST.index(run.arm), run.config["seed"]))


def of_first_seed(experiment: str) -> list[Run]:
    return [run for run in recorded(experiment) if run.config["seed"] == 0]


@functools.cache
def finding(name: str, folder: Path = RESULTS) -> list[Arm]:
    """The arms of a finding: AdamW, MSign and the floor first, whichever of the grids they are in."""
    grid, against = FINDINGS[name]
    others = [run for other, names in against.items() for run in packed(other, folder) if run.arm in names]
    first = {"AdamW": 0, "MSign (attention)": 1, "attention off": 2}
    return sorted(arms(others + packed(grid, folder)), key=lambda arm: first.get(arm.name, len(first)))


@functools.cache
def by_number(grid: str, field: str) -> list[Arm]:
    """The arms of a grid whose runs differ in a number, by that number."""
    named = {"msign_period": "P = {}", "msign_below": "below {:g}"}[field]
    return arms(packed(grid), lambda run: named.format(run.config[field]), packed("attention_off"))


def regimes() -> dict[str, list[Run]]:
    """Recorded runs, by regime, that measured the links of the paper's chain."""
    return {"ramp": recorded("ramp"), "constant 2 ×": recorded("constant"), "no decay": packed("late_seeds")}


def periods(grid: str) -> str:
    table = tables.markdown(tables.period_table(packed(grid), packed("attention_off")))
    return f"{table}\nr = {tables.fitted_r(packed(grid)):.2f} steps an application.\n"


def file(name: str) -> str:
    return (RESULTS / f"{name}.md").read_text()


# kind of a block -> what it shows of the experiment, grid, finding or file of results/ that the block names
BLOCKS: dict[str, Callable[[str], str | pd.DataFrame]] = {
    "table": lambda name: tables.overview_table(recorded(name)),
    "verdicts": lambda name: "".join(f"    {run.verdict}\n" for run in judged(of_first_seed(name))),
    "onsets": lambda name: tables.onsets_table(recorded(name)),
    "theorems": lambda name: tables.theory_table(recorded(name)[0]),
    "finding": lambda name: tables.arms_table(finding(name)),
    "costs": lambda name: tables.arms_table(finding(name), more=tables.costs(packed(name))),
    "calm": lambda name: tables.calm_table(finding(name)),
    "first": lambda name: tables.first_table(finding(name)),
    "periods": periods,
    "margin": lambda name: tables.margin_table(arms(packed(name))),
    "late": lambda name: tables.late_table(arms(packed(name))),
    "texts": lambda name: tables.texts_table(packed(name)),
    "thresholds": lambda name: tables.threshold_table(*(by_number(*grid) for grid in reversed(BY_NUMBER.values()))),
    "ranks": lambda name: tables.ranks_table({grid: packed(grid) for grid in GRIDS if grid != "attention_off"}),
    "ledger": lambda name: tables.ledger_table(regimes()),
    "cost": lambda name: paper_table() + "\n",
    "file": file,
    "targets": lambda name: file(name).split("\n\n")[0] + "\n",  # of a file only the first table
}  # fmt: skip


def filled(text: str) -> str:
    """`text` with every block between <!-- KIND NAME --> and <!-- end --> made anew; UserError: not in BLOCKS."""

    def block(match: re.Match) -> str:
        kind, name = match.groups()
        if kind not in BLOCKS:
            raise UserError(f"<!-- {kind} {name} -->: no such kind of block; there are {', '.join(BLOCKS)}")
        body = BLOCKS[kind](name)
        return f"<!-- {kind} {name} -->\n\n{body if isinstance(body, str) else tables.markdown(body)}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) (\w+) -->.*?<!-- end -->", block, text, flags=re.DOTALL)


def drawn() -> Iterator[tuple[str, Figure]]:
    """Every figure under results/ by its name."""
    for name in FINDINGS:
        yield name, figures.strips(finding(name))
    rates = {arm.name: grouped(arm.runs, lambda run: run.config["lr_scale"]) for arm in arms(packed("margin"))}
    numbers = {
        name: [arm for arm in by_number(*grid) if any(arm.values(applications))] for name, grid in BY_NUMBER.items()
    }
    for name, lines, x, xlabel in (
        ("table3_small", {"MSign (attention)": by_number("table3_small", "msign_period")},
         lambda run: run.config["msign_period"], "period P of MSign, steps"),
        ("margin", rates, lambda run: run.config["lr_scale"], "constant learning rate, multiples of the paper's"),
        ("adaptive", numbers, applications, "matrices replaced in 1000 steps"),
    ):  # fmt: skip
        yield name, figures.against({"": lines}, x, capped_loss, xlabel=xlabel, ylabel=figures.LOSS, xscale="log")
    panels = {
        TEXTS[text.name]: {arm.name: [arm] for arm in arms(text.runs)} for text in tables.by_text(packed("texts"))
    }
    words = {"xlabel": "stable rank of attention at the end", "ylabel": "validation − training loss, nats"}
    yield "texts", figures.against(panels, srank, gap, 3.6, **words)
    yield "calm", figures.fig3([run for run in packed("table2_small") if run.arm in ("AdamW", "MSign (attention)")])
    yield "late_seeds", figures.fig3(packed("late_seeds"))
    for name in sorted({path.parents[1].name for path in RESULTS.glob("*/*/record.json")}):
        yield name, figures.overview(recorded(name))
        if any("jacobian/sigma1/0" in run.layers for run in of_first_seed(name)):
            yield f"{name}_heatmaps", figures.heatmaps(of_first_seed(name))
