"""Measurements of a model that never change it: spectra of weight matrices, layer Jacobians and their alignment."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


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

    sigma: (N,) largest singular values. ratio: (N,) σ₂/σ₁. residual: (N,) ‖Jᵀu − σv‖ / σ, zero when converged.
    u: (N, m) and v: (N, n), unit left and right singular vectors.
    """

    sigma: Tensor
    ratio: Tensor
    residual: Tensor
    u: Tensor
    v: Tensor


def ill_conditioned(ratio: Tensor, residual: Tensor) -> Tensor:
    """Whether a top singular vector, and any alignment made from it, is not to be trusted.

    Either σ₂/σ₁ > 0.99, when a change of 1 % in the map can turn the vector into any other of the top two; or the
    vector found may be off by a sine of more than 0.1 (Wedin: residual / gap), because Lanczos was stopped.
    A NaN is not to be trusted either.
    """
    return ~((ratio <= 0.99) & (residual <= 0.1 * (1 - ratio)))


@torch.no_grad()
def top_triples(
    matvec: Callable[[Tensor, list[int]], Tensor],
    rmatvec: Callable[[Tensor, list[int]], Tensor],
    start: Tensor,
    steps: int = 12,
    tolerance: float = 3e-4,
) -> Triples:
    """The top singular triples of G groups of B maps at once, by Lanczos with full reorthogonalisation.

    start: (G, B, n), one starting vector per map; the triples come back in its order, flattened to N = G · B.
    matvec: (g, B, n), indices of g groups -> (g, B, m), the maps of those groups applied, Jv; rmatvec: Jᵀu.
    A group is left alone once, for all its maps, min(r, r² / (1 − σ₂/σ₁)) is below `tolerance`: the first is a bound of
    σ₁'s relative error given the residual r, the second an upper estimate. `steps`
    products each way at most.
    """
    G, B, n = start.shape

    def add(x: Tensor, basis: Tensor, k: int) -> Tensor:
        """Orthogonalise x (N, dim) against k rows of basis (N, K, dim), normalise it into row k; its norm, (N,)."""
        before = x.norm(dim=-1, keepdim=True)
        for _ in range(2 if k else 0):  # once is not enough when x lies almost in the span
            x = x - (x.unsqueeze(1) @ basis[:, :k].mT @ basis[:, :k]).squeeze(1)
        norm = x.norm(dim=-1, keepdim=True)
        norm = torch.where(norm <= 100 * torch.finfo(x.dtype).eps * before, 0.0, norm)  # the space is exhausted
        basis[:, k] = torch.where(norm > 0, x / norm, 0.0)
        return norm.squeeze(-1).cpu().double()

    def product(apply, x: Tensor) -> Tensor:
        return apply(x.reshape(len(live), B, -1), live).flatten(0, 1)

    steps = min(steps, n)
    live, maps = list(range(G)), torch.arange(G * B)
    V, U = start.new_zeros(G * B, steps + 1, n), None
    bidiagonal = torch.zeros(G * B, steps, steps + 1, dtype=torch.float64)  # small, on the CPU: MPS has no fp64
    found = [None] * (G * B)
    add(start.flatten(0, 1), V, 0)
    for k in range(steps):
        # J V = U C with C the first k + 1 columns of the upper bidiagonal matrix, Jᵀ U = V Cᵀ + β v_last e_lastᵀ
        x = product(matvec, V[:, k])
        if U is None:
            U = x.new_zeros(G * B, steps, x.shape[-1])
        bidiagonal[:, k, k] = add(x, U, k)
        bidiagonal[:, k, k + 1] = add(product(rmatvec, U[:, k]), V, k + 1)
        C = bidiagonal[:, : k + 1, : k + 1]
        P, S, Qh = torch.linalg.svd(C.nan_to_num(0, 0, 0))
        sigma = torch.where(C.isfinite().all(-1).all(-1), S[:, 0], math.nan)
        second = S[:, min(k, 1)] * (k > 0)
        ratio, residual = second / sigma, bidiagonal[:, k, k + 1] * P[:, -1, 0].abs() / sigma
        error = torch.minimum(residual, residual**2 / (1 - ratio))
        # three steps at least, or a map whose second value has not been seen yet looks well separated
        done = (k + 1 == steps) | ((k > 1) & ~(error > tolerance).view(-1, B).any(-1))
        if not done.any():
            continue
        done = done.expand(len(live)).repeat_interleave(B)
        u = (P[:, None, :, 0].to(x) @ U[:, : k + 1]).squeeze(1)
        v = (Qh[:, :1].to(x) @ V[:, : k + 1]).squeeze(1)
        for i in done.nonzero().flatten().tolist():
            found[maps[i]] = sigma[i], ratio[i], residual[i], u[i], v[i]
        if done.all():
            break
        maps, V, U, bidiagonal = (kept[(~done).to(kept.device)] for kept in (maps, V, U, bidiagonal))
        live = [g for g, ready in zip(live, done[::B].tolist(), strict=True) if not ready]
    return Triples(*map(torch.stack, zip(*found, strict=True)))


