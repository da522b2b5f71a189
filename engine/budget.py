"""What a run takes, counted before it starts: parameters, FLOPs, bytes and seconds, of training and of MSign."""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from math import ceil

import torch

from config import Config
from model import GPT
from msign import polar_steps, rank_cutoff, select

EIGH_SHARE = 0.02  # of the fp64 peak at which eigenvectors are found: assumed
POLAR_SHARE = 0.5  # of the fp32 peak at which "polar" multiplies: assumed
ROOM = 0.9  # of a GPU's memory that may be planned with; the rest is the allocator's


@dataclass(frozen=True)
class GPU:
    """Peak FLOP/s without sparsity, bytes, and bytes/s one way inside a node and out of it, as the data sheets say."""

    bf16: float
    fp32: float
    fp64: float
    memory: float
    inside: float
    outside: float = 50e9  # 400 Gb/s a GPU


GPUS = {
    "H100": GPU(989e12, 67e12, 67e12, 80e9, 450e9),
    "A100": GPU(312e12, 19.5e12, 19.5e12, 80e9, 300e9, 25e9),
    "RTX4090": GPU(165e12, 83e12, 1.3e12, 24e9, 32e9),
}


def on_meta(cfg: Config) -> GPT:
    """The model without its numbers: shapes and counts take no memory."""
    with torch.device("meta"):
        return GPT(cfg)


def parameters(cfg: Config) -> float:
    """How many parameters the model has, counted on two of its blocks; infinity where 64 bits cannot number them."""
    try:
        model = on_meta(replace(cfg, n_layer=2))
    except RuntimeError:  # PyTorch counts the bytes of a matrix in 64 bits
        return float("inf")
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]  # MHA and MLA may alternate
    rest = sum(p.numel() for p in model.parameters()) - sum(blocks)
    return rest + (cfg.n_layer + 1) // 2 * blocks[0] + cfg.n_layer // 2 * blocks[1]


@dataclass(frozen=True)
class Memory:
    """Bytes on one of `ranks` GPUs at the largest moment of a step. Weights, gradients and AdamW's two moments are fp32."""

    weights: int
    gradients: int
    moments: int
    activations: int
    casts: int  # bf16 copies of a replica's weights, which autocast keeps for the backward pass
    gathered: int  # FSDP2: embedding and read-out with their gradients; two blocks and one's gradients

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self))

    @classmethod
    def of(cls, cfg: Config, ranks: int, sharded: bool) -> "Memory":
        model = on_meta(cfg)
        n = sum(p.numel() for p in model.parameters())
        block = sum(p.numel() for p in model.blocks[0].parameters())
        width = 2 if cfg.dtype == "bfloat16" else 4
        share = ceil(n / ranks) if sharded else n
        gathered = 8 * (n - cfg.n_layer * block) + (2 * width + 4) * block if sharded else 0
        casts = 2 * n if width == 2 and not sharded else 0
        return cls(4 * share, 4 * share, 8 * share, model.activation_bytes(width), casts, gathered)


def step_flops(cfg: Config) -> float:
    """Forward and backward, all tokens of a step; with recomputation the blocks' forward pass again."""
    return on_meta(cfg).flops_per_token() * cfg.tokens_per_step * (4 / 3 if cfg.recompute else 1)


def matrices(cfg: Config, targets: str | None = None) -> list[tuple[int, ...]]:
    """Shapes of what MSign works on; experts' matrices are one stack (E, m, n)."""
    return [tuple(p.shape) for p in select(on_meta(cfg).named_parameters(), targets or cfg.msign_targets).values()]


def svd_flops(m: int, n: int) -> float:
    """A singular value decomposition as the paper's Eq 16 counts it; m ≥ n."""
    return 2 * m * n**2 + 11 * n**3


def eigh_flops(m: int, n: int) -> float:
    """msign's "eigh": Gram matrix, eigenvectors (9 n³), V S⁻¹ Vᵀ, W times that; m ≥ n."""
    return 2 * m * n**2 + 9 * n**3 + 2 * n**3 + 2 * m * n**2


def polar_flops(m: int, n: int) -> float:
    """msign's "polar": three squarings to bound the norm, quintics and two filters, the residual; m ≥ n."""
    steps = len(polar_steps(rank_cutoff(m, n)))
    return 2 * m * n**2 + 3 * 2 * n**3 + (steps + 2) * (4 * m * n**2 + 2 * n**3) + 4 * m * n**2


