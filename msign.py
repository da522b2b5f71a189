"""MSign: every P steps, replace weight matrices by their norm-restored matrix sign (arXiv 2602.01734, Alg. 1).

This file needs PyTorch (2.9 or later) and nothing else, so it can be copied into another project:

    optimizer = MSign(torch.optim.AdamW(model.parameters()), model.named_parameters(), period=100)

`msign` is the pure function. `restored_sign` is the paper's update of one matrix or of a stack of matrices. `MSign`
is a thin wrapper around any `torch.optim.Optimizer`. Three words recur. The *targets* are the matrices that MSign
replaces. An *application* is one time at which it replaces them. A *stack* (..., m, n) is a batch of matrices (m, n).

Do not use MSign on a weight that fuses W_Q, W_K and W_V, because its sign would mix the three matrices; make them
three parameters or leave the weight out. Do not use it on embeddings, output heads or 1-D parameters either, which
the paper leaves alone.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import lru_cache, partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

ATTENTION = ("W_Q", "W_K", "W_V", "W_DKV", "W_UK", "W_UV", "W_KR", "W_O")
MLP = ("W_up", "W_gate", "W_down")
TARGETS = {"attention": ATTENTION, "mlp": MLP, "blocks": ATTENTION + MLP}
CUSHION = 0.03  # the smallest singular value, as a share of the largest one, that `polar_steps` fits
STACK_ELEMENTS = 2**26  # a rank stacks matrices of one shape up to this many elements (0.5 GB in fp64)
# "polar" accepts a result X with ‖XXᵀX − X‖_F / ‖X‖_F up to this; its singular values are then 0 or 1 ± half of this
POLAR_TOLERANCE = 1e-4
# what this process has done: "matrices" whose sign it took, "fallbacks" among them, "bytes" it sent to other ranks
counts = Counter()


def msign(W: Tensor, backend: str = "auto") -> Tensor:
    """The matrix sign UVᵀ of Def. 5.1, from the reduced SVD W = USVᵀ with r = rank(W) columns.

    W: (..., m, n), finite. The result has W's shape and dtype; r of its singular values are 1, the others are 0. So a
    zero matrix stays zero, and a matrix of deficient rank becomes a partial isometry with the same null space.

    The rank r is the number of singular values s > s₁ · 4 · √max(m, n) · eps(fp32). The cut-off lies above rounding:
    a product of deficient rank, computed in fp32, has singular values of 0.04 · √n · eps in its null directions.

    backend "svd":   torch.linalg.svd in fp32 (in fp64 for an fp64 W), as the paper writes it.
    backend "eigh":  eigendecomposition of the smaller Gram matrix in fp64. It is more accurate than an fp32 SVD for
                     condition numbers up to 1e6 and, on a CPU, at least as fast.
    backend "polar": fp32 products alone, for GPUs, where eigensolvers are slow. A matrix whose residual shows that
                     the iteration did not converge goes to "eigh"; counts["fallbacks"] counts these matrices.
    backend "auto":  "polar" for CUDA tensors, otherwise "eigh".

    Raises ValueError for any other backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend = {backend!r}: must be one of {', '.join(BACKENDS)}")
    if W.numel() == 0:
        return W.clone()
    counts["matrices"] += W.shape[:-2].numel()
    return BACKENDS[backend](W).to(W.dtype)


def _cutoff(m: int, n: int) -> float:
    """The smallest singular value that counts towards the rank of an (m, n) matrix, relative to s₁."""
    return 4 * math.sqrt(max(m, n)) * torch.finfo(torch.float32).eps


def rank_cutoff(m: int, n: int) -> float:
    """The same for "polar", relative to its upper bound of s₁, which is at most r^(1/32) times s₁ (see `_scaled`)."""
    return round(_cutoff(m, n) / min(m, n) ** (1 / 32), 8)


def _svd(W: Tensor) -> Tensor:
    U, S, Vh = torch.linalg.svd(W if W.dtype == torch.float64 else W.float(), full_matrices=False)
    keep = S[..., :1] * _cutoff(*W.shape[-2:]) < S
    return (U * keep.unsqueeze(-2)) @ Vh


