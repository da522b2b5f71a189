"""Memory in bytes and FLOPs of a training run and of MSign, counted before the run starts, and what GPUs can do.

An *application* of MSign is one replacement of all the matrices that it works on, its targets.
A *rank* is one process of a run, with one GPU.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from math import ceil

import torch

from config import Config
from model import GPT
from msign import PARTIAL, deal, find, polar_cutoff, polar_steps

ROOM = 0.85  # the share of a GPU's memory that a plan may use; the rest is the allocator's, NCCL's and the probes'


@dataclass(frozen=True)
class GPU:
    """A GPU: peak FLOP/s without sparsity, bytes/s one way inside and between nodes, as its data sheet says.

    names: a pattern of what CUDA calls GPUs with these peaks. bf16 is fp16's peak, too. memory: the bytes that PyTorch
    sees on one; the data sheet's round number is another. bandwidth: bytes/s from and to this memory.
    """

    names: str
    bf16: float
    fp32: float
    fp64: float
    memory: float
    bandwidth: float
    inside: float
    outside: float = 50e9  # 400 Gb/s a GPU

    def peak(self, dtype: str) -> float:
        """FLOP/s for cfg.dtype."""
        return self.bf16 if dtype == "bfloat16" else self.fp32


GPUS = {  # an H100 on a PCIe card has lower peaks; an H200 has the same and a faster memory
    "H100": GPU(r"H100 \d+GB HBM3|H200", 989e12, 67e12, 67e12, 79.18 * 2**30, 3.35e12, 450e9),
    "A100": GPU(r"A100", 312e12, 19.5e12, 19.5e12, 79.15 * 2**30, 2.04e12, 300e9, 25e9),
    "RTX4090": GPU(r"RTX 4090$", 165e12, 83e12, 1.3e12, 23.65 * 2**30, 1.01e12, 32e9),
}


def gpu_called(name: str) -> GPU | None:
    """The entry of GPUS for what CUDA calls a device; None if there is none, as for a CPU."""
    return next((gpu for gpu in GPUS.values() if re.search(gpu.names, name)), None)


@lru_cache(maxsize=8)
def on_meta(cfg: Config) -> GPT:
    """The model on PyTorch's meta device: its parameters have shapes but no values, and take no memory.

    Equal configurations get the same model, so callers leave it as it is.
    """
    with torch.device("meta"):
        return GPT(cfg)


def parameters(cfg: Config) -> float:
    """The model's number of parameters, counted on two blocks; infinity if a matrix is too large for PyTorch."""
    try:
        model = on_meta(replace(cfg, n_layer=2))
    except RuntimeError:  # PyTorch counts the bytes of a matrix in 64 bits
        return float("inf")
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]  # MHA and MLA may alternate
    rest = sum(p.numel() for p in model.parameters()) - sum(blocks)
    return rest + (cfg.n_layer + 1) // 2 * blocks[0] + cfg.n_layer // 2 * blocks[1]


@dataclass(frozen=True)
class Memory:
    """Bytes on a GPU when a step needs most memory.

    Weights, gradients and AdamW's two moments are fp32. With DDP a GPU holds all of them (`shards` is 1). With FSDP2 it
    holds a part of every parameter's rows, over all ranks, and with HSDP over a node's ranks. The count is that of the
    GPU that holds most.
    """

    weights: int
    gradients: int
    moments: int
    activations: int
    casts: int  # without sharding: bf16 copies of the weights, which autocast keeps for the backward pass
    # with shards: the whole embedding and head; in the backward pass also the head's gradient, two whole blocks and one
    # block's gradients, each as many rows as all ranks together would hold if all held as many as the first
    gathered: int

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self))

    @classmethod
    def of(cls, cfg: Config, shards: int) -> "Memory":
        """The count for cfg."""
        model = on_meta(cfg)
        n = sum(p.numel() for p in model.parameters())
        block = sum(p.numel() for p in model.blocks[0].parameters())  # exact unless MHA and MLA alternate
        width = 2 if cfg.dtype == "bfloat16" else 4
        share = sum(held(p, shards) for p in model.parameters())
        padded = shards * sum(held(p, shards) for p in model.blocks[0].parameters())
        casts = 2 * n if width == 2 and shards == 1 else 0
        whole = 4 * (n - cfg.n_layer * block)
        gathered = (whole, whole + 4 * model.head.weight.numel() + (2 * width + 4) * padded) if shards > 1 else (0, 0)
        moments = zip(model.activation_bytes(width), gathered, strict=True)  # the loss, and the last block's gradient
        activations, gathered = max(moments, key=sum)
        return cls(4 * share, 4 * share, 8 * share, activations, casts, gathered)


