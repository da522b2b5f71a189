"""Regenerate every table and figure of README.md and results/REPORT.md from the logs recorded there.

python scripts/report.py            # writes; `make figures` does the same
python scripts/report.py --check    # writes nothing; exit code 1 when a table is out of date
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from analysis.evidence import (
    Arm,
    applications,
    arms,
    arms_table,
    calm_table,
    costs,
    first_table,
    gap,
    label,
    late_table,
    ledger_table,
    margin_table,
    period_table,
    ranks_table,
    srank,
    texts_table,
    threshold_table,
    unpack,
)
from analysis.figures import against, fig3, heatmaps, overview, save, scatter, strips
from analysis.runs import load_run, onsets_table, table, theory_table, verdicts
from config import Parser, UserError, run_cli
from scripts.plan import paper_table

RESULTS = ROOT / "results"
# what is recorded, in the order in which scripts/evidence.py runs it
GRIDS = (
    "table2_small",
    "attention_off",
    "table3_small",
    "controls",
    "margin",
    "rivals",
    "late_collapse",
    "late_seeds",
    "late_controls",
    "texts",
    "adaptive",
)
# a finding: its grid, and the arms of other grids that it is held against
FINDINGS = {
    "layers": ("table2_small", {"attention_off": ["attention off"]}),
    "controls": ("controls", {"table2_small": ["AdamW", "MSign (attention)"], "attention_off": ["attention off"]}),
    "rivals": ("rivals", {"attention_off": ["attention off"]}),
    "late": ("late_controls", {"late_seeds": ["AdamW", "MSign (attention)"]}),
}

# grids whose runs differ in a number
NUMBERS = {
    "table3_small": ("msign_period", "period P of MSign, steps"),
    "margin": ("lr_scale", "constant learning rate, multiples of the paper's"),
}
# MSign at every P and below thresholds of the stable rank, by what it replaces
BY_NUMBER = {
    "MSign every P steps": ("table3_small", "msign_period"),
    "only below a stable rank": ("adaptive", "msign_below"),
}


def packed(grid: str, folder: Path = RESULTS):
    return unpack(folder / f"{grid}.jsonl.gz")


def finding(name: str, folder: Path = RESULTS) -> list[Arm]:
    """The arms of a finding: AdamW, MSign and the floor first, whichever of the grids they are in."""
    grid, against = FINDINGS[name]
    others = [run for other, names in against.items() for run in packed(other, folder) if label(run) in names]
    known = ["AdamW", "MSign (attention)", "attention off"]
    found = arms(others + packed(grid, folder))
    return sorted(found, key=lambda arm: known.index(arm.name) if arm.name in known else len(known))


def by_number(grid: str, field: str) -> list[Arm]:
    """The arms of a grid whose runs differ in a number, by that number."""
    named = {"msign_period": "P = {}", "msign_below": "below {:g}"}[field]
    return arms(packed(grid), lambda run: named.format(run.config[field]), packed("attention_off"))


def regimes() -> dict[str, list]:
    """Recorded runs, by regime, that measured the links of the paper's chain."""
    return {"ramp": recorded("ramp"), "constant 2 ×": recorded("constant"), "no decay": packed("late_seeds")}


def recorded(experiment: str):
    """The runs recorded under results/<experiment>, arm by arm, seed by seed."""
    runs = [load_run(path.parent) for path in sorted((RESULTS / experiment).glob("*/record.json"))]
    if not runs:
        raise UserError(f"results/{experiment}: no recorded runs")
    order = ["AdamW", "MSign (attention)", "MSign (mlp)", "attention off"]
    return sorted(runs, key=lambda r: (order.index(r.arm) if r.arm in order else 99, r.config["seed"]))


