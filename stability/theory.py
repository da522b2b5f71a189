"""Both sides of the paper's theorems, measured on a GPT (Thm 4.2 is `probes.product_bounds`).

Nothing here changes the model, its gradients or a random state. L blocks, N sequences of T tokens, d = d_model; results
are float64 on the CPU, NaN where a value is not finite or not defined. Norms are the largest singular values.
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

ATTENTION = ("W_Q", "W_K", "W_V", "W_O")  # of multi-head attention, which the theorems are about
# L_φ = sup |φ'|, rounded up; the paper's 1.13 (GELU) and 1.1 (SiLU) are upper bounds of them
LIPSCHITZ = {"gelu": 1.12891, "gelu_tanh": 1.12900, "silu": 1.09984}


class Sides(NamedTuple):
    """What a theorem bounds and its bound, tensors of one shape."""

    measured: Tensor
    bound: Tensor


def _exact(x: Tensor) -> Tensor:
    return x.detach().cpu().double()


def _finite(X: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices (..., m, n) in fp64, those that are not finite replaced by zero (LAPACK would raise), and which are."""
    X = _exact(X)
    finite = X.isfinite().all(-1).all(-1)
    return torch.where(finite[..., None, None], X, 0.0), finite


def _singular_values(X: Tensor) -> Tensor:
    """Of (..., m, n): (..., min(m, n)), falling, NaN for a matrix that is not finite."""
    X, finite = _finite(X)
    return torch.where(finite[..., None], torch.linalg.svdvals(X), math.nan)


def _norm(X: Tensor) -> Tensor:
    return _singular_values(X)[..., 0]


class Pass(NamedTuple):
    """One forward and backward pass over N sequences.

    h: H(ℓ−1), the input of each block; H: the input of its attention, after the norm; X: of its MLP; act: of W_down.
    dY and dh: ∂L/∂Y for Y the attention's output, and ∂L/∂H(ℓ), L a sequence's own mean loss. All (L, N, T, ·). grads:
    {name: ∂L/∂W} of the block matrices, L the mean loss of all sequences, which is what training follows.
    """

    h: Tensor
    H: Tensor
    X: Tensor
    act: Tensor
    dY: Tensor
    dh: Tensor
    grads: dict[str, Tensor]


def observe(model: nn.Module, tokens: Tensor, targets: Tensor) -> Pass:
    """The `Pass` of a `model.GPT` over tokens and targets (N, T). Raises TypeError for a wrapped model."""
    refuse_wrapped(model)
    seen = defaultdict(list)
    with ExitStack() as stack, torch.enable_grad(), uncompiled():
        for block in model.blocks:
            for name, module in (
                ("block", block), ("attn", block.attn), ("mlp", block.mlp), ("down", block.mlp.W_down),
            ):  # fmt: skip
                hook = module.register_forward_hook(lambda _, z, y, to=name: seen[to].append((z[0], y)))
                stack.callback(hook.remove)
        loss = model(tokens, targets)
    h, H, X, act = (torch.stack([z for z, _ in seen[name]]).detach() for name in ("block", "attn", "mlp", "down"))
    matrices = {n: p for n, p in model.blocks.named_parameters() if p.ndim == 2}
    L, N = len(h), len(tokens)
    wanted = [y for _, y in seen["attn"]] + [y for _, y in seen["block"]] + list(matrices.values())
    found = torch.autograd.grad(loss, wanted)
    dY, dh = torch.stack(found[:L]) * N, torch.stack(found[L : 2 * L]) * N
    return Pass(h, H, X, act, dY, dh, dict(zip(matrices, found[2 * L :], strict=True)))


def weight_norms(matrices: Mapping[str, Tensor]) -> Sides:
    """Thm 4.4, ‖W‖₂ = ‖W‖_F / √srank(W), of every matrix: (len(matrices),) in their order.

    The definition of the stable rank, solved for ‖W‖₂: it can only fail numerically. The left side is by SVD, the right
    from `spectra`, NaN for a zero matrix, which has no stable rank.
    """
    bound = [s.fro / math.sqrt(s.srank) for s in spectra(matrices).values()]
    return Sides(torch.stack([_norm(W) for W in matrices.values()]), torch.tensor(bound, dtype=torch.float64))


