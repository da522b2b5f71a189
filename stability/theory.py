"""Both sides of the paper's theorems, measured on a GPT. For Thm 4.2 see `probes.product_bounds`.

There are L blocks, N sequences of T tokens, and d = d_model. ‖·‖ and ‖·‖₂ are the largest singular value, ‖·‖_F is the
Frobenius norm. Results are float64 on the CPU; a value that is not finite or not defined is NaN. No function changes
the model, its gradients or a random state.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mup import role_of
from stability.probes import _Linearised, ill_conditioned, refuse_wrapped, spectra, uncompiled

ATTENTION = ("W_Q", "W_K", "W_V", "W_O")  # the theorems are about multi-head attention
# L_φ = sup |φ'| of an activation function φ, rounded up; the paper gives upper bounds: 1.13 (GELU) and 1.1 (SiLU)
LIPSCHITZ = {"gelu": 1.12891, "gelu_tanh": 1.12900, "silu": 1.09984}


class Sides(NamedTuple):
    """What a theorem bounds, and its bound; tensors of one shape."""

    measured: Tensor
    bound: Tensor


def _exact(x: Tensor) -> Tensor:
    """x in fp64 on the CPU, without its history."""
    return x.detach().cpu().double()


def _finite(X: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices (..., m, n) in fp64 and which are finite, (...); the others are set to 0, or LAPACK would raise."""
    X = _exact(X)
    finite = X.isfinite().all(-1).all(-1)
    return torch.where(finite[..., None, None], X, 0.0), finite


def _singular_values(X: Tensor) -> Tensor:
    """The singular values of X (..., m, n), largest first, (..., min(m, n)); NaN for a matrix that is not finite."""
    X, finite = _finite(X)
    return torch.where(finite[..., None], torch.linalg.svdvals(X), math.nan)


def _norm(X: Tensor) -> Tensor:
    """‖X‖₂ of X (..., m, n), (...); NaN for a matrix that is not finite."""
    return _singular_values(X)[..., 0]


class Pass(NamedTuple):
    """What one forward and backward pass over N sequences shows; all tensors but grads are (L, N, T, ·).

    stream:        H(ℓ−1), the residual stream that enters block ℓ.
    attn_in:       the input of the block's attention, after the norm.
    mlp_in:        the input of its MLP, after the norm.
    act:           the input of W_down, that is the activations.
    attn_out_grad: ∂loss/∂Y with Y the attention's output. The loss is the mean loss of the sequence itself.
    stream_grad:   ∂loss/∂H(ℓ), H(ℓ) being the block's output. The loss is as for attn_out_grad.
    grads:         {name: ∂loss/∂W} of the blocks' matrices. Here the loss is the mean over all sequences, as in
                   training.
    """

    stream: Tensor
    attn_in: Tensor
    mlp_in: Tensor
    act: Tensor
    attn_out_grad: Tensor
    stream_grad: Tensor
    grads: dict[str, Tensor]


def observe(model: nn.Module, tokens: Tensor, labels: Tensor) -> Pass:
    """The `Pass` of a `model.GPT` over tokens and labels, both (N, T). Raises TypeError for a wrapped model."""
    refuse_wrapped(model)
    seen = defaultdict(list)
    with ExitStack() as stack, torch.enable_grad(), uncompiled():
        for block in model.blocks:
            for name, module in (
                ("block", block), ("attn", block.attn), ("mlp", block.mlp), ("down", block.mlp.W_down),
            ):  # fmt: skip
                hook = module.register_forward_hook(lambda _, z, y, to=name: seen[to].append((z[0], y)))
                stack.callback(hook.remove)
        loss = model(tokens, labels)
    inputs = [torch.stack([z for z, _ in seen[name]]).detach() for name in ("block", "attn", "mlp", "down")]
    matrices = {n: p for n, p in model.blocks.named_parameters() if p.ndim == 2}
    L, N = len(model.blocks), len(tokens)
    wanted = [y for _, y in seen["attn"]] + [y for _, y in seen["block"]] + list(matrices.values())
    found = torch.autograd.grad(loss, wanted)
    # the loss is the mean over N sequences; times N, each sequence has the gradient of its own loss
    attn_out_grad, stream_grad = torch.stack(found[:L]) * N, torch.stack(found[L : 2 * L]) * N
    return Pass(*inputs, attn_out_grad, stream_grad, dict(zip(matrices, found[2 * L :], strict=True)))