def filled(text: str) -> str:
    """`text` with every block between <!-- KIND NAME --> and <!-- end --> made anew. NAME is an experiment (table, verdicts, onsets,
    theorems), a recorded file results/NAME.md (file, or of it only the first table: targets), a finding (finding, costs, calm, first)
    or a grid (periods, thresholds, margin, late, texts); what is of several grids (ranks, ledger) or of none (cost) has a name of its own."""

    def block(match: re.Match) -> str:
        kind, name = match[1], match[2]
        if kind in ("file", "targets"):
            body = (RESULTS / f"{name}.md").read_text()
            body = body.split("\n\n")[0] + "\n" if kind == "targets" else body
        elif kind == "cost":
            body = paper_table() + "\n"
        elif kind == "table":
            body = table(recorded(name))
        elif kind == "finding":
            body = arms_table(finding(name))
        elif kind == "calm":
            body = calm_table(finding(name))
        elif kind == "costs":
            body = arms_table(finding(name), more=costs(packed(name)))
        elif kind == "texts":
            body = texts_table(packed(name))
        elif kind == "ranks":
            body = ranks_table({grid: packed(grid) for grid in GRIDS if grid != "attention_off"})
        elif kind == "margin":
            body = margin_table(arms(packed(name)))
        elif kind == "thresholds":
            fixed, below = (by_number(*grid) for grid in BY_NUMBER.values())
            body = threshold_table(below, fixed)
        elif kind == "late":
            body = late_table(arms(packed(name)))
        elif kind == "ledger":
            body = ledger_table(regimes())
        elif kind == "first":
            body = first_table(finding(name))
        elif kind == "periods":
            body = period_table(packed(name), packed("attention_off"))
        elif kind == "onsets":
            body = onsets_table(recorded(name))
        elif kind == "theorems":
            body = theory_table(recorded(name)[0])
        else:
            body = "".join(
                f"    {verdict}\n" for verdict in verdicts(recorded(name)) if verdict.run.config["seed"] == 0
            )
        return f"<!-- {kind} {name} -->\n\n{body}\n<!-- end -->"

    return re.sub(
        r"<!-- (table|verdicts|onsets|theorems|file|targets|finding|calm|first|periods|costs|texts|ranks|margin|thresholds|late|ledger|cost) (\w+) -->.*?<!-- end -->",
        block,
        text,
        flags=re.DOTALL,
    )


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    paths = (ROOT / "README.md", RESULTS / "REPORT.md", *sorted(ROOT.glob("docs/*.md")))
    pages = {path: filled(path.read_text()) for path in paths}
    if args.check:
        stale = [path.name for path, text in pages.items() if text != path.read_text()]
        print(
            f"{', '.join(stale)}: differs from results/; run scripts/report.py"
            if stale
            else "the tables agree with results/"
        )
        return 1 if stale else 0
    for path, text in pages.items():
        path.write_text(text)
    for name in FINDINGS:
        print(*save(strips([(arm.name, arm.verdicts) for arm in finding(name)]), RESULTS / name))
    for grid, (field, axis) in NUMBERS.items():
        lines = [(arm.name, field, arm.verdicts) for arm in arms(packed(grid), off=packed("attention_off"))]
        print(*save(against(lines, axis), RESULTS / grid))
    calm = [run for run in packed("table2_small") if run.arm in ("AdamW", "MSign (attention)")]
    for name, runs in (("calm", calm), ("late_seeds", packed("late_seeds"))):
        print(*save(fig3(runs), RESULTS / name))
    lines = [
        (name, field, [v for arm in by_number(grid, field) for v in arm.verdicts if applications(v.run)])
        for name, (grid, field) in BY_NUMBER.items()
    ]
    print(*save(against(lines, "matrices replaced in 1000 steps", applications), RESULTS / "adaptive"))
    texts = packed("texts")
    panels = [
        (text, [(a.name, [v.run for v in a.verdicts]) for a in arms([r for r in texts if r.config["dataset"] == text])])
        for text in dict.fromkeys(run.config["dataset"] for run in texts)
    ]
    x, y = ("stable rank of attention", srank), ("validation − training loss, nats", gap)
    print(*save(scatter(panels, x, y), RESULTS / "texts"))
    for folder in sorted(p for p in RESULTS.iterdir() if p.is_dir()):
        runs = recorded(folder.name)
        print(*save(overview(runs), RESULTS / folder.name))
        first = [run for run in runs if run.config["seed"] == 0]
        if any("jacobian/sigma1/0" in line for run in first for line in run.lines):
            print(*save(heatmaps(first), RESULTS / f"{folder.name}_heatmaps"))
    return 0


if __name__ == "__main__":
    run_cli(main, "report.py")
