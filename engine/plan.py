"""An estimate of what a run takes on given GPUs: which layout fits, seconds a step, and what MSign adds.

A *layout* is a number of GPUs (ranks), a micro-batch, over how many ranks a copy of the model is spread (shards), and a
number of recomputed blocks. shards is 1 with DDP, the number of ranks with FSDP2, and PER_NODE with HSDP, whose copies
are called replicas. An *application* of MSign is one replacement of all its target matrices.

A training step is assumed to run at the share `mfu` (model FLOPs utilisation) of the GPU's peak. The matrix sign's
products run at POLAR_SHARE of the peak of their type, eigenvectors at EIGH_SHARE of the fp64 peak: both were measured
for 2048 × 2048 on an H100 and are assumed elsewhere. What the matrix sign reads and writes is added, at the data
sheet's bandwidth of the GPU's memory. The overheads in PAPER are the paper's.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial

import pandas as pd

from config import ROOT, Config, UserError, load_config
from engine import budget
from engine.budget import GPU, GPUS, Memory

EIGH_SHARE = 0.06  # eigenvectors are found at this share of the fp64 peak: measured at 2048 × 2048 on an H100
PER_NODE = 8  # GPUs in a node, among which `inside` is the rate of exchange
POLAR_SHARE = 0.6  # "polar" multiplies at this share of the peaks of fp16 and fp64: measured there, too
# from the paper: the step near which AdamW fails (Table 4, Fig 3); the overhead of MSign at P = 100 (Table 1)
PAPER = {
    "nano_5m": (30_000, "−2.4 %"),
    "sigma_40m": (50_000, "6.7 %"),
    "llama_1b": (2_000, "6.2 %"),
    "llama_moe_3b": (3_000, "4.6 %"),
}


@dataclass(frozen=True)
class Plan:
    """Times of one layout. mfu: share of the peak at which a step runs; targets: MSign's."""

    cfg: Config
    ranks: int
    shards: int
    gpu: GPU
    mfu: float
    targets: str

    @property
    def useful_flops(self) -> float:
        """FLOPs of a training step, not counting recomputation."""
        return budget.on_meta(self.cfg).flops_per_token() * self.cfg.tokens_per_step

    @property
    def step_seconds(self) -> float:
        return self.useful_flops / (self.ranks * self.gpu.peak(self.cfg.dtype) * self.mfu)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return budget.matrices(self.cfg, self.targets)

    @property
    def bytes_sent(self) -> int:
        """Bytes that the busiest rank sends in one application."""
        return max(map(sum, budget.msign_bytes(self.shapes, self.ranks, self.shards)))

    def exchange_seconds(self, within: int, across: int) -> float:
        """Seconds in which a rank sends bytes to the ranks that share its copy of the model, and to other replicas."""
        rates = (self.gpu.inside if n <= PER_NODE else self.gpu.outside for n in (self.shards, self.ranks))
        return sum(sent / rate for sent, rate in zip((within, across), rates, strict=True))

    def sign_seconds(self, backend: str, m: int, n: int) -> float:
        """Seconds for the sign of one matrix m × n, m ≥ n, among many."""
        if backend == "eigh":
            return budget.eigh_flops(m, n) / (self.gpu.fp64 * EIGH_SHARE)
        wide = budget.polar_wide_flops(m, n)
        products = (budget.polar_flops(m, n) - wide) / self.gpu.bf16 + wide / self.gpu.fp64
        return products / POLAR_SHARE + budget.polar_bytes(m, n) / self.gpu.bandwidth

    def application_seconds(self, backend: str) -> tuple[float, float]:
        """Seconds of one application: the busiest rank's, of computing its signs and of exchanging them."""
        cost = partial(self.sign_seconds, backend)
        exchange = max(
            self.exchange_seconds(*sent) for sent in budget.msign_bytes(self.shapes, self.ranks, self.shards)
        )
        return max(budget.msign_loads(self.shapes, self.ranks, self.shards, cost)), exchange

    def application_steps(self, backend: str) -> float:
        """How many training steps take as long as one application, with its exchange."""
        return sum(self.application_seconds(backend)) / self.step_seconds

    def share(self, backend: str, period: int) -> float:
        """MSign's time over that of the `period` training steps between two applications."""
        return self.application_steps(backend) / period

    def eq_16(self, period: int) -> float:
        """The paper's Eq 16: FLOPs of the targets' SVDs over those of the `period` steps between two applications."""
        return budget.msign_flops(self.shapes, budget.svd_flops) / (period * self.useful_flops)


