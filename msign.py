"""MSign: every P steps, replace weight matrices by their norm-restored matrix sign (arXiv 2602.01734, Alg. 1).

This file needs PyTorch (2.9 or later) and nothing else, so it can be copied into another project:

    optimizer = MSign(torch.optim.AdamW(model.parameters()), model, period=100)
    print(optimizer)  # which matrices it will replace

`msign` is the pure function. `restored_sign` is the paper's update of one matrix or of a stack of matrices. `MSign`
is a thin wrapper around any `torch.optim.Optimizer`. Four words recur. The *targets* are the matrices that MSign
replaces. An *application* is one replacement of all targets. A *stack* (..., m, n) is a batch of matrices (m, n). A
*process*, or rank, is one of torch.distributed.

Many models fuse W_Q, W_K and W_V in one weight. The sign of that weight would mix the three matrices, so MSign splits
it (`find`) and refuses a weight that it cannot split. Do not use MSign on embeddings, output heads or 1-D parameters,
which the paper leaves alone.
"""

import heapq
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.optim import Optimizer

# roles of matrices. Multi-head latent attention (MLA, arXiv 2405.04434) makes queries as W_UQ W_DQ x, and keys and
# values as W_UK W_DKV x and W_UV W_DKV x; W_KR x is the part of the keys that carries positions
ATTENTION = ("W_Q", "W_K", "W_V", "W_DQ", "W_UQ", "W_DKV", "W_UK", "W_UV", "W_KR", "W_O")
MLP = ("W_up", "W_gate", "W_down")
TARGETS = {"attention": ATTENTION, "mlp": MLP, "blocks": ATTENTION + MLP}
CUSHION = 0.03  # the smallest singular value, as a share of the largest one, that `polar_steps` fits
HEADROOM = 1.001  # see `polar_steps`
SCALE = 1024.0  # "polar" stores its matrices as this many times their value, since fp16 has few digits below 1e-4
STACK_ELEMENTS = 2**26  # a process stacks matrices of one shape up to this many elements (0.5 GB in fp64)
# how many products a GPU's matrix units sum up; with 512 "polar" makes half the error (H100, 2048 × 2048: 5e-5 where
# half of the singular values are 0) and takes 1.4 times as long; with the whole sum it makes 1.7 times the error
PARTIAL = 1024
# "polar" accepts a result X with ‖XXᵀX − X‖_F / ‖X‖_F up to this. In the root mean square, the singular values that
# are not 0 then differ from 1 by about half of this.
POLAR_TOLERANCE = 1e-4
# what this process has done: "matrices" whose sign it took, "fallbacks" among them, "bytes" it sent to other ranks
counts: Counter[str] = Counter()


