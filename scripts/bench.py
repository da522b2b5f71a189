"""What MSign and the instruments cost: one application of each against one training step, side by side in one process.

    python scripts/bench.py                            # the stress test's step, all 144 block matrices
    python scripts/bench.py --out=results/bench.md     # and record it

Rounds alternate between all of them, and the ratio is taken round by round, so a machine that slows down
slows all. Prints median [min, max]; the share of training is at P = 100 and at the config's own cadences.
"""

import argparse
import platform
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

import measure
import mup
from config import Parser, load_config, run_cli
from model import GPT
from msign import BACKENDS, MSign, apply_


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

    accumulate = cfg.batch_size // cfg.micro_batch
    tokens = x[: cfg.probe_batch, :-1]

    def micro_step():
        model.loss(x[:, :-1], x[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        adamw.step()

    def norms():
        """Of gradients and updates, as in train.py."""
        params = dict(model.named_parameters())
        measure.norms("grad_norm", {n: p.grad for n, p in params.items()}, True)
        before = {n: p.detach().clone() for n, p in params.items()}
        measure.norms("update_norm", {n: p.detach() - before[n] for n, p in params.items()}, True)

    micro_step()
    micro_step()  # W_Q has left zero: every matrix costs what it costs later
    work = {f"step ({accumulate} × one micro-batch)" if accumulate > 1 else "step": (micro_step, None)}
    for backend in BACKENDS:
        for targets in ("attention", "blocks"):
            wrapped = MSign(adamw, model.named_parameters(), targets=targets, backend=backend)
            name = f"MSign {targets} ({len(wrapped.params)} matrices), {backend}"
            work[name] = lambda w=wrapped: apply_(w.params, w.update), 100
    instruments = {
        "spectra of all": (lambda: measure.weights(model, True), cfg.probe_every),
        "norms of gradients and updates": (norms, cfg.probe_every),
        "activations": (lambda: measure.activations(model, tokens, True, print, nullcontext()), cfg.probe_every),
        f"Jacobians ({cfg.n_layer} blocks)": (
            lambda: measure.jacobians(model, tokens, True, print),
            cfg.jacobian_every,
        ),
    }
    work |= instruments
    times = {name: [] for name in work}
    for round in range(args.rounds + 2):
        for name, (do, _) in work.items():
            seconds = clock(do)
            if round >= 2:
                times[name].append(seconds * (accumulate if do is micro_step else 1))
    lines = ["| what | ms | ratio to one step | every | share of training |", "|---|---|---|---|---|"]
    steps, together = next(iter(times.values())), 0.0
    for name, (do, every) in work.items():
        median = 1e3 * statistics.median(times[name])
        if do is micro_step:
            lines.append(f"| {name} | {median:.1f} | 1 | | |")
            continue
        ratios = [a / b for a, b in zip(times[name], steps, strict=True)]
        share = 100 * statistics.median(ratios) / every
        together += share if name in instruments else 0
        spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        lines.append(f"| {name} | {median:.1f} | {spread} | {every} | {share:.2f} % |")
    lines.append(f"| all instruments | | | | {together:.2f} % |")
    what = f"`{Path(args.config).stem}`, {torch.get_num_threads()} thread(s), median of {args.rounds} rounds"
    text = "\n".join(lines) + f"\n\n{what}, torch {torch.__version__}, {processor()}.\n"
    print(text)
    if args.out:
        args.out.write_text(text)
    return 0


if __name__ == "__main__":
    run_cli(main, "bench.py")
