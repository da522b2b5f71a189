import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import mup
from model import GPT, MLP, Attention
from stability import theory
from tests.conftest import small

eye = torch.eye


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def a_model(**overrides):
    """A model and its tokens and targets. W_Q is random, because with W_Q = 0 the attention's logits have no effect."""
    cfg = small(**{"n_layer": 3, **overrides})
    model = GPT(cfg)
    mup.init_weights(model, cfg)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.W_Q.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(7))
    tokens = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(0))
    return model, tokens[:, :-1], tokens[:, 1:]


def dense_norm(f, z):
    """‖∂f/∂z‖₂ of one sequence (T, d)."""
    with sdpa_kernel(SDPBackend.MATH):
        J = torch.autograd.functional.jacobian(lambda z: f(z[None])[0], z)
    return torch.linalg.matrix_norm(J.reshape(z.numel(), -1), 2).item()


def test_theorem_4_4():
    sides = theory.weight_norms({
        "square": randn(6, 6), "tall": randn(9, 4), "rank one": torch.ones(3, 5), "zero": torch.zeros(3, 3),
        "nan": torch.full((3, 3), math.nan),
    })  # fmt: skip
    torch.testing.assert_close(sides.measured[:3], sides.bound[:3], rtol=1e-12, atol=0)
    assert sides.measured[3] == 0
    assert sides.bound[3:].isnan().all()
    assert sides.measured[4].isnan()


def attention(heads, d, seed, sharpness):
    attn = Attention(small(d_model=d, n_head=heads)).double()
    with torch.no_grad():
        for i, role in enumerate(theory.ATTENTION):
            getattr(attn, role).weight.copy_(randn(d, d, seed=10 * seed + i) * (sharpness if role == "W_Q" else 1))
    return attn


def right_side_of_4_5(attn, H):
    """The right side of Thm 4.5 and χ for one sequence H (T, d), computed row by row."""
    (T, d), k = H.shape, H.shape[1] // attn.n_head
    W = {role: getattr(attn, role).weight.detach() for role in theory.ATTENTION}
    gamma, A = math.inf, []
    for head in torch.arange(d).split(k):
        A.append(torch.zeros(T, T).double())
        for t in range(T):
            logits = (H[: t + 1] @ W["W_K"][head].mT) @ (W["W_Q"][head] @ H[t]) / math.sqrt(k)
            A[-1][t, : t + 1] = logits.softmax(0)
            if t:
                second, first = logits.sort().values[-2:].tolist()
                gamma = min(gamma, first - second)
    norm = {role: torch.linalg.matrix_norm(w, 2) for role, w in W.items()}
    chi = min((T - 1) * math.exp(-gamma), 1)
    logits = 4 * chi / math.sqrt(k) * norm["W_Q"] * norm["W_K"] * torch.linalg.matrix_norm(H, 2) ** 2
    return float(norm["W_V"] * norm["W_O"] * (max(torch.linalg.matrix_norm(a, 2) for a in A) + logits)), chi


def test_theorem_4_5_against_dense_jacobians():
    seen = {True: [], False: []}  # {whether χ = 1: [measured / bound]}
    for trial in range(60):
        heads, T = (1, 2, 4)[trial % 3], 2 + trial % 4
        attn = attention(heads, 8, trial, sharpness=(0, 0.01, 1, 30, 1000)[trial % 5])
        H = randn(2, T, 8, seed=trial)
        got = theory.attention_norms([attn], H[None])
        for n in range(2):
            measured = dense_norm(attn, H[n])
            assert got.measured[0, n] == pytest.approx(measured, rel=1e-3)
            assert measured <= got.bound[0, n]
            assert (got.bound[0, n], got.chi[0, n]) == pytest.approx(right_side_of_4_5(attn, H[n]), rel=1e-9)
            seen[got.chi[0, n].item() == 1].append(measured / got.bound[0, n].item())
        P = torch.softmax(attn.logits(H), -1)  # step (2) of the proof: ‖diag p − ppᵀ‖ ≤ 2χ
        spread = torch.linalg.matrix_norm(torch.diag_embed(P) - P[..., None] * P[..., None, :], 2).amax((1, 2))
        assert (spread <= 2 * got.chi[0] + 1e-12).all()
        assert (spread <= 0.5 + 1e-12).all()
    assert min(map(len, seen.values())) > 10
    assert max(seen[False]) > 0.3  # sharp attention, where only ‖W_V‖‖W_O‖‖A‖ is left


