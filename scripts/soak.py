"""Train a tiny model, measure everything and save at every step, and see whether memory, files or time grow.

python scripts/soak.py --out=results/soak    # 6000 steps in a quarter of an hour on two cores; writes results/soak.md
python scripts/soak.py --steps=1200          # in three minutes

The table compares the last tenth of the steps with the second tenth; the exit code is 1 if something grew. The model is
tiny because NanoGPT-5M would need thirty hours for 6000 steps on two cores.
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
    parser.add_argument("--steps", type=Number(int, 100), default=6000, help="steps of the run [%(default)s]")
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