def msign(W: Tensor, backend: str = "auto") -> Tensor:
    """The matrix sign UVᵀ of Def. 5.1, from the reduced SVD W = USVᵀ with r = rank(W) columns.

    W: (..., m, n), finite. The result has W's shape and dtype; r of its singular values are 1, the others are 0. So a
    zero matrix stays zero, and a matrix of deficient rank becomes a partial isometry with the same null space.

    The rank r is the number of singular values s > s₁ · 4 · √max(m, n) · eps(fp32). The cut-off exceeds
    rounding errors: a product of deficient rank, computed in fp32, has singular values of about 0.05 · √n · eps · s₁ in
    its null directions.

    backend "svd":   torch.linalg.svd in fp32 (in fp64 for an fp64 W), as the paper writes it.
    backend "eigh":  eigendecomposition of the smaller Gram matrix in fp64. It is more accurate than an fp32 SVD for
                     condition numbers up to 1e6 and, on a CPU, at least as fast.
    backend "polar": products of fp16 matrices, summed in fp32, for GPUs, where eigensolvers are slow. Each fp32 matrix
                     is the sum of two in fp16. A matrix whose residual shows that the iteration did not converge goes
                     to "eigh"; counts["fallbacks"] counts these matrices. An fp64 W, or one on MPS, goes to "eigh" as
                     well and is not counted.
    backend "auto":  "polar" for CUDA tensors, otherwise "eigh".

    Raises ValueError for any other backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend = {backend!r}: must be one of {', '.join(BACKENDS)}")
    if W.numel() == 0:
        return W.clone()
    counts["matrices"] += W.shape[:-2].numel()
    return BACKENDS[backend](W).to(W.dtype)


def rank_cutoff(m: int, n: int) -> float:
    """The smallest singular value that counts towards the rank of an (m, n) matrix, relative to s₁."""
    return 4 * math.sqrt(max(m, n)) * torch.finfo(torch.float32).eps


def polar_cutoff(m: int, n: int) -> float:
    """The cut-off of "polar" for an (m, n) matrix, as a share of the bound of s₁ that `_scaled` computes."""
    # rounded, so that nearly equal cut-offs share the cached quintics
    return round(rank_cutoff(m, n) / min(m, n) ** (1 / 32), 8)


def _svd(W: Tensor) -> Tensor:
    driver = "gesvd" if W.is_cuda else None  # the default there, Jacobi's method, leaves an error of 3e-4
    U, S, Vh = torch.linalg.svd(W if W.dtype == torch.float64 else W.float(), full_matrices=False, driver=driver)
    keep = S[..., :1] * rank_cutoff(*W.shape[-2:]) < S
    return (U * keep.unsqueeze(-2)) @ Vh


def _eigh(W: Tensor) -> Tensor:
    if W.shape[-2] < W.shape[-1]:
        return _eigh(W.mT).mT
    # MPS has no fp64, so the CPU computes; the result returns to the caller's device
    W64 = W.cpu().double() if W.device.type == "mps" else W.double()
    lam, V = torch.linalg.eigh(W64.mT @ W64)  # W = U S Vᵀ gives WᵀW = V S² Vᵀ, so UVᵀ = W V S⁻¹ Vᵀ
    keep = lam > lam[..., -1:] * rank_cutoff(*W.shape[-2:]) ** 2
    inverse_s = torch.where(keep, lam, torch.inf).rsqrt()
    return (W64 @ ((V * inverse_s.unsqueeze(-2)) @ V.mT)).to(W.device)


@lru_cache
def polar_steps(low: float, accuracy: float = 1e-2) -> tuple[tuple[float, float, float], ...]:
    """Coefficients (a, b, c) of the quintics x -> ax + bx³ + cx⁵ that "polar" applies, one after another.

    Together they map the interval [low, 1] of singular values into [1 − accuracy, 1 + accuracy]. Each quintic is the
    best approximation of 1 on the interval that the previous one leaves (arXiv 2505.16932). Its error is −E, +E, −E, +E
    at the lower end, the two extrema and the upper end, which `_nearest_to_one` makes use of. Each quintic but the last
    is divided by (1 + E) · HEADROOM, so that its interval ends just below 1. A quintic without HEADROOM would map 1 to
    1 with a slope of 12: a singular value that rounding lifts to 1 + 1e-7 would leave the interval within eight steps.

    A fit never begins below CUSHION. Smaller values are then lifted nearly as fast, and large values keep their
    digits. A quintic fitted to smaller values would map some large values close to 0. It would do so by cancellation,
    and only three fp32 digits would be left.
    """
    steps: list[tuple[float, float, float]] = []
    while True:
        fit = max(low, CUSHION)
        a, b, c, E = _nearest_to_one(fit)
        if low == fit and accuracy >= E:
            return (*steps, (a, b, c))
        a, b, c = (v / (1 + E) / HEADROOM for v in (a, b, c))
        steps.append((a, b, c))
        low = a * low + b * low**3 + c * low**5


def _nearest_to_one(low: float) -> list[float]:
    """[a, b, c, E]: the quintic ax + bx³ + cx⁵ nearest to 1 on [low, 1] and its largest error E, by Remez exchange."""
    x = torch.tensor([low, (1 + 2 * low) / 3, (2 + low) / 3, 1.0], dtype=torch.float64)
    for _ in range(50):
        rows = torch.stack([x, x**3, x**5, torch.tensor([1.0, -1, 1, -1], dtype=torch.float64)], 1)
        a, b, c, E = torch.linalg.solve(rows, torch.ones(4, dtype=torch.float64)).tolist()
        # the extrema solve a + 3bx² + 5cx⁴ = 0, a quadratic equation for x²
        root = math.sqrt(max(9 * b * b - 20 * a * c, 0))
        extrema = [math.sqrt((-3 * b - sign * root) / (10 * c)) for sign in (1, -1)]
        x = torch.tensor([low, *extrema, 1.0], dtype=torch.float64)
    return [a, b, c, E]


@contextmanager
def _exact_sums(device: torch.device):
    """Inside, products on `device` are summed in full fp32 precision, whatever the process allows otherwise."""
    if device.type not in ("cpu", "cuda"):
        yield
        return
    # PyTorch puts mkldnn's attributes in place at run time
    matmul = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul  # type: ignore
    name, exact = ("allow_fp16_accumulation", False) if device.type == "cuda" else ("fp32_precision", "ieee")
    before = getattr(matmul, name)
    setattr(matmul, name, exact)
    try:
        yield
    finally:
        setattr(matmul, name, before)


def _halves(X: Tensor) -> tuple[Tensor, Tensor]:
    """fp16 stacks H and L with X = H + L up to 2⁻²² |X| + 2⁻²⁵, elementwise; X is fp32 and below 65504."""
    high = X.half()
    return high, torch.sub(X, high, out=torch.empty_like(high))


def _mm(A: Tensor, B: Tensor, C: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """scale · (AB + C) in fp32, in C if given: A and B are fp16, so elements' products are exact; fp32 sums them.

    A GPU's matrix units cut off the last digits of sums that other hardware rounds. The error grows with the number of
    products, so sums of more than PARTIAL products are added up from parts.
    """
    *parts, (a, b) = zip(A.split(PARTIAL, -1), B.split(PARTIAL, -2), strict=True)
    for left, right in parts:
        C = _add(left, right, C)
    return _add(a, b, C, scale)


def _add(A: Tensor, B: Tensor, C: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """As `_mm`, in one part. A GPU's matrix units compute it. Other devices emulate them but for the sums' rounding."""
    to_fp32: dict[str, Any] = {"out_dtype": torch.float32} if A.is_cuda else {}
    A, B = (A, B) if A.is_cuda else (A.float(), B.float())
    if C is None:
        return torch.bmm(A, B, **to_fp32)
    return torch.baddbmm(C, A, B, beta=scale, alpha=scale, out=C, **to_fp32)


def _product(X: tuple[Tensor, Tensor], Y: tuple[Tensor, Tensor]) -> Tensor:
    """XY / SCALE from halves, without the product of the two low ones, which is below 2⁻²² |X||Y|."""
    (HX, LX), (HY, LY) = X, Y
    return _mm(HX, HY, _mm(LX, HY, _mm(HX, LY)), 1 / SCALE)


def _gram(X: tuple[Tensor, Tensor]) -> Tensor:
    """XᵀX / SCALE from halves. It is symmetric, so two products suffice where `_product` needs three."""
    H, L = X
    cross = _mm(H.mT, L)
    return _mm(H.mT, H, cross + cross.mT, 1 / SCALE)


def _quintic(A: Tensor, a: float, b: float, c: float) -> Tensor:
    """SCALE · (aI + bG + cG²) for A = SCALE · G, a stack of symmetric matrices."""
    P = _gram(_halves(A)).mul_(c).add_(A, alpha=b)
    P.diagonal(dim1=-2, dim2=-1).add_(a * SCALE)
    return P


def _scaled(W: Tensor) -> Tensor:
    """SCALE · W (N, m, n), in fp64, divided, matrix by matrix, by an upper bound of its largest singular value s₁.

    The bound is ‖(WᵀW)⁸‖_F^(1/16) = (Σ s³²)^(1/32). It is at most r^(1/32) times s₁. 0.1 % is added for rounding.
    """
    tiny = torch.finfo(torch.float32).tiny
    largest = W.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(tiny)
    B = W / largest * SCALE
    log_bound = W.new_zeros(())  # the logarithm of the bound of s₁², for W / largest
    for power in (1, 2, 4, 8):
        B = _gram(_halves(B))
        norm = (torch.linalg.matrix_norm(B, keepdim=True) / SCALE).clamp_min(tiny)
        B, log_bound = B / norm, log_bound + norm.log() / power
    return W.double() * (SCALE / 1.001 / (log_bound.double() / 2).exp() / largest)


def _iterate(W: Tensor) -> tuple[Tensor, Tensor]:
    """SCALE · X, where X is the sign of W (N, m, n), m ≥ n, in fp32, and SCALE · ‖XXᵀX − X‖_F.

    A fixed number of quintics lifts to 1 all singular values that exceed the cut-off. Rounding noise in null directions
    grows with them but stays well below 1. The last two steps, x -> 2.5x³ − 1.5x⁵, therefore send the noise to 0 (0.1
    becomes 4e-8) and the others to 1.

    Every step is a product X · P(XᵀX). An error of P turns the result by as much, whatever W's condition. An error of
    the product X · P counts more: relative to the smallest singular value, which is small at first. Hence P of the
    first two steps is one matrix, and its product with X is computed in fp64.
    """
    first, second, *rest = polar_steps(polar_cutoff(*W.shape[-2:]))
    W = _scaled(W)
    A = _gram(_halves(W.float()))
    P = _halves(_quintic(A, *first))
    A = _product(_halves(_product(P, _halves(A))), P)
    both = _product(P, _halves(_quintic(A, *second)))
    X = (W @ both.double().div_(SCALE)).float()
    for step in (*rest, *[(0.0, 2.5, -1.5)] * 2):
        halves = _halves(X)
        X = _product(halves, _halves(_quintic(_gram(halves), *step)))
    halves = _halves(X)
    return X, torch.linalg.matrix_norm(_product(halves, _halves(_gram(halves))) - X)


def _polar(W: Tensor) -> Tensor:
    if W.dtype == torch.float64 or W.device.type == "mps":
        return _eigh(W)
    if W.shape[-2] < W.shape[-1]:
        return _polar(W.mT).mT
    flat = W.reshape(-1, *W.shape[-2:]).float()
    with _exact_sums(W.device):
        X, residual = _iterate(flat)
    # not "residual > …": a NaN is wrong too
    wrong = ~(residual <= POLAR_TOLERANCE * torch.linalg.matrix_norm(X))
    X = X / SCALE
    fallbacks = int(wrong.sum())
    if fallbacks:
        counts["fallbacks"] += fallbacks
        X[wrong] = _eigh(flat[wrong]).float()
    return X.view(W.shape)


BACKENDS = {"auto": lambda W: _polar(W) if W.is_cuda else _eigh(W), "svd": _svd, "eigh": _eigh, "polar": _polar}


def restored_sign(W: Tensor, backend: str = "auto") -> Tensor:
    """Algorithm 1's update of every matrix of W (..., m, n): ‖W‖_F / ‖UVᵀ‖_F · UVᵀ. A zero matrix stays zero."""
    sign = msign(W, backend)
    wide = None if W.device.type == "mps" else torch.float64  # the norm is summed in fp64 without an fp64 copy of W
    norm_W, norm_sign = (torch.linalg.matrix_norm(M, keepdim=True, dtype=wide) for M in (W, sign))
    ratio = norm_W / norm_sign.clamp_min(torch.finfo(torch.float32).tiny)
    return (sign * ratio.to(torch.promote_types(W.dtype, torch.float32))).to(W.dtype)