def test_theorem_4_5_is_nearly_reached():
    """W_Q = 0 and W_V = W_O = 1: Y = AH, so that ‖∂Y/∂H‖ = ‖A‖, the bound itself."""
    attn = attention(2, 8, 0, sharpness=0)
    with torch.no_grad():
        for W in (attn.W_V, attn.W_O):
            W.weight.copy_(eye(8))
    got = theory.attention_norms([attn], randn(1, 1, 5, 8))
    assert (got.gamma, got.chi) == (0, 1)
    torch.testing.assert_close(got.measured, got.bound, rtol=1e-4, atol=0)
    A = torch.tril(torch.ones(5, 5, dtype=torch.float64)) / torch.arange(1, 6)[:, None]
    torch.testing.assert_close(got.bound[0, 0], torch.linalg.matrix_norm(A, 2))


def test_lipschitz_constants():
    x = torch.linspace(-8, 8, 1_600_001, dtype=torch.float64, requires_grad=True)
    phis = {"gelu": F.gelu, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"), "silu": F.silu}
    assert phis.keys() == theory.LIPSCHITZ.keys()
    for name, phi in phis.items():
        (slope,) = torch.autograd.grad(phi(x).sum(), x)
        assert slope.abs().max().item() <= theory.LIPSCHITZ[name] <= slope.abs().max().item() + 1e-5
    assert theory.LIPSCHITZ["gelu"] < theory.LIPSCHITZ["gelu_tanh"] < 1.13  # the paper's two are bounds
    assert theory.LIPSCHITZ["silu"] < 1.1


def test_theorem_4_6_against_dense_jacobians():
    for trial in range(10):
        mlp = MLP(small(d_model=6, d_ff=9)).double()
        with torch.no_grad():
            mlp.W_up.weight.copy_(randn(9, 6, seed=trial))
            mlp.W_down.weight.copy_(randn(6, 9, seed=100 + trial))
        X = randn(1, 2, 4, 6, seed=200 + trial)
        got = theory.mlp_norms([mlp], X)
        for n in range(2):
            assert got.measured[0, n] == pytest.approx(dense_norm(mlp, X[0, n]), rel=5e-3)
        assert (got.measured <= got.bound).all()
        norms = [torch.linalg.matrix_norm(W.weight, 2) for W in (mlp.W_up, mlp.W_down)]
        torch.testing.assert_close(got.bound[0, 0], theory.LIPSCHITZ["gelu"] * norms[0] * norms[1], check_dtype=False)


def test_theorem_4_6_needs_its_constant():
    mlp = MLP(small(d_model=1, n_head=1, d_ff=1)).double()
    with torch.no_grad():
        mlp.W_up.weight.fill_(1)
        mlp.W_down.weight.fill_(1)
    got = theory.mlp_norms([mlp], torch.full((1, 1, 1, 1), math.sqrt(2), dtype=torch.float64))
    torch.testing.assert_close(got.measured, got.bound, rtol=1e-5, atol=0)


def test_theorems_4_8_and_4_9_do_not_hold_as_stated():
    """Two tokens, d = 1, two blocks, W_down 1 × 1, every alignment a = 1/√2, M = γ = ‖∂ℒ/∂h(2)‖ = 1.

    The activations of block 1 are (1, 1)/√2. J(2) = diag(1, s) has the top vector e1, as s is just below 1. The
    gradient is ∂ℒ/∂h(2) = (1, −1)/√2. Both sides are aligned with e1, but what J(2) carries along e2 cancels the rest.
    Thm 4.8 promises a² = ½ for block 1, and Thm 4.9 promises a² + a⁴ = ¾.
    """
    s, a = 1 - 1e-6, 1 / math.sqrt(2)
    act1, act2, g = torch.tensor([[a, a], [1, 0], [a, -a]]).double()
    J2 = torch.diag(torch.tensor([1, s]).double())
    actual = [float(g @ J2 @ act1), float(g @ act2)]  # ∂L/∂W_down of blocks 1 and 2
    ones = torch.ones(2, 1, dtype=torch.float64)
    each, total, _ = theory.gradient_bounds(ones, a * ones, a * ones, ones, ones[0])
    assert (10**each).flatten().tolist() == pytest.approx([0.5, a])
    assert abs(actual[0]) < 1e-6  # 4.8 fails for block 1
    assert actual[1] == pytest.approx(a)  # and is exact for the last
    assert 10 ** total.item() == pytest.approx(0.75)
    assert sum(x * x for x in actual) == pytest.approx(0.5)  # 4.9 fails


def test_theorems_4_8_and_4_9_hold_for_rank_one_jacobians():
    for trial in range(50):
        L, m = 1 + trial % 5, 6
        u, v = F.normalize(randn(2, L, m, seed=trial), dim=-1)
        sigma = randn(L, seed=trial + 100).exp()
        P = randn(L, m, 4, seed=trial + 200)  # local Jacobians, of any rank
        g = randn(m, seed=trial + 300)
        met = torch.cat([v[1:], g[None] / g.norm()])
        U, S, _ = torch.linalg.svd(P)
        link, local = (u * met).sum(-1).abs(), (U[:, :, 0] * met).sum(-1).abs()
        each, total, _ = theory.gradient_bounds(*(x[:, None] for x in (sigma, link, local, S[:, 0])), g.norm()[None])
        norms = []
        for i in reversed(range(L)):
            norms.insert(0, (P[i].mT @ g).norm().item())
            g = sigma[i] * v[i] * (u[i] @ g)
        assert all(norm >= 10**bound * (1 - 1e-9) for norm, bound in zip(norms, each[:, 0].tolist(), strict=True))
        assert sum(x * x for x in norms) >= 10 ** total.item() * (1 - 1e-9)


def test_theorem_4_9_in_logarithms():
    def total(a, M, L):
        ones = torch.ones(L, 1, dtype=torch.float64)
        return theory.gradient_bounds(M * ones, a * ones, a * ones, 2 * ones, 3 * ones[0])[1].item()

    assert 10 ** total(0.5, 1.2, 6) == pytest.approx((0.5 * 2 * 3) ** 2 * (0.6**12 - 1) / (0.6**2 - 1))
    assert 10 ** total(0.5, 2, 6) == pytest.approx((0.5 * 2 * 3) ** 2 * 6)  # aM = 1
    assert total(0.5, 1e200, 24) == pytest.approx(2 * math.log10(3) + 46 * math.log10(5e199))
    assert total(1e-200, 1, 24) == pytest.approx(2 * math.log10(6e-200))
    assert total(0, 1, 24) == -math.inf
    assert 10 ** total(0.5, 7, 1) == pytest.approx(9)  # one block has no Jacobian above it


def test_gradient_norms_are_those_of_each_sequence():
    model, x, y = a_model()
    seen = theory.observe(model, x, y)
    got = theory.gradient_norms(model.blocks, seen)
    for n in range(2):
        loss = model(x[n : n + 1], y[n : n + 1])
        weights = [block.mlp.W_down.weight for block in model.blocks]
        for i, G in enumerate(torch.autograd.grad(loss, weights)):
            assert 10 ** got.each.measured[i, n].item() == pytest.approx(G.norm().item(), rel=1e-4)
    total = (2 * got.each.measured * math.log(10)).logsumexp(0) / math.log(10)
    torch.testing.assert_close(got.total.measured, total)


def test_theorem_4_8_against_dense_jacobians():
    model, x, y = a_model(seed=2)  # well-separated singular values
    seen = theory.observe(model, x, y)
    got = theory.gradient_norms(model.blocks, seen)
    assert not got.flagged.any()
    with sdpa_kernel(SDPBackend.MATH):
        J = [
            torch.autograd.functional.jacobian(lambda z, b=b: b(z[None])[0], h).reshape(128, 128)
            for b, h in zip(model.blocks, seen.stream[:, 0], strict=True)
        ]
    U, S, Vh = torch.linalg.svd(torch.stack(J).double())
    grad = seen.stream_grad[-1, 0].flatten().double()
    met = torch.stack([Vh[1, 0], Vh[2, 0], grad / grad.norm()])
    links = (U[:, :, 0] * met).sum(-1).abs()
    local = []
    for i in range(3):
        u = torch.linalg.svd(seen.act[i, 0].double())[0][:, 0]
        # the top left singular vectors of activations ⊗ 1 are degenerate: project on all of them
        local.append(torch.kron(u[:, None], eye(16).double()).mT.mv(met[i]).norm())
    a = torch.stack([min(local[0], links[1], links[2]), min(local[1], links[2]), local[2]])
    torch.testing.assert_close(got.a[:, 0], a, rtol=0, atol=5e-3)
    gamma = torch.linalg.matrix_norm(seen.act[:, 0].double(), 2)
    M = torch.stack([S[1:, 0].min(), S[2, 0], torch.ones(()).double()])
    bound = a * gamma * (a * M) ** torch.tensor([2, 1, 0]) * grad.norm()
    torch.testing.assert_close(got.each.bound[:, 0], bound.log10(), rtol=0, atol=0.02)
    assert (got.each.measured >= got.each.bound).all()


def low_rank(m, n, r, seed):
    return randn(m, r, seed=seed) @ randn(r, n, seed=seed + 1)


def gradient_ranks(heads, H, dY):
    attn = attention(heads, 12, 3, sharpness=0.1)
    found = torch.autograd.grad(attn(H[None]), [getattr(attn, role).weight for role in theory.ATTENTION], dY[None])
    return [int(theory.ranks(G).rank) for G in found]


def test_theorem_4_10_and_which_condition_each_gradient_needs():
    full, r = randn(20, 12, seed=50), 2
    H, dY = low_rank(20, 12, r, 60), low_rank(20, 12, r, 70)
    for heads in (1, 3):
        assert max(gradient_ranks(heads, H, dY)) <= r  # W_Q, W_K, W_V, W_O
        assert min(gradient_ranks(heads, full, full)) > 3 * r
        hidden_only, cohidden_only = gradient_ranks(heads, H, full), gradient_ranks(heads, full, dY)
        assert max(hidden_only[:3]) <= r
        assert hidden_only[3] == heads * r
        assert min(cohidden_only[:2]) > 3 * r
        assert cohidden_only[2:] == [heads * r, r]


def test_stable_ranks_are_not_inherited():
    H = torch.diag(4.0 ** torch.arange(6))
    dQ = torch.diag(4.0 ** -torch.arange(6))
    assert theory.ranks(H).srank < 1.1
    assert theory.ranks(dQ).srank < 1.1
    assert theory.ranks(H.mT @ dQ).srank == pytest.approx(6)


def test_ranks():
    stack = torch.stack([eye(4, 6), torch.ones(4, 6), torch.zeros(4, 6), torch.full((4, 6), math.nan)])
    got = theory.ranks(stack)
    assert got.rank[:3].tolist() == [4, 1, 0]
    assert got.srank[:2].tolist() == pytest.approx([4, 1])
    assert got.rank[3].isnan()
    assert got.srank[2:].isnan().all()


def test_layer_norm_takes_one_from_both_ranks():
    model = a_model(block_size=16)[0]
    tokens = torch.randint(256, (4, 17), generator=torch.Generator().manual_seed(1))
    found = theory.attention_ranks(theory.observe(model, tokens[:, :-1], tokens[:, 1:]))
    assert all((found[name].rank == 15).all() for name in ("hidden", "cohidden"))  # d = 16, 64 tokens
    assert all((found[role].rank <= 15).all() for role in theory.ATTENTION)


def matrix_and_gradient(s, rates, seed):
    """W with singular values s and a G for which Cov_i = s_i · rates_i; elsewhere G is noise."""
    n = len(s)
    U, V = (torch.linalg.qr(randn(rows, n, seed=seed))[0] for rows in (n + 2, n))
    G = randn(n, n, seed=seed + 1)
    G.diagonal().copy_(-s * rates)
    return U * s @ V.mT, U @ G @ V.mT


def test_theorem_4_12_condition_is_sufficient():
    for seed in range(50):
        s = torch.linspace(3, 0.1, 8, dtype=torch.float64)
        rates = 0.8 * randn(8, seed=seed).clamp(-1, 1)
        rates[0] = 1  # the top one grows fastest in proportion; some shrink
        W, G = matrix_and_gradient(s, rates, 10 * seed)
        got = theory.stable_rank_drift(W, G)
        assert (got.holds, got.share) == (1, 1)
        assert got.predicted < 0
        assert got.observed < 0
        assert got.observed == pytest.approx(got.predicted.item(), rel=0.05)
        assert got.positive == (rates > 0).double().mean()
        assert got.growth == pytest.approx(got.eta.item(), rel=1e-6)


def test_theorem_4_12_condition_is_not_necessary():
    """Only the last singular value outgrows the first: the condition fails, but the stable rank still falls."""
    s, rates = torch.tensor([3, 2, 1, 1e-3]).double(), torch.tensor([1, 0, 0, 2]).double()
    got = theory.stable_rank_drift(*matrix_and_gradient(s, rates, 0))
    assert got.holds == 0
    assert got.share == pytest.approx(2 / 3)
    assert got.observed < 0


def test_theorem_4_12_needs_its_negative_correlation():
    """With Cov_i < 0 throughout, Cov₁/Cov_i > s₁/s_i says that s₁ shrinks fastest: the stable rank rises."""
    s, rates = torch.tensor([3, 2, 1]).double(), -torch.tensor([2, 1, 1]).double()
    cov = s * rates
    assert (cov[0] / cov[1:] > s[0] / s[1:]).all()
    got = theory.stable_rank_drift(*matrix_and_gradient(s, rates, 0))
    assert (got.holds, got.positive) == (0, 0)
    assert got.observed > 0


def test_drift_where_it_is_not_defined():
    W = torch.stack([randn(4, 3), torch.zeros(4, 3).double(), randn(4, 3), torch.full((4, 3), math.nan).double()])
    G = torch.stack([randn(4, 3), randn(4, 3), torch.zeros(4, 3).double(), randn(4, 3)])
    got = theory.stable_rank_drift(W, G)
    assert all(value[0].isfinite() and value[1:].isnan().all() for value in got)


def test_observe_is_one_backward_pass_and_changes_nothing():
    model, x, y = a_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    seen = theory.observe(model, x, y)
    theory.all_theorems(model, x, y)
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any(module._forward_hooks for module in model.modules())
    model(x, y).backward()
    for name, G in seen.grads.items():
        torch.testing.assert_close(G, dict(model.blocks.named_parameters())[name].grad)
    torch.testing.assert_close(seen.stream[0], model.embed(x))
    torch.testing.assert_close(seen.stream[1], model.blocks[0](seen.stream[0]))
    torch.testing.assert_close(seen.attn_in[1], model.blocks[1].attn_norm(seen.stream[1]))
    G = seen.stream_grad[-1].mT @ seen.act[-1]  # per sequence; the batch's gradient is their mean
    torch.testing.assert_close(G.mean(0), seen.grads["2.mlp.W_down.weight"])
    with pytest.raises(TypeError, match="OptimizedModule"):
        theory.observe(torch.compile(model), x, y)


def test_flat():
    model, x, y = a_model()
    out = theory.all_theorems(model, x, y)
    assert all(math.isfinite(value) for value in out.values())
    assert all(out[f"{theorem}/holds"] == 1 for theorem in ("4.5", "4.6", "4.8", "4.9", "4.10"))
    assert out["4.4/error"] < 1e-12
    assert out["4.12/agrees"] == 1
    layers = {key.rpartition("/")[0] for key in out if key.count("/") == 2}
    assert all(f"{name}/{i}" in out for name in layers for i in range(3))
    assert {"4.5/measured", "4.5/bound", "4.8/log10_bound", "4.10/srank_hidden", "4.12/share"} <= layers
    assert len(layers) <= 12


def test_flat_at_initialisation_where_w_q_is_zero():
    cfg = small()
    model = GPT(cfg)
    mup.init_weights(model, cfg)
    tokens = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(0))
    out = theory.all_theorems(model, tokens[:, :-1], tokens[:, 1:])
    assert all(math.isfinite(value) for value in out.values())
    assert out["4.5/gamma/0"] == 0
    seen = theory.observe(model, tokens[:, :-1], tokens[:, 1:])
    assert theory.stable_rank_drift(model.blocks[0].attn.W_Q.weight, seen.grads["0.attn.W_Q.weight"]).holds.isnan()
    assert (theory.attention_ranks(seen)["W_K"].rank == 0).all()  # with W_Q = 0 no gradient reaches W_K


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_flat_with_a_weight_that_is_not_finite(value):
    model, x, y = a_model()
    before = theory.all_theorems(model, x, y)
    with torch.no_grad():
        model.blocks[1].mlp.W_up.weight[0, 0] = value
    out = theory.all_theorems(model, x, y)
    assert out.keys() == before.keys()
    for theorem, measured in (("4.5", 2), ("4.6", 1)):  # blocks that still have a finite input and finite weights
        for i in range(3):
            same = out[f"{theorem}/measured/{i}"] == pytest.approx(before[f"{theorem}/measured/{i}"], rel=1e-3)
            assert same if i < measured else math.isnan(out[f"{theorem}/measured/{i}"])
    assert math.isnan(out["4.6/bound/1"])
    assert out["4.4/error"] < 1e-12
    assert all(math.isnan(out[key]) for key in ("4.8/holds", "4.9/log10_measured", "4.10/holds", "4.12/falls"))
