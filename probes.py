"""Measurements of a model that never change it: spectra of weight matrices, layer Jacobians and their alignment."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class Spectrum(NamedTuple):
    """srank(W) = ‖W‖_F² / ‖W‖₂² (Def. 3.1), sigma1 = ‖W‖₂ and fro = ‖W‖_F of one matrix; means over a stack of them."""

    srank: float
    sigma1: float
    fro: float


@torch.no_grad()
def spectra(params: Mapping[str, Tensor]) -> dict[str, Spectrum]:
    """The Spectrum of every matrix of {name: (..., m, n)}.

    Exact to fp64: the trace and the largest eigenvalue of the smaller Gram matrix, batched by shape. The stable rank
    of a zero matrix is NaN, and so is everything about one that is not finite.
    """
    stacks = defaultdict(dict)
    for name, W in params.items():
        stacks[W.shape, W.device][name] = W
    out = {}
    for named in stacks.values():
        W = torch.stack(list(named.values()))
        W = W.cpu().double() if W.device.type == "mps" else W.double()
        gram = W @ W.mT if W.shape[-2] < W.shape[-1] else W.mT @ W
        bad = ~torch.isfinite(gram).all(dim=(-2, -1))
        lam = torch.linalg.eigvalsh(torch.where(bad[..., None, None], 0.0, gram))[..., -1].clamp_min(0)
        lam = torch.where(bad, math.nan, lam)
        fro2 = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
        rows = torch.stack([fro2 / lam, lam.sqrt(), fro2.sqrt()], -1)  # 0 / 0 is the NaN that is wanted
        rows = rows.flatten(1, -2).mean(1) if rows.ndim > 2 else rows
        out.update({name: Spectrum(*row) for name, row in zip(named, rows.tolist(), strict=True)})
    return {name: out[name] for name in params}


def geometric_mean(values) -> float:
    """exp(mean log) of the finite positive values, NaN when there are none."""
    logs = [math.log(v) for v in values if v > 0 and math.isfinite(v)]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


@dataclass(frozen=True)
class Triples:
    """Top singular triples of N linear maps, by Golub-Kahan-Lanczos.

    sigma: (N,) largest singular values. ratio: (N,) σ₂/σ₁; near 1 the singular vectors, and any
    alignment made from them, are ill-conditioned. residual: (N,) ‖Jᵀu − σv‖ / σ, zero when converged.
    u: (N, m) and v: (N, n), unit left and right singular vectors.
    """

    sigma: Tensor
    ratio: Tensor
    residual: Tensor
    u: Tensor
    v: Tensor


@torch.no_grad()
def top_triples(
    matvec: Callable[[Tensor], Tensor], rmatvec: Callable[[Tensor], Tensor], start: Tensor, steps: int = 15
) -> Triples:
    """The top singular triple of N maps at once. matvec: (N, n) -> (N, m), Jv; rmatvec: (N, m) -> (N, n), Jᵀu.

    start: (N, n), one starting vector per map. Full reorthogonalisation; `steps` products each way.
    """

    def orthogonal(x: Tensor, basis: list[Tensor]) -> tuple[Tensor, Tensor]:
        """x without its components in the basis, normalised, and its norm (N, 1); rounding noise becomes 0."""
        before = x.norm(dim=-1, keepdim=True)
        if basis:
            Q = torch.stack(basis, -1)  # (N, dim, k)
            for _ in range(2):  # once is not enough when x lies almost in the span
                x = x - (Q @ (Q.mT @ x.unsqueeze(-1))).squeeze(-1)
        norm = x.norm(dim=-1, keepdim=True)
        norm = torch.where(norm > 100 * torch.finfo(x.dtype).eps * before, norm, 0.0)  # the space is exhausted
        return torch.where(norm > 0, x / norm, 0.0), norm

    V, U, alphas, betas = [orthogonal(start, [])[0]], [], [], []
    for _ in range(min(steps, start.shape[-1])):
        u, alpha = orthogonal(matvec(V[-1]), U)
        U.append(u)
        v, beta = orthogonal(rmatvec(u), V)
        V.append(v)
        alphas.append(alpha)
        betas.append(beta)
    # J V = U B with B upper bidiagonal, Jᵀ U = V Bᵀ + β v_last e_lastᵀ
    B = torch.diag_embed(torch.cat(alphas, -1).double())
    if len(betas) > 1:
        B = B + torch.diag_embed(torch.cat(betas[:-1], -1).double(), offset=1)
    P, S, Qh = torch.linalg.svd(B)
    sigma = S[:, 0]
    second = S[:, 1] if S.shape[1] > 1 else torch.zeros_like(sigma)
    u = (torch.stack(U, -1).double() @ P[:, :, :1]).squeeze(-1)
    v = (torch.stack(V[:-1], -1).double() @ Qh[:, 0, :, None]).squeeze(-1)
    residual = betas[-1].squeeze(-1).double() * P[:, -1, 0].abs() / sigma
    return Triples(sigma, second / sigma, residual, u.to(start.dtype), v.to(start.dtype))


@dataclass(frozen=True)
class Jacobians:
    """Layer Jacobians J(ℓ) = ∂vec H(ℓ) / ∂vec H(ℓ−1) of L blocks on a probe batch of B sequences, all on the CPU.

    sigma, ratio, residual: (L, B), see `Triples`. alignment: (L − 1, B), |v(ℓ+1)ᵀ u(ℓ)| of Def. 3.2: top right
    singular vector of J(ℓ+1) against top left one of J(ℓ). product: (B,), ‖J(L)···J(1)‖₂ itself.
    errors: blocks that could not be measured, by name; their entries are NaN, the others' are measured.
    """

    sigma: Tensor
    ratio: Tensor
    residual: Tensor
    alignment: Tensor
    product: Tensor
    errors: tuple[str, ...]


def product_bounds(sigma: Tensor, ratio: Tensor, alignment: Tensor) -> tuple[Tensor, Tensor]:
    """Two lower bounds of ‖J(L)···J(1)‖₂ from sigma (L, ...), ratio = σ₂/σ₁ (L, ...) and alignment (L − 1, ...).

    First the right side of Thm 4.2, (aM)^L / a with M = min sigma and a = min alignment. It does not hold as
    stated for L ≥ 3: what a block's other singular directions carry on may cancel the aligned part (tests/test_probes.py
    has an example whose product vanishes). It does for L = 2 (Lemma B.1) and for rank-one Jacobians.

    Then one that does hold. Follow x = v(1) through the blocks: ‖J x‖ ≥ σ₁ cos φ with φ its angle to v(ℓ), and Jx is
    within arctan(σ₂/σ₁ · tan φ) of u(ℓ), hence within that plus arccos(alignment) of v(ℓ+1). The bound is the
    product of the σ₁ cos φ, zero once an angle may reach 90°; it is as certain as the σ₂/σ₁ it is given.
    """
    L = len(sigma)
    M, a = sigma.amin(0), alignment.amin(0)
    stated = a ** (L - 1) * M**L
    angle = torch.zeros_like(sigma[0])
    held = sigma[0].clone()
    for i in range(1, L):
        angle = torch.atan(ratio[i - 1] * torch.tan(angle)) + torch.arccos(alignment[i - 1].clamp(0, 1))
        angle = angle.clamp_max(math.pi / 2)
        held = held * sigma[i] * torch.cos(angle).clamp_min(0)
    return stated, held


class _Linearised:
    """Products with the Jacobians of several functions of one input each, at fixed points, in single autograd calls.

    Double backward: g(u) = Jᵀu is linear in u, and its derivative transposed is v -> Jv. Attention has to run on
    the math kernel, the only one with a double backward.
    """

    def __init__(self, functions: Sequence[Callable[[Tensor], Tensor]], points: Sequence[Tensor]):
        self.shape = points[0].shape
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            self.z = [z.detach().clone().requires_grad_() for z in points]
            self.y = [f(z) for f, z in zip(functions, self.z, strict=True)]
            self.u = [torch.zeros_like(y, requires_grad=True) for y in self.y]
            self.g = torch.autograd.grad(self.y, self.z, self.u, create_graph=True)

    def _apply(self, outputs, inputs, x: Tensor) -> Tensor:
        """x: (functions · B, T · d); the B sequences of a point are independent maps."""
        weights = x.view(len(self.z), *self.shape).unbind()
        out = torch.autograd.grad(outputs, inputs, weights, retain_graph=True)
        return torch.stack(out).view(x.shape)

    def matvec(self, v: Tensor) -> Tensor:
        return self._apply(self.g, self.u, v)

    def rmatvec(self, u: Tensor) -> Tensor:
        return self._apply(self.y, self.z, u)

    def triples(self, steps: int, seed: int) -> Triples:
        B = self.shape[0]
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(len(self.z) * B, self.shape[1:].numel(), generator=generator)
        return top_triples(self.matvec, self.rmatvec, start.to(self.z[0]), steps)


def jacobians(blocks: Sequence[nn.Module], x: Tensor, steps: int = 15, seed: int = 0) -> Jacobians:
    """Measure the layer Jacobians of any modules that map a residual stream (B, T, d) to itself.

    x: H(0), the first block's input. steps: Lanczos steps. Nothing about the modules changes: no gradient is
    accumulated, no global random state is used. Raises TypeError for modules inside a wrapper.
    """
    for block in blocks:
        if type(block).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule"):
            raise TypeError(f"{type(block).__name__}: measure the module inside the wrapper")
    points, errors = [x.detach()], []
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for i, block in enumerate(blocks):
            points.append(block(points[-1]))
            if not torch.isfinite(points[-1]).all():
                errors.append(f"block {i}: its output is not finite")
                break
    measured = len(points) - 1 - len(errors)
    L, B = len(blocks), x.shape[0]
    nan = torch.full((L, B), math.nan, dtype=torch.float64)
    sigma, ratio, residual = nan.clone(), nan.clone(), nan.clone()
    alignment, product = nan[1:].clone(), nan[0].clone()
    if measured:
        top = _Linearised(list(blocks[:measured]), points[:measured]).triples(steps, seed)
        for into, values in ((sigma, top.sigma), (ratio, top.ratio), (residual, top.residual)):
            into[:measured] = values.view(measured, B).cpu()
        u, v = top.u.view(measured, B, -1), top.v.view(measured, B, -1)
        alignment[: measured - 1] = (v[1:] * u[:-1]).sum(-1).abs().double().cpu()
    if measured == L:

        def chain(z: Tensor) -> Tensor:
            for block in blocks:
                z = block(z)
            return z

        product = _Linearised([chain], points[:1]).triples(steps, seed).sigma.cpu()
    return Jacobians(sigma, ratio, residual, alignment, product, tuple(errors))