@dataclass(frozen=True)
class Layout:
    """Which rows of a weight (..., m, n) belong to which matrix.

    parts:      (role, rows) of every matrix, in their order within a group of rows.
    groups:     how often this order repeats: once if W_Q, W_K, W_V follow one another, as many times as there are heads
                if the weight holds head after head. A matrix has groups · rows rows.
    transposed: whether the weight is stored as (..., n, m), as in GPT-2's Conv1D.
    """

    parts: tuple[tuple[str, int], ...]
    groups: int = 1
    transposed: bool = False

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(role for role, _ in self.parts)

    @property
    def rows(self) -> int:
        return self.groups * sum(rows for _, rows in self.parts)

    def split(self, W: Tensor) -> dict[str, Tensor]:
        """{role: matrix (..., groups · rows, n)}: views of W if there is one group, otherwise copies."""
        grouped = (W.mT if self.transposed else W).unflatten(-2, (self.groups, -1))
        pieces = grouped.split([rows for _, rows in self.parts], -2)
        return {role: piece.flatten(-3, -2) for role, piece in zip(self.roles, pieces, strict=True)}

    def join(self, matrices: dict[str, Tensor]) -> Tensor:
        """The weight that `split` takes apart into these matrices."""
        W = torch.cat([matrices[role].unflatten(-2, (self.groups, -1)) for role in self.roles], -2).flatten(-3, -2)
        return W.mT if self.transposed else W

    def apply(self, update: Callable[[Tensor], Tensor], roles: tuple[str, ...], W: Tensor) -> Tensor:
        """A stack W (N, ...) of weights with the matrices of these roles updated; those of one shape share a stack."""
        matrices, same_shape = self.split(W), defaultdict(list)
        for role in roles:
            same_shape[matrices[role].shape].append(role)
        for alike in same_shape.values():
            new = update(torch.cat([matrices[role] for role in alike]))
            matrices |= zip(alike, new.chunk(len(alike)), strict=True)
        return self.join(matrices)


@dataclass(frozen=True, eq=False)
class Target:
    """A parameter and the matrices in it that are chosen.

    parameter: the tensor. If it is 3-D, the first dimension counts matrices, such as experts'.
    layout:    all its matrices.
    roles:     the roles of the chosen ones, in the layout's order.
    module:    dotted name of the attention or MLP module around the parameter; "" is the model itself.
    block:     index of the block: the first number in the parameter's name, or None.
    heads, kv_heads: how many heads of queries and of keys and values an attention module has; None if unknown.
    """

    parameter: Tensor
    layout: Layout
    roles: tuple[str, ...]
    module: str = ""
    block: int | None = None
    heads: int | None = None
    kv_heads: int | None = None

    @property
    def alone(self) -> bool:
        """Whether the parameter is one matrix, as it stands."""
        return len(self.layout.parts) == 1 and not self.layout.transposed

    def matrices(self) -> dict[str, Tensor]:
        """{role: W (..., m, n)} of the chosen matrices, detached, with n inputs and m outputs: y = Wx.

        They are views of the parameter if `Layout.split` makes views. A sharded parameter is gathered, so all processes
        must call this together.
        """
        W = self.parameter.detach()
        found = self.layout.split(W.full_tensor() if hasattr(W, "full_tensor") else W)
        return {role: found[role] for role in self.roles}