@dataclass(frozen=True)
class Jacobians:
    """Layer Jacobians J(ℓ) = ∂vec H(ℓ) / ∂vec H(ℓ−1) of L blocks on a probe batch of N sequences, all on the CPU.

    sigma, ratio, residual: (L, N), see `Triples`. alignment: (L − 1, N), |v(ℓ+1)ᵀ u(ℓ)| of Def. 3.2: top right
    singular vector of J(ℓ+1) against top left one of J(ℓ); flagged: (L − 1, N), that one of the two vectors is
    `ill_conditioned`. product: (N,), ‖J(L)···J(1)‖₂ itself. errors: blocks that could not be measured, by name; their
    entries are NaN, the others' are measured. N = B · len(positions) with positions, sequence by sequence.
    """

    sigma: Tensor
    ratio: Tensor
    residual: Tensor
    alignment: Tensor
    flagged: Tensor
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
    M = sigma.amin(0)
    a = alignment.amin(0) if L > 1 else torch.ones_like(M)
    stated = a ** (L - 1) * M**L
    angle = torch.zeros_like(sigma[0])
    held = sigma[0].clone()
    for i in range(1, L):
        angle = torch.atan(ratio[i - 1] * torch.tan(angle)) + torch.arccos(alignment[i - 1].clamp(0, 1))
        angle = angle.clamp_max(math.pi / 2)
        held = held * sigma[i] * torch.where(angle < math.pi / 2, torch.cos(angle), 0.0)
    return stated, held


class _LayerNorm(torch.autograd.Function):
    """Layer norm whose double backward, with respect to the gradient only, is one kernel instead of a dozen.

    Without its gains the Jacobian of layer norm is symmetric, so Jv is gain · (the kernel of Jᵀu, without gain).
    """

    @staticmethod
    def forward(ctx, x, shape, gain, bias, eps):
        y, mean, rstd = torch.native_layer_norm(x, shape, gain, bias, eps)
        ctx.at = x, shape, mean, rstd, gain
        return y

    @staticmethod
    def backward(ctx, u):
        return _LayerNormVJP.apply(u, *ctx.at), None, None, None, None

    @staticmethod
    def transposed(u, x, shape, mean, rstd, gain):
        out = torch.ops.aten.native_layer_norm_backward(u, x, shape, mean, rstd, gain, None, [True, False, False])
        return out[0]


class _LayerNormVJP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, *at):
        ctx.at = at
        return _LayerNorm.transposed(u, *at)

    @staticmethod
    def backward(ctx, v):
        *at, gain = ctx.at
        out = _LayerNorm.transposed(v, *at, None)
        return out if gain is None else out * gain, *[None] * 5


@contextmanager
def default_products():
    """Inside, fp32 products are PyTorch's default: on batches as small as a probe's, oneDNN takes a third longer."""
    matmul = torch.backends.mkldnn.matmul
    chosen, matmul.fp32_precision = matmul.fp32_precision, "none"
    try:
        yield
    finally:
        matmul.fp32_precision = chosen


@contextmanager
def uncompiled():
    """Inside, PyTorch's attention runs on the math kernel and modules compiled in place run as written: both can be
    differentiated twice only so.
    """
    with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
        yield


class _Measured(TorchFunctionMode):
    """`uncompiled`, and layer norm is the one above."""

    def __enter__(self):
        self.plain = uncompiled()
        self.plain.__enter__()
        return super().__enter__()

    def __exit__(self, *exc):
        super().__exit__(*exc)
        self.plain.__exit__(*exc)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.layer_norm:
            func = self.layer_norm
        return func(*args, **(kwargs or {}))

    @staticmethod
    def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
        return _LayerNorm.apply(input, normalized_shape, weight, bias, eps)


def leaf(x: Tensor) -> Tensor:
    """x, cut from its graph, to differentiate with respect to."""
    return x.detach().clone().requires_grad_()


