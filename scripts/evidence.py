"""Repeat the runs that the findings of results/REPORT.md rest on, and fill its tables and figures from them.

    python scripts/evidence.py            # about ten hours on two cores; after an interruption, call it again
    python scripts/evidence.py --quick    # a quarter of an hour: half the length, two seeds; leaves results/ alone

A grid is a set of runs that configs/sweeps/ defines. Runs that runs/ holds already are not repeated. The command packs
the runs into results/ and overwrites the tables and figures there. The first two and a quarter of the ten hours are for
the report's Tables 2 and 3.
"""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from analysis.report import GRIDS, RESULTS, arms_table, finding, fitted_r, markdown, packed, period_table
from analysis.statistics import judged
from config import Parser, output_folder, run_cli

SHORT = ["--warmup_steps=1250", "--max_steps=1500", "--seed=0,1"]
# table3_small lacks period 100, which is an arm of table2_small
QUICK = {"table2_small": SHORT, "attention_off": SHORT, "table3_small": [*SHORT, "--msign_period=10,1000"]}


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    quick = "three grids, half the length, two seeds; results/ stays as it is"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--runs_dir", type=output_folder, default="runs", help="where run folders go [%(default)s]")
    args, rest = parser.parse_known_args()
    runs_dir = args.runs_dir / "quick" if args.quick else args.runs_dir
    runs_dir.mkdir(parents=True, exist_ok=True)
    record = runs_dir / "recorded" if args.quick else RESULTS
    for grid in QUICK if args.quick else GRIDS:
        command = [sys.executable, str(ROOT / "scripts" / "sweep.py"), str(ROOT / "configs" / "sweeps" / f"{grid}.py")]
        more = [
            f"--runs_dir={runs_dir}",
            f"--record={record}",
            "--wandb=off",
            *(QUICK[grid] if args.quick else []),
            *rest,
        ]
        done = subprocess.run([*command, *more])
        if done.returncode:
            return done.returncode
    if args.quick:
        every_100 = [run for run in packed("table2_small", record) if run.arm == "MSign (attention)"]
        runs = judged(packed("table3_small", record) + every_100, packed("attention_off", record), "lr_scale")
        runs = runs.sort_values("msign_period", ignore_index=True)
        print(markdown(arms_table(finding("layers", record))))
        print(markdown(period_table(runs)))
        print(f"r = {fitted_r(runs):.2f} steps an application.")
        return 0
    return subprocess.run([sys.executable, str(ROOT / "scripts" / "report.py")]).returncode


if __name__ == "__main__":
    run_cli(main, "evidence.py")
