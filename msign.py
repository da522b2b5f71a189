"""MSign: every P steps, replace a weight matrix by its norm-restored matrix sign (arXiv 2602.01734, Alg. 1).

This file needs nothing but PyTorch and can be copied into another project:

    optimizer = MSign(torch.optim.AdamW(model.parameters()), model.named_parameters(), period=100)

`msign` is the pure function, `restored_sign` the paper's update of one matrix (or a stack of them),
`MSign` a thin wrapper of any `torch.optim.Optimizer`. Where *not* to use it: on a fused qkv weight (its
sign mixes three matrices into one; select W_Q, W_K and W_V separately or not at all), and on embeddings,
heads and 1-D parameters, which the paper leaves alone.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from functools import lru_cache, partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

ATTENTION = ("W_Q", "W_K", "W_V", "W_DKV", "W_UK", "W_UV", "W_KR", "W_O")
MLP = ("W_up", "W_gate", "W_down")
TARGETS = {"attention": ATTENTION, "mlp": MLP, "blocks": ATTENTION + MLP}
CUSHION = 0.03  # of the largest singular value
STACK_ELEMENTS = 2**26  # matrices of one shape are stacked up to this many elements (0.5 GB in fp64), on each rank
POLAR_TOLERANCE = (
    1e-4  # of ‖XXᵀX − X‖_F / ‖X‖_F; the singular values of what is left at "polar" are 0 or 1 ± half of it
)
counts = Counter()  # of this process: matrices whose sign was taken, fallbacks among them, bytes sent to other ranks


def msign(W: Tensor, backend: str = "auto") -> Tensor:
    """The matrix sign UVᵀ of Def. 5.1, from the reduced SVD W = USVᵀ with r = rank(W) columns.

    W: (..., m, n), finite; the result has its shape and dtype and r singular values of 1, the others 0.
    The rank counts s > s₁ · 4 · √max(m, n) · eps(fp32): products of deficient rank, computed in fp32, leave noise of
    0.04 · √n · eps in their null directions. A zero matrix stays zero, and one of deficient rank becomes a partial
    isometry with the same null space.

    backend "svd":   torch.linalg.svd in fp32 (fp64 for an fp64 W), the paper's letter.
    backend "eigh":  eigendecomposition of the smaller Gram matrix in fp64; more accurate than fp32 SVD for
                     condition numbers up to 1e6, and on a CPU faster or as fast.
    backend "polar": fp32 products alone, for GPUs, where eigensolvers are slow. Matrices for which its residual says that it did
                     not converge are given to "eigh"; `counts` tells how many.
    backend "auto":  "polar" for CUDA tensors, else "eigh".
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend = {backend!r}: must be one of {', '.join(BACKENDS)}")
    if W.numel() == 0:
        return W.clone()
    counts["matrices"] += W.shape[:-2].numel()
    return BACKENDS[backend](W).to(W.dtype)


def _cutoff(W: Tensor) -> float:
    return 4 * math.sqrt(max(W.shape[-2:])) * torch.finfo(torch.float32).eps


def rank_cutoff(m: int, n: int) -> float:
    """Where "polar" begins to count singular values, relative to its bound of s₁."""
    return round(4 * math.sqrt(max(m, n)) * torch.finfo(torch.float32).eps / min(m, n) ** (1 / 32), 8)


def _svd(W: Tensor) -> Tensor:
    U, S, Vh = torch.linalg.svd(W if W.dtype == torch.float64 else W.float(), full_matrices=False)
    keep = S[..., :1] * _cutoff(W) < S
    return (U * keep.unsqueeze(-2)) @ Vh


def _eigh(W: Tensor) -> Tensor:
    if W.shape[-2] < W.shape[-1]:
        return _eigh(W.mT).mT
    # MPS has no fp64; the CPU does it and the caller's dtype and device are restored
    W64 = W.cpu().double() if W.device.type == "mps" else W.double()
    lam, V = torch.linalg.eigh(W64.mT @ W64)  # W = U S Vᵀ gives WᵀW = V S² Vᵀ, so UVᵀ = W V S⁻¹ Vᵀ
    keep = lam > lam[..., -1:] * _cutoff(W) ** 2
    inverse_s = torch.where(keep, lam, torch.inf).rsqrt()
    return (W64 @ ((V * inverse_s.unsqueeze(-2)) @ V.mT)).to(W.device)


