"""Does every configuration fit into a GPU and stay in bf16? Shown without a GPU, on a CUDA that computes nothing.

python scripts/without_gpu.py                            # the tables; five minutes (Linux and gcc)
python scripts/without_gpu.py --out=results/without_gpu    # also write the page OUT.md
python scripts/without_gpu.py --only gpt_3b:64:hsdp      # a configuration, on how many GPUs, and spread how

Every run takes six steps at its full size as rank 0 of its processes, with two micro-batches a step; one step measures
the weights and activations, one applies MSign. The exit code is 0 only if no rule of the page is broken.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import Parser, output_stem, run_cli
from trials.without_gpu import RUNS, broken, build, page, row, run


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="RUN", help="run only these, such as gpt_3b:8:fsdp")
    parser.add_argument("--out", type=output_stem, help="also write OUT.md")
    args = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        environment = build(Path(scratch))
        for which in args.only or RUNS:
            found.append(run(which, environment, Path(scratch)))
            print("; ".join(f"{key} {value}" for key, value in row(found[-1]).items()), flush=True)
    print(page(found))
    if args.out:
        args.out.with_suffix(".md").write_text(page(found))
    return 1 if any(map(broken, found)) else 0


if __name__ == "__main__":
    run_cli(main, "without_gpu.py")
