"""Measurements that never change a model: spectra of weight matrices, layer Jacobians and their alignment.

H(ℓ) is the residual stream after block ℓ of L, (B, T, d) for B sequences of T tokens; H(0) is the embedding. Each
sequence has its own Jacobian J(ℓ) = ∂vec H(ℓ) / ∂vec H(ℓ−1), (T·d, T·d). It is never stored: automatic differentiation
gives its products with vectors, and Lanczos iteration turns these into its top singular triple (u, σ₁, v), J v = σ₁ u.
σ₂ is the next singular value.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

STEPS = 12  # of Lanczos iteration, at most
STACK_ELEMENTS = 2**26  # of the matrices whose spectra are computed together: 0.5 GB in fp64


class Spectrum(NamedTuple):
    """srank = ‖W‖_F² / ‖W‖₂² (Def. 3.1), sigma1 = ‖W‖₂ and fro = ‖W‖_F of a matrix W, or their means over a stack."""

    srank: float
    sigma1: float
    fro: float


@torch.no_grad()
def spectra(params: Mapping[str, Tensor]) -> dict[str, Spectrum]:
    """The Spectrum of every parameter in {name: (..., m, n)}, in the same order.

    ‖W‖_F² is the trace and ‖W‖₂² the largest eigenvalue of the smaller Gram matrix, in fp64. Matrices of one shape are
    computed together, up to STACK_ELEMENTS elements at a time. The stable rank of a zero matrix is NaN. All values of a
    matrix that is not finite are NaN.
    """
    alike: dict[tuple[torch.Size, torch.device], list[str]] = defaultdict(list)
    for name, W in params.items():
        alike[W.shape, W.device].append(name)
    out: dict[str, Spectrum] = {}
    for (shape, _), names in alike.items():
        size = max(1, STACK_ELEMENTS // max(1, shape.numel()))
        for stack in (names[i : i + size] for i in range(0, len(names), size)):
            out |= zip(stack, _spectra(torch.stack([params[name] for name in stack])), strict=True)
    return {name: out[name] for name in params}


def _spectra(W: Tensor) -> Iterable[Spectrum]:
    """The Spectrum of every entry of W (N, ..., m, n)."""
    W = W.cpu().double() if W.device.type == "mps" else W.double()
    gram = W @ W.mT if W.shape[-2] < W.shape[-1] else W.mT @ W
    bad = ~torch.isfinite(gram).all(dim=(-2, -1))
    lam = torch.linalg.eigvalsh(torch.where(bad[..., None, None], 0.0, gram))[..., -1].clamp_min(0)
    lam = torch.where(bad, math.nan, lam)
    fro2 = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    rows = torch.stack([fro2 / lam, lam.sqrt(), fro2.sqrt()], -1)  # a zero matrix gives 0 / 0 = NaN, as documented
    rows = rows.flatten(1, -2).mean(1) if rows.ndim > 2 else rows
    return (Spectrum(*row) for row in rows.tolist())


def geometric_mean(values) -> float:
    """The geometric mean of those values that are finite and positive; NaN when there are none."""
    logs = [math.log(v) for v in values if v > 0 and math.isfinite(v)]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


@dataclass(frozen=True)
class Triples:
    """The top singular triples (u, σ₁, v) of N linear maps J, found by Golub-Kahan-Lanczos iteration.

    sigma:    (N,), the largest singular values σ₁.
    ratio:    (N,), σ₂/σ₁.
    residual: (N,), ‖Jᵀu − σ₁v‖ / σ₁, zero when the iteration has converged.
    u, v:     (N, m) and (N, n), left and right singular vectors of length 1.
    """

    sigma: Tensor
    ratio: Tensor
    residual: Tensor
    u: Tensor
    v: Tensor


def ill_conditioned(ratio: Tensor, residual: Tensor) -> Tensor:
    """Whether a top singular vector is uncertain, and with it any alignment computed from it.

    It is uncertain when σ₂/σ₁ > 0.99: a change of 1 % in the map can then turn the vector anywhere in the plane of the
    top two. It is also uncertain when the iteration stopped too early: the sine of the angle between the vector and the
    true one may then exceed 0.1 (Wedin's bound, residual / (1 − σ₂/σ₁)). NaN counts as uncertain.
    """
    return ~((ratio <= 0.99) & (residual <= 0.1 * (1 - ratio)))


@torch.no_grad()
def top_triples(
    matvec: Callable[[Tensor, list[int]], Tensor],
    rmatvec: Callable[[Tensor, list[int]], Tensor],
    start: Tensor,
    steps: int = STEPS,
    tolerance: float = 3e-4,
) -> Triples:
    """The top singular triples of G groups of B maps at once, by Lanczos with full reorthogonalisation.

    A group is what one call can multiply or leave out, such as a block; its maps are then the sequences.

    start:   (G, B, n), one starting vector per map. The triples come back in this order, flattened to N = G · B.
    matvec:  called with vectors v (g, B, n) and the indices of g groups; returns Jv for these groups' maps, (g, B, m).
    rmatvec: the same for Jᵀu.
    steps:   the largest number of products with J, and of products with Jᵀ.

    The relative error of σ₁ is at most the residual r. With the true σ₂/σ₁ it is also at most r² / (1 − σ₂/σ₁); with
    the computed one this is an estimate. A group is finished once the smaller of the two is at most `tolerance` for all
    of its maps.
    """
    G, B, n = start.shape
    steps = min(steps, n)
    live, maps = list(range(G)), torch.arange(G * B)  # the unfinished groups, and their maps
    V, U = start.new_zeros(G * B, steps + 1, n), None
    bidiagonal = torch.zeros(G * B, steps, steps + 1, dtype=torch.float64)  # small; on the CPU, as MPS has no fp64
    found: dict[int, tuple[Tensor, ...]] = {}
    _append(V, 0, start.flatten(0, 1))
    for k in range(steps):
        # J V = U C with C the first k + 1 columns of the upper bidiagonal matrix, Jᵀ U = V Cᵀ + β v_last e_lastᵀ with
        # β = bidiagonal[:, k, k + 1]
        x = matvec(V[:, k].reshape(len(live), B, -1), live).flatten(0, 1)
        if U is None:
            U = x.new_zeros(G * B, steps, x.shape[-1])
        bidiagonal[:, k, k] = _append(U, k, x)
        y = rmatvec(U[:, k].reshape(len(live), B, -1), live).flatten(0, 1)
        bidiagonal[:, k, k + 1] = _append(V, k + 1, y)
        P, sigma, Qh, ratio, residual = _top_of_bidiagonal(bidiagonal, k)
        error = torch.minimum(residual, residual**2 / (1 - ratio))
        # at least three steps: before a map's second singular value shows up, its first one looks well separated
        done = ~(error > tolerance).view(-1, B).any(-1)  # (groups,); a NaN cannot improve, so it counts as done
        if k + 1 == steps:
            done[:] = True
        elif k < 2 or not done.any():
            continue
        done = done.repeat_interleave(B)
        u = (P[:, None, :, 0].to(x) @ U[:, : k + 1]).squeeze(1)
        v = (Qh[:, :1].to(x) @ V[:, : k + 1]).squeeze(1)
        for i in done.nonzero().flatten().tolist():
            found[int(maps[i])] = sigma[i], ratio[i], residual[i], u[i], v[i]
        if done.all():
            break
        maps, V, U, bidiagonal = (kept[(~done).to(kept.device)] for kept in (maps, V, U, bidiagonal))
        live = [g for g, ready in zip(live, done[::B].tolist(), strict=True) if not ready]
    return Triples(*map(torch.stack, zip(*(found[i] for i in range(G * B)), strict=True)))


def _append(basis: Tensor, k: int, x: Tensor) -> Tensor:
    """Orthogonalise x (N, dim) to the first k rows of basis (N, K, dim) and store it, normalised, as row k.

    Returns the norm before normalisation, (N,), in fp64 on the CPU; it is 0 when the rows already span x.
    """
    before = x.norm(dim=-1, keepdim=True)
    for _ in range(2 if k else 0):  # once is not enough when x lies almost in the span of the rows
        x = x - (x.unsqueeze(1) @ basis[:, :k].mT @ basis[:, :k]).squeeze(1)
    norm = x.norm(dim=-1, keepdim=True)
    norm = torch.where(norm <= 100 * torch.finfo(x.dtype).eps * before, 0.0, norm)
    basis[:, k] = torch.where(norm > 0, x / norm, 0.0)
    return norm.squeeze(-1).cpu().double()


def _top_of_bidiagonal(bidiagonal: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """P, σ₁, Qᵀ, σ₂/σ₁ and the residual after step k, from the SVD P S Qᵀ of the leading (k + 1) × (k + 1) matrix."""
    C = bidiagonal[:, : k + 1, : k + 1]
    P, S, Qh = torch.linalg.svd(C.nan_to_num(0, 0, 0))
    sigma = torch.where(C.isfinite().all(-1).all(-1), S[:, 0], math.nan)
    second = S[:, 1] if k else torch.zeros_like(sigma)
    return P, sigma, Qh, second / sigma, bidiagonal[:, k, k + 1] * P[:, -1, 0].abs() / sigma


@dataclass(frozen=True)
class Jacobians:
    """What was measured of the Jacobians J(1) … J(L) of L blocks on N sequences; all tensors are on the CPU.

    sigma, ratio, residual: (L, N), see `Triples`.
    alignment: (L − 1, N), |v(ℓ+1)ᵀ u(ℓ)| of Def. 3.2, the top right singular vector of J(ℓ+1) against the top left
               one of J(ℓ).
    flagged:   (L − 1, N), whether one of these two vectors is `ill_conditioned`.
    product:   (N,), ‖J(L)···J(1)‖₂.
    errors:    a line for the block whose output is not finite, if there is one. Its values and those of the blocks
               after it are NaN.

    When single tokens are measured, N is the number of sequences times the number of positions, ordered by sequence.
    """

    sigma: Tensor
    ratio: Tensor
    residual: Tensor
    alignment: Tensor
    flagged: Tensor
    product: Tensor
    errors: tuple[str, ...]


def logit_bound(Q: Tensor, K: Tensor, scale: float, rotated: bool = False) -> Tensor:
    """The largest attention logit that any two inputs of root mean square 1 can have, of each head (h,), on the CPU.

    Q, K: (h, k, n), each head's rows of W_Q and of W_K, times the gains of the norm before them.

    A logit is scale · (Q x)ᵀ(K y), and ‖x‖ = ‖y‖ = √n. So the bound is scale · n · ‖QᵀK‖₂, which x and y along the
    product's first singular vectors reach. RoPE (`rotated`) puts a rotation between Q and K that depends on the tokens'
    distance; the bound is then scale · n · ‖Q‖₂ ‖K‖₂, which need not be reached. NaN if a weight is not finite.
    """
    # ‖QᵀK‖₂² is the largest eigenvalue of QQᵀKKᵀ, which is k × k; small matrices are faster on the CPU than on a GPU
    A, B = ((W.float() @ W.float().mT).cpu().double() for W in (Q, K))
    if not (A.isfinite().all() and B.isfinite().all()):
        return torch.full(A.shape[:1], math.nan)
    largest = [torch.linalg.eigvals(M).abs().amax(-1) for M in ((A, B) if rotated else (A @ B,))]
    return scale * Q.shape[-1] * math.prod(largest).sqrt()


def product_bounds(sigma: Tensor, ratio: Tensor, alignment: Tensor) -> tuple[Tensor, Tensor]:
    """What Thm 4.2 states as a lower bound of ‖J(L)···J(1)‖₂, and a lower bound that holds, each of shape (...).

    sigma, ratio: (L, ...), σ₁ and σ₂/σ₁ of each J(ℓ). alignment: (L − 1, ...), see `Jacobians`.

    The first is (aM)^L / a with M = min sigma and a = min alignment. For L ≥ 3 it can exceed the norm, because the
    other singular directions of a block can cancel the aligned part; tests/test_probes.py has an example whose product
    vanishes. It holds for L = 2 (Lemma B.1) and for Jacobians of rank one.

    The second follows x = v(1) through the blocks. Let φ be the angle between x and v(ℓ). Then ‖J(ℓ)x‖ ≥ σ₁ cos φ, and
    J(ℓ)x lies within the angle arctan(σ₂/σ₁ · tan φ) of u(ℓ). Its angle to v(ℓ+1) is larger by at most
    arccos(alignment). The bound is the product of all σ₁ cos φ; it is zero once an angle may reach 90°. It is only as
    exact as the given σ₂/σ₁.
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
    """Layer norm for double backward passes: differentiating Jᵀu by u takes one kernel instead of a dozen.

    It cannot be differentiated twice by x.
    Without gains the Jacobian of layer norm is symmetric. So Jv is the gains times the kernel that computes Jᵀu, run
    without gains.
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
    def transposed(u: Tensor, x: Tensor, shape, mean: Tensor, rstd: Tensor, gain: Tensor | None) -> Tensor:
        out = torch.ops.aten.native_layer_norm_backward(u, x, shape, mean, rstd, gain, None, [True, False, False])
        return out[0]


class _LayerNormVJP(torch.autograd.Function):
    """Jᵀu of layer norm, whose derivative with respect to u is v -> Jv."""

    @staticmethod
    def forward(ctx, u, *at):
        ctx.at = at
        return _LayerNorm.transposed(u, *at)

    @staticmethod
    def backward(ctx, v):
        x, shape, mean, rstd, gain = ctx.at
        jv = _LayerNorm.transposed(v, x, shape, mean, rstd, None)
        jv = jv if gain is None else jv * gain
        return jv, None, None, None, None, None


@contextmanager
def default_products():
    """Inside, a CPU computes fp32 products in PyTorch's default way, a third faster than oneDNN for small batches."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore # PyTorch puts the attribute in place at run time
    chosen, matmul.fp32_precision = matmul.fp32_precision, "none"
    try:
        yield
    finally:
        matmul.fp32_precision = chosen


@contextmanager
def uncompiled():
    """Inside, PyTorch's attention uses the math kernel, and modules that were compiled in place run uncompiled.

    The other attention kernels and compiled code cannot be differentiated twice.
    """
    with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
        yield


class _Measured(TorchFunctionMode):
    """Inside, everything is `uncompiled` and F.layer_norm is replaced by `_LayerNorm`."""

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
    """A copy of x without history, with respect to which one can differentiate."""
    return x.detach().clone().requires_grad_()


class _Linearised:
    """Products with the Jacobians J of several functions at fixed points; one autograd call serves all functions.

    Jᵀu is a backward pass. It is linear in u, so the backward pass of u -> Jᵀu gives v -> Jv. Every function treats the
    rows of its point (first dimension) independently, so each row has its own Jacobian. Vectors are
    (functions, rows, T · d).
    """

    def __init__(self, functions: Sequence[Callable[[Tensor], Tensor]], points: Sequence[Tensor]):
        with torch.enable_grad(), _Measured():
            self.z = [leaf(z) for z in points]
            self.y = [f(z) for f, z in zip(functions, self.z, strict=True)]
        self._transpose()

    @classmethod
    def along(cls, blocks: Iterable[nn.Module], x: Tensor, first: int = 0) -> tuple["_Linearised", Tensor, str | None]:
        """The blocks linearised at the residual stream that begins with x, what they make of x, and a line or None.

        The line names the first block whose output is not finite, counted from `first`; this block and those after it
        are left out.
        """
        self, error = cls([], []), None
        with torch.enable_grad(), _Measured():
            for i, block in enumerate(blocks):
                z = leaf(x)
                x = block(z)
                if not torch.isfinite(x).all():
                    error = not_finite(first + i, block, z)
                    break
                self.z.append(z)
                self.y.append(x)
        self._transpose()
        return self, x.detach(), error

    def _transpose(self):
        """Record the backward passes g = Jᵀu, to be differentiated with respect to u."""
        with torch.enable_grad(), _Measured():
            self.u = [torch.zeros_like(y, requires_grad=True) for y in self.y]
            self.g = torch.autograd.grad(self.y, self.z, self.u, create_graph=True) if self.y else ()

    def _apply(self, outputs, inputs, x: Tensor, live: list[int]) -> Tensor:
        """The derivatives of outputs with respect to inputs, for the functions in `live`, weighted by x."""
        weights = x.view(len(live), *self.z[0].shape).unbind()
        out = torch.autograd.grad([outputs[i] for i in live], [inputs[i] for i in live], weights, retain_graph=True)
        return torch.stack(out).view(x.shape)

    def matvec(self, v: Tensor, live: list[int]) -> Tensor:
        """Jv for the functions in `live`."""
        return self._apply(self.g, self.u, v, live)

    def rmatvec(self, u: Tensor, live: list[int]) -> Tensor:
        """Jᵀu for the functions in `live`."""
        return self._apply(self.y, self.z, u, live)

    def triples(self, steps: int = STEPS, generator: torch.Generator | None = None) -> Triples:
        """The top singular triples of every function's Jacobian."""
        start = _start(len(self.z), self.z[0], generator or torch.Generator().manual_seed(0))
        return top_triples(self.matvec, self.rmatvec, start, steps)


def _start(functions: int, z: Tensor, generator: torch.Generator) -> Tensor:
    """Random starting vectors, (functions, rows, T · d)."""
    return torch.randn(functions, len(z), z[0].numel(), generator=generator).to(z)


class _Product:
    """Products with J(L)···J(1) of blocks in parts, each linearised at its point; only one part is so at a time."""

    def __init__(self, parts: Sequence[Sequence[nn.Module]], points: Sequence[Tensor], last: _Linearised):
        self.parts, self.points = parts, points
        self.at, self.linearised = len(parts) - 1, last

    def _through(self, v: Tensor, order: range, multiply: Callable) -> Tensor:
        for part in order:
            if part != self.at:
                self.linearised = _Linearised([], [])  # frees the part before
                self.at, (self.linearised, *_) = part, _Linearised.along(self.parts[part], self.points[part])
            blocks = range(len(self.parts[part]))
            for i in blocks if order.step > 0 else reversed(blocks):
                v = multiply(self.linearised, v, [i])
        return v

    def matvec(self, v: Tensor, live: list[int]) -> Tensor:
        """J(L)···J(1)v for v (1, rows, T · d)."""
        return self._through(v, range(len(self.parts)), _Linearised.matvec)

    def rmatvec(self, u: Tensor, live: list[int]) -> Tensor:
        """(J(L)···J(1))ᵀu for u (1, rows, T · d)."""
        return self._through(u, range(len(self.parts) - 1, -1, -1), _Linearised.rmatvec)


def refuse_wrapped(module: nn.Module):
    """Raise TypeError if `module` is a wrapper (DDP, FSDP, torch.compile) or holds shards; neither can be measured."""
    kind = type(module).__name__
    if kind in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "OptimizedModule"):
        raise TypeError(f"{kind}: measure the module inside the wrapper")
    if any(type(p).__name__ == "DTensor" for p in module.parameters()):
        raise TypeError(f"{kind} holds shards (DTensor): gather its parameters and measure that copy")