def msign_flops(shapes: Iterable[tuple[int, ...]], flops=eigh_flops) -> float:
    """Of one application to all of them, over all ranks."""
    return sum(torch.Size(s[:-2]).numel() * flops(max(s[-2:]), min(s[-2:])) for s in shapes)


def msign_bytes(shapes: Iterable[tuple[int, ...]], ranks: int, sharded: bool) -> list[int]:
    """fp32 bytes that every rank sends in one application, as `msign.apply_` exchanges them (`msign.counts` has the same).

    Replicated matrices: the results of a rank's own go to all others. Sharded ones: their rows go to their owners, and the
    new rows back; experts stay where they are.
    """
    sent, first = [0] * ranks, 0
    stacks = {}
    for shape in shapes:
        stacks[shape] = stacks.get(shape, 0) + torch.Size(shape[:-2]).numel()
    for shape, count in stacks.items():
        m, n = shape[-2:]
        if ranks == 1 or (sharded and len(shape) > 2):
            continue
        owned = [len(range((rank - first) % ranks, count, ranks)) for rank in range(ranks)]
        each = ceil(m / ranks)
        for rank in range(ranks):
            rows = max(0, min(each, m - rank * each))
            if sharded:
                sent[rank] += 4 * n * (rows * (count - owned[rank]) + (m - rows) * owned[rank])
            else:
                sent[rank] += 4 * n * m * max(owned) * (ranks - 1)
        first += count
    return sent


@dataclass(frozen=True)
class Plan:
    """Seconds and shares of one layout. mfu: share of the peak at which a training step runs."""

    cfg: Config
    ranks: int
    sharded: bool
    gpu: GPU
    mfu: float
    targets: str
    per_node: int = 8

    @property
    def step_seconds(self) -> float:
        peak = self.gpu.bf16 if self.cfg.dtype == "bfloat16" else self.gpu.fp32
        useful = on_meta(self.cfg).flops_per_token() * self.cfg.tokens_per_step
        return useful / (self.ranks * peak * self.mfu)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return matrices(self.cfg, self.targets)

    def application_seconds(self, backend: str) -> tuple[float, float]:
        """Computing the signs, split over the ranks, and exchanging them."""
        flops, peak = {"polar": (polar_flops, self.gpu.fp32 * POLAR_SHARE),
                       "eigh": (eigh_flops, self.gpu.fp64 * EIGH_SHARE)}[backend]  # fmt: skip
        rate = self.gpu.inside if self.ranks <= self.per_node else self.gpu.outside
        exchange = max(msign_bytes(self.shapes, self.ranks, self.sharded)) / rate
        return msign_flops(self.shapes, flops) / (self.ranks * peak), exchange

    def share(self, backend: str, period: int) -> float:
        """Of the training time that goes to MSign."""
        return sum(self.application_seconds(backend)) / self.step_seconds / period

    def eq_16(self, period: int) -> float:
        """The paper's: SVD's FLOPs against the steps between two applications, as if both ran at the same rate."""
        useful = on_meta(self.cfg).flops_per_token() * self.cfg.tokens_per_step
        return msign_flops(self.shapes, svd_flops) / (period * useful)


def layouts(cfg: Config, gpus: int) -> Iterable[tuple[str, Config, int, bool]]:
    """What could be done with `gpus` or more GPUs, the least change first: (in words, config, ranks, sharded)."""

    def divides(micro: int, ranks: int) -> bool:
        return cfg.batch_size % (micro * ranks) == 0

    ranks = gpus
    while ranks <= max(cfg.batch_size, gpus):
        more = f"--gpus {ranks}" if ranks != gpus else ""
        micro = cfg.micro_batch
        while micro >= 1:
            smaller = f"--micro_batch={micro}" if micro != cfg.micro_batch else ""
            for recompute in (False, True) if not cfg.recompute else (True,):
                again = "--recompute" if recompute != cfg.recompute else ""
                for sharded in (False, True) if ranks > 1 else (False,):
                    if divides(micro, ranks):
                        shards = "--parallel=fsdp" if sharded else "--parallel=ddp" if ranks > 1 else ""
                        words = " ".join(filter(None, (more, shards, again, smaller)))
                        yield words, replace(cfg, micro_batch=micro, recompute=recompute), ranks, sharded
            micro //= 2
        ranks *= 2


def fits(cfg: Config, ranks: int, sharded: bool, gpu: GPU) -> bool:
    return Memory.of(cfg, ranks, sharded).total <= ROOM * gpu.memory
