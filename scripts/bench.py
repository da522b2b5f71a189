"""How fast all of it is on this machine, in one run: every figure a ratio of two things that took turns.

    python scripts/bench.py                                    # a quarter of an hour, a third of it `make reproduce`'s four arms
    python scripts/bench.py --quick                            # under two minutes: fewer rounds, no reproduction
    python scripts/bench.py --nanogpt=../nanoGPT               # also against a checkout of karpathy/nanoGPT, unmodified
    python scripts/bench.py --out=results/bench                # write bench.json and bench.md, too

Rounds alternate between the contenders, and a ratio is taken round by round, so a machine that slows down slows both.
Times are medians, ratios median [min, max]. "Plain" is the same model written down without any of our levers, with PyTorch's
defaults: three products for q, k and v, PyTorch's attention, all logits at once, AdamW as it comes.
"""

import argparse
import contextlib
import importlib.util
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import model as gpt
import msign
import mup
from config import Config, Number, Parser, UserError, load_config, output_stem, run_cli
from engine import budget, machine, parallel
from model import GPT, MLP, Attention, MoE
from stability import metrics

CPU = torch.device("cpu")
PERIOD = 100
GPT_124M = dict(n_layer=12, d_model=768, n_head=12, d_ff=3072, block_size=512, batch_size=480, micro_batch=4)
SPECTRA = {"κ = 1e2": 1e2, "κ = 1e4": 1e4, "rank n/2": None}
SHAPES = {"96 × 48²": (96, 48, 48), "48 × (48 × 192)": (48, 48, 192), "8 × 512²": (8, 512, 512),
          "2 × 2048²": (2, 2048, 2048), "2 × (2048 × 5440)": (2, 2048, 5440)}  # fmt: skip


class Plain(Attention):
    """Attention written down: three products, PyTorch's kernel."""

    def forward(self, x: Tensor) -> Tensor:
        B, T, d = x.shape
        q, k, v = (W(x).view(B, T, self.n_head, -1).transpose(1, 2) for W in (self.W_Q, self.W_K, self.W_V))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return self.W_O(y.transpose(1, 2).reshape(B, T, d))


@contextlib.contextmanager
def defaults():
    """PyTorch's own arithmetic, whatever machine.set_arithmetic has chosen for ours."""
    chosen = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    torch.set_flush_denormal(False)
    yield
    torch.backends.mkldnn.matmul.fp32_precision = chosen
    torch.set_flush_denormal(True)


class Step:
    """One contender: what a training step of cfg takes with it, from one micro-batch and one update."""

    def __init__(self, cfg: Config, model, loss_of: Callable, optimizer, context: Callable):
        self.cfg, self.model, self.loss_of, self.optimizer, self.context = cfg, model, loss_of, optimizer, context
        generator = torch.Generator().manual_seed(0)
        windows = torch.randint(cfg.vocab_size, (cfg.micro_batch, cfg.block_size + 1), generator=generator)
        self.x, self.y = windows[:, :-1], windows[:, 1:]

    def __call__(self) -> float:
        """Seconds a step: batch_size / micro_batch times the forward and backward pass, and one update."""
        with self.context():
            began = time.perf_counter()
            self.loss_of(self.x, self.y).backward()
            between = time.perf_counter()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.grad_clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            update = time.perf_counter() - between
        return (between - began) * self.cfg.batch_size / self.cfg.micro_batch + update


@contextlib.contextmanager
def all_logits():
    """The loss over all logits at once."""
    limit, gpt.LOGITS = gpt.LOGITS, sys.maxsize
    yield
    gpt.LOGITS = limit


def ours(cfg: Config, context: Callable = contextlib.nullcontext, fused: bool = True) -> Step:
    """The step of train.py with this configuration."""
    model = GPT(cfg)
    mup.init_weights(model, cfg)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=cfg.dtype == "bfloat16")
    loss_of, _, notes = machine.compiled(cfg, model, CPU, autocast)
    for note in notes:
        print(f"WARNING {note}", file=sys.stderr)

    def loss(x, y):
        with autocast:
            return loss_of(x, y)

    optimizer = torch.optim.AdamW(mup.param_groups(model, cfg), betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=fused)
    return Step(cfg, model, loss, optimizer, context)


