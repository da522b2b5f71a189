"""What a configuration takes on N GPUs, without touching one: memory a rank, FLOPs, time, and what MSign adds.

    python scripts/plan.py configs/gpt_3b.py --gpus 8
    python scripts/plan.py configs/llama_1b_msign.py --gpus 64 --mfu 0.3 --period 10
    python scripts/plan.py --paper                      # the paper's four models on 8 H100, next to its Table 1

A layout that cannot fit is refused, with one that does. Nothing here is measured but the paper's own column: a step runs at --mfu of the
GPU's peak, the matrix sign's products at 50 % of the fp32 peak, eigenvectors at 2 % of the fp64 peak; memory is counted for fp32 weights,
gradients and moments, with an estimate of what one micro-batch keeps for its backward pass.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from config import Number, Parser, UserError, load_config, run_cli
from engine import budget
from engine.budget import GPUS, Memory, Plan

# the step near which the paper's AdamW fails (Table 4, Fig 3), and MSign's overhead at P = 100 that it measured (Table 1)
PAPER = {"nano_5m": (30_000, "−2.4 %"), "sigma_40m": (50_000, "6.7 %"), "llama_1b": (2_000, "6.2 %"),
         "llama_moe_3b": (3_000, "4.6 %")}  # fmt: skip


def duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60), ("s", 1)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{1e3 * seconds:.3g} ms"


def describe(plan: Plan, period: int) -> str:
    """The plan as a page of text."""
    cfg, model = plan.cfg, budget.on_meta(plan.cfg)
    total, active = (sum(map(count, model.parameters())) for count in (lambda p: p.numel(), model.active))
    memory = Memory.of(cfg, plan.ranks, plan.sharded)
    how = "one GPU" if plan.ranks == 1 else f"{plan.ranks} GPUs, {'FSDP2' if plan.sharded else 'DDP'}"
    accumulate = cfg.batch_size // cfg.micro_batch // plan.ranks
    gb = {
        name: getattr(memory, name) / 1e9
        for name in ("weights", "gradients", "moments", "activations", "casts", "gathered")
    }
    run = cfg.max_steps * plan.step_seconds
    sent = max(budget.msign_bytes(plan.shapes, plan.ranks, plan.sharded))
    count = sum(s[0] if len(s) > 2 else 1 for s in plan.shapes)
    out = [
        f"{cfg.name} on {how}",
        f"  parameters  {total:,}" + (f", of which a token meets {active:,}" if active != total else ""),
        f"  memory      {memory.total / 1e9:.3g} GB a rank of {plan.gpu.memory / 1e9:.3g}: "
        + ", ".join(f"{k} {v:.3g}" for k, v in gb.items() if v),
        f"  a step      {cfg.tokens_per_step:,} tokens = {plan.ranks} × {accumulate} × {cfg.micro_batch} × {cfg.block_size}, "
        f"{budget.step_flops(cfg):.3g} FLOPs, {duration(plan.step_seconds)} at {100 * plan.mfu:.0f} % of the peak",
        f"  the run     {cfg.max_steps:,} steps, {cfg.max_steps * cfg.tokens_per_step / 1e9:.3g}e9 tokens, {duration(run)}",
    ]
    name = cfg.name.removesuffix("_adamw").removesuffix("_msign")
    if name in PAPER:
        step = PAPER[name][0]
        out.append(
            f"  the paper's AdamW fails near step {step:,}: {step * cfg.tokens_per_step / 1e9:.3g}e9 tokens, {duration(step * plan.step_seconds)}"
        )
    out.append(f"  MSign       {count} matrices ({plan.targets}), every {period} steps")
    out.append(f"    in theory (Eq 16, FLOPs of an SVD)  {100 * plan.eq_16(period):.2g} % of training")
    for backend, flops in (("polar", budget.polar_flops), ("eigh", budget.eigh_flops)):
        compute, exchange = plan.application_seconds(backend)
        out.append(f"    {backend:5}  {budget.msign_flops(plan.shapes, flops):.2g} FLOPs, {duration(compute)} + {duration(exchange)} of exchange, "
                   f"r = {(compute + exchange) / plan.step_seconds:.2g} steps, {100 * plan.share(backend, period):.2g} % of training")  # fmt: skip
    out.append(f"    every rank sends {sent / 1e6:.3g} MB an application")
    return "\n".join(out)


def paper_table(gpus: int = 8, mfu: float = 0.4, gpu: str = "H100") -> str:
    """MSign on all block matrices every 100 steps of the paper's four models, as a Markdown table."""
    rows = [["model", "FLOPs a step", "step, ms", "Eq 16", "FLOPs an application, polar", "MB a rank sends", "polar, ms: compute + exchange", "r, steps", "share of the time", "eigh instead: r", "paper, measured"]]  # fmt: skip
    rows.append(["---"] * len(rows[0]))
    for name, (_, overhead) in PAPER.items():
        cfg = load_config([str(ROOT / "configs" / f"{name}_adamw.py")])
        sharded = not budget.fits(cfg, gpus, False, GPUS[gpu])
        plan = Plan(cfg, gpus, sharded, GPUS[gpu], mfu, "blocks")
        compute, exchange = plan.application_seconds("polar")
        rows.append([
            name, f"{budget.step_flops(cfg):.2g}", f"{1e3 * plan.step_seconds:.3g}", f"{100 * plan.eq_16(100):.3g} %",
            f"{budget.msign_flops(plan.shapes, budget.polar_flops):.2g}",
            f"{max(budget.msign_bytes(plan.shapes, gpus, sharded)) / 1e6:.3g}", f"{1e3 * compute:.3g} + {1e3 * exchange:.2g}",
            f"{100 * plan.share('polar', 100):.2g}", f"{100 * plan.share('polar', 100):.2g} %",
            f"{100 * plan.share('eigh', 100):.2g}", overhead,
        ])  # fmt: skip
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def chosen(cfg, gpus: int, gpu) -> bool:
    """Whether the model is sharded; raises UserError when it does not fit, saying what would."""
    if cfg.batch_size % (cfg.micro_batch * gpus):
        good = [m for m in range(1, cfg.micro_batch + 1) if cfg.batch_size % (m * gpus) == 0]
        hint = f"--micro_batch={good[-1]}" if good else f"at most {cfg.batch_size} GPUs"
        raise UserError(
            f"--gpus = {gpus}: times micro_batch={cfg.micro_batch} must divide batch_size={cfg.batch_size}; {hint}"
        )
    ways = {"auto": (False, True), "ddp": (False,), "fsdp": (True,)}[cfg.parallel] if gpus > 1 else (False,)
    for sharded in ways:
        if budget.fits(cfg, gpus, sharded, gpu):
            return sharded
    need = Memory.of(cfg, gpus, ways[-1]).total / 1e9
    fitting = (words for words, c, ranks, sharded in budget.layouts(cfg, gpus) if budget.fits(c, ranks, sharded, gpu))
    raise UserError(
        f"--gpus = {gpus}: {need:.3g} GB a rank, which has {gpu.memory / 1e9:.3g} GB; what fits: {next(fitting, 'nothing with this batch_size')}"
    )


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("config", nargs="?", help="followed by train.py's own --field=value")
    parser.add_argument("--gpus", type=Number(int, 1), default=8)
    parser.add_argument("--gpu", choices=GPUS, default="H100")
    parser.add_argument(
        "--mfu", type=Number(float, 0.001, 1), default=0.4, help="share of the peak at which a step runs"
    )
    parser.add_argument(
        "--period", type=Number(int, 1), help="steps between two applications; default: the config's, or 100"
    )
    parser.add_argument("--targets", help="what MSign is applied to; default: the config's")
    parser.add_argument("--paper", action="store_true", help="the paper's four models instead")
    args, rest = parser.parse_known_args()
    if args.paper:
        print(paper_table(args.gpus, args.mfu, args.gpu))
        return 0
    if not args.config:
        raise UserError("config: must be given, such as configs/gpt_3b.py (or --paper)")
    cfg = load_config([args.config, *rest])
    try:
        sharded = chosen(cfg, args.gpus, GPUS[args.gpu])
        plan = Plan(cfg, args.gpus, sharded, GPUS[args.gpu], args.mfu, args.targets or cfg.msign_targets)
        print(describe(plan, args.period or cfg.msign_period or 100))
    except ValueError as error:
        raise UserError(f"msign_targets: {error}") from error
    return 0


if __name__ == "__main__":
    run_cli(main, "plan.py")