def _jacobian_norms(functions: Sequence[nn.Module], points: Tensor) -> Tensor:
    """‖∂f/∂z‖₂ at points (L, N, T, d), one f each: (L, N). Lanczos, from below: 3e-4, a few 1e-3 if σ₂ ≈ σ₁."""
    with torch.no_grad():
        good = [i for i, (f, z) in enumerate(zip(functions, points, strict=True)) if f(z).isfinite().all()]
    out = torch.full(points.shape[:2], math.nan, dtype=torch.float64)
    if good:
        top = _Linearised([functions[i] for i in good], [points[i] for i in good]).triples()
        out[good] = top.sigma.view(len(good), -1).cpu()
    return out


class AttentionSides(NamedTuple):
    """Thm 4.5, each (L, N). gamma: γ, the smallest margin. chi: χ; at 1 the assumption of sharp logits gives nothing."""

    measured: Tensor
    bound: Tensor
    gamma: Tensor
    chi: Tensor


@torch.no_grad()
def attention_norms(attns: Sequence[nn.Module], H: Tensor) -> AttentionSides:
    """Thm 4.5: ‖∂Y/∂H‖₂ ≤ ‖W_V‖‖W_O‖ (‖A‖ + (4χ/√d_k) ‖W_Q‖‖W_K‖‖H‖²) for attention sublayers at H (L, N, T, d), T ≥ 2.

    Stated for one head. For several it holds with the whole matrices W_Q … W_O, ‖A‖ the largest over heads, γ the
    smallest over heads and rows, and `attn.scale` for 1/√d_k: dY = [P_1 … P_h] W_O, P_h = A_h dH W_V^h + dA_h H W_V^h, and
    (1) Σ_h ‖A_h dH W_V^h‖_F² ≤ max‖A_h‖² ‖dH W_V‖_F²;
    (2) a row of dA_h is diag p − ppᵀ times that of the logits' dS_h, and by Gershgorin ‖diag p − ppᵀ‖₂ ≤ 2 max pᵢ(1 − pᵢ)
        ≤ 2(1 − p₁) ≤ 2χ, because p₁ ≥ 1 / (1 + (n−1)e^{−γ});
    (3) dS_h = scale · (dQ_h K_hᵀ + Q_h dK_hᵀ), and ‖K_h‖ ≤ ‖H‖‖W_K‖, ‖Q_h‖ ≤ ‖H‖‖W_Q‖, so that Minkowski's inequality
        over heads gives √Σ‖dS_h‖_F² ≤ 2 scale ‖W_Q‖‖W_K‖‖H‖‖dH‖_F; (4) ‖H W_V^h‖ ≤ ‖H‖‖W_V‖.
    n = T for every row, though causality allows fewer keys. A row with one allowed key does not vary and has no margin
    (+inf). By (2) χ may be capped at 1/4 without any assumption. ‖H‖ is the spectral norm.
    """
    rows = []
    for attn, h in zip(attns, H, strict=True):
        logits = _exact(attn.logits(h))  # (N, heads, T, T)
        first, second = logits.topk(2).values.unbind(-1)
        gamma = (first - second).amin((1, 2))
        chi = ((h.shape[1] - 1) * torch.exp(-gamma)).clamp_max(1)
        A = _norm(logits.softmax(-1)).amax(1)
        Q, K, V, O = (_norm(getattr(attn, role).weight) for role in ATTENTION)  # noqa: E741
        rows.append((V * O * (A + 4 * chi * attn.scale * Q * K * _norm(h) ** 2), gamma, chi))
    return AttentionSides(_jacobian_norms(attns, H), *map(torch.stack, zip(*rows, strict=True)))


def mlp_norms(mlps: Sequence[nn.Module], X: Tensor) -> Sides:
    """Thm 4.6: ‖J_MLP‖₂ ≤ L_φ ‖W_up‖_F‖W_down‖_F / √(srank W_up · srank W_down), GELU MLPs at X (L, N, T, d): (L, N).

    By Thm 4.4 that is L_φ‖W_up‖₂‖W_down‖₂. It holds for a plain φ, not for a gated MLP. NaN when one is a zero matrix.
    """
    bounds = []
    for mlp in mlps:
        up, down = spectra({"up": mlp.W_up.weight, "down": mlp.W_down.weight}).values()
        bounds.append(LIPSCHITZ["gelu"] * up.fro * down.fro / math.sqrt(up.srank * down.srank))
    bound = torch.tensor(bounds, dtype=torch.float64)[:, None].expand(X.shape[:2])
    return Sides(_jacobian_norms(mlps, X), bound)


