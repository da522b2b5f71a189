"""Inject faults into training runs and count how often a run reacts as expected.

python scripts/faults.py --out=results/faults    # half an hour on two cores; also write results/faults.md
python scripts/faults.py --quick                 # a few faults of each kind, two minutes

A run must print at most one line of error and keep every step up to its last checkpoint. Resumed, it must end bit for
bit like a run without a fault. Where a fault has another rule, trials/faults.py says so. The table counts the
injections of each fault, a hundred kills and more among them. Each exception is listed below the table, and any
exception makes the exit code 1.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from config import Parser, UserError, output_stem, run_cli
from trials.faults import NAMES, inject, plan_victim, report
from trials.place import Place


def main() -> int:
    if sys.argv[1:2] == ["--victim"]:  # a run with a fault planned inside it, as Place.start starts it
        plan_victim(sys.argv[2], int(sys.argv[3]))
        sys.argv = ["train.py", *sys.argv[4:]]
        return train.main()
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="inject only a few faults of each kind")
    parser.add_argument("--only", nargs="+", metavar="FAULT", help=f"inject only these of {', '.join(NAMES)}")
    parser.add_argument("--out", type=output_stem, help="also write OUT.md")
    args = parser.parse_args()
    for name in args.only or ():
        if name not in NAMES:
            raise UserError(f"only = {name!r}: must be one of {', '.join(NAMES)}")
    with tempfile.TemporaryDirectory() as scratch:
        table, exceptions = inject(args.only or list(NAMES), args.quick, Place(Path(scratch)))
    said = report(table, exceptions)
    print(said)
    if args.out:
        args.out.with_suffix(".md").write_text(said)
    return 1 if exceptions else 0


if __name__ == "__main__":
    run_cli(main, "faults.py")