class _Linearised:
    """Products with the Jacobians of several functions at fixed points, all in single autograd calls.

    Double backward: g(u) = Jᵀu is linear in u, and its derivative transposed is v -> Jv. The rows of a point, its
    first dimension, are independent maps.
    """

    def __init__(self, functions: Sequence[Callable[[Tensor], Tensor]], points: Sequence[Tensor]):
        with torch.enable_grad(), _Measured():
            self.z = [leaf(z) for z in points]
            self.y = [f(z) for f, z in zip(functions, self.z, strict=True)]
        self._transpose()

    @classmethod
    def along(cls, blocks: Sequence[nn.Module], x: Tensor) -> tuple["_Linearised", str | None]:
        """The blocks at the residual stream that begins with x, up to one whose output is not finite; what to say of that one."""
        self, error = cls([], []), None
        with torch.enable_grad(), _Measured():
            for i, block in enumerate(blocks):
                z = leaf(x)
                x = block(z)
                if not torch.isfinite(x).all():
                    error = not_finite(i, block, z)
                    break
                self.z.append(z)
                self.y.append(x)
        self._transpose()
        return self, error

    def _transpose(self):
        with torch.enable_grad(), _Measured():
            self.u = [torch.zeros_like(y, requires_grad=True) for y in self.y]
            self.g = torch.autograd.grad(self.y, self.z, self.u, create_graph=True) if self.y else ()

    def _apply(self, outputs, inputs, x: Tensor, live: list[int]) -> Tensor:
        """x: (functions, rows, T · d)."""
        weights = x.view(len(live), *self.z[0].shape).unbind()
        out = torch.autograd.grad([outputs[i] for i in live], [inputs[i] for i in live], weights, retain_graph=True)
        return torch.stack(out).view(x.shape)

    def matvec(self, v: Tensor, live: list[int]) -> Tensor:
        return self._apply(self.g, self.u, v, live)

    def rmatvec(self, u: Tensor, live: list[int]) -> Tensor:
        return self._apply(self.y, self.z, u, live)

    def chain(self, v: Tensor, live: list[int]) -> Tensor:
        """The product of all of them, the first one's Jacobian first: (1, rows, T · d) -> the same."""
        for i in range(len(self.z)):
            v = self.matvec(v, [i])
        return v

    def rchain(self, u: Tensor, live: list[int]) -> Tensor:
        for i in reversed(range(len(self.z))):
            u = self.rmatvec(u, [i])
        return u

    def triples(self, steps: int = 12, seed: int = 0) -> Triples:
        return top_triples(self.matvec, self.rmatvec, self._start(len(self.z), seed), steps)

    def product(self, steps: int = 12, seed: int = 0) -> Triples:
        """Of J(L)···J(1), the functions being blocks and the points the residual stream between them."""
        return top_triples(self.chain, self.rchain, self._start(1, seed), steps)

    def _start(self, functions: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)  # drawn on the CPU: the same on every device
        return torch.randn(functions, self.z[0].shape[0], self.z[0][0].numel(), generator=generator).to(self.z[0])


def refuse_wrapped(module: nn.Module):
    """Raise TypeError if `module` is a wrapper, compiled, or holds shards, so that measuring it would go wrong."""
    kind = type(module).__name__
    if kind in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "OptimizedModule"):
        raise TypeError(f"{kind}: measure the module inside the wrapper")
    if any(type(p).__name__ == "DTensor" for p in module.parameters()):
        raise TypeError(f"{kind} holds shards (DTensor): gather its parameters and measure that copy")


def not_finite(i: int, block: nn.Module, x: Tensor) -> str:
    """What to say of block i, whose output for the input x is not finite: what is to blame."""
    bad = [name for name, p in block.named_parameters() if not torch.isfinite(p).all()]
    what = bad[0] if bad else "output" if torch.isfinite(x).all() else "input"
    return f"block {i}: its {what} is not finite"


