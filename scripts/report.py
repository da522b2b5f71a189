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

from config import Parser, UserError, run_cli
from evidence import (
    Arm,
    arms,
    arms_table,
    calm_table,
    costs,
    first_table,
    label,
    late_table,
    margin_table,
    period_table,
    texts_table,
    unpack,
)
from figures import against, heatmaps, overview, save, strips
from runs import load_run, onsets_table, table, theory_table, verdicts
from scripts.plan import paper_table

RESULTS = ROOT / "results"
# a finding: its grid, and the arms of other grids that it is held against
FINDINGS = {
    "layers": ("table2_small", {"attention_off": ["attention off"]}),
    "controls": ("controls", {"table2_small": ["AdamW", "MSign (attention)"], "attention_off": ["attention off"]}),
    "rivals": ("rivals", {"attention_off": ["attention off"]}),
}


# grids whose runs differ in a number
NUMBERS = {
    "table3_small": ("msign_period", "period P of MSign, steps"),
    "margin": ("lr_scale", "constant learning rate, multiples of the paper's"),
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


def recorded(experiment: str):
    """The runs recorded under results/<experiment>, arm by arm, seed by seed."""
    runs = [load_run(path.parent) for path in sorted((RESULTS / experiment).glob("*/record.json"))]
    if not runs:
        raise UserError(f"results/{experiment}: no recorded runs")
    order = ["AdamW", "MSign (attention)", "MSign (mlp)", "attention off"]
    return sorted(runs, key=lambda r: (order.index(r.arm) if r.arm in order else 99, r.config["seed"]))


def filled(text: str) -> str:
    """`text` with every block between <!-- KIND NAME --> and <!-- end --> made anew: an experiment's table, seed-0
    verdicts, onsets, seed-0 AdamW's theorems; a recorded file results/NAME.md, or of it only the first table, the
    targets; a finding's table, with costs or without, or what moved first in its arms; a grid of periods, of texts, of
    learning rates or of late collapses; or what MSign costs on a cluster."""

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
        elif kind == "margin":
            body = margin_table(arms(packed(name)))
        elif kind == "late":
            body = late_table(arms(packed(name)))
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
        r"<!-- (table|verdicts|onsets|theorems|file|targets|finding|calm|first|periods|costs|texts|margin|late|cost) (\w+) -->.*?<!-- end -->",
        block,
        text,
        flags=re.DOTALL,
    )


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    pages = {path: filled(path.read_text()) for path in (ROOT / "README.md", RESULTS / "REPORT.md")}
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
    for grid, axis in NUMBERS.items():
        judged = [(arm.name, arm.verdicts) for arm in arms(packed(grid), off=packed("attention_off"))]
        print(*save(against(judged, *axis), RESULTS / grid))
    for folder in sorted(p for p in RESULTS.iterdir() if p.is_dir()):
        runs = recorded(folder.name)
        print(*save(overview(runs), RESULTS / folder.name))
        first = [run for run in runs if run.config["seed"] == 0]
        if any("jacobian/sigma1/0" in line for run in first for line in run.lines):
            print(*save(heatmaps(first), RESULTS / f"{folder.name}_heatmaps"))
    return 0


if __name__ == "__main__":
    run_cli(main, "report.py")