def gradient_bounds(
    sigma: Tensor, link: Tensor, local: Tensor, gamma: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """log10 of the right sides of Thms 4.8, (L, N), and 4.9, (N,), and the a's of 4.8, (L, N).

    sigma: (L, N), ‖J(ℓ)‖₂. link: (L, N), |cos| of J(ℓ)'s top left singular vector with v(ℓ+1), or with ∂L/∂h(L) for ℓ = L.
    local: the same of ∂h(i)/∂v instead of J(i). gamma: ‖∂h(i)/∂v‖₂. grad: (N,), ‖∂L/∂h(L)‖.
    4.8: aγ(aM)^{L−i}‖∂L/∂h(L)‖, M the smallest sigma above block i, a the smallest of local(i) and the links above i.
    4.9: C((aM)^{2L} − 1)/((aM)² − 1), C = (aγ‖∂L/∂h(L)‖)², with the smallest a, γ and M of all blocks.

    Neither holds as stated for L ≥ 2 (tests/test_theory.py): like Thm 4.2 they take alignment with the next factor for
    alignment with the whole product. Both do for rank-one J, and 4.8 for the last block.
    """
    L = len(sigma)

    def above(x: Tensor) -> Tensor:
        """The smallest of x(i + 1) … x(L); 1 for the last block."""
        return torch.cat([x[1:].flip(0).cummin(0).values.flip(0), torch.ones_like(x[:1])])

    def power(x: Tensor, n: Tensor) -> Tensor:
        """n log x, also for x = 0 and n = 0."""
        return torch.where(n > 0, n * x, 0.0)

    n = torch.arange(L, dtype=sigma.dtype)[:, None]
    a, M, gamma, grad = torch.minimum(local, above(link)), above(sigma).log10(), gamma.log10(), grad.log10()
    log_a = a.log10()
    each = log_a + gamma + power(log_a + M, L - 1 - n) + grad
    worst = log_a.amin(0)
    terms = power(2 * (worst + M[0]), n)  # (aM)^{2n}; their sum is the quotient, also at aM = 1
    total = 2 * (worst + gamma.amin(0) + grad) + (terms * math.log(10)).logsumexp(0) / math.log(10)
    return each, total, a


class GradientSides(NamedTuple):
    """Thms 4.8 (each, (L, N)) and 4.9 (total, (N,)), all sides as log10.

    a: (L, N), the a of 4.8. flagged: (L, N), the singular vectors of J(ℓ) are `ill_conditioned`.
    """

    each: Sides
    total: Sides
    a: Tensor
    flagged: Tensor


@torch.no_grad()
def gradient_norms(blocks: Sequence[nn.Module], seen: Pass) -> GradientSides:
    """Thm 4.8: ‖∂L/∂v‖ ≥ aγ(aM)^{L−i}‖∂L/∂h(L)‖; Thm 4.9: Σ_i ‖∂L/∂W(i)‖_F² ≥ C((aM)^{2L} − 1)/((aM)² − 1).

    Our reading, the paper's B.2 not being at hand: v = W(i) = W_down of block i, h(i) = H(i) of one sequence, L its own mean
    loss. The local Jacobian ∂vec h(i)/∂vec W_down is activations ⊗ I: γ = ‖activations‖₂, and its top left singular
    vectors are u ⊗ (any vector of R^d), u the activations' own; `local` is |cos| with the nearest of them. See
    `gradient_bounds`. All is NaN when a block's output or the gradient is not finite.
    """
    L, N = seen.h.shape[:2]
    if not seen.dh.isfinite().all():  # as it is after a block that is not
        nan = torch.full((L, N), math.nan, dtype=torch.float64)
        return GradientSides(Sides(nan, nan), Sides(nan[0], nan[0]), nan, torch.ones(L, N, dtype=torch.bool))
    top = _Linearised(list(blocks), list(seen.h)).triples()
    u, v = (_exact(x).view(seen.h.shape) for x in (top.u, top.v))
    dh, act = _exact(seen.dh), _exact(seen.act)
    grad = dh[-1].flatten(1).norm(dim=1)
    met = torch.cat([v[1:], dh[-1:] / grad[:, None, None]])  # by the gradient, before it passes block ℓ
    link = (u * met).sum((-2, -1)).abs()
    U, S, _ = torch.linalg.svd(act, full_matrices=False)
    local = (U[..., :1].mT @ met).flatten(2).norm(dim=-1)
    sigma, gamma = _exact(top.sigma).view(L, N), S[..., 0]
    bound, total_bound, a = gradient_bounds(sigma, link, local, gamma, grad)
    norms = (dh.mT @ act).flatten(2).norm(dim=-1)
    each, total = Sides(norms.log10(), bound), Sides(norms.square().sum(0).log10(), total_bound)
    return GradientSides(each, total, a, ill_conditioned(top.ratio, top.residual).view(L, N).cpu())


class Ranks(NamedTuple):
    """Of matrices (..., m, n). rank: how many s_i > s₁ · max(m, n) · ε, ε of the dtype. srank: NaN for a zero matrix."""

    rank: Tensor
    srank: Tensor


def ranks(X: Tensor) -> Ranks:
    s = _singular_values(X)
    rank = (s > s[..., :1] * max(X.shape[-2:]) * torch.finfo(X.dtype).eps).sum(-1).double()
    return Ranks(torch.where(s[..., 0].isnan(), math.nan, rank), (s / s[..., :1]).square().sum(-1))


def attention_ranks(seen: Pass) -> dict[str, Ranks]:
    """Thm 4.10, hidden and co-hidden states of rank ≤ r give attention gradients of rank ≤ r: {name: (L,) each}.

    "hidden" is H entering the attention, "cohidden" ∂L/∂Y of its output, both (N·T, d), all sequences stacked; then the
    four gradients by role. Each of them needs one of the two conditions: ∂L/∂W_Q = Hᵀ∂L/∂Q, and W_K and W_V likewise, has
    rank ≤ rank H whatever ∂L/∂Y; ∂L/∂W_O = (heads' outputs)ᵀ∂L/∂Y has rank ≤ rank ∂L/∂Y whatever H. The other condition
    alone gives W_V and W_O rank ≤ heads · r, W_Q and W_K nothing (the softmax's Jacobian is a Hadamard product).
    The theorem is about ranks: *stable* ranks are not inherited (tests/test_theory.py: two factors of 1.1, their product
    of full stable rank). And layer norm keeps both ranks ≤ d − 1 anyway: H forwards, ∂L/∂Y backwards.
    """
    found = {"hidden": ranks(seen.H.flatten(1, 2)), "cohidden": ranks(seen.dY.flatten(1, 2))}
    for role in ATTENTION:
        found[role] = ranks(torch.stack([G for n, G in seen.grads.items() if role_of(n) == role]))
    return found


class Drift(NamedTuple):
    """Thm 4.12 for matrices (..., m, n), one value each; NaN for a zero matrix or gradient.

    holds: 1 where the condition does, else 0. share: of the i > 1 for which it does. positive: of the i with Cov_i > 0, the
    paper's premise for all. top: η Cov₁ / s₁, relative change of s₁. eta: η. predicted: η d srank/dη. observed: the
    change of srank by W ← W − ηG.
    """

    holds: Tensor
    share: Tensor
    positive: Tensor
    top: Tensor
    eta: Tensor
    predicted: Tensor
    observed: Tensor


def stable_rank_drift(W: Tensor, G: Tensor) -> Drift:
    """Thm 4.12: a gradient step W ← W − ηG lowers srank(W) when Cov₁/Cov_i > s₁/s_i for all i > 1. W, G: (..., m, n).

    Cov_i = −u_iᵀGv_i = ds_i/dη: minus the covariance (not centred) of the inputs along v_i with the output gradients along
    u_i, positive when these are "negatively correlated". The condition is read as Cov₁ > 0 and, for every i > 1, Cov_i ≤ 0
    (s_i shrinks; the quotient would have the wrong sign) or Cov₁ s_i > Cov_i s₁: s₁ grows, and in proportion fastest. With
    all Cov_i < 0 the inequality taken literally says the opposite. To first order
        d srank/dη = 2 Σ_{i>1} (s_i/s₁)² (Cov_i/s_i − Cov₁/s₁),
    so the condition is sufficient and far from necessary: it counts the smallest s_i like the largest, the sum hardly
    counts them at all. The step is of ‖ηG‖_F = 10⁻³ ‖W‖_F.
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


def flat(model: nn.Module, tokens: Tensor, targets: Tensor) -> dict[str, float]:
    """All of it on tokens and targets (N, T), as {"<theorem>/<name>[/<layer>]": number}.

    4.4: error, the largest relative one. 4.5, 4.6: measured and bound of each layer, means over sequences (gamma the
    smallest, chi the largest); holds, share of layers and sequences; looseness, mean of log10 (bound / measured); vacuous,
    share with χ = 1. 4.8, 4.9: log10 of both sides, means over sequences; holds; a, the smallest; ill_conditioned, share.
    4.10: stable ranks of hidden and co-hidden states of each layer; rank_…, largest of all layers; holds, share of gradients
    whose rank is at most the larger of those two; vacuous, share of layers where that is d − 1 or d; srank_gradient, mean;
    srank_holds, what holds would be for stable ranks. 4.12: holds, share (also of each layer), positive: means of `Drift`'s;
    grows, share of matrices with Cov₁ > 0; falls, with a stable rank that falls; agrees, where it does as predicted.
    """
    seen = observe(model, tokens, targets)
    matrices = {n: p for n, p in model.blocks.named_parameters() if p.ndim == 2}
    out = {}

    def layers(name: str, values: Tensor):
        out.update({f"{name}/{i}": v for i, v in enumerate(values.tolist())})

    def share(true: Tensor, *of: Tensor) -> float:
        """Of the entries where none of `of` is NaN."""
        return true[~sum(of).isnan()].double().mean().item()

    sides = weight_norms(matrices)
    out["4.4/error"] = (sides.measured / sides.bound - 1).abs().nan_to_num(0).max().item()

    attention = attention_norms([b.attn for b in model.blocks], seen.H)
    for key, (measured, bound) in (
        ("4.5", attention[:2]), ("4.6", mlp_norms([b.mlp for b in model.blocks], seen.X)),
    ):  # fmt: skip
        layers(f"{key}/measured", measured.mean(1))
        layers(f"{key}/bound", bound.mean(1))
        out[f"{key}/holds"] = share(measured <= bound, measured, bound)
        out[f"{key}/looseness"] = (bound / measured).log10().nanmean().item()
    layers("4.5/gamma", attention.gamma.amin(1))
    layers("4.5/chi", attention.chi.amax(1))
    out["4.5/vacuous"] = share(attention.chi == 1, attention.chi)

    gradients = gradient_norms(model.blocks, seen)
    for key, (measured, bound) in (("4.8", gradients.each), ("4.9", gradients.total)):
        out[f"{key}/holds"] = share(measured >= bound, measured, bound)
    layers("4.8/log10_measured", gradients.each.measured.mean(1))
    layers("4.8/log10_bound", gradients.each.bound.mean(1))
    out["4.8/a"] = gradients.a.min().item()
    out["4.8/ill_conditioned"] = gradients.flagged.double().mean().item()
    out["4.9/log10_measured"] = gradients.total.measured.mean().item()
    out["4.9/log10_bound"] = gradients.total.bound.mean().item()

    found = attention_ranks(seen)
    for name in ("hidden", "cohidden"):
        layers(f"4.10/srank_{name}", found[name].srank)
        out[f"4.10/rank_{name}"] = found[name].rank.max().item()
    r = Ranks(*map(torch.maximum, found["hidden"], found["cohidden"]))
    of = Ranks(*map(torch.stack, zip(*(found[role] for role in ATTENTION), strict=True)))  # (4, L)
    out |= {
        "4.10/rank_gradient": of.rank.max().item(),
        "4.10/holds": share(of.rank <= r.rank, of.rank, r.rank),
        "4.10/vacuous": share(r.rank >= seen.H.shape[-1] - 1, r.rank),
        "4.10/srank_gradient": of.srank.nanmean().item(),
        "4.10/srank_holds": share(of.srank <= r.srank, of.srank, r.srank),
    }

    drifts = []
    for role in dict.fromkeys(map(role_of, matrices)):
        names = [n for n in matrices if role_of(n) == role]
        drifts.append(
            stable_rank_drift(torch.stack([matrices[n] for n in names]), torch.stack([seen.grads[n] for n in names]))
        )
    drift = Drift(*map(torch.stack, zip(*drifts, strict=True)))  # (6 roles, L)
    layers("4.12/share", drift.share.nanmean(0))
    for name in ("holds", "share", "positive"):
        out[f"4.12/{name}"] = getattr(drift, name).nanmean().item()
    for name, true in (
        ("grows", drift.top > 0), ("falls", drift.observed < 0), ("agrees", (drift.predicted < 0) == (drift.observed < 0)),
    ):  # fmt: skip
        out[f"4.12/{name}"] = share(true, drift.observed)
    return out
