"""MSign: every P steps, replace a weight matrix by its norm-restored matrix sign (arXiv 2602.01734, Alg. 1).

This file needs nothing but PyTorch and can be copied into another project:

    optimizer = MSign(torch.optim.AdamW(model.parameters()), model.named_parameters(), period=100)

`msign` is the pure function, `restored_sign` the paper's update of one matrix (or a stack of them),
`MSign` a thin wrapper of any `torch.optim.Optimizer`. Where *not* to use it: on a fused qkv weight (its
sign mixes three matrices into one; select W_Q, W_K and W_V separately or not at all), and on embeddings,
heads and 1-D parameters, which the paper leaves alone.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

ATTENTION = ("W_Q", "W_K", "W_V", "W_O")
MLP = ("W_up", "W_down")
TARGETS = {"attention": ATTENTION, "mlp": MLP, "blocks": ATTENTION + MLP}
STACK_ELEMENTS = 2**26  # matrices of one shape are stacked up to this many elements (0.5 GB in fp64)


def msign(W: Tensor, backend: str = "eigh") -> Tensor:
    """The matrix sign UVᵀ of Def. 5.1, from the reduced SVD W = USVᵀ with r = rank(W) columns.

    W: (..., m, n), finite; the result has its shape and dtype and r singular values of 1, the others 0.
    The rank counts s > s₁ · 4 · √max(m, n) · eps(fp32): products of deficient rank, computed in fp32, leave noise of
    0.04 · √n · eps in their null directions. A zero matrix stays zero, and one of deficient rank becomes a partial
    isometry with the same null space.

    backend "svd":  torch.linalg.svd in fp32 (fp64 for an fp64 W), the paper's letter.
    backend "eigh": eigendecomposition of the smaller Gram matrix in fp64; faster, and more accurate than
                    fp32 SVD for condition numbers up to 1e6.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend = {backend!r}: must be one of {', '.join(BACKENDS)}")
    if W.numel() == 0:
        return W.clone()
    return BACKENDS[backend](W).to(W.dtype)


def _cutoff(W: Tensor) -> float:
    return 4 * math.sqrt(max(W.shape[-2:])) * torch.finfo(torch.float32).eps


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


BACKENDS = {"svd": _svd, "eigh": _eigh}


def restored_sign(W: Tensor, backend: str = "eigh") -> Tensor:
    """‖W‖_F / ‖UVᵀ‖_F · UVᵀ for every matrix of W (..., m, n): Algorithm 1's update; 0 stays 0."""
    sign = msign(W, backend)
    wide = None if W.device.type == "mps" else torch.float64  # the accumulation's dtype, without a copy of W
    norm_W, norm_sign = (torch.linalg.matrix_norm(M, keepdim=True, dtype=wide) for M in (W, sign))
    ratio = norm_W / norm_sign.clamp_min(torch.finfo(torch.float32).tiny)
    return (sign * ratio.to(torch.promote_types(W.dtype, torch.float32))).to(W.dtype)


def zero(W: Tensor) -> Tensor:
    """0 for every matrix: the attention-off control, which shows what a rescue is worth."""
    return torch.zeros_like(W)


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


@torch.no_grad()
def apply_(params: dict[str, Tensor], update: Callable[[Tensor], Tensor] = restored_sign):
    """Replace every matrix of {name: (..., m, n)} by update(matrix), batched by shape, in place.

    Raises NonFiniteWeightError naming the first non-finite parameter; then none has changed.
    """
    for name, p in params.items():
        if not torch.isfinite(p).all():
            raise NonFiniteWeightError(f"{name} holds a value that is not finite; MSign changed no weight")
    stacks = defaultdict(list)
    for p in params.values():
        stacks[p.shape, p.dtype, p.device].append(p)
    for (shape, _, _), ps in stacks.items():
        size = max(1, STACK_ELEMENTS // shape.numel())
        for chunk in (ps[i : i + size] for i in range(0, len(ps), size)):
            for p, new in zip(chunk, update(torch.stack(chunk)).unbind(), strict=True):
                p.copy_(new)


class MSign(Optimizer):
    """Any optimizer, followed every `period` steps by the norm-restored matrix sign of the targets.

    base: the optimizer that does the steps; its moments are left alone. named_params: where the targets
    are looked up, usually model.named_parameters(). period: steps are counted from 1; math.inf is never.
    targets: see `select`. update: what replaces a stack of matrices; None is `restored_sign` with
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
        backend: str = "eigh",
        update: Callable[[Tensor], Tensor] | None = None,
    ):
        if period < 1:
            raise ValueError(f"period = {period!r}: must be at least 1 step (math.inf for never)")
        if backend not in BACKENDS:
            raise ValueError(f"backend = {backend!r}: must be one of {', '.join(BACKENDS)}")
        self.base = base
        self.period = period
        self.params = select(named_params, targets)
        self.update = update or partial(restored_sign, backend=backend)
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
            apply_(self.params, self.update)
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