def without(cfg: Config) -> dict[str, Step]:
    """Ours with one lever taken away at a time."""
    levers = {
        "compiled blocks": ours(replace(cfg, compile="off")),
        "attention in chunks": ours(replace(cfg, attn_kernel="flash")),
        "oneDNN and flushed denormals": ours(cfg, defaults),
        "fused AdamW": ours(cfg, fused=False),
    }
    if cfg.micro_batch * cfg.block_size * cfg.vocab_size > gpt.LOGITS:
        levers["the loss in chunks"] = ours(cfg, all_logits)
    return {f"ours without {lever}": step for lever, step in levers.items()}


def plain(cfg: Config) -> Step:
    model = GPT(replace(cfg, compile="off"))
    mup.init_weights(model, cfg)
    for block in model.blocks:
        block.attn.__class__ = Plain

    def loss(x, y):
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    optimizer = torch.optim.AdamW(mup.param_groups(model, cfg), betas=(cfg.beta1, cfg.beta2), eps=cfg.eps)
    return Step(cfg, model, loss, optimizer, defaults)


def nanogpt(path: Path, cfg: Config, compiled: bool) -> Step:
    """nanoGPT's own model, optimizer and step, as its train.py puts them together on a CPU (fp32, no autocast)."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", path / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with contextlib.redirect_stdout(sys.stderr):
        spec.loader.exec_module(module)
        model = module.GPT(module.GPTConfig(
            block_size=cfg.block_size, vocab_size=cfg.vocab_size, n_layer=cfg.n_layer, n_head=cfg.n_head,
            n_embd=cfg.d_model, dropout=0.0, bias=False,
        ))  # fmt: skip
        optimizer = model.configure_optimizers(cfg.weight_decay, cfg.lr, (cfg.beta1, cfg.beta2), "cpu")
    run = torch.compile(model) if compiled else model
    return Step(cfg, model, lambda x, y: run(x.contiguous(), y.contiguous())[1], optimizer, defaults)


def alternate(work: dict[str, Callable[[], float]], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of every contender in every round, in which the order is drawn anew: how long one takes depends on what
    the one before it did to the system's memory. A contender says itself how long it took."""
    times, order = {name: [] for name in work}, random.Random(0)
    for round in range(warm_up + rounds):
        for name in order.sample(list(work), len(work)):
            seconds = work[name]()
            if round >= warm_up:
                times[name].append(seconds)
    return times


def timed(do: Callable) -> Callable[[], float]:
    def clock() -> float:
        began = time.perf_counter()
        do()
        return time.perf_counter() - began

    return clock


