"""What MSign costs: one application against one training step, side by side in one process.

    python scripts/bench.py                            # the stress test's step, all 144 block matrices
    python scripts/bench.py --out=results/bench.md     # and record it

Rounds alternate between the two, and the ratio is taken round by round, so a machine that slows down
slows both. Prints median [min, max].
"""

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

import mup
from config import Parser, load_config, run_cli
from model import GPT
from msign import BACKENDS, MSign, apply_
from probes import spectra


def clock(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        names = [
            x.split(":")[1].strip()
            for x in Path("/proc/cpuinfo").read_text().splitlines()
            if x.startswith("model name")
        ]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs" / "stress_constant.py"))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    cfg = load_config([args.config])
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    model = GPT(cfg)
    mup.init_weights(model, cfg)
    adamw = torch.optim.AdamW(mup.param_groups(model, cfg), fused=True)
    x = torch.randint(cfg.vocab_size, (cfg.micro_batch, cfg.block_size + 1))

    def step():
        model.loss(x[:, :-1], x[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        adamw.step()
        adamw.zero_grad()

    step()
    step()  # W_Q has left zero: every matrix costs what it costs later
    work = {"step": step}
    for backend in BACKENDS:
        for targets in ("attention", "blocks"):
            wrapped = MSign(adamw, model.named_parameters(), targets=targets, backend=backend)
            work[f"MSign {targets} ({len(wrapped.params)} matrices), {backend}"] = lambda w=wrapped: apply_(
                w.params, w.update
            )
    work["spectra of all"] = lambda: spectra(wrapped.params)
    times = {name: [] for name in work}
    for round in range(args.rounds + 2):
        for name, do in work.items():
            seconds = clock(do)
            if round >= 2:
                times[name].append(seconds)
    lines = ["| what | ms | ratio to one step | share of training at P = 100 |", "|---|---|---|---|"]
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times["step"], strict=True)]
        ratio = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]" if name != "step" else "1"
        share = f"{statistics.median(ratios):.2f} %" if name.startswith("MSign") else ""
        lines.append(f"| {name} | {1e3 * statistics.median(seconds):.1f} | {ratio} | {share} |")
    what = f"`{Path(args.config).stem}`, {torch.get_num_threads()} thread(s), median of {args.rounds} rounds"
    text = "\n".join(lines) + f"\n\n{what}, torch {torch.__version__}, {processor()}.\n"
    print(text)
    if args.out:
        args.out.write_text(text)
    return 0


if __name__ == "__main__":
    run_cli(main, "bench.py")