# names of weights in PyTorch, transformers, timm and nanoGPT, by the kind of module that holds them
NAMES = {
    "attention": {
        "W_Q": "q_proj q_proj_weight query wq q_lin to_q q_attn q",
        "W_K": "k_proj k_proj_weight key wk k_lin to_k k",
        "W_V": "v_proj v_proj_weight value wv v_lin to_v v",
        "W_O": "o_proj out_proj c_proj proj dense wo out_lin o",
        "W_DQ": "q_a_proj",
        "W_UQ": "q_b_proj",
    },
    "mlp": {
        "W_gate": "gate_proj w1 wi_0",
        "W_up": "up_proj fc1 c_fc fc_in linear1 lin1 dense_h_to_4h w3 wi wi_1",
        "W_down": "down_proj fc2 c_proj fc_out linear2 lin2 dense_4h_to_h w2 wo",
    },
}
ROLES = {kind: {name: role for role, names in table.items() for name in names.split()} for kind, table in NAMES.items()}
# what part of a dotted name, or the end of a class's name, shows that a module is attention or an MLP
KINDS = {
    "attention": (re.compile("(?i)attn|attention"), re.compile("(?i)(attention|attn)2?$")),
    "mlp": (re.compile("(?i)mlp|ffn|feed_?forward|expert|moe$"), re.compile("(?i)(mlp|ffn|feedforward|experts|moe)$")),
}
# names of weights that fuse matrices; of those that fuse matrices of equally many rows; of routers
FUSED = {
    "attention": re.compile("kv|c_attn|in_proj|qk|query_key_value", re.I),
    "mlp": re.compile("gate_?up|up_?gate|in_proj|w1[23]"),
}
EQUAL = re.compile("(qkv|c_attn|in_proj|gate_?up|up_?gate|w1[23])(_proj|_weight)?$", re.I)
ROUTER = re.compile("router|(^|_)w?gate$|^wg$|classifier", re.I)
# Classes whose fused weight holds all of W_Q, then W_K, then W_V; and those whose weight repeats, for every key head,
# the rows of its queries, of its key and of its value.
CONSECUTIVE = {
    "MultiheadAttention": "in_proj_weight", "GPT2Attention": "c_attn", "CausalSelfAttention": "c_attn",
    "Phi3Attention": "qkv_proj", "MptAttention": "Wqkv", "DbrxAttention": "Wqkv", "timm.Attention": "qkv",
}  # fmt: skip
INTERLEAVED = {
    "GPTNeoXAttention": "query_key_value", "BloomAttention": "query_key_value", "FalconAttention": "query_key_value",
    "GPTBigCodeAttention": "c_attn",
}  # fmt: skip


def _classes(module: nn.Module | None) -> list[str]:
    """The names of a module's class and of its bases (FSDP2 derives a class), each also behind its package's name."""
    bases = type(module).__mro__ if module is not None else ()
    return [name for c in bases for name in (c.__name__, f"{c.__module__.split('.')[0]}.{c.__name__}")]


def _kind(part: str, module: nn.Module | None) -> str | None:
    """Whether a module of this name is "attention", "mlp" or neither."""
    for kind, (in_name, of_class) in KINDS.items():
        if in_name.search(part) or any(map(of_class.search, _classes(module))):
            return kind
    return None


def _fits(part: str, name: str) -> bool:
    """Whether `part` is a part of this dotted name, or a pattern that the whole name matches."""
    return part in name.split(".") or fnmatch(name, part)