def _eigh(W: Tensor) -> Tensor:
    if W.shape[-2] < W.shape[-1]:
        return _eigh(W.mT).mT
    # MPS has no fp64, so the CPU computes; the result returns to the caller's device
    W64 = W.cpu().double() if W.device.type == "mps" else W.double()
    lam, V = torch.linalg.eigh(W64.mT @ W64)  # W = U S Vᵀ gives WᵀW = V S² Vᵀ, so UVᵀ = W V S⁻¹ Vᵀ
    keep = lam > lam[..., -1:] * _cutoff(*W.shape[-2:]) ** 2
    inverse_s = torch.where(keep, lam, torch.inf).rsqrt()
    return (W64 @ ((V * inverse_s.unsqueeze(-2)) @ V.mT)).to(W.device)


@lru_cache
def polar_steps(low: float, accuracy: float = 1e-2) -> tuple[tuple[float, float, float], ...]:
    """Coefficients (a, b, c) of the quintics x -> ax + bx³ + cx⁵ that "polar" applies to singular values, one by one.

    Together they map the interval [low, 1] to [1 − accuracy, 1 + accuracy], times a constant. Each quintic is the best
    approximation of 1 on the interval that the previous one leaves (arXiv 2505.16932). Its error is −E, +E, −E, +E at
    the two ends and at the two extrema, which `_nearest_to_one` finds. Each quintic but the last is scaled by
    1 / (1 + E), so that its interval ends at 1 again.

    A fit never begins below CUSHION. Smaller values are then lifted nearly as fast, and large values keep their
    digits: a quintic fitted further down would map some large values to the size of the small ones by cancellation,
    which leaves three digits in fp32.
    """
    steps = []
    while True:
        fit = max(low, CUSHION)
        a, b, c, E = _nearest_to_one(fit)
        if low == fit and accuracy >= E:
            return (*steps, (a, b, c))
        a, b, c = (v / (1 + E) for v in (a, b, c))
        steps.append((a, b, c))
        low = a * low + b * low**3 + c * low**5


def _nearest_to_one(low: float) -> list[float]:
    """[a, b, c, E]: the quintic ax + bx³ + cx⁵ nearest to 1 on [low, 1] and its largest error E, by Remez exchange."""
    x = torch.tensor([low, (1 + 2 * low) / 3, (2 + low) / 3, 1.0], dtype=torch.float64)
    for _ in range(50):
        rows = torch.stack([x, x**3, x**5, torch.tensor([1.0, -1, 1, -1], dtype=torch.float64)], 1)
        a, b, c, E = torch.linalg.solve(rows, torch.ones(4, dtype=torch.float64)).tolist()
        root = math.sqrt(max(9 * b * b - 20 * a * c, 0))
        extrema = [math.sqrt((-3 * b - sign * root) / (10 * c)) for sign in (1, -1)]
        x = torch.tensor([low, *extrema, 1.0], dtype=torch.float64)
    return [a, b, c, E]


@contextmanager
def _exact_products(device: torch.device):
    """Inside, fp32 products on `device` have full fp32 precision, whatever the process allows otherwise."""
    if device.type not in ("cpu", "cuda"):
        yield
        return
    matmul = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _scaled(X: Tensor) -> Tensor:
    """X (N, m, n) divided, matrix by matrix, by an upper bound of its largest singular value s₁.

    The bound is ‖(XᵀX)⁸‖_F^(1/16) = (Σ s³²)^(1/32), at most r^(1/32) times s₁, and 0.1 % for rounding.
    """
    tiny = torch.finfo(torch.float32).tiny
    X = X / X.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(tiny)
    B = X.mT @ X
    log_bound = 0.0  # the logarithm of the bound of s₁²
    for power in (1, 2, 4, 8):
        B = B if power == 1 else B @ B
        norm = torch.linalg.matrix_norm(B, keepdim=True).clamp_min(tiny)
        B, log_bound = B / norm, log_bound + norm.log() / power
    return X / ((log_bound / 2).exp() * 1.001)