def weight_norms(matrices: Mapping[str, Tensor]) -> Sides:
    """Thm 4.4, ‖W‖₂ = ‖W‖_F / √srank(W), for every matrix in order: (len(matrices),).

    The theorem is the definition of the stable rank solved for ‖W‖₂, so it can fail only numerically. The left side is
    computed by SVD, the right side by `spectra`. A zero matrix has no stable rank, so its right side is NaN.
    """
    bound = [s.fro / math.sqrt(s.srank) for s in spectra(matrices).values()]
    return Sides(torch.stack([_norm(W) for W in matrices.values()]), torch.tensor(bound, dtype=torch.float64))


def _jacobian_norms(functions: Sequence[nn.Module], points: Tensor) -> Tensor:
    """‖∂f/∂z‖₂, (L, N), of L functions f at their points z, (L, N, T, d).

    Lanczos iteration approaches the norm from below, to 3e-4, or to a few 1e-3 where σ₂ ≈ σ₁.
    """
    with torch.no_grad():
        good = [i for i, (f, z) in enumerate(zip(functions, points, strict=True)) if f(z).isfinite().all()]
    out = torch.full(points.shape[:2], math.nan, dtype=torch.float64)
    if good:
        top = _Linearised([functions[i] for i in good], [points[i] for i in good]).triples()
        out[good] = top.sigma.view(len(good), -1).cpu()
    return out


class AttentionSides(NamedTuple):
    """Both sides of Thm 4.5 with its γ and χ, each (L, N).

    gamma: the smallest margin γ between the two largest logits of a row.
    chi:   χ = min((T − 1) e^{−γ}, 1). At χ = 1 the theorem gains nothing from its assumption of sharp attention.
    """

    measured: Tensor
    bound: Tensor
    gamma: Tensor
    chi: Tensor


@torch.no_grad()
def attention_norms(attns: Sequence[nn.Module], H: Tensor) -> AttentionSides:
    """Thm 4.5: ‖∂Y/∂H‖₂ ≤ ‖W_V‖‖W_O‖ (‖A‖ + (4χ/√d_k) ‖W_Q‖‖W_K‖‖H‖²), for attention layers at H (L, N, T, d), T ≥ 2.

    A are the attention weights, χ = min((n − 1)e^{−γ}, 1), and γ is the smallest margin between the two largest logits
    of a row. We take n = T for every row, although causality allows fewer keys. A row with one allowed key does not
    vary; its margin is infinite.

    The paper states the theorem for one head. It also holds for several heads, with the whole matrices W_Q … W_O, the
    largest ‖A_i‖ of a head i, the smallest γ over heads and rows, and `attn.scale` for 1/√d_k, where d_k is the width
    of one head's queries. To see this, write dY = [P_1 P_2 …] W_O with P_i = A_i dH W_V,i + dA_i H W_V,i for head i.
    Let p be a row of A_i, p_1 its largest entry, and S_i the logits:
    (1) Σ_i ‖A_i dH W_V,i‖_F² ≤ max‖A_i‖² ‖dH W_V‖_F².
    (2) A row of dA_i is diag p − ppᵀ times the same row of dS_i. By Gershgorin
        ‖diag p − ppᵀ‖₂ ≤ 2 max p_j(1 − p_j) ≤ 2(1 − p_1) ≤ 2χ, because p_1 ≥ 1 / (1 + (n − 1)e^{−γ}).
    (3) dS_i = scale · (dQ_i K_iᵀ + Q_i dK_iᵀ) with ‖K_i‖ ≤ ‖H‖‖W_K‖ and ‖Q_i‖ ≤ ‖H‖‖W_Q‖. Minkowski's inequality over
        heads gives √Σ‖dS_i‖_F² ≤ 2 scale ‖W_Q‖‖W_K‖‖H‖‖dH‖_F.
    (4) ‖H W_V,i‖ ≤ ‖H‖‖W_V‖.
    By (2), χ could be capped at 1/4 without any assumption.
    """
    rows = []
    for attn, inputs in zip(attns, H, strict=True):
        logits = _exact(attn.logits(inputs))  # (N, heads, T, T)
        first, second = logits.topk(2).values.unbind(-1)
        gamma = (first - second).amin((1, 2))
        chi = ((inputs.shape[1] - 1) * torch.exp(-gamma)).clamp_max(1)
        norm_A = _norm(logits.softmax(-1)).amax(1)
        norm_Q, norm_K, norm_V, norm_O = (_norm(getattr(attn, role).weight) for role in ATTENTION)
        bound = norm_V * norm_O * (norm_A + 4 * chi * attn.scale * norm_Q * norm_K * _norm(inputs) ** 2)
        rows.append((bound, gamma, chi))
    return AttentionSides(_jacobian_norms(attns, H), *map(torch.stack, zip(*rows, strict=True)))


