"""How fast training, MSign and the measurements are on this machine, compared with their alternatives.

The contenders take turns in one process, and a ratio of two is taken round by round: a machine that slows down slows
both. Times are medians over the rounds, ratios median [min, max]. A *lever* is one of the choices that make our step
fast. "Plain" is the same model without any lever, with PyTorch's defaults: three products for q, k and v, PyTorch's
attention, all logits at once, AdamW with its default implementation.
"""

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
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import model as gpt
import msign
import mup
from config import ROOT, Config, load_config
from engine import budget, machine, parallel
from model import GPT, MLP, Attention, MoE
from remedies.rivals import build
from stability import metrics

CPU = torch.device("cpu")
PERIOD = 100
GPT_124M = dict(n_layer=12, d_model=768, n_head=12, d_ff=3072, block_size=512, batch_size=480, micro_batch=4)
SPECTRA = {"κ = 1e2": 1e2, "κ = 1e4": 1e4, "rank n/2": None}
SHAPES = {
    "96 × 48²": (96, 48, 48),
    "48 × (48 × 192)": (48, 48, 192),
    "8 × 512²": (8, 512, 512),
    "2 × 2048²": (2, 2048, 2048),
    "2 × (2048 × 5440)": (2, 2048, 5440),
}


# --- what is measured is written down ---
class Report:
    """What was measured: rows for the tables, and the figures that are held against a target."""

    def __init__(self):
        self.sections: dict[str, list[dict]] = {}
        self.targets: list[dict] = []

    def row(self, section: str, **cells):
        self.sections.setdefault(section, []).append(cells)
        said = ", ".join(f"{name} {value}" for name, value in cells.items())
        print(f"  {section}: {said}", file=sys.stderr, flush=True)

    def target(self, what: str, value: float, must: float, aim: float, unit: str, smaller_is_better: bool = False):
        """Add a figure, the bound that it must keep, and the bound that we aim at."""
        met = value <= must if smaller_is_better else value >= must
        sign = "≤" if smaller_is_better else "≥"
        self.targets.append({
            "what": what, "measured": f"{value:.3g}{unit}", "must": f"{sign} {must:g}{unit}",
            "aim": f"{sign} {aim:g}{unit}", "met": "yes" if met else "no",
        })  # fmt: skip

    def markdown(self, about: str) -> str:
        parts = [table(self.targets)] if self.targets else []
        parts += [f"**{section}**\n\n{table(rows)}" for section, rows in self.sections.items()]
        return "\n\n".join([*parts, f"{about}\n"])


def table(rows: list[dict]) -> str:
    return pd.DataFrame(rows, dtype=object).fillna("").to_markdown(index=False, disable_numparse=True)


def spread(values: list[float], digits: int = 2) -> str:
    """median [min, max]"""
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def ms(seconds: list[float], digits: int = 1) -> str:
    """The median in milliseconds."""
    return f"{1e3 * statistics.median(seconds):.{digits}f}"


# --- clocks ---
def timed(do: Callable) -> Callable[[], float]:
    """A function that calls `do()` and returns the seconds it took."""

    def clock() -> float:
        began = time.perf_counter()
        do()
        return time.perf_counter() - began

    return clock