@lru_cache
def polar_steps(low: float, accuracy: float = 1e-2) -> tuple[tuple[float, float, float], ...]:
    """Quintics (a, b, c), x -> ax + bx³ + cx⁵, that one after another map [low, 1] to [1 − accuracy, 1 + accuracy] · const.

    Each is the one nearest to 1 on the interval that the one before left (arXiv 2505.16932): its error is ±E in turn at both
    ends and at its two extrema, found by exchange. Each is scaled so that its interval ends at 1 again, but the last.
    While the interval begins below CUSHION the fit begins there: what is smaller is lifted nearly as fast, and no large value is
    cancelled down to the small ones' size, where only three of its digits would be left.
    """
    steps = []
    while True:
        fit = max(low, CUSHION)
        x = torch.tensor([fit, (1 + 2 * fit) / 3, (2 + fit) / 3, 1.0], dtype=torch.float64)
        for _ in range(50):
            rows = torch.stack([x, x**3, x**5, torch.tensor([1.0, -1, 1, -1], dtype=torch.float64)], 1)
            a, b, c, E = torch.linalg.solve(rows, torch.ones(4, dtype=torch.float64)).tolist()
            root = math.sqrt(max(9 * b * b - 20 * a * c, 0))
            extrema = [math.sqrt((-3 * b - sign * root) / (10 * c)) for sign in (1, -1)]
            x = torch.tensor([fit, *extrema, 1.0], dtype=torch.float64)
        if low == fit and accuracy >= E:
            return (*steps, (a, b, c))
        a, b, c = (v / (1 + E) for v in (a, b, c))
        steps.append((a, b, c))
        low = a * low + b * low**3 + c * low**5


def _polar(W: Tensor) -> Tensor:
    """A fixed number of quintics for singular values from the cut-off to the largest one, whatever the spectrum.

    Noise in null directions grows with them, but stays well below 1 (‖W‖ · eps · 1/cut-off at most); the last two steps,
    x -> 2.5x³ − 1.5x⁵, return what is below 0.8 to 0 and the rest to 1.
    """
    if W.dtype == torch.float64:
        return _eigh(W)
    if W.shape[-2] < W.shape[-1]:
        return _polar(W.mT).mT
    flat = W.reshape(-1, *W.shape[-2:]).float()
    tiny, before = torch.finfo(torch.float32).tiny, None
    if W.is_cuda:  # TF32's 1e-3 would drown what has to be told apart from noise
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    try:
        X = flat / flat.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(tiny)
        B = X.mT @ X
        log_bound = 0.0  # of s₁², from above by a factor of r^(1/16) at most: ‖(XᵀX)⁸‖_F = (Σ s³²)^½
        for power in (1, 2, 4, 8):
            B = B if power == 1 else B @ B
            norm = torch.linalg.matrix_norm(B, keepdim=True).clamp_min(tiny)
            B, log_bound = B / norm, log_bound + norm.log() / power
        bound = (log_bound / 2).exp() * 1.001
        X = X / bound
        for a, b, c in polar_steps(rank_cutoff(*W.shape[-2:])):
            A = X.mT @ X
            X = a * X + X @ (b * A + c * (A @ A))
        for _ in range(2):
            A = X.mT @ X
            X = X @ (2.5 * A - 1.5 * (A @ A))
        residual = torch.linalg.matrix_norm(X @ (X.mT @ X) - X)
    finally:
        if before:
            torch.set_float32_matmul_precision(before)
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
    """‖W‖_F / ‖UVᵀ‖_F · UVᵀ for every matrix of W (..., m, n): Algorithm 1's update; 0 stays 0."""
    sign = msign(W, backend)
    wide = None if W.device.type == "mps" else torch.float64  # the accumulation's dtype, without a copy of W
    norm_W, norm_sign = (torch.linalg.matrix_norm(M, keepdim=True, dtype=wide) for M in (W, sign))
    ratio = norm_W / norm_sign.clamp_min(torch.finfo(torch.float32).tiny)
    return (sign * ratio.to(torch.promote_types(W.dtype, torch.float32))).to(W.dtype)