def _measurable(module: nn.Module) -> nn.Module:
    refuse_wrapped(module)
    return module


def not_finite(i: int, block: nn.Module, x: Tensor) -> str:
    """A line that names what is not finite in block i with input x: a parameter, the input, or else the output."""
    bad = [name for name, p in block.named_parameters() if not torch.isfinite(p).all()]
    if bad:
        what = bad[0]
    elif torch.isfinite(x).all():
        what = "output"
    else:
        what = "input"
    return f"block {i}: its {what} is not finite"


@default_products()
def jacobians(
    blocks: Sequence[nn.Module] | nn.ModuleList,
    x: Tensor,
    positions: Sequence[int] = (),
    steps: int = STEPS,
    seed: int = 0,
    together: int = 0,
) -> Jacobians:
    """The layer Jacobians of any modules that map a residual stream (B, T, d) to one of the same shape.

    x:         H(0), the input of the first block.
    positions: measure single tokens t instead of whole sequences, that is ∂h_t(ℓ) / ∂h_t(ℓ−1), d × d, with all other
               tokens held fixed. `product` is then NaN.
    steps:     the largest number of Lanczos steps. Vectors that they leave uncertain are `flagged`.
    together:  how many blocks are linearised at a time. 0: all on a CPU, and on a GPU those for which there is memory.

    Where no vector is `flagged`, sigma is exact to 1e-4 in the tests; the iteration stops at an estimated error of
    3e-4. There is one rare exception: when σ₂ is nearly as large as σ₁, the iteration may find σ₂ first and take it for
    σ₁. This happens for 1 of 48 Jacobians in the tests; sigma is then too small by 1 − σ₂/σ₁, less than 1 %. The
    modules run in evaluation mode, without dropout. They do not change, no gradient is accumulated, and no global
    random state is used. Raises TypeError for a wrapper (DDP, FSDP, torch.compile) or a module that holds shards.
    """
    training = [module for block in blocks for module in _measurable(block).modules() if module.training]
    for module in training:
        module.training = False
    try:
        return _jacobians(blocks, x, positions, steps, seed, together or _fitting(blocks, x, steps))
    finally:
        for module in training:
            module.training = True