class _Weight:
    """A parameter of two or more dimensions, and what its name and the modules around it say of it.

    kind: "attention", "mlp" or None. module: the outermost of the modules of this kind right around it.
    scope: the module in which another weight reads its outputs. places: where `number` looks for numbers of heads.
    layout: its matrices, or None. fused: seems to be several. plain: no matrix. matters: None is refused.
    given: whether the layout is the user's.
    """

    def __init__(self, name: str, p: Tensor, modules: dict[str, nn.Module], split: dict):
        path = name.split(".")
        last = len(path) - 1 - (path[-1] == "weight" and len(path) > 1)
        self.name, self.p, self.key = name, p, path[last]
        self.holder = modules.get(".".join(path[:-1]))
        outwards = [".".join(path[:i]) for i in range(last, -1, -1)]  # the modules around it, by name
        kinds = [_kind(self.key, None)] + [_kind(n.rpartition(".")[2], modules.get(n)) for n in outwards]
        first = next((i for i, kind in enumerate(kinds) if kind), 1)
        self.kind = kinds[first]
        end = next((i for i in range(first, len(kinds)) if kinds[i] != self.kind), len(kinds)) if self.kind else 2
        within = outwards[: max(end - 1, 1)]  # up to the last module of this kind; of none, the innermost module
        self.module = within[-1]
        self.scope = self.module if self.kind == "attention" else within[0]
        found = [modules[n] for n in within if n in modules]
        self.places = [place for module in found for place in (module, getattr(module, "config", None))]
        self.block = next((int(part) for part in path if part.isdecimal()), None)
        self.heads = self.number("num_heads n_head n_heads num_attention_heads")
        self.kv_heads = self.number("num_kv_heads num_key_value_heads n_kv_head n_kv_heads kv_heads")
        if self.heads and not self.kv_heads:
            self.kv_heads = self.heads // (self.number("num_key_value_groups") or 1)
        no_matrix = isinstance(self.holder, nn.Embedding | nn.modules.conv._ConvNd) or p.ndim > 3
        self.plain = no_matrix or "bias" in self.key  # bias_k of MultiheadAttention, gate_up_proj_bias of experts
        self.fused = bool(self.kind and not self.plain and FUSED[self.kind].search(self.key))
        self.matters = not self.plain and not (self.kind == "mlp" and ROUTER.search(self.key))
        self.transposed = "Conv1D" in _classes(self.holder) or self.experts_are_transposed()
        self.rows = p.shape[-1 if self.transposed else -2]
        given = next((value for part, value in split.items() if _fits(part, name)), None)
        self.given = given is not None
        self.layout = self.from_split(given) if self.given else self.from_role() or self.from_class()

    def number(self, names: str) -> int | None:
        """The first whole number of one of these names in the modules around the weight or in their `config`."""
        values = (getattr(place, name, None) for place in self.places for name in names.split())
        return next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0), None)

    def experts_are_transposed(self) -> bool:
        """Whether gate_up_proj is (E, d, 2f) and down_proj (E, f, d), not (E, 2f, d) and (E, d, f)."""
        up, down = (tuple(getattr(getattr(self.holder, n, None), "shape", ())) for n in ("gate_up_proj", "down_proj"))
        return len(up) == len(down) == 3 and up[-1] == 2 * down[-2]

    def from_split(self, given) -> Layout:
        """The layout that the user gave."""
        if not isinstance(given, Layout):
            roles = {3: ATTENTION[:3], 2: ("W_K", "W_V") if self.kind == "attention" else ("W_gate", "W_up")}
            if len(given) not in roles:
                right = f"rows of W_Q, W_K, W_V, or of {' and '.join(roles[2])}, or a Layout"
                raise ValueError(f"split of {self.name} = {given!r}: must be {right}")
            turned = self.transposed or sum(given) == self.p.shape[-1] != self.p.shape[-2]
            given = Layout(tuple(zip(roles[len(given)], given, strict=True)), transposed=turned)
        rows = self.p.shape[-1 if given.transposed else -2]
        if given.rows != rows:
            raise ValueError(f"split of {self.name} {tuple(self.p.shape)} has {given.rows} rows; it must have {rows}")
        return given

    def from_role(self) -> Layout | None:
        """The layout of a weight whose name says that it is one matrix."""
        role = next((part for part in reversed(self.name.split(".")) if part in ATTENTION + MLP), None)
        if not role and not self.plain and not self.fused:
            unsure = self.kind is None and self.key in ("c_proj", "wo", "w1", "w2", "w3")
            role = None if unsure else ROLES[self.kind or "mlp"].get(self.key)
        return Layout(((role, self.rows),), transposed=self.transposed) if role else None

    def from_class(self) -> Layout | None:
        """The layout of a fused weight of a class that a rule knows."""
        m, h, kv, classes = self.rows, self.heads, self.kv_heads, _classes(self.places[0] if self.places else None)
        parts: tuple[tuple[str, int], ...] = ()
        groups = 1
        nope, v, latent, rope = map(self.number, ("qk_nope_head_dim", "v_head_dim", "kv_lora_rank", "qk_rope_head_dim"))
        if self.key == "gate_up_proj" and self.holder is not None:
            mixed = not getattr(self.holder, "is_concatenated", True) or "GptOssExperts" in _classes(self.holder)
            groups = m // 2 if mixed else 1
            parts = (("W_gate", m // 2 // groups), ("W_up", m // 2 // groups))
        elif self.key == "kv_a_proj_with_mqa" and latent and rope:
            parts = (("W_DKV", latent), ("W_KR", rope))
        elif self.key == "kv_b_proj" and h and nope and v:
            parts, groups = (("W_UK", nope), ("W_UV", v)), h
        elif h and kv and self.key == "c_attn" and getattr(self.places[0], "is_cross_attention", False):
            parts = (("W_K", m // 2), ("W_V", m // 2))
        elif h and kv and any({**CONSECUTIVE, **INTERLEAVED}.get(name) == self.key for name in classes):
            groups = kv if any(name in INTERLEAVED for name in classes) else 1
            k = m // (h + 2 * kv)
            parts = (("W_Q", h * k // groups), ("W_K", kv * k // groups), ("W_V", kv * k // groups))
        layout = Layout(parts, groups, self.transposed)
        return layout if parts and layout.rows == m else None

    def target(self, layout: Layout, chosen: set[str]) -> Target:
        heads = (self.heads, self.kv_heads) if self.kind == "attention" else (None, None)
        roles = tuple(role for role in layout.roles if role in chosen)
        return Target(self.p, layout, roles, self.module, self.block, *heads)

    def refusal(self) -> str:
        """Why the layout is not known, and what to write."""
        said, n = f"{self.name} {tuple(self.p.shape)}", 3 if self.kind == "attention" else 2
        rows = f"{(self.rows // n,) * n}" if EQUAL.search(self.key) and self.rows % n == 0 else "Layout(...)"
        instead = f'pass split={{"{self.key}": {rows}}}'
        if self.fused:
            return f"{said} seems to fuse several matrices; {instead}"
        roles = "W_Q,W_K,W_V,W_O" if self.kind == "attention" else "W_gate,W_up,W_down"
        return (
            f"{said}: no rule knows this weight of an {self.kind} module; add {self.key!r} to targets if it is one "
            f"matrix, {instead} if it fuses several, or name the roles to leave it out, as in targets={roles!r}"
        )


def _doubt_unequal(weights: list[_Weight]):
    """Set layout to None where W_Q (W_up) has not as many rows as W_O (W_down) has columns: perhaps it is fused."""
    latent = {w.module for w in weights if w.layout and "W_DKV" in w.layout.roles}
    inputs = {
        (w.scope, w.layout.roles[0]): w.p.shape[-2 if w.transposed else -1]
        for w in weights
        if w.layout and w.layout.roles in (("W_O",), ("W_down",))
    }
    for w in weights:
        layout = w.layout
        if layout is None or w.given or w.module in latent:
            continue
        for role, rows in layout.parts:
            reader = w.scope, {"W_Q": "W_O", "W_up": "W_down"}.get(role, "")
            if inputs.get(reader, rows * layout.groups) != rows * layout.groups:
                w.layout, w.fused = None, True


def find(
    model: nn.Module | Iterable[tuple[str, Tensor]],
    targets: str = "attention",
    split: dict[str, tuple[int, ...] | Layout] | None = None,
) -> dict[str, Target]:
    """The matrices that `targets` names, as {parameter name: Target}, in the order of the model's parameters.

    model:   a module, or named parameters. Of the latter only the names are known, so no fused weight is recognised.
    targets: comma-separated entries: "attention", "mlp" or "blocks" (both); a role ("W_V"), which may be a part of a
             fused weight; a part of a parameter's dotted name; a pattern for the whole name ("layers.*.attn.*.weight").
    split:   {part of a name, or pattern: (rows of W_Q, of W_K, of W_V)}; of two numbers, W_K and W_V in an attention
             module and W_gate and W_up in an MLP. A Layout in place of the numbers says everything else.

    The rules go by the names of parameters and by the classes and attributes of the modules around them. Embeddings,
    convolutions, biases, routers and parameters of one dimension have no role. Raises ValueError for an entry that
    matches no matrix, for a weight that seems to fuse several matrices in an unknown way, and, if an entry is
    "attention", "mlp" or "blocks", for a weight in such a module that no rule knows.
    """
    split, entries = split or {}, [entry.strip() for entry in targets.split(",")]
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    parameters = model.named_parameters() if isinstance(model, nn.Module) else model
    weights = [_Weight(name, p, modules, split) for name, p in parameters if p.ndim >= 2]
    for part in split:
        if not any(_fits(part, w.name) for w in weights):
            raise ValueError(f"split {part!r} matches no matrix")
    _doubt_unequal(weights)
    for w in weights:
        named = any(entry not in TARGETS and _fits(entry, w.name) for entry in entries)
        if named and not w.layout and not w.fused:
            w.layout = Layout(((w.key, w.rows),), transposed=w.transposed)
    chosen: dict[str, set[str]] = {w.name: set() for w in weights}
    for entry in entries:
        roles, found = TARGETS.get(entry, (entry,)), False
        kinds = [kind for kind in KINDS if set(roles) & set(TARGETS[kind])]
        for w in weights:
            by_name = entry not in TARGETS and _fits(entry, w.name)
            if w.layout:
                chosen[w.name] |= set(w.layout.roles) & set(w.layout.roles if by_name else roles)
                found |= by_name or bool(set(w.layout.roles) & set(roles))
            elif (w.fused and (by_name or w.kind in kinds)) or (entry in TARGETS and w.kind in kinds and w.matters):
                raise ValueError(w.refusal())
        if not found:
            there = ", ".join([w.name for w in weights][:8])
            raise ValueError(f"MSign target {entry!r} matches no matrix; there are {there}, …")
    return {w.name: w.target(w.layout, chosen[w.name]) for w in weights if w.layout and chosen[w.name]}


def describe(targets: Mapping[str, Target]) -> str:
    """A line for each kind of target: how often it occurs, its name with * for numbers, its shape and its matrices."""
    kinds: Counter[str] = Counter()
    for name, target in targets.items():
        rows = {role: target.layout.groups * n for role, n in target.layout.parts}
        what = ", ".join(role if target.alone else f"{role} ({rows[role]} rows)" for role in target.roles)
        anywhere = re.sub(r"\b\d+\b", "*", name)
        kinds[f"{anywhere} {tuple(target.parameter.shape)}: {what}"] += 1
    return "\n".join(f"  {n} × {kind}" for kind, n in kinds.items())


class NonFiniteWeightError(ValueError):
    """A target holds NaN or infinity, so it has no matrix sign."""


def _local(p: Tensor) -> Tensor:
    return p.to_local() if hasattr(p, "to_local") else p


@torch.no_grad()
def apply_(
    targets: dict[str, Target],
    update: Callable[[Tensor], Tensor] = restored_sign,
    group: dist.ProcessGroup | None = None,
):
    """Replace the matrices of the targets in place: `update` gets a stack (N, m, n) and returns their replacements.

    Several ranks share the work: the matrices are dealt out (`deal`), and every rank updates those that it owns. What
    then is sent depends on how the parameters lie on the ranks.

    * `group` is given (DDP): its ranks all hold the same matrices. The owners broadcast the results.
    * DTensors with placements [Shard(0)] (FSDP2): every rank holds some rows. One all-to-all brings the whole matrices
      to their owners, another one returns the rows.
    * DTensors with placements [Replicate(), Shard(0)] (HSDP): the ranks of a replica, which hold the matrices together,
      exchange rows as FSDP2's do, but only for their share of the matrices. Then every rank broadcasts its new rows to
      the ranks that hold the same rows in the other replicas.

    Parameters of three dimensions (experts) that are sharded need no exchange of rows, because each matrix lies on one
    rank of a replica.

    Raises NonFiniteWeightError, on all ranks, naming the first parameter that is not finite; no parameter has changed
    then. Raises ValueError for DTensors that lie in another way or on several meshes.
    """
    parameters = {name: target.parameter for name, target in targets.items()}
    _require_finite(parameters, group)
    parts = {name: (t.layout, t.roles) for name, t in targets.items() if not t.alone}
    for by_owner, spread in _dealt(parameters, group, parts):
        _update_shared(by_owner, update, spread)


@torch.no_grad()
def share_of(
    parameters: Mapping[str, Tensor], group: dist.ProcessGroup | None = None
) -> Iterator[list[tuple[str, Tensor]]]:
    """The whole matrices (m, n) that this process is to measure, with their parameters' names, some at a time.

    They are dealt out as `apply_` does, and every matrix of every parameter falls to one process. Those of which the
    process holds only rows are gathered when their list is due, up to STACK_ELEMENTS elements or one matrix. All
    processes call this together and iterate to the end. Raises ValueError for DTensors that `apply_` refuses.
    """
    for by_owner, spread in _dealt(parameters, group):
        of_replica = by_owner[_place(spread.replicas)[0]]
        if not spread.shards:
            yield [(matrix.name, matrix.values) for matrix in of_replica[0]]
            continue
        most = max((matrix.shape.numel() for theirs in of_replica for matrix in theirs), default=1)
        size = max(1, STACK_ELEMENTS // most)
        for first in range(0, max(map(len, of_replica)), size):
            rows = _Rows([theirs[first : first + size] for theirs in of_replica], spread.shards)
            yield [(matrix.name, matrix.values) for matrix in rows.gather()]


class _Spread(NamedTuple):
    """How parameters lie on the processes. None stands for this process alone.

    replicas: the processes that hold what this one holds. shards: those that hold a parameter together, each some rows.
    """

    replicas: dist.ProcessGroup | None
    shards: dist.ProcessGroup | None


def _place(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """This process's rank in the group, and the number of its ranks."""
    return (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)


def _dealt(
    parameters: Mapping[str, Tensor], group, parts: Mapping = {}
) -> Iterator[tuple[list[list[list["_Matrix"]]], _Spread]]:
    """The matrices by the process that computes them, and how they lie: by_owner[replica][shard] are a process's.

    parts: {name: (layout, roles)} of parameters that are not one matrix.
    """
    sharded, spread = _sharded(parameters)
    whole = _Spread(_several(group) or spread.shards, None)  # of what is no DTensor
    dealt: dict[tuple, list[_Matrix]] = defaultdict(list)
    for name, p in parameters.items():
        where = whole if name not in sharded else spread if p.ndim == 2 else spread._replace(shards=None)
        matrices = [_Matrix(name, values, p.shape[-2:], parts.get(name)) for values in _matrices(_local(p))]
        dealt[where, p.dtype, p.device] += matrices
    for (where, *_), matrices in dealt.items():
        (_, replicas), (_, shards) = map(_place, where)
        by_owner: list[list[list[_Matrix]]] = [[[] for _ in range(shards)] for _ in range(replicas)]
        owners = deal([matrix.shape for matrix in matrices], replicas * shards)
        for matrix, owner in zip(matrices, owners, strict=True):
            by_owner[owner // shards][owner % shards].append(matrix)
        yield by_owner, where


def _sharded(parameters: Mapping[str, Tensor]) -> tuple[set[str], _Spread]:
    """The names of the DTensors, and how they lie. Raises ValueError where `apply_` does."""
    tensors: dict[str, Any] = {n: p for n, p in parameters.items() if hasattr(p, "placements")}
    if not tensors:
        return set(), _Spread(None, None)
    first, mesh = next((name, p.device_mesh) for name, p in tensors.items())
    for name, p in tensors.items():
        *outer, last = p.placements
        if len(outer) > 1 or not all(placement.is_replicate() for placement in outer) or not last.is_shard(0):
            right = "[Shard(0)] (FSDP2) or [Replicate(), Shard(0)] (HSDP)"
            raise ValueError(f"{name} is distributed as {list(p.placements)}; it must be {right}")
        if p.device_mesh != mesh:
            raise ValueError(f"{name} lies on {p.device_mesh} and {first} on {mesh}; all must lie on one mesh")
    replicas, shards = [None, *(mesh.get_group(i) for i in range(mesh.ndim))][-2:]
    return set(tensors), _Spread(_several(replicas), _several(shards))


def _several(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group, or None where this process is alone in it."""
    return group if _place(group)[1] > 1 else None


def _require_finite(params: dict[str, Tensor], group: dist.ProcessGroup | None):
    """Raise NonFiniteWeightError, on all ranks, naming the first parameter of which some rank holds NaN or infinity."""
    device = next(iter(params.values())).device
    bad = torch.stack([~torch.isfinite(_local(p)).all().to(device) for p in params.values()]).int()
    for together in filter(_several, (group, *_sharded(params)[1])):
        dist.all_reduce(bad, dist.ReduceOp.MAX, together)
    if bad.any():
        name = list(params)[int(bad.nonzero()[0])]
        raise NonFiniteWeightError(f"{name} holds a value that is not finite; MSign changed no weight")


def _matrices(W: Tensor) -> Iterable[Tensor]:
    """Views of the matrices (m, n) of W (..., m, n)."""
    return [W] if W.ndim == 2 else W.flatten(0, -3).unbind()


class _Matrix(NamedTuple):
    """A parameter's matrix, or the rows of it that this process holds.

    name: the parameter's. values: what the process holds. shape: the whole matrix's.
    parts: the layout and the roles to be updated, or None where the matrix is a target as a whole.
    """

    name: str
    values: Tensor
    shape: torch.Size
    parts: tuple[Layout, tuple[str, ...]] | None


def deal(shapes: Sequence[tuple[int, ...]], ranks: int) -> list[int]:
    """The process that computes each of these matrices (m, n): the dearest first, each to the one with least to do.

    A matrix, m ≥ n, costs about n² (m + n). The busiest process has at most 4/3 of the best maximum (Graham 1969).
    """
    costs = [min(shape) ** 2 * sum(shape) for shape in shapes]
    loads, owners = [(0, rank) for rank in range(ranks)], [0] * len(costs)
    for i in sorted(range(len(costs)), key=costs.__getitem__, reverse=True):
        load, owners[i] = loads[0]
        heapq.heapreplace(loads, (load + costs[i], owners[i]))
    return owners


def _update(matrices: Iterable[_Matrix], update: Callable[[Tensor], Tensor]):
    """Update whole matrices in place; those that are alike share stacks."""
    alike = defaultdict(list)
    for matrix in matrices:
        alike[matrix.shape, matrix.values.dtype, matrix.values.device, matrix.parts].append(matrix.values)
    for (shape, _, _, parts), values in alike.items():
        change = update if parts is None else partial(parts[0].apply, update, parts[1])
        size = max(1, STACK_ELEMENTS // shape.numel())
        for stack in (values[i : i + size] for i in range(0, len(values), size)):
            for W, new in zip(stack, change(torch.stack(stack)).unbind(), strict=True):
                W.copy_(new)


def _update_shared(by_owner: list[list[list[_Matrix]]], update: Callable[[Tensor], Tensor], spread: _Spread):
    """Update matrices on their owners, and then wherever else they or their rows lie; for `by_owner` see `_dealt`."""
    of_replica = by_owner[_place(spread.replicas)[0]]
    if spread.shards:
        rows = _Rows(of_replica, spread.shards)
        whole = rows.gather()
        _update(whole, update)
        rows.scatter(whole)
    else:
        _update(of_replica[0], update)
    if spread.replicas:
        _tell(by_owner, spread.replicas)


def _tell(by_owner: list[list[list[_Matrix]]], group: dist.ProcessGroup):
    """Bring matrices, or the rows of them that this process holds, from the replica that updated them to the others."""
    rank, ranks = _place(group)
    for replica, owners in enumerate(by_owner):
        theirs = [matrix for of_owner in owners for matrix in of_owner if matrix.values.numel()]
        size = max(1, STACK_ELEMENTS // max((matrix.values.numel() for matrix in theirs), default=1))
        for part in (theirs[i : i + size] for i in range(0, len(theirs), size)):
            flat = torch.cat([matrix.values.reshape(-1) for matrix in part])
            dist.broadcast(flat, group=group, group_src=replica)
            counts["bytes"] += flat.nbytes * (ranks - 1) * (replica == rank)
            for matrix, new in zip(part, flat.split([matrix.values.numel() for matrix in part]), strict=True):
                matrix.values.copy_(new.view(matrix.values.shape))


class _Rows:
    """Matrices of which every process holds some rows, dealt out as torch.chunk does, and their way to their owners.

    The rows travel in flat buffers: `pieces` is this process's rows of all matrices, in the order of their owners, and
    `wholes` is all rows of the matrices that it owns, in the order of the processes that hold the rows.
    """

    def __init__(self, by_owner: list[list[_Matrix]], group):
        ranks, rank = len(by_owner), dist.get_rank(group)
        self.group, self.mine = group, by_owner[rank]
        self.held = [matrix.values for theirs in by_owner for matrix in theirs]
        self.rows = []  # rows[i][other]: of mine[i] on the process `other`
        for m, _ in (matrix.shape for matrix in self.mine):
            most = math.ceil(m / ranks)
            self.rows.append([max(0, min(most, m - other * most)) for other in range(ranks)])
        # elements[other][i]: of mine[i] on that process; whole_sizes: summed over i
        self.elements = [[held[other] * matrix.shape[1] for held, matrix in zip(self.rows, self.mine, strict=True)]
                         for other in range(ranks)]  # fmt: skip
        self.whole_sizes = list(map(sum, self.elements))
        self.piece_sizes = [sum(matrix.values.numel() for matrix in theirs) for theirs in by_owner]

    def gather(self) -> list[_Matrix]:
        """This process's matrices, whole."""
        pieces = torch.cat([values.reshape(-1) for values in self.held])
        wholes = pieces.new_empty(sum(self.whole_sizes))
        self._send(wholes, pieces, self.whole_sizes, self.piece_sizes)
        parts = zip(wholes.split(self.whole_sizes), self.elements, strict=True)
        from_each = [part.split(sizes) for part, sizes in parts]
        return [matrix._replace(values=torch.cat(parts).view(matrix.shape))
                for matrix, *parts in zip(self.mine, *from_each, strict=True)]  # fmt: skip

    def scatter(self, whole: list[_Matrix]):
        """Give every process its rows of the whole matrices."""
        to_each = zip(*(matrix.values.split(held) for matrix, held in zip(whole, self.rows, strict=True)), strict=True)
        pieces = self.held[0].new_empty(sum(self.piece_sizes))
        wholes = torch.cat([pieces[:0], *(part.reshape(-1) for parts in to_each for part in parts)])
        self._send(pieces, wholes, self.piece_sizes, self.whole_sizes)
        for values, new in zip(self.held, pieces.split([values.numel() for values in self.held]), strict=True):
            values.copy_(new.view(values.shape))

    def _send(self, into: Tensor, out: Tensor, into_sizes: list[int], out_sizes: list[int]):
        dist.all_to_all_single(into, out, into_sizes, out_sizes, self.group)
        counts["bytes"] += (out.numel() - out_sizes[dist.get_rank(self.group)]) * out.itemsize


def _of_base(name: str) -> Any:
    """A property that reads and sets the attribute `name` of `base`."""
    return property(lambda self: getattr(self.base, name), lambda self, value: setattr(self.base, name, value))


class Wrapper(Optimizer):
    """An optimizer around another, `base`, whose parameter groups, state and state_dict it has."""

    def __init__(self, base: Optimizer):
        self.base = base
        self.__setstate__({})  # sets up an Optimizer's hooks; Optimizer.__init__ would make a second param_groups

    param_groups: list[dict[str, Any]] = _of_base("param_groups")
    state: defaultdict[Tensor, Any] = _of_base("state")
    defaults: dict[str, Any] = _of_base("defaults")

    def zero_grad(self, set_to_none: bool = True):
        self.base.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict):
        self.base.add_param_group(param_group)

    def state_dict(self) -> dict:
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict):
        self.base.load_state_dict(state_dict)


class MSign(Wrapper):
    """An optimizer that steps as `base` does and, every `period` steps, applies MSign to the targets.

    base:   the optimizer that does the steps. Its moments are left alone unless `reset` is set.
    model:  the module in which targets are looked up, or named parameters. The attribute `targets` holds what `find`
            returns, and print(optimizer) shows it.
    period: steps between applications; steps are counted from 1, and math.inf means never.
    targets, split: see `find`.
    backend: see `msign`; it has no effect if `update` is given.
    update: a function from a stack of matrices to their replacements; None means `restored_sign`.
    group:  the processes that hold the same parameters (DDP) and share the work. DTensors (FSDP2, HSDP) bring their
            own.
    reset:  after each application set the state of the targets' parameters in `base` to 0, both moments and step
            count.

    Learning-rate schedulers, closures, gradient scalers and hooks see an ordinary optimizer with the parameter groups
    of `base`. state_dict is that of `base` with one more entry, "msign". The constructor raises ValueError for a period
    below 1, an unknown backend, what `find` refuses, what `apply_` does not update, and `reset` if only a part of a
    weight is chosen, since its parts share one step count. `step` raises NonFiniteWeightError, after the base's step,
    when a target is not finite. The attribute `observe`, a function, is called with "before" and "after" around every
    application.
    """

    def __init__(
        self,
        base: Optimizer,
        model: nn.Module | Iterable[tuple[str, Tensor]],
        period: float = 100,
        targets: str = "attention",
        split: dict[str, tuple[int, ...] | Layout] | None = None,
        backend: str = "auto",
        update: Callable[[Tensor], Tensor] | None = None,
        group: dist.ProcessGroup | None = None,
        reset: bool = False,
    ):
        if period < 1:
            raise ValueError(f"period = {period!r}: must be at least 1 step (math.inf for never)")
        msign(torch.empty(0, 0), backend)  # refuses an unknown backend
        super().__init__(base)
        self.period = period
        self.targets = find(model, targets, split)
        _sharded({name: target.parameter for name, target in self.targets.items()})  # refuses what `apply_` would
        for name, t in self.targets.items() if reset else ():
            if t.roles != t.layout.roles:
                parts = f"all of {', '.join(t.layout.roles)}, not {', '.join(t.roles)} alone"
                raise ValueError(f"reset = True sets the one step count of {name} to 0: targets must name {parts}")
        self.update = update or partial(restored_sign, backend=backend)
        self.group = group
        self.reset = reset
        self.steps = 0
        self.observe: Callable[[str], None] = lambda when: None

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        loss = self.base.step(closure)
        self.steps += 1
        if self.due(self.steps):
            self.observe("before")
            apply_(self.targets, self.update, self.group)
            for target in self.targets.values() if self.reset else ():
                for value in self.state.get(target.parameter, {}).values():
                    if torch.is_tensor(value):
                        value.zero_()  # the step count too, because Adam's bias correction assumes moments from 0
            self.observe("after")
        return loss

    def __repr__(self) -> str:
        return f"MSign every {self.period} steps around {type(self.base).__name__}:\n{describe(self.targets)}"

    def due(self, step: int) -> bool:
        """Whether this step, counted from 1, ends with an application."""
        return step % self.period == 0

    def state_dict(self) -> dict:
        return super().state_dict() | {"msign": {"steps": self.steps}}

    def load_state_dict(self, state_dict: dict):
        """Restore what `state_dict` returned. Raises ValueError for what a plain optimizer saved, such as `base`."""
        if "msign" not in state_dict:
            raise ValueError("state_dict has no 'msign' entry: a plain optimizer saved it; load it into MSign.base")
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "msign"})
        self.steps = state_dict["msign"]["steps"]