def _polar(W: Tensor) -> Tensor:
    """The sign by a fixed number of quintics, which lift every singular value above the cut-off to 1.

    Rounding noise in null directions grows with the quintics but stays well below 1 (at most ‖W‖ · eps / cut-off). The
    last two steps, x -> 2.5x³ − 1.5x⁵, therefore send values below 0.8 to 0 and all others to 1.
    """
    if W.dtype == torch.float64:
        return _eigh(W)
    if W.shape[-2] < W.shape[-1]:
        return _polar(W.mT).mT
    flat = W.reshape(-1, *W.shape[-2:]).float()
    with _exact_products(W.device):  # TF32's relative error of 1e-3 exceeds the rank's cut-off
        X = _scaled(flat)
        for a, b, c in polar_steps(rank_cutoff(*W.shape[-2:])):
            A = X.mT @ X
            X = a * X + X @ (b * A + c * (A @ A))
        for _ in range(2):
            A = X.mT @ X
            X = X @ (2.5 * A - 1.5 * (A @ A))
        residual = torch.linalg.matrix_norm(X @ (X.mT @ X) - X)
    wrong = ~(residual <= POLAR_TOLERANCE * torch.linalg.matrix_norm(X))
    fallbacks = int(wrong.sum())
    if fallbacks:
        counts["fallbacks"] += fallbacks
        X[wrong] = _eigh(flat[wrong]).float()
    return X.view(W.shape)


def _auto(W: Tensor) -> Tensor:
    return _polar(W) if W.is_cuda else _eigh(W)


BACKENDS = {"auto": _auto, "svd": _svd, "eigh": _eigh, "polar": _polar}


def restored_sign(W: Tensor, backend: str = "auto") -> Tensor:
    """Algorithm 1's update of every matrix of W (..., m, n): ‖W‖_F / ‖UVᵀ‖_F · UVᵀ. A zero matrix stays zero."""
    sign = msign(W, backend)
    wide = None if W.device.type == "mps" else torch.float64  # the norm is summed in fp64 without an fp64 copy of W
    norm_W, norm_sign = (torch.linalg.matrix_norm(M, keepdim=True, dtype=wide) for M in (W, sign))
    ratio = norm_W / norm_sign.clamp_min(torch.finfo(torch.float32).tiny)
    return (sign * ratio.to(torch.promote_types(W.dtype, torch.float32))).to(W.dtype)


def select(named_params: Iterable[tuple[str, Tensor]], targets: str = "attention") -> dict[str, Tensor]:
    """The parameters that `targets` names, as {name: parameter}; parameters of less than two dimensions are left out.

    targets: comma-separated entries. An entry is "attention", "mlp" or "blocks" (both); or a part of a parameter's
    dotted name ("W_V"); or a pattern for the whole name ("layers.*.attn.*.weight"). Raises ValueError for an entry
    that matches no matrix.
    """
    matrices = {name: p for name, p in named_params if p.ndim >= 2}
    chosen = set()
    for target in (t.strip() for t in targets.split(",")):
        found = set()
        for part in TARGETS.get(target, (target,)):
            found |= {n for n in matrices if part in n.split(".") or fnmatch(n, part)}
        if not found:
            raise ValueError(f"MSign target {target!r} matches no matrix; there are {', '.join(list(matrices)[:8])}, …")
        chosen |= found
    return {name: p for name, p in matrices.items() if name in chosen}


class NonFiniteWeightError(ValueError):
    """A target holds NaN or infinity, so it has no matrix sign."""


def _local(p: Tensor) -> Tensor:
    return p.to_local() if hasattr(p, "to_local") else p


def _chunks(items: list, size: int) -> Iterable[list]:
    return (items[i : i + size] for i in range(0, len(items), size))