def _fitting(blocks, x: Tensor, steps: int) -> int:
    """How many blocks can be linearised at a time: all on a CPU; those that fit, but one at least, on a GPU."""
    if x.device.type != "cuda":
        return len(blocks)
    before = torch.cuda.memory_allocated(x.device)
    first, *_ = _Linearised.along(blocks[:1], x)
    graph = torch.cuda.memory_allocated(x.device) - before
    del first
    free, memory = torch.cuda.mem_get_info(x.device)
    unused = free + torch.cuda.memory_reserved(x.device) - before - 0.2 * memory  # a fifth is left to others
    vectors = (2 * steps + 1) * x.numel() * x.element_size()
    # a product takes, for a moment, as much as two blocks at most (experts)
    return max(1, min(len(blocks), int(unused / (graph + vectors)) - 2))


def _jacobians(blocks, x: Tensor, positions: Sequence[int], steps: int, seed: int, together: int) -> Jacobians:
    L, N = len(blocks), x.shape[0] * max(1, len(positions))
    sigma, ratio, residual = torch.full((3, L, N), math.nan, dtype=torch.float64)
    alignment, product = sigma[1:].clone(), sigma[0].clone()
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device starts from the same vectors
    parts = [blocks[first : first + together] for first in range(0, L, together)]
    points, measured, error, u_before = [], 0, None, None
    for part in parts:
        points.append(x)
        linearised, x, error = _Linearised.along(part, x, measured)
        count = len(linearised.z)
        if count:
            top = _at(linearised, part, positions).triples(steps, generator)
            for into, values in ((sigma, top.sigma), (ratio, top.ratio), (residual, top.residual)):
                into[measured : measured + count] = values.view(count, N).cpu()
            u, v = top.u.view(count, N, -1), top.v.view(count, N, -1)
            if u_before is not None:
                alignment[measured - 1] = (v[0] * u_before).sum(-1).abs().double().cpu()
            alignment[measured : measured + count - 1] = (v[1:] * u[:-1]).sum(-1).abs().double().cpu()
            u_before, measured = u[-1].clone(), measured + count
            del top, u, v
        if error:
            break
        if part is not parts[-1]:
            del linearised  # the next part needs its memory
    if measured == L and not len(positions):
        whole, generator = _Product(parts, points, linearised), torch.Generator().manual_seed(seed)
        del linearised  # `whole` lets go of it when it takes another part
        product = top_triples(whole.matvec, whole.rmatvec, _start(1, x, generator), steps).sigma.cpu()
    bad = ill_conditioned(ratio, residual)
    return Jacobians(sigma, ratio, residual, alignment, bad[1:] | bad[:-1], product, (error,) if error else ())