def select(named_params: Iterable[tuple[str, Tensor]], targets: str = "attention") -> dict[str, Tensor]:
    """The parameters with at least two dimensions that `targets` names, as {name: parameter}.

    targets: comma-separated; "attention", "mlp", "blocks" (both), a component of the parameter's name
    ("W_V"), or a pattern for the whole name ("layers.*.attn.*.weight"). Raises ValueError when one of
    them matches nothing.
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
    """A weight that the matrix sign was to be taken of holds NaN or infinity."""


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
    """Replace every matrix of {name: (..., m, n)} by update(matrix), batched by shape, in place.

    With a process group of more than one rank every rank updates its share of the matrices, and no others. Parameters
    that are the same on all ranks (DDP) need one all-gather of the results. Of DTensors sharded by rows (FSDP2) one
    all-to-all brings whole matrices to their owners, and one brings the rows back; stacks of matrices (experts)
    sharded by their first dimension are whole where they are. Raises NonFiniteWeightError naming the first non-finite
    parameter, on all ranks; then none has changed. Raises ValueError for any other way of sharding.
    """
    sharded = {name: p for name, p in params.items() if hasattr(p, "placements")}
    for name, p in sharded.items():
        if len(p.placements) != 1 or not p.placements[0].is_shard(0):
            raise ValueError(
                f"{name} is distributed as {p.placements}; MSign needs [Shard(0)] on a mesh of one dimension"
            )
        group = group or p.device_mesh.get_group()
    ranks = dist.get_world_size(group) if group else 1
    device = next(iter(params.values())).device
    bad = torch.stack([~torch.isfinite(_local(p)).all().to(device) for p in params.values()]).int()
    if ranks > 1:
        dist.all_reduce(bad, dist.ReduceOp.MAX, group)
    if bad.any():
        name = list(params)[int(bad.nonzero()[0])]
        raise NonFiniteWeightError(f"{name} holds a value that is not finite; MSign changed no weight")

    stacks, first_owner = defaultdict(list), 0
    for name, p in params.items():
        stacks[p.shape, p.dtype, p.device, name in sharded].append(p)
    for (shape, _, _, is_sharded), ps in stacks.items():
        size = max(1, STACK_ELEMENTS // shape[-2:].numel())
        if ranks == 1 or (is_sharded and len(shape) > 2):
            matrices = (
                [M for p in ps for M in _local(p).flatten(0, -3).unbind()]
                if len(shape) > 2
                else [_local(p) for p in ps]
            )
            for chunk in _chunks(matrices, size):
                for M, new in zip(chunk, update(torch.stack(chunk)).unbind(), strict=True):
                    M.copy_(new)
            continue
        matrices = [_local(p) for p in ps] if len(shape) == 2 else [M for p in ps for M in p.flatten(0, -3).unbind()]
        exchange = _by_rows if is_sharded else _replicated
        for chunk in _chunks(matrices, size * ranks):
            exchange(chunk, shape[-2:], update, first_owner, group)
            first_owner += len(chunk)  # so that shapes with few matrices do not all go to the first ranks


def _owned(matrices: list, first: int, group) -> list[list]:
    """The matrices of every rank, in turn."""
    ranks = dist.get_world_size(group)
    return [matrices[(rank - first) % ranks :: ranks] for rank in range(ranks)]


def _replicated(matrices: list[Tensor], shape, update, first: int, group):
    """Every rank has all matrices (m, n): it updates its own and gathers the others' results."""
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
    """Every rank has some rows of each matrix, as torch.chunk deals them out."""
    owned, rank = _owned(matrices, first, group), dist.get_rank(group)
    m, n = shape
    each = -(-m // len(owned))
    rows = [max(0, min(each, m - r * each)) for r in range(len(owned))]
    out = torch.cat([M.reshape(-1) for theirs in owned for M in theirs])
    sizes_out = [len(theirs) * rows[rank] * n for theirs in owned]
    sizes_in = [len(owned[rank]) * r * n for r in rows]
    whole = out.new_empty(sum(sizes_in))
    dist.all_to_all_single(whole, out, sizes_in, sizes_out, group)
    if owned[rank]:
        parts = [x.view(len(owned[rank]), r, n) for x, r in zip(whole.split(sizes_in), rows, strict=True)]
        new = update(torch.cat(parts, 1))
        whole = torch.cat([x.reshape(-1) for x in new.split(rows, 1)])
    dist.all_to_all_single(out, whole, sizes_out, sizes_in, group)
    counts["bytes"] += (out.nbytes - sizes_out[rank] * out.itemsize) + (whole.nbytes - sizes_in[rank] * out.itemsize)
    for M, value in zip(
        (M for theirs in owned for M in theirs), out.view(len(matrices), rows[rank], n).unbind(), strict=True
    ):
        M.copy_(value)


class MSign(Optimizer):
    """Any optimizer, followed every `period` steps by the norm-restored matrix sign of the targets.

    base: the optimizer that does the steps; its moments are left alone. named_params: where the targets
    are looked up, usually model.named_parameters(). period: steps are counted from 1; math.inf is never.
    targets: see `select`. reset: also set the targets' state in `base` to 0, moments and step count. group: of the processes that hold the same parameters (DDP) and share the work; DTensors (FSDP2)
    bring their own. update: what replaces a stack of matrices; None is `restored_sign` with
    `backend`. Learning-rate schedulers, closures, gradient scalers and hooks see an ordinary optimizer
    with the base's groups; state_dict is the base's with one more entry, "msign". `step` raises
    NonFiniteWeightError, after the base's step, when a target is not finite. Set `observe` to be called with
    "before" and "after" around every application.
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
        self.__setstate__({})  # gives the hooks of an Optimizer without a second set of param_groups

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
                        value.zero_()  # the step count, too: Adam's bias correction belongs to moments from 0
            self.observe("after")
        return loss

    def due(self, step: int) -> bool:
        """Whether the matrix sign is applied at the end of this 1-indexed step."""
        return step % self.period == 0

    def zero_grad(self, set_to_none: bool = True):
        self.base.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict):
        self.base.add_param_group(param_group)

    def state_dict(self) -> dict:
        return self.base.state_dict() | {"msign": {"steps": self.steps}}

    def load_state_dict(self, state_dict: dict):
        """Raises ValueError for the state of a plain optimizer (that one goes into `.base`)."""
        if "msign" not in state_dict:
            raise ValueError("state_dict has no 'msign' entry: a plain optimizer saved it; load it into MSign.base")
        self.base.load_state_dict({k: v for k, v in state_dict.items() if k != "msign"})
        self.steps = state_dict["msign"]["steps"]
