"""Train a tiny model for long, everything measured and saved at every step, and watch what grows that should not.

python scripts/soak.py --out=results/soak    # 6000 steps in a quarter of an hour on two cores
python scripts/soak.py --steps=1200          # in six minutes

NanoGPT-5M takes 6000 steps in thirty hours on two cores.
The second tenth of the steps is held against the last one; exit code 1 when something grew.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import Number, Parser, output_stem, run_cli
from trials.place import Place
from trials.soak import judge, watch


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=Number(int, 100), default=6000)
    parser.add_argument("--out", type=output_stem, help="also write OUT.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        said, flat = judge(watch(Place(Path(scratch)), args.steps))
    print(said)
    if args.out:
        args.out.with_suffix(".md").write_text(said)
    return 0 if flat else 1


if __name__ == "__main__":
    run_cli(main, "soak.py")