def _at(linearised: _Linearised, blocks: Sequence[nn.Module], positions: Sequence[int]) -> _Linearised:
    """The same blocks linearised as functions of single tokens at the positions, if there are some."""
    if not len(positions):
        return linearised
    points = [z.detach() for z in linearised.z]
    functions = [partial(_at_positions, f, z, positions) for f, z in zip(blocks, points, strict=False)]
    return _Linearised(functions, [z[:, list(positions)].flatten(0, 1) for z in points])


def _at_positions(block: Callable[[Tensor], Tensor], x: Tensor, positions: Sequence[int], h: Tensor) -> Tensor:
    """The tokens after the block, as a function of the same tokens h before it, both (B · len(positions), d).

    Row by row, h replaces one token of x (B, T, d); all other tokens keep their values in x.
    """
    B, P = len(x), len(positions)
    t = torch.tensor(positions, device=x.device).repeat(B)
    row = torch.arange(B * P, device=x.device)
    return block(x.repeat_interleave(P, 0).index_put((row, t), h))[row, t]


@torch.no_grad()
def norms(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """{name: Frobenius norm} of {name: tensor}; all norms leave the device in one transfer."""
    return dict(zip(tensors, torch.stack([x.norm() for x in tensors.values()]).tolist(), strict=True))