def mlp_norms(mlps: Sequence[nn.Module], inputs: Tensor) -> Sides:
    """Thm 4.6: ‖J_MLP‖₂ ≤ L_φ ‖W_up‖_F‖W_down‖_F / √(srank W_up · srank W_down), as Sides of (L, N).

    inputs: (L, N, T, d), one for each MLP. J_MLP is the Jacobian of an MLP with φ = GELU. By Thm 4.4 the right side
    equals L_φ‖W_up‖₂‖W_down‖₂; it is NaN when one of the matrices is zero. The theorem does not hold for gated MLPs.
    """
    bounds = []
    for mlp in mlps:
        up, down = spectra({"up": mlp.W_up.weight, "down": mlp.W_down.weight}).values()
        bounds.append(LIPSCHITZ["gelu"] * up.fro * down.fro / math.sqrt(up.srank * down.srank))
    bound = torch.tensor(bounds, dtype=torch.float64)[:, None].expand(inputs.shape[:2])
    return Sides(_jacobian_norms(mlps, inputs), bound)


def gradient_bounds(
    sigma: Tensor, link: Tensor, local: Tensor, g: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """log10 of the right sides of Thm 4.8, (L, N), and of Thm 4.9, (N,), and the a of Thm 4.8, (L, N).

    h(i) is the output of block i of L, w a parameter of that block, and v(ℓ) the top right singular vector of the
    Jacobian J(ℓ). The loss is written ℒ.
    sigma: (L, N), ‖J(ℓ)‖₂.
    link:  (L, N), |cos| of the angle between J(ℓ)'s top left singular vector and v(ℓ+1), or ∂ℒ/∂h(L) for ℓ = L.
    local: (L, N), the same for the local Jacobian ∂h(i)/∂w instead of J(i).
    g:     (L, N), ‖∂h(i)/∂w‖₂; γ in the paper.
    grad:  (N,), ‖∂ℒ/∂h(L)‖.

    Thm 4.8: ag(aM)^{L−i}‖∂ℒ/∂h(L)‖. M is the smallest sigma above block i; a is the smallest of local(i) and of the
    links above block i.
    Thm 4.9: C((aM)^{2L} − 1)/((aM)² − 1), C = (ag‖∂ℒ/∂h(L)‖)², with the smallest a, g and M of all blocks.

    For L ≥ 2 neither theorem holds as stated; tests/test_theory.py has a counterexample. As in Thm 4.2, the proofs use
    the alignment with the next factor where they need the alignment with the whole product. Both theorems hold for J
    of rank one, and Thm 4.8 holds for the last block.
    """
    L = len(sigma)
    n = torch.arange(L, dtype=sigma.dtype)[:, None]
    a = torch.minimum(local, _smallest_above(link))
    log_a, log_M, log_g, log_grad = a.log10(), _smallest_above(sigma).log10(), g.log10(), grad.log10()
    each = log_a + log_g + _log_power(log_a + log_M, L - 1 - n) + log_grad
    log_worst_a = log_a.amin(0)
    # the quotient of Thm 4.9 is the sum of (aM)^{2n} over n = 0 … L − 1, which also exists at aM = 1
    log_terms = _log_power(2 * (log_worst_a + log_M[0]), n)
    log_quotient = (log_terms * math.log(10)).logsumexp(0) / math.log(10)
    total = 2 * (log_worst_a + log_g.amin(0) + log_grad) + log_quotient
    return each, total, a


def _smallest_above(x: Tensor) -> Tensor:
    """For each block i the smallest of x(i + 1) … x(L), (L, N), given x (L, N); 1 for the last block."""
    return torch.cat([x[1:].flip(0).cummin(0).values.flip(0), torch.ones_like(x[:1])])


def _log_power(log_x: Tensor, n: Tensor) -> Tensor:
    """log xⁿ from log x; x⁰ is 1 also for x = 0."""
    return torch.where(n > 0, n * log_x, 0.0)


class GradientSides(NamedTuple):
    """log10 of both sides of Thms 4.8 and 4.9.

    each:    (L, N), Thm 4.8.
    total:   (N,), Thm 4.9.
    a:       (L, N), the a of Thm 4.8.
    flagged: (L, N), whether the top singular vectors of J(ℓ) are `ill_conditioned`.
    """

    each: Sides
    total: Sides
    a: Tensor
    flagged: Tensor


@torch.no_grad()
def gradient_norms(blocks: Sequence[nn.Module], seen: Pass) -> GradientSides:
    """Thm 4.8: ‖∂ℒ/∂w‖ ≥ ag(aM)^{L−i}‖∂ℒ/∂h(L)‖; Thm 4.9: Σ_i ‖∂ℒ/∂w(i)‖_F² ≥ C((aM)^{2L} − 1)/((aM)² − 1).

    For the symbols see `gradient_bounds`. We do not have the text of the paper's assumptions B.2, so the choice of w is
    ours: w = W_down of block i, h(i) = H(i) of one sequence, and ℒ the mean loss of this sequence. The local Jacobian
    ∂vec h(i)/∂vec W_down is then activations ⊗ I. So g = ‖activations‖₂, and the top left singular vectors are
    u ⊗ (any vector of R^d) with u the top left singular vector of the activations; `local` is |cos| of the angle to the
    nearest of these. All values are NaN when a block's output or the gradient is not finite.
    """
    L, N = seen.stream.shape[:2]
    if not seen.stream_grad.isfinite().all():  # this is also so when the output of a block is not finite
        nan = torch.full((L, N), math.nan, dtype=torch.float64)
        return GradientSides(Sides(nan, nan), Sides(nan[0], nan[0]), nan, torch.ones(L, N, dtype=torch.bool))
    top = _Linearised(list(blocks), list(seen.stream)).triples()
    u, v = (_exact(x).view(seen.stream.shape) for x in (top.u, top.v))
    stream_grad, act = _exact(seen.stream_grad), _exact(seen.act)
    grad = stream_grad[-1].flatten(1).norm(dim=1)
    next_v = torch.cat(
        [v[1:], stream_grad[-1:] / grad[:, None, None]]
    )  # v(ℓ+1), and after the last block ∂ℒ/∂h(L) normalised
    link = (u * next_v).sum((-2, -1)).abs()
    U, S, _ = torch.linalg.svd(act, full_matrices=False)
    local = (U[..., :1].mT @ next_v).flatten(2).norm(dim=-1)
    sigma, g = _exact(top.sigma).view(L, N), S[..., 0]
    bound, total_bound, a = gradient_bounds(sigma, link, local, g, grad)
    norms = (stream_grad.mT @ act).flatten(2).norm(dim=-1)  # of ∂ℒ/∂W_down(i) = (∂ℒ/∂h(i))ᵀ · activations
    each, total = Sides(norms.log10(), bound), Sides(norms.square().sum(0).log10(), total_bound)
    return GradientSides(each, total, a, ill_conditioned(top.ratio, top.residual).view(L, N).cpu())


class Ranks(NamedTuple):
    """Ranks of matrices (..., m, n), each (...).

    rank:  the number of singular values s_i > s₁ · max(m, n) · ε, with ε of the dtype.
    srank: the stable rank; NaN for a zero matrix.
    """

    rank: Tensor
    srank: Tensor


def ranks(X: Tensor) -> Ranks:
    """The Ranks of matrices X (..., m, n)."""
    s = _singular_values(X)
    rank = (s > s[..., :1] * max(X.shape[-2:]) * torch.finfo(X.dtype).eps).sum(-1).double()
    return Ranks(torch.where(s[..., 0].isnan(), math.nan, rank), (s / s[..., :1]).square().sum(-1))


def attention_ranks(seen: Pass) -> dict[str, Ranks]:
    """Thm 4.10, "hidden and co-hidden states of rank ≤ r give attention gradients of rank ≤ r": {name: (L,) Ranks}.

    "hidden" is H, the input of the attention. "cohidden" is ∂ℒ/∂Y, the loss's gradient with respect to its output Y.
    Both are (N·T, d), all sequences below each other. The other entries, W_Q, W_K, W_V and W_O, are the ranks of these
    matrices' gradients.

    Each gradient needs only one of the two conditions. The gradient ∂ℒ/∂W_Q = Hᵀ∂ℒ/∂Q has rank ≤ rank H, whatever
    ∂ℒ/∂Y; so have those of W_K and W_V. The gradient ∂ℒ/∂W_O = (heads' outputs)ᵀ∂ℒ/∂Y has rank ≤ rank ∂ℒ/∂Y, whatever
    H. The other condition alone gives W_V and W_O rank ≤ heads · r, and nothing for W_Q and W_K, because the Jacobian
    of the softmax is a Hadamard product.

    The theorem does not hold for *stable* ranks: tests/test_theory.py multiplies two matrices of stable rank 1.1 into
    one of full stable rank. Layer norm keeps both ranks ≤ d − 1 in any case, of H in the forward pass and of ∂ℒ/∂Y in
    the backward pass.
    """
    found = {"hidden": ranks(seen.attn_in.flatten(1, 2)), "cohidden": ranks(seen.attn_out_grad.flatten(1, 2))}
    for role in ATTENTION:
        found[role] = ranks(torch.stack([G for n, G in seen.grads.items() if role_of(n) == role]))
    return found


class Drift(NamedTuple):
    """What `stable_rank_drift` says of matrices (..., m, n), each (...); NaN for a zero matrix or a zero gradient.

    holds:     1 where the condition of Thm 4.12 holds for all i > 1, otherwise 0.
    share:     the share of the i > 1 for which it holds.
    positive:  the share of all i with Cov_i > 0, which the paper presumes for every i.
    growth:    η Cov₁ / s₁, the relative change of s₁.
    eta:       η, the size of the step.
    predicted: the change of srank to first order, η d srank/dη.
    observed:  the change of srank by W ← W − ηG.
    """

    holds: Tensor
    share: Tensor
    positive: Tensor
    growth: Tensor
    eta: Tensor
    predicted: Tensor
    observed: Tensor


def stable_rank_drift(W: Tensor, G: Tensor) -> Drift:
    """Thm 4.12: a gradient step W ← W − ηG lowers srank(W) when Cov₁/Cov_i > s₁/s_i for all i > 1. W, G: (..., m, n).

    W has singular values s_i and singular vectors u_i, v_i. Cov_i = −u_iᵀGv_i = ds_i/dη is minus the covariance (not
    centred) of the inputs along v_i with the output gradients along u_i; it is positive when these are negatively
    correlated.

    We read the condition as follows: Cov₁ > 0, and for every i > 1 either Cov_i ≤ 0 or Cov₁ s_i > Cov_i s₁. So s₁
    grows, and no s_i grows as fast in proportion. (For Cov_i ≤ 0 the quotient of the theorem has the wrong sign. With
    all Cov_i < 0 the inequality, taken literally, even says the opposite.) To first order
        d srank/dη = 2 Σ_{i>1} (s_i/s₁)² (Cov_i/s_i − Cov₁/s₁).
    The condition is therefore sufficient but far from necessary: it gives every s_i the same weight, whereas small s_i
    hardly contribute to the sum. The step has ‖ηG‖_F = 10⁻³ ‖W‖_F.
    """
    (W, finite), (G, finite_G) = _finite(W), _finite(G)
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    cov = -(U * (G @ Vh.mT)).sum(-2)
    good = (cov[..., :1] > 0) & ((cov <= 0) | (cov[..., :1] * s > cov * s[..., :1]))
    eta = 1e-3 * torch.linalg.matrix_norm(W) / torch.linalg.matrix_norm(G)
    ratio, rate = s / s[..., :1], cov / s[..., :1]
    slope = 2 * (ratio * (rate - ratio * rate[..., :1])).sum(-1)
    after = torch.linalg.svdvals(torch.nan_to_num(W - eta[..., None, None] * G))
    observed = (after / after[..., :1]).square().sum(-1) - ratio.square().sum(-1)
    defined = finite & finite_G & (s[..., 0] > 0) & eta.isfinite()
    share, positive = good[..., 1:].double().mean(-1), (cov > 0).double().mean(-1)
    values = (share == 1).double(), share, positive, rate[..., 0] * eta, eta, slope * eta, observed
    return Drift(*(torch.where(defined, x, math.nan) for x in values))


def _layers(name: str, values: Tensor) -> dict[str, float]:
    """{"<name>/<layer>": value} of values (L,)."""
    return {f"{name}/{i}": value for i, value in enumerate(values.tolist())}


def _share(true: Tensor, *needed: Tensor) -> float:
    """The share of true entries, among those where none of the `needed` values is NaN, nor +∞ beside −∞."""
    # a sum is NaN if one of its terms is
    return true[~sum(needed).isnan()].double().mean().item()


def all_theorems(model: nn.Module, tokens: Tensor, labels: Tensor) -> dict[str, float]:
    """All theorems on tokens and labels (N, T), as {"<theorem>/<name>": number}, or /<name>/<layer> for each layer.

    4.4: error, the largest relative difference of the two sides. For the others see `_flat_norms` (4.5, 4.6),
    `_flat_gradients` (4.8, 4.9), `_flat_ranks` (4.10) and `_flat_drift` (4.12). "holds" is the share of cases
    in which the theorem holds (4.12: its condition). A mean or a share leaves out what is not defined.
    """
    seen = observe(model, tokens, labels)
    matrices = {name: p for name, p in model.blocks.named_parameters() if p.ndim == 2}
    sides = weight_norms(matrices)
    error = (sides.measured / sides.bound - 1).abs().nan_to_num(0).max().item()
    return (
        {"4.4/error": error}
        | _flat_norms(model.blocks, seen)
        | _flat_gradients(model.blocks, seen)
        | _flat_ranks(seen)
        | _flat_drift(matrices, seen.grads)
    )


def _flat_norms(blocks: Sequence[nn.Module], seen: Pass) -> dict[str, float]:
    """Thms 4.5 and 4.6, with both sides of each layer as means over sequences.

    holds:      share of layers and sequences.
    looseness:  mean of log10 (bound / measured).
    gamma, chi: of each layer, the smallest γ and the largest χ of Thm 4.5.
    vacuous:    share of layers and sequences with χ = 1.
    """
    out = {}
    attention = attention_norms([block.attn for block in blocks], seen.attn_in)
    mlp = mlp_norms([block.mlp for block in blocks], seen.mlp_in)
    for theorem, (measured, bound) in (("4.5", attention[:2]), ("4.6", mlp)):
        out |= _layers(f"{theorem}/measured", measured.mean(1)) | _layers(f"{theorem}/bound", bound.mean(1))
        out[f"{theorem}/holds"] = _share(measured <= bound, measured, bound)
        out[f"{theorem}/looseness"] = (bound / measured).log10().nanmean().item()
    out |= _layers("4.5/gamma", attention.gamma.amin(1)) | _layers("4.5/chi", attention.chi.amax(1))
    out["4.5/vacuous"] = _share(attention.chi == 1, attention.chi)
    return out


def _flat_gradients(blocks: Sequence[nn.Module], seen: Pass) -> dict[str, float]:
    """Thms 4.8 and 4.9, with log10 of both sides as means over sequences.

    holds:           share of layers and sequences (4.8) or of sequences (4.9).
    a:               the smallest a of Thm 4.8.
    ill_conditioned: share of the Jacobians whose top singular vectors are uncertain.
    """
    found = gradient_norms(blocks, seen)
    out = {}
    for theorem, (measured, bound) in (("4.8", found.each), ("4.9", found.total)):
        out[f"{theorem}/holds"] = _share(measured >= bound, measured, bound)
    out |= _layers("4.8/log10_measured", found.each.measured.mean(1))
    out |= _layers("4.8/log10_bound", found.each.bound.mean(1))
    return out | {
        "4.8/a": found.a.min().item(),
        "4.8/ill_conditioned": found.flagged.double().mean().item(),
        "4.9/log10_measured": found.total.measured.mean().item(),
        "4.9/log10_bound": found.total.bound.mean().item(),
    }


def _flat_ranks(seen: Pass) -> dict[str, float]:
    """Thm 4.10 with r the larger rank of a layer's hidden and co-hidden states.

    srank_hidden, srank_cohidden: stable ranks of each layer.
    rank_hidden, rank_cohidden, rank_gradient: the largest over layers (and roles).
    holds:          share of gradients of rank ≤ r.
    vacuous:        share of layers with r ≥ d − 1.
    srank_gradient: mean stable rank of the gradients.
    srank_holds:    `holds`, computed with stable ranks instead of ranks.
    """
    found = attention_ranks(seen)
    out = {}
    for name in ("hidden", "cohidden"):
        out |= _layers(f"4.10/srank_{name}", found[name].srank)
        out[f"4.10/rank_{name}"] = found[name].rank.max().item()
    states = Ranks(*map(torch.maximum, found["hidden"], found["cohidden"]))  # (L,)
    gradients = Ranks(*map(torch.stack, zip(*(found[role] for role in ATTENTION), strict=True)))  # (4, L)
    return out | {
        "4.10/rank_gradient": gradients.rank.max().item(),
        "4.10/holds": _share(gradients.rank <= states.rank, gradients.rank, states.rank),
        "4.10/vacuous": _share(states.rank >= seen.attn_in.shape[-1] - 1, states.rank),
        "4.10/srank_gradient": gradients.srank.nanmean().item(),
        "4.10/srank_holds": _share(gradients.srank <= states.srank, gradients.srank, states.srank),
    }


def _flat_drift(matrices: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> dict[str, float]:
    """Thm 4.12 over all matrices and their gradients: means of `Drift`'s holds, share (also by layer) and positive.

    grows:  share of matrices with Cov₁ > 0.
    falls:  share of matrices whose stable rank falls.
    agrees: share of matrices whose stable rank falls or rises as predicted.
    """
    drifts = []
    for role in dict.fromkeys(map(role_of, matrices)):
        names = [name for name in matrices if role_of(name) == role]
        W, G = (torch.stack([tensors[name] for name in names]) for tensors in (matrices, grads))
        drifts.append(stable_rank_drift(W, G))
    drift = Drift(*map(torch.stack, zip(*drifts, strict=True)))  # (6 roles, L)
    out = _layers("4.12/share", drift.share.nanmean(0))
    for name in ("holds", "share", "positive"):
        out[f"4.12/{name}"] = getattr(drift, name).nanmean().item()
    falls = drift.observed < 0
    return out | {
        "4.12/grows": _share(drift.growth > 0, drift.observed),
        "4.12/falls": _share(falls, drift.observed),
        "4.12/agrees": _share((drift.predicted < 0) == falls, drift.observed),
    }
