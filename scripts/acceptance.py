"""Check that this machine computes what it should, and how fast. Run this first on a new GPU.

python scripts/acceptance.py --out=results/acceptance/h100    # ten minutes; also write the page OUT.md
python scripts/acceptance.py --only sign run                  # some of the parts alone

Gradients of four small models in every precision, attention kernel and kind of compilation are compared with those of
fp32 on the CPU, matrix signs with those in fp64, whole runs with runs on one process and on the CPU. Then come speed
and memory, against the plan. A path that this machine cannot run is listed as not run. The exit code is 0 only if
everything that ran held.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import Parser, UserError, output_stem, run_cli
from engine import machine
from trials.acceptance import PARTS, page, rows


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="PART", help=f"run only these of {', '.join(PARTS)}")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    parser.add_argument("--out", type=output_stem, help="also write OUT.md")
    args = parser.parse_args()
    for name in args.only or ():
        if name not in PARTS:
            raise UserError(f"only = {name!r}: must be one of {', '.join(PARTS)}")
    device = machine.pick_device(args.device)
    with tempfile.TemporaryDirectory() as scratch:
        found = []
        for row in rows(args.only or PARTS, device, Path(scratch)):
            print(f"{row.part}: {row.path}: {row.found}" + (f" (at most {row.limit})" if row.limit else ""), flush=True)
            found.append(row)
    said = page(found, device)
    print(said)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".md").write_text(said)
    return 1 if any(row.held is False for row in found) else 0


if __name__ == "__main__":
    run_cli(main, "acceptance.py")