def spread(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


class Report:
    """What was measured: rows for the tables, and the figures that are held against a target."""

    def __init__(self):
        self.sections: dict[str, list[dict]] = {}
        self.targets: list[dict] = []

    def row(self, section: str, **cells):
        self.sections.setdefault(section, []).append(cells)
        print(f"  {section}: " + ", ".join(f"{k} {v}" for k, v in cells.items()), file=sys.stderr, flush=True)

    def target(self, what: str, value: float, must: float, aim: float, unit: str, smaller_is_better: bool = False):
        met = value <= must if smaller_is_better else value >= must
        sign = "≤" if smaller_is_better else "≥"
        self.targets.append({"what": what, "measured": f"{value:.3g}{unit}", "must": f"{sign} {must:g}{unit}",
                             "aim": f"{sign} {aim:g}{unit}", "met": "yes" if met else "no"})  # fmt: skip

    def markdown(self, about: str) -> str:
        parts = [table(self.targets)] if self.targets else []
        parts += [f"**{section}**\n\n{table(rows)}" for section, rows in self.sections.items()]
        return "\n".join(parts) + f"\n{about}\n"


def table(rows: list[dict]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([str(row.get(name, "")) for name in names] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def steps(
    report: Report, section: str, contenders: dict[str, Step], rounds: int, warm_up: int = 2
) -> dict[str, list[float]]:
    """Rows of a training step; the first contender is ours, the others' ratios are how many times as long they take.

    A turn is two micro-batches, and the second is timed: the first pays for the memory that the contender before it
    gave back to the system, which is a matter of the order and not of either.
    """
    times = alternate(
        {name: lambda step=step: (step(), step())[1] for name, step in contenders.items()}, rounds, warm_up
    )
    first = next(iter(times))
    for name, seconds in times.items():
        cfg, median = contenders[name].cfg, statistics.median(seconds)
        ratios = [b / a for a, b in zip(times[first], seconds, strict=True)]
        report.row(section, **{"implementation": name, "ms": f"{1e3 * median:.1f}",
                               "tokens/s": f"{cfg.tokens_per_step / median:.0f}",
                               "time relative to ours": "1" if name == first else spread(ratios)})  # fmt: skip
    return times


def best_ratio(times: dict[str, list[float]], of: str, prefix: str) -> float:
    """Median over rounds of (the fastest contender whose name begins with prefix) / (that of `of`)."""
    rivals = [name for name in times if name.startswith(prefix)]
    best = min(rivals, key=lambda name: statistics.median(times[name]))
    return statistics.median(b / a for a, b in zip(times[of], times[best], strict=True))


def matrices(batch: int, m: int, n: int, condition: float | None) -> Tensor:
    """Random matrices with log-spaced singular values from 1 to 1/condition, or of rank min(m, n) / 2 with values of 1."""
    generator = torch.Generator().manual_seed(m + n)
    r = min(m, n)
    U, V = (torch.linalg.qr(torch.randn(batch, k, r, dtype=torch.float64, generator=generator))[0] for k in (m, n))
    if condition is None:
        s = (torch.arange(r) < r // 2).double()
    else:
        s = torch.logspace(0, -torch.tensor(condition).log10().item(), r, dtype=torch.float64)
    return ((U * s) @ V.mT).float(), (U * (s > 0)) @ V.mT


def signs(report: Report, rounds: int, shapes: dict):
    """The default backend against batched torch.linalg.svd."""
    slowest = {True: 1e9, False: 1e9}
    for name, shape in shapes.items():
        for spectrum, condition in SPECTRA.items():
            W, exact = matrices(*shape, condition)
            got = {}

            def sign(name, *backend, W=W, got=got):
                got[name] = msign.msign(W, *backend)

            work = {"default": timed(lambda: sign("default")), "svd": timed(lambda: sign("svd", "svd"))}
            times = alternate(work, rounds if W.numel() < 2**22 else 1, 1)
            error = {key: ((X.double() - exact).norm() / exact.norm()).item() for key, X in got.items()}
            ratios = [b / a for a, b in zip(times["default"], times["svd"], strict=True)]
            report.row("Matrix sign, default backend against torch.linalg.svd in fp32", **{
                "shape": name, "spectrum": spectrum, "ms": f"{1e3 * statistics.median(times['default']):.1f}",
                "svd takes": f"{spread(ratios)} ×",
                "error": f"{error['default']:.0e}", "svd's": f"{error['svd']:.0e}",
            })  # fmt: skip
            large = min(shape[1:]) >= 512
            slowest[large] = min(slowest[large], statistics.median(ratios))
    if slowest[True] < 1e9:
        report.target("matrix sign against svd, shapes from 512 on, slowest", slowest[True], 2, 5, " ×")
    report.target("matrix sign against svd, smaller shapes, slowest", slowest[False], 1, 5, " ×")


def application(params: dict[str, Tensor], done: Callable = lambda: None, **how) -> Callable[[], float]:
    """MSign on the same weights every time: the eigenvectors of what already is a sign are found sooner."""
    before = {name: p.detach().clone() for name, p in params.items()}

    def clock() -> float:
        with torch.no_grad():
            for name, p in params.items():
                p.copy_(before[name])
        done()
        return timed(lambda: (msign.apply_(params, **how), done()))()

    return clock


def overhead(report: Report, name: str, step: Step, rounds: int, must: float):
    """One application of MSign to all block matrices against one step; the share of training at PERIOD."""
    params = msign.select(step.model.named_parameters(), "blocks")
    times = alternate({"step": step, "msign": application(params)}, rounds)
    r = [b / a for a, b in zip(times["step"], times["msign"], strict=True)]
    share = 100 * statistics.median(r) / PERIOD
    report.row(f"MSign on all block matrices, every {PERIOD} steps, against AdamW alone", **{
        "model": name, "matrices": len(params), "ms": f"{1e3 * statistics.median(times['msign']):.1f}",
        "step, ms": f"{1e3 * statistics.median(times['step']):.0f}", "r, steps an application": spread(r, 4),
        "share of training": f"{share:.4f} %",
    })  # fmt: skip
    report.target(f"MSign, {name}", share, must, 0.1, " %", smaller_is_better=True)


def instruments(report: Report, step: Step, rounds: int):
    """Everything that train.py measures by itself, each against one step, and together at the default cadences."""
    cfg, model, tokens = step.cfg, step.model, step.x[: step.cfg.probe_batch]
    params = dict(model.named_parameters())

    def norms():
        """Of gradients and updates, as in train.py."""
        model(tokens, tokens).backward()
        began = time.perf_counter()
        metrics.norms("grad_norm", {n: p.grad for n, p in params.items()}, True)
        before = {n: p.detach().clone() for n, p in params.items()}
        metrics.norms("update_norm", {n: p.detach() - before[n] for n, p in params.items()}, True)
        return time.perf_counter() - began

    work = {
        "step": (step, 1),
        "spectra": (timed(lambda: metrics.weights(model, True)), cfg.probe_every),
        "norms of gradients and updates": (norms, cfg.probe_every),
        "activations": (timed(lambda: metrics.activations(model, tokens, True, print, contextlib.nullcontext())), cfg.probe_every),
        f"Jacobians ({cfg.n_layer} blocks, {cfg.probe_batch} × {cfg.block_size})": (timed(lambda: metrics.jacobians(model, tokens, True, print)), cfg.jacobian_every),
    }  # fmt: skip
    times, together = alternate({name: do for name, (do, _) in work.items()}, rounds), 0.0
    for name, (_, every) in work.items():
        ratios = [b / a for a, b in zip(times["step"], times[name], strict=True)]
        share = 100 * statistics.median(ratios) / every
        if name != "step":
            together += share
            report.row(f"Instruments, {cfg.name}", **{
                "what": name, "ms": f"{1e3 * statistics.median(times[name]):.1f}", "steps": spread(ratios),
                "every": every, "share of training": f"{share:.3f} %",
            })  # fmt: skip
    report.row(f"Instruments, {cfg.name}", what="all", **{"share of training": f"{together:.3f} %"})
    report.target(f"all instruments, {cfg.name}", together, 3, 1, " %", smaller_is_better=True)


def experts(report: Report, cfg: Config, rounds: int):
    """A mixture of experts against a dense MLP of the same FLOPs a token, forward and backward."""
    layers = {"dense": MLP(replace(cfg, n_experts=0, d_ff=cfg.top_k * cfg.d_ff)), "experts": MoE(cfg)}
    x = torch.randn(cfg.micro_batch, cfg.block_size, cfg.d_model, requires_grad=True)
    for p in (p for layer in layers.values() for p in layer.parameters()):
        nn.init.normal_(p, std=cfg.init_std)
    work = {name: timed(lambda layer=layer: layer(x).square().sum().backward()) for name, layer in layers.items()}
    times = alternate(work, rounds)
    ratios = [a / b for a, b in zip(times["dense"], times["experts"], strict=True)]
    report.row(f"{cfg.n_experts} experts of {cfg.d_ff}, {cfg.top_k} a token, against a dense MLP of "
               f"{cfg.top_k * cfg.d_ff}, hidden size {cfg.d_model}", **{
        "tokens": cfg.micro_batch * cfg.block_size, "dense, ms": f"{1e3 * statistics.median(times['dense']):.1f}",
        "experts, ms": f"{1e3 * statistics.median(times['experts']):.1f}", "speed of the experts": spread(ratios),
    })  # fmt: skip
    report.target("experts against a dense MLP, speed", statistics.median(ratios), 0.5, 1, " ×")


def sharing(rank: int, ranks: int, shapes: dict, rounds: int, folder: str):
    """One of the processes of `ranks`, with one thread: MSign by rank 0 alone, and by all together."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    generator = torch.Generator().manual_seed(0)
    whole = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    mesh = init_device_mesh("cpu", (ranks,))
    rows = {name: distribute_tensor(W, mesh, [Shard(0)]) for name, W in whole.items()}

    def wait() -> float:
        distributed.barrier()
        return timed(distributed.barrier)()

    times = alternate({
        "alone": application(whole, distributed.barrier) if rank == 0 else wait,
        "replicated (DDP)": application(whole, distributed.barrier, group=distributed.group.WORLD),
        "sharded by rows (FSDP2)": application(rows, distributed.barrier),
    }, rounds, 1)  # fmt: skip
    if rank == 0:
        Path(folder, "times.json").write_text(json.dumps(times))
    parallel.finish(in_order=True)


def sharers(report: Report, cfg: Config, rounds: int, ranks: int = 2):
    """One process against two of one thread each, for the matrices of cfg."""
    shapes = {n: tuple(p.shape) for n, p in msign.select(budget.on_meta(cfg).named_parameters(), "blocks").items()}
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(sharing, (ranks, shapes, rounds, folder), ranks)
        times = json.loads(Path(folder, "times.json").read_text())
    alone, worst = times.pop("alone"), 0.0
    for name, seconds in times.items():
        ratios = [b / a for a, b in zip(alone, seconds, strict=True)]
        worst = max(worst, statistics.median(ratios))
        report.row(f"MSign by {ranks} processes of one thread, {cfg.name} at width {cfg.d_model}", **{
            "weights": name, "matrices": len(shapes), "one process, s": f"{statistics.median(alone):.2f}",
            f"{ranks} processes, s": f"{statistics.median(seconds):.2f}", "ratio": spread(ratios),
        })  # fmt: skip
    report.target(f"MSign, time of {ranks} processes over one's", worst, 0.65, 0.5, " ×", smaller_is_better=True)


def bf16_rate() -> float:
    """FLOP/s of a bf16 product of 2048² matrices, the best of ten."""
    a, b = (torch.randn(2048, 2048).bfloat16() for _ in range(2))
    product = timed(lambda: a @ b)
    product()
    return 2 * 2048**3 / min(product() for _ in range(10))


def peak_memory() -> float:
    """GiB at which a process that trains NanoGPT-5M peaks: two steps of two micro-batches, the full ones' size."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, ROOT / "train.py", ROOT / "configs" / "nano_5m_adamw.py", "--batch_size=24", "--max_steps=2",
             "--eval_every=0", "--wandb=off", f"--runs_dir={folder}", "--name=x"], check=True, capture_output=True,
        )  # fmt: skip
        return json.loads((Path(folder) / "x" / "summary.json").read_text())["peak_memory_gib"]


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and shapes, no reproduction")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT")
    parser.add_argument(
        "--threads",
        type=Number(int, 1),
        default=torch.get_num_threads(),
        help="of all but the stress test, which has one",
    )
    parser.add_argument(
        "--only",
        choices=["steps", "signs", "msign", "experts", "ranks", "instruments", "reproduce"],
        nargs="+",
        help="some of the tables",
    )
    parser.add_argument("--out", type=output_stem, help="also write the results to this path + .json and .md")
    args = parser.parse_args()
    if args.nanogpt and not (args.nanogpt / "model.py").is_file():
        raise UserError(f"--nanogpt = {str(args.nanogpt)!r}: no model.py there; must be a checkout of karpathy/nanoGPT")
    wanted = args.only or ["steps", "signs", "msign", "experts", "instruments"] + ["ranks", "reproduce"] * (
        not args.quick
    )
    few, many = (1, 5) if args.quick else (3, 30)
    report, began = Report(), time.perf_counter()

    nano = load_config([str(ROOT / "configs" / "nano_5m_adamw.py")])
    stress = load_config([str(ROOT / "configs" / "stress_ramp.py")])
    large = replace(nano, name="GPT-124M", dtype="bfloat16", **GPT_124M)
    sigma = load_config([str(ROOT / "configs" / "sigma_40m_adamw.py")])
    sigma = replace(sigma, dtype="float32", micro_batch=1)
    torch._dynamo.config.recompile_limit = 64  # one block's code serves all contenders
    torch.set_num_threads(args.threads)
    all_shapes = {p.shape for cfg in (nano, stress, large) for p in GPT(cfg).parameters() if p.ndim == 2}
    arithmetic = machine.set_arithmetic(CPU, [torch.empty(shape, device="meta") for shape in all_shapes])

    def rivals(cfg: Config) -> dict[str, Step]:
        if not args.nanogpt:
            return {}
        ways = {"nanoGPT, eager": False} | ({} if args.quick else {"nanoGPT, compiled": True})
        return {name: nanogpt(args.nanogpt, cfg, compiled) for name, compiled in ways.items()}

    our_nano = our_stress = None
    if "steps" in wanted:
        section = f"NanoGPT-5M, a full step of {nano.tokens_per_step} tokens"
        contenders = {
            "ours": ours(nano),
            "ours, bf16": ours(replace(nano, dtype="bfloat16")),
            "plain": plain(nano),
        } | rivals(nano)
        times = steps(report, section, contenders | ({} if args.quick else without(nano)), few)
        our_nano = contenders["ours"]
        if args.nanogpt:
            for how, name in (("", "ours"), (" in bf16", "ours, bf16")):
                ratio = best_ratio(times, name, "nanoGPT")
                report.target(f"NanoGPT-5M step{how} against nanoGPT's best", ratio, 3, 6, " ×")
        del contenders

        torch.set_num_threads(1)
        contenders = {"ours": ours(stress), "plain": plain(stress)} | rivals(stress)
        if not args.quick:
            contenders |= {"ours, compiled whole": ours(replace(stress, compile="whole"))} | without(stress)
        times = steps(report, "Stress test, a step of 512 bytes, one thread", contenders, many)
        our_stress = contenders["ours"]
        report.target("stress-test step against plain eager", best_ratio(times, "ours", "plain"), 2, 4, " ×")
        torch.set_num_threads(args.threads)

        section = f"GPT-124M, a step of {large.tokens_per_step} tokens"
        contenders = {"ours": ours(large), "ours, fp32": ours(replace(large, dtype="float32"))} | rivals(large)
        times, rate = steps(report, section, contenders, 1 if args.quick else 3, 1), bf16_rate()
        flops = contenders["ours"].model.flops_per_token() * large.tokens_per_step
        share = 100 * flops / statistics.median(times["ours"]) / rate
        report.row(
            section, implementation=f"bf16 product of 2048²: {rate / 1e9:.0f} GFLOP/s; ours runs at {share:.0f} % of it"
        )
        if args.nanogpt:
            report.target("GPT-124M step against nanoGPT's best", best_ratio(times, "ours", "nanoGPT"), 2, 2, " ×")
        report.target("GPT-124M, share of the bf16 product's rate", share, 30, 50, " %")
        del contenders
    our_nano, our_stress = our_nano or ours(nano), our_stress or ours(stress)
    if "signs" in wanted:
        signs(report, few, dict(list(SHAPES.items())[: 3 if args.quick else None]))
    if "msign" in wanted:
        overhead(report, "NanoGPT-5M", our_nano, few, 0.5)
        torch.set_num_threads(1)
        overhead(report, "stress test", our_stress, many, 1)
        torch.set_num_threads(args.threads)
        if not args.quick:
            overhead(report, "Sigma-40M", ours(sigma), 3, 0.5)
            overhead(report, "GPT-124M", ours(large), 3, 0.5)
    if "experts" in wanted:
        moe = load_config([str(ROOT / "configs" / "llama_moe_3b_adamw.py")])
        experts(report, replace(moe, d_model=512, n_head=4, d_ff=340, micro_batch=1), 2 * few)
    if "ranks" in wanted:
        llama = load_config([str(ROOT / "configs" / "llama_1b_adamw.py")])
        sharers(report, replace(llama, name="LLaMA-1B", d_model=512, n_head=4, d_ff=1360), few)
    if "instruments" in wanted:
        torch.set_num_threads(1)
        instruments(report, our_stress, few)
        torch.set_num_threads(args.threads)
        instruments(report, our_nano, few)
    if "steps" in wanted:
        report.target("peak memory, NanoGPT-5M step", peak_memory(), 3, 1.5, " GiB", smaller_is_better=True)
    if "reproduce" in wanted:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, ROOT / "scripts" / "reproduce.py", f"--runs_dir={folder}"]
            seconds = timed(lambda: subprocess.run(command, check=True, capture_output=True))()
        report.target("make reproduce, after set-up", seconds / 60, 5, 2, " min", smaller_is_better=True)

    about = (
        f"{machine.processor()}, {args.threads} threads, torch {torch.__version__}; fp32 products by "
        f"{arithmetic['fp32_matmul'].replace('default', 'PyTorch’s default')}, denormals {arithmetic['denormals']}; "
        f"{'quick, ' if args.quick else ''}{time.perf_counter() - began:.0f} s."
    )
    text = report.markdown(about)
    print(text)
    if args.out:
        args.out.with_suffix(".md").write_text(text)
        record = {"about": about, "targets": report.targets, "tables": report.sections}
        args.out.with_suffix(".json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    run_cli(main, "bench.py")
