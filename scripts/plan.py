"""Estimate, without a GPU, what a configuration takes on N GPUs: memory a GPU, FLOPs, time, and what MSign adds.

    python scripts/plan.py configs/gpt_3b.py --gpus 8
    python scripts/plan.py configs/llama_1b_msign.py --gpus 64 --mfu 0.3 --period 10
    python scripts/plan.py --paper                      # the paper's four models on 8 H100, next to its Table 1

A configuration that does not fit into the GPUs' memory is refused, and the message names the options that make it fit.
A step is assumed to run at --mfu of the GPU's peak. The matrix sign's products run at 60 % of the fp16 and fp64 peaks,
eigenvectors at 6 % of the fp64 peak, as measured for 2048 × 2048 on an H100. What the matrix
sign reads and writes is added, at the bandwidth of the GPU's memory. Memory is counted for fp32 weights, gradients and
moments, with an estimate of what one micro-batch keeps for its backward pass.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import Number, Parser, UserError, load_config, run_cli
from engine.plan import GPUS, Plan, describe, paper_table, shards_of


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("config", nargs="?", help="config file; train.py's --field=value may follow")
    parser.add_argument("--gpus", type=Number(int, 1), default=8, help="number of GPUs [%(default)s]")
    parser.add_argument("--gpu", choices=GPUS, default="H100", help="their kind [%(default)s]")
    parser.add_argument(
        "--mfu", type=Number(float, 0.001, 1), default=0.4,
        help="share of the GPU's peak at which a step runs [%(default)s]",
    )  # fmt: skip
    parser.add_argument("--period", type=Number(int, 1), help="steps between two applications [the config's, or 100]")
    parser.add_argument("--targets", help="what MSign is applied to [the config's msign_targets]")
    parser.add_argument("--paper", action="store_true", help="the paper's four models instead")
    args, rest = parser.parse_known_args()
    if args.paper:
        print(paper_table(args.gpus, args.mfu, args.gpu))
        return 0
    if not args.config:
        raise UserError("config: must be given, such as configs/gpt_3b.py (or --paper)")
    cfg = load_config([args.config, *rest])
    try:
        shards = shards_of(cfg, args.gpus, GPUS[args.gpu])
        plan = Plan(cfg, args.gpus, shards, GPUS[args.gpu], args.mfu, args.targets or cfg.msign_targets)
        print(describe(plan, args.period or cfg.msign_period or 100))
    except ValueError as error:
        where = f"--targets = {args.targets!r}" if args.targets else f"msign_targets = {cfg.msign_targets!r}"
        raise UserError(f"{where}: {error}") from error
    return 0


if __name__ == "__main__":
    run_cli(main, "plan.py")