def fits(cfg: Config, shards: int, gpu: GPU) -> bool:
    """Whether the run fits into the memory of each GPU."""
    return Memory.of(cfg, shards).total <= budget.ROOM * gpu.memory


def whole_nodes(ranks: int) -> bool:
    """Whether these are several whole nodes, which HSDP needs."""
    return ranks > PER_NODE and ranks % PER_NODE == 0


def ways(ranks: int) -> dict[str, int]:
    """{option: shards} of all ways to spread a model over so many ranks."""
    hsdp = {"--parallel=hsdp": PER_NODE} if whole_nodes(ranks) else {}
    return {"--parallel=ddp": 1, **hsdp, "--parallel=fsdp": ranks} if ranks > 1 else {"": 1}


def layouts(cfg: Config, gpus: int) -> Iterable[tuple[str, Config, int]]:
    """Layouts on `gpus` or more GPUs, those nearest to cfg first: (options, config, shards).

    The options are those of train.py and plan.py that give this layout. Blocks are recomputed as cfg says, or more by
    quarters of the model.
    """
    quarters = [-(-cfg.n_layer * i // 4) for i in range(1, 5)]
    ranks = gpus
    while ranks <= max(cfg.batch_size, gpus):
        micro_batch = cfg.micro_batch
        while micro_batch >= 1:
            if cfg.batch_size % (micro_batch * ranks) == 0:
                for recompute in [cfg.recompute, *(n for n in quarters if n > cfg.recompute)]:
                    for parallel, shards in ways(ranks).items():
                        words = (
                            f"--gpus {ranks}" if ranks != gpus else "",
                            parallel,
                            f"--recompute={recompute}" if recompute != cfg.recompute else "",
                            f"--micro_batch={micro_batch}" if micro_batch != cfg.micro_batch else "",
                        )
                        changed = replace(cfg, micro_batch=micro_batch, recompute=recompute)
                        yield " ".join(filter(None, words)), changed, shards
            micro_batch //= 2
        ranks *= 2


def shards_of(cfg: Config, gpus: int, gpu: GPU) -> int:
    """Over how many of `gpus` GPUs cfg spreads a model. If it does not fit, a UserError names a layout that does."""
    if cfg.batch_size % (cfg.micro_batch * gpus):
        good = [size for size in range(1, cfg.micro_batch + 1) if cfg.batch_size % (size * gpus) == 0]
        hint = f"--micro_batch={good[-1]}" if good else f"at most {cfg.batch_size} GPUs"
        raise UserError(
            f"--gpus = {gpus}: times micro_batch={cfg.micro_batch} must divide batch_size={cfg.batch_size}; {hint}"
        )
    if cfg.parallel == "hsdp" and gpus > 1 and not whole_nodes(gpus):
        raise UserError(f"--gpus = {gpus}: must be several nodes of {PER_NODE} GPUs with parallel = 'hsdp'")
    shards = budget.shards(cfg, gpus, gpu.memory, PER_NODE)
    if fits(cfg, shards, gpu):
        return shards
    need = Memory.of(cfg, shards).total / 1e9
    fitting = (words for words, *layout in layouts(cfg, gpus) if fits(*layout, gpu))
    raise UserError(
        f"--gpus = {gpus}: {need:.3g} GB a rank, which has {gpu.memory / 1e9:.3g} GB; "
        f"what fits: {next(fitting, 'nothing with this batch_size')}"
    )


def duration(seconds: float) -> str:
    """Seconds in words, such as "3.5 hours"."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60), ("s", 1)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{1e3 * seconds:.3g} ms"


def describe(plan: Plan, period: int) -> str:
    """The plan as text for the terminal, with MSign applied every `period` steps."""
    cfg, model = plan.cfg, budget.on_meta(plan.cfg)
    parameters = list(model.parameters())
    total, active = sum(p.numel() for p in parameters), sum(model.active(p) for p in parameters)
    memory = Memory.of(cfg, plan.shards)
    way = {1: "DDP", plan.ranks: "FSDP2"}.get(plan.shards, f"HSDP over nodes of {plan.shards}")
    how = "one GPU" if plan.ranks == 1 else f"{plan.ranks} GPUs, {way}"
    accumulate = cfg.batch_size // cfg.micro_batch // plan.ranks
    sent = budget.step_bytes(cfg, plan.ranks, plan.shards)
    count = sum(shape[0] if len(shape) > 2 else 1 for shape in plan.shapes)
    lines = [
        f"{cfg.name} on {how}",
        f"  parameters  {total:,}" + (f", of which a token meets {active:,}" if active != total else ""),
        f"  memory      {memory.total / 1e9:.3g} GB a rank of {plan.gpu.memory / 1e9:.3g}: "
        + ", ".join(f"{what} {size / 1e9:.3g}" for what, size in asdict(memory).items() if size),
        f"  a step      {cfg.tokens_per_step:,} tokens = {plan.ranks} × {accumulate} × {cfg.micro_batch} × "
        f"{cfg.block_size}, {budget.step_flops(cfg):.3g} FLOPs, {duration(plan.step_seconds)} at "
        f"{100 * plan.mfu:.0f} % of the peak",
        f"  the run     {cfg.max_steps:,} steps, {cfg.max_steps * cfg.tokens_per_step / 1e9:.3g}e9 tokens, "
        f"{duration(cfg.max_steps * plan.step_seconds)}",
    ]
    if plan.ranks > 1:
        alone = duration(plan.exchange_seconds(*sent))
        lines.append(f"  exchange    every rank sends {sum(sent) / 1e9:.3g} GB a step, {alone} if nothing hides it")
    name = cfg.name.removesuffix("_adamw").removesuffix("_msign")
    if name in PAPER:
        step = PAPER[name][0]
        lines.append(
            f"  the paper's AdamW fails near step {step:,}: {step * cfg.tokens_per_step / 1e9:.3g}e9 tokens, "
            f"{duration(step * plan.step_seconds)}"
        )
    lines.append(f"  MSign       {count} matrices ({plan.targets}), every {period} steps")
    lines.append(f"    in theory (Eq 16, FLOPs of an SVD)  {100 * plan.eq_16(period):.2g} % of training")
    for backend, flops in (("polar", budget.polar_flops), ("eigh", budget.eigh_flops)):
        compute, exchange = plan.application_seconds(backend)
        lines.append(
            f"    {backend:5}  {budget.msign_flops(plan.shapes, flops):.2g} FLOPs, {duration(compute)} + "
            f"{duration(exchange)} of exchange, as long as r = {plan.application_steps(backend):.2g} steps, "
            f"{100 * plan.share(backend, period):.2g} % of training"
        )
    lines.append(f"    every rank sends {plan.bytes_sent / 1e6:.3g} MB an application")
    return "\n".join(lines)


def paper_table(gpus: int = 8, mfu: float = 0.4, gpu: str = "H100") -> str:
    """A Markdown table of MSign's cost for the paper's four models, applied every 100 steps to all block matrices."""
    rows = []
    for name, (_, overhead) in PAPER.items():
        cfg = load_config([str(ROOT / "configs" / f"{name}_adamw.py")])
        plan = Plan(cfg, gpus, budget.shards(cfg, gpus, GPUS[gpu].memory), GPUS[gpu], mfu, "blocks")
        compute, exchange = plan.application_seconds("polar")
        rows.append({
            "model": name,
            "FLOPs a step": f"{budget.step_flops(cfg):.2g}",
            "step, ms": f"{1e3 * plan.step_seconds:.3g}",
            "Eq 16": f"{100 * plan.eq_16(100):.3g} %",
            "FLOPs an application, polar": f"{budget.msign_flops(plan.shapes, budget.polar_flops):.2g}",
            "MB a rank sends": f"{plan.bytes_sent / 1e6:.3g}",
            "polar, ms: compute + exchange": f"{1e3 * compute:.3g} + {1e3 * exchange:.2g}",
            "r, steps": f"{plan.application_steps('polar'):.2g}",
            "share of the time": f"{100 * plan.share('polar', 100):.2g} %",
            "eigh instead: r": f"{plan.application_steps('eigh'):.2g}",
            "paper, measured": overhead,
        })  # fmt: skip
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)