def held(p: torch.Tensor, shards: int) -> int:
    """Elements of a parameter on the rank that holds most of them: FSDP2 deals its rows out as torch.chunk does."""
    return ceil(len(p) / shards) * (p.numel() // len(p))


def step_bytes(cfg: Config, ranks: int, shards: int) -> tuple[int, int]:
    """Bytes that a rank sends in a training step, without measurements; `shards`: see Memory.

    The first number goes to the ranks that hold the model together with it, the second one to other replicas. They are
    counted as sent around a ring: of n ranks each sends n − 1 parts when parts are gathered, or summed and scattered,
    and twice the share (n − 1)/n of what it has when all get the sum. For every micro-batch, FSDP2 gathers each block
    twice in the type that it computes in, once for each pass, and the rest of the model once in fp32, and scatters fp32
    gradients. Replicas sum gradients once a step.
    """
    model = on_meta(cfg)
    blocks, whole = (sum(held(p, shards) for p in of.parameters()) for of in (model.blocks, model))
    width = 2 if cfg.dtype == "bfloat16" else 4
    gathered = 2 * width * blocks + 4 * (whole - blocks)
    micro_batches = cfg.batch_size // cfg.micro_batch // ranks
    replicas = ranks // shards
    return micro_batches * (shards - 1) * (gathered + 4 * whole), 8 * whole * (replicas - 1) // replicas


def shards(cfg: Config, ranks: int, memory: int | None, per_node: int = 1) -> int:
    """Over how many ranks cfg spreads a model: `per_node` with HSDP, all with FSDP2, one with DDP.

    Left to choose, DDP where a GPU of this memory can hold the model, else HSDP where the GPUs of a node can together,
    else FSDP2. memory: in bytes; None for a CPU, where nothing is sharded unasked. per_node: the ranks of a node.
    """
    if ranks == 1 or (cfg.parallel == "auto" and not memory):
        return 1
    if cfg.parallel == "auto":
        ways = (1, per_node) if ranks % per_node == 0 else (1,)
        return next((n for n in ways if Memory.of(cfg, n).total <= ROOM * memory), ranks)
    return {"ddp": 1, "fsdp": ranks, "hsdp": per_node}[cfg.parallel]


def step_flops(cfg: Config) -> float:
    """FLOPs of a step: forward and backward pass over all its tokens, and the blocks that are computed again.

    Of these PyTorch omits a dense block's last product, whose result nothing needs; it is counted here.
    """
    model = on_meta(cfg)
    again = sum(map(model.block_flops, model.blocks[: cfg.recompute])) / 3  # the forward pass once more
    return (model.flops_per_token() + again) * cfg.tokens_per_step


def matrices(cfg: Config, targets: str | None = None) -> list[tuple[int, ...]]:
    """Shapes of the matrices that MSign replaces, (m, n); those of E experts are one stack (E, m, n)."""
    return [tuple(t.parameter.shape) for t in find(on_meta(cfg), targets or cfg.msign_targets).values()]


def svd_flops(m: int, n: int) -> float:
    """FLOPs of a singular value decomposition of an m × n matrix, m ≥ n, as the paper's Eq 16 counts them."""
    return 2 * m * n**2 + 11 * n**3


def eigh_flops(m: int, n: int) -> float:
    """FLOPs of msign's "eigh" for m × n, m ≥ n: Gram matrix, eigenvectors (9 n³), V S⁻¹ Vᵀ, and W V S⁻¹ Vᵀ."""
    return 2 * m * n**2 + 9 * n**3 + 2 * n**3 + 2 * m * n**2


def polar_flops(m: int, n: int) -> float:
    """FLOPs of msign's "polar" for m × n, m ≥ n, all in fp16 but `polar_wide_flops`.

    A Gram matrix is two fp16 products, and any other product three. There are s quintics and two last steps. The bound
    of s₁ takes four Gram matrices; the first two quintics, taken together, three and three products of n × n. Each
    later step takes two Gram matrices and a product, the residual one Gram matrix and a product.
    """
    s = len(polar_steps(polar_cutoff(m, n)))
    return 2 * ((5 * s + 9) * m * n**2 + (2 * s + 19) * n**3) + polar_wide_flops(m, n)


def polar_wide_flops(m: int, n: int) -> float:
    """FLOPs of the one product of "polar" in fp64."""
    return 2 * m * n**2


def polar_bytes(m: int, n: int) -> float:
    """Bytes that "polar" reads and writes for m × n, m ≥ n, when no operation is fused with the next.

    A product that sums more than PARTIAL elements reads and writes its fp32 result once more for every further part:
    those of m × n with n × n and of n × n sum n elements, a Gram matrix of m × n sums m.
    """
    s = len(polar_steps(polar_cutoff(m, n)))
    more_of_m, more_of_n = (-(-k // PARTIAL) - 1 for k in (m, n))
    parts = (2 * s + 6) * n**2 * more_of_m + ((3 * s + 3) * m * n + (2 * s + 19) * n**2) * more_of_n
    return (48 * s + 224) * m * n + (110 * s + 598) * n**2 + 8 * parts


def msign_flops(shapes: Iterable[tuple[int, ...]], flops=eigh_flops) -> float:
    """FLOPs of one application of MSign to matrices of these shapes, over all ranks; `flops(m, n)` counts one."""
    return sum(torch.Size(shape[:-2]).numel() * flops(max(shape[-2:]), min(shape[-2:])) for shape in shapes)


def msign_loads(shapes: Iterable[tuple[int, ...]], ranks: int, shards: int, flops=eigh_flops) -> list[float]:
    """FLOPs of each rank in one application of MSign, as `msign.apply_` deals it out; `shards`: see Memory."""
    dealt, local = _dealt(shapes, ranks, shards)
    loads = [msign_flops(local, flops) / ranks] * ranks
    for (m, n), owner in dealt:
        loads[owner] += flops(max(m, n), min(m, n))
    return loads


def _dealt(shapes: Iterable[tuple[int, ...]], ranks: int, shards: int) -> tuple[list[tuple], list[tuple]]:
    """(matrix, its owner) of the matrices that are dealt out to all ranks, and the other shapes: sharded experts.

    An expert's matrix lies on one rank of every replica, and these ranks alone share the experts that they hold.
    """
    shapes = list(shapes)
    local = [shape for shape in shapes if shards > 1 and len(shape) > 2]
    matrices = [s[-2:] for s in shapes if s not in local for _ in range(torch.Size(s[:-2]).numel())]
    return list(zip(matrices, deal(matrices, ranks), strict=True)), local


def msign_bytes(shapes: Iterable[tuple[int, ...]], ranks: int, shards: int) -> list[tuple[int, int]]:
    """Bytes that every rank sends in one application, in fp32, as `msign.apply_` exchanges them; `shards`: see Memory.

    The first number is what it sends to the ranks that hold the model together with it: its rows of a matrix to the
    owner, or, as the owner, the new rows to the others. The second is what it sends to other replicas of the model: all
    it holds of the matrices that a rank of its replica owns. Sharded stacks of experts are sent to other replicas only.
    During a run, `msign.counts` counts the bytes that are really sent.
    """
    within, across = [0] * ranks, [0] * ranks
    replicas = ranks // shards
    dealt, local = _dealt(shapes, ranks, shards)
    for (m, n), owner in dealt:
        for shard, rows in enumerate(rows_of(m, shards)):
            holder = owner // shards * shards + shard
            across[holder] += 4 * n * rows * (replicas - 1)
            within[holder] += 4 * n * (m - rows if holder == owner else rows)
    for shard in range(shards if local else 0):
        here = [(m, n) for experts, m, n in local for _ in range(rows_of(experts, shards)[shard])]
        for (m, n), replica in zip(here, deal(here, replicas), strict=True):
            across[replica * shards + shard] += 4 * m * n * (replicas - 1)
    return list(zip(within, across, strict=True))


def rows_of(m: int, shards: int) -> list[int]:
    """How many of m rows each shard holds, as torch.chunk deals them out."""
    most = ceil(m / shards)
    return [max(0, min(most, m - shard * most)) for shard in range(shards)]