def alternate(work: dict[str, Callable[[], float]], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of every contender in every round; a contender itself returns how long it took.

    The order is drawn anew in every round: how long one contender takes depends on what the one before it did to the
    system's memory.
    """
    times, order = {name: [] for name in work}, random.Random(0)
    for round in range(warm_up + rounds):
        for name in order.sample(list(work), len(work)):
            seconds = work[name]()
            if round >= warm_up:
                times[name].append(seconds)
    return times


def ratios(times: list[float], to: list[float]) -> list[float]:
    """times / to, round by round."""
    return [one / other for one, other in zip(times, to, strict=True)]


def best_ratio(times: dict[str, list[float]], of: str, prefix: str) -> float:
    """How many times as long as `of` the fastest contender takes whose name begins with `prefix`.

    It is the median over rounds.
    """
    rivals = [name for name in times if name.startswith(prefix)]
    best = min(rivals, key=lambda name: statistics.median(times[name]))
    return statistics.median(ratios(times[best], times[of]))


@contextlib.contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- contenders in a training step ---
@contextlib.contextmanager
def defaults():
    """A context with PyTorch's default arithmetic in place of what machine.set_arithmetic chose for ours."""
    chosen = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    torch.set_flush_denormal(False)
    yield
    torch.backends.mkldnn.matmul.fp32_precision = chosen
    torch.set_flush_denormal(True)


@contextlib.contextmanager
def all_logits():
    """A context in which the loss computes all logits at once, not in chunks."""
    limit, gpt.LOGITS = gpt.LOGITS, sys.maxsize
    yield
    gpt.LOGITS = limit


class Step:
    """One contender: a way to compute a training step of cfg. Its time is extrapolated from one micro-batch."""

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

    def warm(self) -> float:
        """Seconds a step, from the second of two micro-batches.

        The first one also allocates memory that the contender before it returned to the system. That time depends on
        the order of contenders and belongs to none of them.
        """
        self()
        return self()


class Plain(Attention):
    """Attention in its plainest form: a product each for q, k and v, and PyTorch's kernel."""

    def forward(self, x: Tensor) -> Tensor:
        B, T, d = x.shape
        q, k, v = (W(x).view(B, T, self.n_head, -1).transpose(1, 2) for W in (self.W_Q, self.W_K, self.W_V))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return self.W_O(y.transpose(1, 2).reshape(B, T, d))


def adamw(model: GPT, cfg: Config, **how) -> torch.optim.Optimizer:
    return torch.optim.AdamW(mup.param_groups(model, cfg), betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, **how)


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

    optimizer = build(cfg, mup.param_groups(model, cfg), model) if fused else adamw(model, cfg)
    return Step(cfg, model, loss, optimizer, context)


def without(cfg: Config) -> dict[str, Step]:
    """{name: our step without one lever}, one for each lever."""
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
    """The same model without any of our levers."""
    model = GPT(replace(cfg, compile="off"))
    mup.init_weights(model, cfg)
    for block in model.blocks:
        block.attn.__class__ = Plain

    def loss(x, y):
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    return Step(cfg, model, loss, adamw(model, cfg), defaults)


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


# --- contenders in the matrix sign ---
def matrices(batch: int, m: int, n: int, condition: float | None) -> tuple[Tensor, Tensor]:
    """Random W = U diag(s) Vᵀ (batch, m, n) in fp32, and its sign in fp64.

    The singular values s are log-spaced from 1 to 1/condition; with None W has rank min(m, n) / 2, and s is 1.
    """
    generator = torch.Generator().manual_seed(m + n)
    r = min(m, n)
    U, V = (torch.linalg.qr(torch.randn(batch, k, r, dtype=torch.float64, generator=generator))[0] for k in (m, n))
    if condition is None:
        s = (torch.arange(r) < r // 2).double()
    else:
        s = torch.logspace(0, -torch.tensor(condition).log10().item(), r, dtype=torch.float64)
    return ((U * s) @ V.mT).float(), (U * (s > 0)) @ V.mT


def race_signs(W: Tensor, rounds: int) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Seconds of msign(W) by the default backend and by "svd", and the signs that they found."""
    found = {}

    def sign(name: str, *backend: str):
        found[name] = msign.msign(W, *backend)

    work = {"default": timed(lambda: sign("default")), "svd": timed(lambda: sign("svd", "svd"))}
    return alternate(work, rounds, 1), found


def application(weights, done: Callable = lambda: None, **how) -> Callable[[], float]:
    """A clock of one application of MSign to the blocks of a model, or of named parameters.

    Before each, the weights are restored: a matrix that is a sign already takes less time.
    """
    targets = msign.find(weights, "blocks")
    before = [(t.parameter, t.parameter.detach().clone()) for t in targets.values()]

    def apply():
        msign.apply_(targets, **how)
        done()

    def clock() -> float:
        with torch.no_grad():
            for p, value in before:
                p.copy_(value)
        done()
        return timed(apply)()

    return clock


def sharing(rank: int, ranks: int, shapes: dict, rounds: int, folder: str):
    """In process `rank` of `ranks`, with one thread: time MSign by rank 0 alone and by all; write folder/times.json."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    generator = torch.Generator().manual_seed(0)
    whole = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    mesh = init_device_mesh("cpu", (ranks,))
    rows = {name: distribute_tensor(W, mesh, [Shard(0)]) for name, W in whole.items()}

    def wait() -> float:
        distributed.barrier()
        return timed(distributed.barrier)()

    work = {
        "alone": application(whole.items(), distributed.barrier) if rank == 0 else wait,
        "replicated (DDP)": application(whole.items(), distributed.barrier, group=distributed.group.WORLD),
        "sharded by rows (FSDP2)": application(rows.items(), distributed.barrier),
    }
    times = alternate(work, rounds, 1)
    if rank == 0:
        Path(folder, "times.json").write_text(json.dumps(times))
    parallel.finish()


# --- the machine ---
def bf16_rate() -> float:
    """FLOP/s of a bf16 product of 2048² matrices, the best of ten."""
    left, right = (torch.randn(2048, 2048).bfloat16() for _ in range(2))
    product = timed(lambda: left @ right)
    product()
    return 2 * 2048**3 / min(product() for _ in range(10))


def peak_memory() -> float:
    """Peak memory, GiB, of a process that trains NanoGPT-5M: two steps of two micro-batches, each of its full size."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--batch_size=24", "--max_steps=2", "--eval_every=0", "--wandb=off", "--name=x"]
        command = [sys.executable, ROOT / "train.py", ROOT / "configs" / "nano_5m_adamw.py", *options]
        subprocess.run([*command, f"--runs_dir={folder}"], check=True, capture_output=True)
        return json.loads((Path(folder) / "x" / "summary.json").read_text())["peak_memory_gib"]


def config(file: str, /, **changes) -> Config:
    return replace(load_config([str(ROOT / "configs" / f"{file}.py")]), **changes)


class Bench:
    """One run of the bench. `measure_<table>` measures one table of TABLES and compares its main figures with targets.

    nanogpt: a checkout of karpathy/nanoGPT to race against, or None. threads: the number of CPU threads, except in the
    stress test, which has one.
    """

    TABLES = ("steps", "signs", "msign", "remedies", "experts", "ranks", "instruments", "reproduce")
    SLOW = ("ranks", "reproduce")  # left out of a quick bench

    def __init__(self, quick: bool, nanogpt: Path | None, threads: int):
        self.quick, self.nanogpt, self.threads = quick, nanogpt, threads
        self.few, self.many = (1, 5) if quick else (3, 30)  # rounds
        self.report = Report()
        self.nano, self.stress = config("nano_5m_adamw"), config("stress_ramp")
        self.large = replace(self.nano, name="GPT-124M", dtype="bfloat16", **GPT_124M)
        torch._dynamo.config.recompile_limit = 64  # one block's code serves all contenders
        torch.set_num_threads(threads)
        models = [GPT(cfg) for cfg in (self.nano, self.stress, self.large)]
        shapes = {p.shape for model in models for p in model.parameters() if p.ndim == 2}
        self.arithmetic = machine.set_arithmetic(CPU, [torch.empty(shape, device="meta") for shape in shapes])

    def run(self, tables: list[str]) -> str:
        """Measure these tables. Returns a line on the processor, the settings and the seconds that it took."""
        began = time.perf_counter()
        for name in self.TABLES:
            if name in tables:
                getattr(self, f"measure_{name}")()
        products = self.arithmetic["fp32_matmul"].replace("default", "PyTorch’s default")
        return (
            f"{machine.processor()}, {self.threads} threads, torch {torch.__version__}; fp32 products by {products}, "
            f"denormals {self.arithmetic['denormals']}; {'quick, ' if self.quick else ''}"
            f"{time.perf_counter() - began:.0f} s."
        )

    # built once, because several tables compare something with a step
    @cached_property
    def nano_step(self) -> Step:
        return ours(self.nano)

    @cached_property
    def stress_step(self) -> Step:
        return ours(self.stress)

    def rivals(self, cfg: Config) -> dict[str, Step]:
        if not self.nanogpt:
            return {}
        ways = {"nanoGPT, eager": False} | ({} if self.quick else {"nanoGPT, compiled": True})
        return {name: nanogpt(self.nanogpt, cfg, compiled) for name, compiled in ways.items()}

    def race(self, section: str, contenders: dict[str, Step], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
        """Time contenders and add a row for each. The first is ours; a ratio is another's time over ours."""
        times = alternate({name: step.warm for name, step in contenders.items()}, rounds, warm_up)
        first = next(iter(times))
        for name, seconds in times.items():
            tokens = contenders[name].cfg.tokens_per_step / statistics.median(seconds)
            relative = "1" if name == first else spread(ratios(seconds, times[first]))
            cells = {"implementation": name, "ms": ms(seconds), "tokens/s": f"{tokens:.0f}"}
            self.report.row(section, **cells, **{"time relative to ours": relative})
        return times

    def measure_steps(self):
        """A training step of three models, and the memory that the first one takes."""
        self.nano_steps()
        with threads(1):
            self.stress_steps()
        self.large_steps()
        self.report.target(
            "peak memory, NanoGPT-5M step", peak_memory(), must=3, aim=1.5, unit=" GiB", smaller_is_better=True
        )

    def nano_steps(self):
        cfg = self.nano
        contenders = {"ours": self.nano_step, "ours, bf16": ours(replace(cfg, dtype="bfloat16")), "plain": plain(cfg)}
        contenders |= self.rivals(cfg) | ({} if self.quick else without(cfg))
        times = self.race(f"NanoGPT-5M, a full step of {cfg.tokens_per_step} tokens", contenders, self.few)
        if self.nanogpt:
            for how, name in (("", "ours"), (" in bf16", "ours, bf16")):
                ratio = best_ratio(times, name, "nanoGPT")
                self.report.target(f"NanoGPT-5M step{how} against nanoGPT's best", ratio, must=3, aim=6, unit=" ×")

    def stress_steps(self):
        cfg = self.stress
        contenders = {"ours": self.stress_step, "plain": plain(cfg)} | self.rivals(cfg)
        if not self.quick:
            contenders |= {"ours, compiled whole": ours(replace(cfg, compile="whole"))} | without(cfg)
        times = self.race("Stress test, a step of 512 bytes, one thread", contenders, self.many)
        self.report.target(
            "stress-test step against plain eager", best_ratio(times, "ours", "plain"), must=2, aim=4, unit=" ×"
        )

    def large_steps(self):
        cfg = self.large
        section = f"GPT-124M, a step of {cfg.tokens_per_step} tokens"
        contenders = {"ours": ours(cfg), "ours, fp32": ours(replace(cfg, dtype="float32"))} | self.rivals(cfg)
        times, rate = self.race(section, contenders, self.few, 1), bf16_rate()
        flops = contenders["ours"].model.flops_per_token() * cfg.tokens_per_step
        share = 100 * flops / statistics.median(times["ours"]) / rate
        said = f"bf16 product of 2048²: {rate / 1e9:.0f} GFLOP/s; ours runs at {share:.0f} % of it"
        self.report.row(section, implementation=said)
        if self.nanogpt:
            ratio = best_ratio(times, "ours", "nanoGPT")
            self.report.target("GPT-124M step against nanoGPT's best", ratio, must=2, aim=2, unit=" ×")
        self.report.target("GPT-124M, share of the bf16 product's rate", share, must=30, aim=50, unit=" %")

    def measure_signs(self):
        """The default backend against batched torch.linalg.svd."""
        large, small = [], []  # how many times as long svd takes, for shapes from 512 on and for smaller ones
        for shape_name, shape in list(SHAPES.items())[: 3 if self.quick else None]:
            for spectrum, condition in SPECTRA.items():
                W, exact = matrices(*shape, condition)
                times, found = race_signs(W, self.few if W.numel() < 2**22 else 1)
                errors = {name: ((X.double() - exact).norm() / exact.norm()).item() for name, X in found.items()}
                longer = ratios(times["svd"], times["default"])
                self.report.row("Matrix sign, default backend against torch.linalg.svd in fp32", **{
                    "shape": shape_name, "spectrum": spectrum, "ms": ms(times["default"]),
                    "svd takes": f"{spread(longer)} ×",
                    "error": f"{errors['default']:.0e}", "svd's": f"{errors['svd']:.0e}",
                })  # fmt: skip
                (large if min(shape[1:]) >= 512 else small).append(statistics.median(longer))
        if large:
            self.report.target(
                "matrix sign against svd, shapes from 512 on, slowest", min(large), must=2, aim=5, unit=" ×"
            )
        self.report.target("matrix sign against svd, smaller shapes, slowest", min(small), must=1, aim=5, unit=" ×")

    def measure_msign(self):
        """The time of one application of MSign (to all its targets) over that of a step, and its share of training."""
        self.overhead("NanoGPT-5M", self.nano_step, self.few, 0.5)
        with threads(1):
            self.overhead("stress test", self.stress_step, self.many, 1)
        if not self.quick:
            self.overhead("Sigma-40M", ours(config("sigma_40m_adamw", dtype="float32", micro_batch=1)), 3, 0.5)
            self.overhead("GPT-124M", ours(self.large), 3, 0.5)

    def overhead(self, name: str, step: Step, rounds: int, must: float):
        times = alternate({"step": step, "msign": application(step.model)}, rounds)
        steps = ratios(times["msign"], times["step"])
        share = 100 * statistics.median(steps) / PERIOD
        count = len(msign.find(step.model, "blocks"))
        self.report.row(f"MSign on all block matrices, every {PERIOD} steps, against AdamW alone", **{
            "model": name, "matrices": count, "ms": ms(times["msign"]), "step, ms": ms(times["step"], 0),
            "r, steps an application": spread(steps, 4), "share of training": f"{share:.4f} %",
        })  # fmt: skip
        self.report.target(f"MSign, {name}", share, must=must, aim=0.1, unit=" %", smaller_is_better=True)

    def measure_remedies(self):
        """A step of the stress test with what is said to prevent its collapse at every step, over AdamW's."""
        changes = {"limit on the step": {"logit_trust": 1.0}, "QK-norm": {"qk_norm": True}}
        names = {"muon": "Muon", "spectral_sphere": "spectral sphere", "adagc": "AdaGC", "stable_spam": "Stable-SPAM"}
        changes |= {words: {"optimizer": optimizer} for optimizer, words in names.items()}
        with threads(1):
            contenders = {"AdamW": self.stress_step}
            contenders |= {name: ours(replace(self.stress, **of)) for name, of in changes.items()}
            self.race("Remedies, a step of the stress test, one thread", contenders, self.many)

    def measure_experts(self):
        """A mixture of experts against a dense MLP of the same FLOPs a token, forward and backward."""
        cfg = config("llama_moe_3b_adamw", d_model=512, n_head=4, d_ff=340, micro_batch=1)
        dense = cfg.top_k * cfg.d_ff
        layers = {"dense": MLP(replace(cfg, n_experts=0, d_ff=dense)), "experts": MoE(cfg)}
        x = torch.randn(cfg.micro_batch, cfg.block_size, cfg.d_model, requires_grad=True)
        for p in (p for layer in layers.values() for p in layer.parameters()):
            nn.init.normal_(p, std=cfg.init_std)
        work = {name: timed(lambda layer=layer: layer(x).square().sum().backward()) for name, layer in layers.items()}
        times = alternate(work, 2 * self.few)
        speed = ratios(times["dense"], times["experts"])
        section = (
            f"{cfg.n_experts} experts of {cfg.d_ff}, {cfg.top_k} a token, against a dense MLP of {dense}, "
            f"hidden size {cfg.d_model}"
        )
        self.report.row(section, **{
            "tokens": cfg.micro_batch * cfg.block_size, "dense, ms": ms(times["dense"]),
            "experts, ms": ms(times["experts"]), "speed of the experts": spread(speed),
        })  # fmt: skip
        self.report.target("experts against a dense MLP, speed", statistics.median(speed), must=0.5, aim=1, unit=" ×")

    def measure_ranks(self, ranks: int = 2):
        """MSign by one process against MSign by `ranks`, each with one thread, for a model of LLaMA-1B's depth."""
        cfg = config("llama_1b_adamw", name="LLaMA-1B", d_model=512, n_head=4, d_ff=1360)
        found = msign.find(budget.on_meta(cfg), "blocks")
        shapes = {name: tuple(target.parameter.shape) for name, target in found.items()}
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(sharing, (ranks, shapes, self.few, folder), ranks)
            times = json.loads(Path(folder, "times.json").read_text())
        alone, medians = times.pop("alone"), []
        for name, seconds in times.items():
            shares = ratios(seconds, alone)
            medians.append(statistics.median(shares))
            self.report.row(f"MSign by {ranks} processes of one thread, {cfg.name} at width {cfg.d_model}", **{
                "weights": name, "matrices": len(shapes), "one process, s": f"{statistics.median(alone):.2f}",
                f"{ranks} processes, s": f"{statistics.median(seconds):.2f}", "ratio": spread(shares),
            })  # fmt: skip
        what = f"MSign, time of {ranks} processes over one's"
        self.report.target(what, max(medians), must=0.65, aim=0.5, unit=" ×", smaller_is_better=True)

    def measure_instruments(self):
        """The time of everything that train.py measures by default over that of a step, for two models."""
        with threads(1):
            self.instruments_of(self.stress_step)
        self.instruments_of(self.nano_step)

    def instruments_of(self, step: Step):
        """The time of each instrument over that of a step, and the share of training of all at their cadences."""
        cfg, model, tokens = step.cfg, step.model, step.x[: step.cfg.probe_batch]
        section = f"Instruments, {cfg.name}"

        def activations():
            metrics.activations(model, tokens, True, print, contextlib.nullcontext())

        jacobians = f"Jacobians ({cfg.n_layer} blocks, {cfg.probe_batch} × {cfg.block_size})"
        work = {
            "spectra": (timed(lambda: metrics.weights(model, True, print)), cfg.probe_every),
            "norms of gradients and updates": (lambda: norms(model, tokens), cfg.probe_every),
            "activations": (timed(activations), cfg.probe_every),
            jacobians: (timed(lambda: metrics.jacobians(model, tokens, True, print)), cfg.jacobian_every),
        }
        times = alternate({"step": step, **{name: do for name, (do, _) in work.items()}}, self.few)
        together = 0.0
        for name, (_, every) in work.items():
            steps = ratios(times[name], times["step"])
            share = 100 * statistics.median(steps) / every
            together += share
            cells = {"what": name, "ms": ms(times[name]), "steps": spread(steps), "every": every}
            self.report.row(section, **cells, **{"share of training": f"{share:.3f} %"})
        self.report.row(section, what="all", **{"share of training": f"{together:.3f} %"})
        self.report.target(f"all instruments, {cfg.name}", together, must=3, aim=1, unit=" %", smaller_is_better=True)

    def measure_reproduce(self):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, ROOT / "scripts" / "reproduce.py", f"--runs_dir={folder}"]
            seconds = timed(lambda: subprocess.run(command, check=True, capture_output=True))()
        self.report.target(
            "make reproduce, after set-up", seconds / 60, must=5, aim=2, unit=" min", smaller_is_better=True
        )


def norms(model: GPT, tokens: Tensor) -> float:
    """Seconds that the norms of gradients and updates take, as train.py measures them."""
    params = dict(model.named_parameters())
    model(tokens, tokens).backward()
    began = time.perf_counter()
    metrics.norms("grad_norm", {name: p.grad for name, p in params.items()}, True)
    before = {name: p.detach().clone() for name, p in params.items()}
    metrics.norms("update_norm", {name: p.detach() - before[name] for name, p in params.items()}, True)
    return time.perf_counter() - began
