"""How fast training, MSign and the measurements are on this machine, each compared with an alternative.

    python scripts/bench.py                                    # 15 minutes; `make reproduce` is 5 of them
    python scripts/bench.py --quick                            # under two minutes: fewer rounds, no `make reproduce`
    python scripts/bench.py --nanogpt=../nanoGPT               # also against an unmodified checkout of karpathy/nanoGPT
    python scripts/bench.py --out=results/bench                # also write results/bench.json and .md

trials/bench.py says what is compared and how it is timed. Times are medians, ratios median [min, max].
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from config import Number, Parser, UserError, output_stem, run_cli
from trials.bench import Bench


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and shapes, no reproduction")
    parser.add_argument("--nanogpt", type=Path, help="also race against this checkout of karpathy/nanoGPT")
    cores = torch.get_num_threads()
    threads = "number of CPU threads, except in the stress test, which has one [%(default)s]"
    parser.add_argument("--threads", type=Number(int, 1), default=cores, help=threads)
    parser.add_argument("--only", choices=Bench.TABLES, nargs="+", help="measure these tables alone [all]")
    parser.add_argument("--out", type=output_stem, help="also write the results to this path + .json and .md")
    args = parser.parse_args()
    if args.nanogpt and not (args.nanogpt / "model.py").is_file():
        raise UserError(f"--nanogpt = {str(args.nanogpt)!r}: no model.py there; must be a checkout of karpathy/nanoGPT")
    tables = args.only or [name for name in Bench.TABLES if not (args.quick and name in Bench.SLOW)]
    bench = Bench(args.quick, args.nanogpt, args.threads)
    about = bench.run(tables)
    text = bench.report.markdown(about)
    print(text)
    if args.out:
        args.out.with_suffix(".md").write_text(text)
        record = {"about": about, "targets": bench.report.targets, "tables": bench.report.sections}
        args.out.with_suffix(".json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    run_cli(main, "bench.py")
