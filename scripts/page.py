"""Write one HTML page of recorded runs: verdicts, plots that can be zoomed, settings, events and environment.

    python scripts/page.py runs/nano_5m_msign                      # page.html
    python scripts/page.py results/ramp/*-seed0 --out=ramp.html    # up to eight runs on a page, a colour each

The page opens in any browser, without a network. An older file of that name is replaced.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis import page
from analysis.runs import load_run
from config import Parser, output_stem, run_cli


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folder, or offline W&B run (its folder or .wandb file)"
    )
    parser.add_argument("--out", type=output_stem, default="page.html", help="the file to write [page.html]")
    args = parser.parse_args()
    page.write([load_run(path) for path in args.runs], args.out)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    run_cli(main, "page.py")