@default_products()
def jacobians(
    blocks: Sequence[nn.Module], x: Tensor, positions: Sequence[int] = (), steps: int = 12, seed: int = 0
) -> Jacobians:
    """Measure the layer Jacobians of any modules that map a residual stream (B, T, d) to itself.

    x: H(0), the first block's input. positions: tokens t whose own ∂h_t(ℓ) / ∂h_t(ℓ−1), d × d, is measured instead of
    the whole sequence's Jacobian; `product` is then NaN. steps: Lanczos steps at most; what they leave uncertain is
    `flagged`. Other blocks' sigma is right to 1e-4, but for the rare one whose second value, nearly as large, was found first and taken
    for the top (1 of 48 in the tests, then it is wrong by 1 − σ₂/σ₁, less than 1 %). Measured in evaluation mode,
    without dropout; nothing about the modules changes, no gradient is accumulated, no global random state is used.
    Raises TypeError for modules inside a wrapper.
    """
    for block in blocks:
        refuse_wrapped(block)
    training = [module for block in blocks for module in block.modules() if module.training]
    for module in training:
        module.training = False
    try:
        return _jacobians(blocks, x, positions, steps, seed)
    finally:
        for module in training:
            module.training = True


def _jacobians(blocks, x: Tensor, positions: Sequence[int], steps: int, seed: int) -> Jacobians:
    linearised, error = _Linearised.along(blocks, x)
    measured = len(linearised.z)
    if measured and len(positions):
        functions = [
            partial(_at_positions, f, z.detach(), positions) for f, z in zip(blocks, linearised.z, strict=False)
        ]
        linearised = _Linearised(functions, [z[:, list(positions)].flatten(0, 1) for z in linearised.z])
    L, N = len(blocks), x.shape[0] * max(1, len(positions))
    nan = torch.full((L, N), math.nan, dtype=torch.float64)
    sigma, ratio, residual = nan.clone(), nan.clone(), nan.clone()
    alignment, product = nan[1:].clone(), nan[0].clone()
    if measured:
        top = linearised.triples(steps, seed)
        for into, values in ((sigma, top.sigma), (ratio, top.ratio), (residual, top.residual)):
            into[:measured] = values.view(measured, N).cpu()
        u, v = top.u.view(measured, N, -1), top.v.view(measured, N, -1)
        alignment[: measured - 1] = (v[1:] * u[:-1]).sum(-1).abs().double().cpu()
        if measured == L and not len(positions):
            product = linearised.product(steps, seed).sigma.cpu()
    bad = ill_conditioned(ratio, residual)
    return Jacobians(sigma, ratio, residual, alignment, bad[1:] | bad[:-1], product, (error,) if error else ())


def _at_positions(block: Callable[[Tensor], Tensor], x: Tensor, positions: Sequence[int], h: Tensor) -> Tensor:
    """h_t before the block -> h_t after it, all other tokens of x (B, T, d) held; h: (B · len(positions), d)."""
    B, P = len(x), len(positions)
    t = torch.tensor(positions, device=x.device).repeat(B)
    row = torch.arange(B * P, device=x.device)
    return block(x.repeat_interleave(P, 0).index_put((row, t), h))[row, t]


class Activations(NamedTuple):
    """What a forward pass shows, on the CPU; L blocks.

    residual_rms: (L + 1,), root mean square of H(0) … H(L). max_logit: (L,), largest attention logit.
    entropy: (L,), of the attention rows, in nats, mean over heads and tokens. log_z: mean of log Σ exp(logits).
    hidden: H(L), (B, T, d). errors: the first block whose values are not finite, by name; what follows is NaN.
    """

    residual_rms: Tensor
    max_logit: Tensor
    entropy: Tensor
    log_z: float
    hidden: Tensor
    errors: tuple[str, ...]


@torch.no_grad()
@default_products()
def activations(model: nn.Module, tokens: Tensor) -> Activations:
    """One forward pass of a `model.GPT` on tokens (B, T), in the parameters' precision, attention on the math kernel."""
    refuse_wrapped(model)
    rms, max_logit, entropy, errors = [], [], [], []
    with uncompiled():
        x = model.embed(tokens)
        for i, block in enumerate(model.blocks):
            rms.append(x.square().mean().sqrt())
            logits = block.attn.logits(block.attn_norm(x))
            max_logit.append(logits.amax())
            entropy.append(torch.special.entr(torch.softmax(logits, -1)).sum(-1).mean())
            before, x = x, block(x)
            if not errors and not torch.isfinite(x).all():
                errors.append(not_finite(i, block, before))
        rms.append(x.square().mean().sqrt())
        log_z = model.logits(x).float().logsumexp(-1).mean().item()
    return Activations(*(torch.stack(v).cpu().double() for v in (rms, max_logit, entropy)), log_z, x, tuple(errors))


@torch.no_grad()
def norms(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """‖·‖_F of every tensor, by name; one transfer from the device for all."""
    return dict(zip(tensors, torch.stack([x.norm() for x in tensors.values()]).tolist(), strict=True))