@torch.no_grad()
def apply_(
    params: dict[str, Tensor],
    update: Callable[[Tensor], Tensor] = restored_sign,
    group: dist.ProcessGroup | None = None,
):
    """Replace every matrix of {name: (..., m, n)} by update(matrix), in place; matrices of one shape go in stacks.

    With a process group of several ranks the matrices are dealt out, and every rank updates those that it owns.
    Parameters that all ranks hold (DDP) need one all-gather of the results. Of DTensors sharded by rows (FSDP2) one
    all-to-all brings whole matrices to their owners and another one takes the rows back. Parameters of three
    dimensions (experts) that are sharded along the first one need no exchange, because each matrix lies on one rank.

    Raises NonFiniteWeightError, on all ranks, naming the first parameter that is not finite; no parameter has changed
    then. Raises ValueError for any other way of sharding.
    """
    sharded = {name: p for name, p in params.items() if hasattr(p, "placements")}
    for name, p in sharded.items():
        if len(p.placements) != 1 or not p.placements[0].is_shard(0):
            raise ValueError(
                f"{name} is distributed as {p.placements}; MSign needs [Shard(0)] on a mesh of one dimension"
            )
        group = group or p.device_mesh.get_group()
    _require_finite(params, group)
    ranks = dist.get_world_size(group) if group else 1
    stacks, first_owner = defaultdict(list), 0
    for name, p in params.items():
        stacks[p.shape, p.dtype, p.device, name in sharded].append(p)
    for (shape, _, _, is_sharded), same_shape in stacks.items():
        matrices = [M for p in same_shape for M in _matrices(_local(p))]
        size = max(1, STACK_ELEMENTS // shape[-2:].numel())
        if ranks == 1 or (is_sharded and len(shape) > 2):
            for chunk in _chunks(matrices, size):
                for M, new in zip(chunk, update(torch.stack(chunk)).unbind(), strict=True):
                    M.copy_(new)
            continue
        exchange = _by_rows if is_sharded else _replicated
        for chunk in _chunks(matrices, size * ranks):
            exchange(chunk, shape[-2:], update, first_owner, group)
            first_owner += len(chunk)  # the next shape's first matrix goes to the next rank, which evens out the work


def _require_finite(params: dict[str, Tensor], group: dist.ProcessGroup | None):
    """Raise NonFiniteWeightError, on all ranks, naming the first parameter of which some rank holds NaN or infinity."""
    device = next(iter(params.values())).device
    bad = torch.stack([~torch.isfinite(_local(p)).all().to(device) for p in params.values()]).int()
    if group and dist.get_world_size(group) > 1:
        dist.all_reduce(bad, dist.ReduceOp.MAX, group)
    if bad.any():
        name = list(params)[int(bad.nonzero()[0])]
        raise NonFiniteWeightError(f"{name} holds a value that is not finite; MSign changed no weight")


def _matrices(W: Tensor) -> Iterable[Tensor]:
    """Views of the matrices (m, n) of W (..., m, n)."""
    return [W] if W.ndim == 2 else W.flatten(0, -3).unbind()


def _owned(matrices: list, first: int, group) -> list[list]:
    """The matrices that each rank owns, one list per rank; matrix 0 belongs to rank `first`, matrix 1 to the next."""
    ranks = dist.get_world_size(group)
    return [matrices[(rank - first) % ranks :: ranks] for rank in range(ranks)]


def _replicated(matrices: list[Tensor], shape, update, first: int, group):
    """Update matrices (m, n) that every rank holds: each rank updates those it owns and gathers the other results."""
    owned, rank = _owned(matrices, first, group), dist.get_rank(group)
    most = max(map(len, owned))
    mine = matrices[0].new_zeros(most, *shape)
    if owned[rank]:
        mine[: len(owned[rank])] = update(torch.stack(owned[rank]))
    everyones = [torch.empty_like(mine) for _ in owned]
    dist.all_gather(everyones, mine, group)
    counts["bytes"] += mine.nbytes * (len(owned) - 1)
    for theirs, new in zip(owned, everyones, strict=True):
        for M, value in zip(theirs, new.unbind(), strict=False):
            M.copy_(value)


def _by_rows(matrices: list[Tensor], shape, update, first: int, group):
    """Update matrices (m, n) of which every rank holds some rows, dealt out as torch.chunk does.

    The rows travel in flat buffers: `pieces` is this rank's rows of all matrices, in the order of their owners, and
    `wholes` is all rows of the matrices that this rank owns, in the order of the ranks that hold the rows.
    """
    owned, rank = _owned(matrices, first, group), dist.get_rank(group)
    mine, by_owner = len(owned[rank]), [M for theirs in owned for M in theirs]
    m, n = shape
    most = math.ceil(m / len(owned))
    rows = [max(0, min(most, m - r * most)) for r in range(len(owned))]  # of every matrix, on each rank
    pieces = torch.cat([M.reshape(-1) for M in by_owner])
    piece_sizes = [len(theirs) * rows[rank] * n for theirs in owned]  # elements to or from each rank
    whole_sizes = [mine * r * n for r in rows]
    wholes = pieces.new_empty(sum(whole_sizes))
    dist.all_to_all_single(wholes, pieces, whole_sizes, piece_sizes, group)
    if mine:
        parts = [x.view(mine, r, n) for x, r in zip(wholes.split(whole_sizes), rows, strict=True)]
        new = update(torch.cat(parts, 1))
        wholes = torch.cat([x.reshape(-1) for x in new.split(rows, 1)])
    dist.all_to_all_single(pieces, wholes, piece_sizes, whole_sizes, group)
    kept = piece_sizes[rank] + whole_sizes[rank]  # elements that a rank sends to itself
    counts["bytes"] += (pieces.numel() + wholes.numel() - kept) * pieces.itemsize
    for M, new_rows in zip(by_owner, pieces.view(len(matrices), rows[rank], n).unbind(), strict=True):
        M.copy_(new_rows)


class MSign(Optimizer):
    """An optimizer that steps as `base` does and, every `period` steps, applies MSign to the targets.

    base:         the optimizer that does the steps. Its moments are left alone unless `reset` is set.
    named_params: the parameters among which targets are looked up, usually model.named_parameters().
    period:       steps between applications; steps are counted from 1, and math.inf means never.
    targets:      see `select`.
    backend:      see `msign`.
    update:       a function from a stack of matrices to their replacements; None means `restored_sign`.
    group:        the processes that hold the same parameters (DDP) and share the work. DTensors (FSDP2) bring their
                  own group.
    reset:        after each application set the targets' state in `base` to 0, both moments and step count.

    Learning-rate schedulers, closures, gradient scalers and hooks see an ordinary optimizer with the parameter groups
    of `base`. state_dict is that of `base` with one more entry, "msign". `step` raises NonFiniteWeightError, after the
    base's step, when a target is not finite. The attribute `observe`, a function, is called with "before" and "after"
    around every application.
    """

    def __init__(
        self,
        base: Optimizer,
        named_params: Iterable[tuple[str, Tensor]],
        period: float = 100,
        targets: str = "attention",
        backend: str = "auto",
        update: Callable[[Tensor], Tensor] | None = None,
        group: dist.ProcessGroup | None = None,
        reset: bool = False,
    ):
        if period < 1:
            raise ValueError(f"period = {period!r}: must be at least 1 step (math.inf for never)")
        if backend not in BACKENDS:
            raise ValueError(f"backend = {backend!r}: must be one of {', '.join(BACKENDS)}")
        self.base = base
        self.period = period
        self.params = select(named_params, targets)
        self.update = update or partial(restored_sign, backend=backend)
        self.group = group
        self.reset = reset
        self.steps = 0
        self.observe: Callable[[str], None] = lambda when: None
        self.__setstate__({})  # sets up an Optimizer's hooks; Optimizer.__init__ would make a second param_groups

    @property
    def param_groups(self):
        return self.base.param_groups

    @property
    def state(self):
        return self.base.state

    @property
    def defaults(self):
        return self.base.defaults

    def step(self, closure=None):
        loss = self.base.step(closure)
        self.steps += 1
        if self.due(self.steps):
            self.observe("before")
            apply_(self.params, self.update, self.group)
            for p in self.params.values() if self.reset else ():
                for value in self.state.get(p, {}).values():
                    if torch.is_tensor(value):
                        value.zero_()  # the step count too, because Adam's bias correction assumes moments from 0
            self.observe("after")
        return loss

    def due(self, step: int) -> bool:
        """Whether this step, counted from 1, ends with an application."""
        return step % self.period == 0

    def zero_grad(self, set_to_none: bool = True):
        self.base.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict):
        self.base.add_param_group(param_group)

    def state_dict(self) -> dict:
        return self.base.state_dict() | {"msign": {"steps": self.steps}}

    def load_state_dict(self, state_dict: dict):
        """Restore what `state_dict` returned. Raises ValueError for the state of a plain optimizer, as of `.base`."""
        if "msign" not in state_dict:
            raise ValueError("state_dict has no 'msign' entry: a plain optimizer saved it; load it into MSign.base")
        self.base.load_state_dict({k: v for k, v in state_dict.items() if k != "msign"})
        self.steps = state_dict["msign"]["steps"]
