import copy
import itertools
import math
import weakref
from functools import partial

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel

import mup
from config import Config
from model import GPT
from stability import probes
from stability.metrics import forward_pass
from stability.probes import (
    geometric_mean,
    ill_conditioned,
    jacobians,
    logit_bound,
    norms,
    product_bounds,
    spectra,
    top_triples,
)
from tests.conftest import noisy_model, small


def test_spectra_are_their_definitions():
    g = torch.Generator().manual_seed(0)
    named = {
        f"W{i}": torch.randn(shape, generator=g) for i, shape in enumerate([(8, 8), (8, 8), (32, 8), (8, 32), (1, 5)])
    }
    named["low"] = torch.randn(8, 2, generator=g) @ torch.randn(2, 8, generator=g)
    for name, got in spectra(named).items():
        s = torch.linalg.svdvals(named[name].double())
        assert got.srank == pytest.approx(float((s**2).sum() / s[0] ** 2), rel=1e-9)
        assert got.sigma1 == pytest.approx(float(s[0]), rel=1e-9)
        assert got.fro == pytest.approx(float(named[name].double().norm()), rel=1e-9)
        assert got.sigma1 == pytest.approx(got.fro / math.sqrt(got.srank), rel=1e-9)  # Thm 4.4
    assert list(spectra(named)) == list(named)


def test_known_values_and_undefined_ones():
    got = spectra({
        "identity": torch.eye(6), "rank one": torch.ones(4, 6), "zero": torch.zeros(3, 3),
        "nan": torch.full((3, 3), math.nan), "experts": torch.stack([torch.eye(4), torch.ones(4, 4)]),
    })  # fmt: skip
    assert got["identity"] == pytest.approx((6, 1, math.sqrt(6)))
    assert got["rank one"] == pytest.approx((1, math.sqrt(24), math.sqrt(24)))
    assert got["experts"] == pytest.approx((2.5, 2.5, 3))
    assert math.isnan(got["zero"].srank)
    assert got["zero"][1:] == (0, 0)
    assert all(math.isnan(value) for value in got["nan"])


def test_spectra_of_many_matrices_are_computed_a_few_at_a_time(monkeypatch):
    named = {f"W{i}": torch.randn(8, 8, generator=torch.Generator().manual_seed(i)) for i in range(5)}
    expected, eigvalsh, stacks = spectra(named), torch.linalg.eigvalsh, []
    monkeypatch.setattr("stability.probes.STACK_ELEMENTS", 2 * 64)
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda gram: stacks.append(len(gram)) or eigvalsh(gram))
    assert spectra(named) == expected
    assert stacks == [2, 2, 1]


def test_geometric_mean():
    assert geometric_mean([1, 4, 16]) == pytest.approx(4)
    assert geometric_mean([math.nan, 0.0, 3.0]) == pytest.approx(3)
    assert math.isnan(geometric_mean([]))


def random_maps(n_maps, m, n, seed=0):
    return torch.randn(n_maps, m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lanczos(J, group=1, **kwargs):
    """top_triples of the matrices J (N, m, n), in groups."""
    J = J.view(-1, group, *J.shape[1:])
    start = torch.randn(*J.shape[:2], J.shape[-1], generator=torch.Generator().manual_seed(1), dtype=J.dtype)
    return top_triples(
        lambda v, live: (J[live] @ v[..., None])[..., 0],
        lambda u, live: (J.mT[live] @ u[..., None])[..., 0],
        start,
        **kwargs,
    )


@pytest.mark.parametrize("shape", [(12, 12), (20, 7), (7, 20)])
def test_lanczos_finds_the_top_triple(shape):
    J = random_maps(5, *shape)
    top = lanczos(J, steps=20, tolerance=0)
    U, S, Vh = torch.linalg.svd(J)
    torch.testing.assert_close(top.sigma, S[:, 0], rtol=1e-9, atol=0)
    torch.testing.assert_close(top.ratio, S[:, 1] / S[:, 0], rtol=1e-7, atol=0)
    assert ((top.u * U[:, :, 0]).sum(-1).abs() > 1 - 1e-9).all()
    assert ((top.v * Vh[:, 0]).sum(-1).abs() > 1 - 1e-9).all()
    assert (top.residual < 1e-6).all()


def test_lanczos_residual_tells_that_it_has_not_converged():
    J = random_maps(3, 60, 60)
    top = lanczos(J, steps=4)
    true = (J.mT @ top.u[..., None])[..., 0] - top.sigma[:, None] * top.v
    torch.testing.assert_close(top.residual, true.norm(dim=-1) / top.sigma, rtol=1e-6, atol=0)
    assert (top.residual > 1e-3).all()


def test_lanczos_stops_group_by_group_and_is_right_when_it_does():
    """Maps of very different gaps: each group runs as long as it needs, and a group that stops early is as exact."""
    g = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(12, 80, 80, generator=g, dtype=torch.float64))[0] for _ in range(2))
    S = torch.rand(12, 80, generator=g, dtype=torch.float64).sort(descending=True)[0]
    S[:4, 0], S[4:8, 0] = 5.0, 1.3  # a wide gap, a narrow one, and for the rest a random one: mostly ill-conditioned
    J = (U * S[:, None]) @ V.mT
    products = []
    whole = J.view(6, 2, 80, 80)

    def matvec(v, live):
        products.append(list(live))
        return (whole[live] @ v[..., None])[..., 0]

    start = torch.randn(6, 2, 80, generator=g, dtype=torch.float64)
    top = top_triples(matvec, lambda u, live: (whole.mT[live] @ u[..., None])[..., 0], start, steps=60)
    calls = [sum(group in live for live in products) for group in range(6)]
    assert calls[0] <= 4 < calls[2] < max(calls[4:])
    true = torch.linalg.svd(J)
    assert ((top.sigma / S[:, 0] - 1).abs() < 1e-4).all()
    sure = ~ill_conditioned(top.ratio, top.residual)
    assert sure[:4].all()
    sine = (1 - (top.v * true.Vh[:, 0]).sum(-1) ** 2).clamp_min(0).sqrt()
    assert (sine[sure] < 0.1).all()


def test_a_map_that_is_not_finite_is_nan_and_the_others_are_right():
    J = random_maps(3, 6, 6)
    J[1, 2, 2] = math.inf
    top = lanczos(J, steps=6)
    assert top.sigma[1].isnan()
    assert ill_conditioned(top.ratio, top.residual)[1]
    torch.testing.assert_close(top.sigma[[0, 2]], torch.linalg.svdvals(J[[0, 2]])[:, 0], rtol=1e-4, atol=0)


def test_a_small_gap_is_flagged():
    J = torch.diag_embed(torch.tensor([[1, 0.5, 0.1], [1, 0.995, 0.1]], dtype=torch.float64))
    top = lanczos(J, steps=3)
    assert ill_conditioned(top.ratio, top.residual).tolist() == [False, True]
    assert ill_conditioned(torch.tensor([0.9, 0.9]), torch.tensor([0.009, 0.011])).tolist() == [False, True]


def dense(blocks, x):
    """The layer Jacobians of every block and sequence as matrices (L, B, T·d, T·d)."""
    out = []
    for block in blocks:
        with sdpa_kernel(SDPBackend.MATH):
            each = [
                torch.autograd.functional.jacobian(lambda z, block=block: block(z[None])[0], x[b]).reshape(
                    x[b].numel(), -1
                )
                for b in range(len(x))
            ]
            x = block(x).detach()
        out.append(torch.stack(each))
    return torch.stack(out)


def our_blocks(**options):
    cfg = small(n_layer=3, **options)
    model = GPT(cfg)
    mup.init_weights(model, cfg)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.W_Q.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(7))
    return model.blocks, model.embed(torch.arange(16).view(2, 8)).detach()


def someone_elses_blocks():
    torch.manual_seed(0)
    layers = [torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for _ in range(3)]
    return layers, torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("make", [our_blocks, partial(our_blocks, logit_cap=0.5), someone_elses_blocks])
def test_jacobians_against_dense_ones(make):
    blocks, x = make()
    got = jacobians(blocks, x)
    J = dense(blocks, x)
    U, S, Vh = torch.linalg.svd(J)
    torch.testing.assert_close(got.sigma, S[..., 0].double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(got.ratio, (S[..., 1] / S[..., 0]).double(), rtol=5e-2, atol=0)
    exact = (Vh[1:, :, 0] * U[:-1, :, :, 0]).sum(-1).abs().double()
    assert not got.flagged.all()
    torch.testing.assert_close(got.alignment[~got.flagged], exact[~got.flagged], rtol=0, atol=0.1)
    bad = ill_conditioned(got.ratio, got.residual)
    assert torch.equal(got.flagged, bad[1:] | bad[:-1])
    product = torch.linalg.matrix_norm(J[2] @ J[1] @ J[0], 2).double()
    torch.testing.assert_close(got.product, product, rtol=1e-4, atol=0)
    assert got.errors == ()


def test_jacobians_that_are_not_flagged_are_right_where_lanczos_is_hard(monkeypatch):
    """In NanoGPT-5M's blocks before training σ₂/σ₁ is 0.9 to 0.999, and twelve steps do not always suffice."""
    cfg = Config(vocab_size=256, block_size=64)
    model = GPT(cfg)
    mup.init_weights(model, cfg)
    x = model.embed(torch.arange(128).view(2, 64)).detach()
    got = jacobians(model.blocks, x)
    monkeypatch.setattr("stability.probes.top_triples", partial(top_triples, tolerance=0.0))
    best = jacobians(model.blocks, x, steps=60, seed=5)
    sure = ~ill_conditioned(got.ratio, got.residual)
    assert 0.2 < sure.double().mean() < 0.95
    error = (got.sigma / best.sigma - 1).abs()
    # for one of the 48 Jacobians σ₂ is taken for σ₁, which happens when the two are close
    assert (error[sure] > 1e-4).sum() <= 2
    assert (error[sure] < 1e-2).all()
    assert (error[~sure] > 1e-4).sum() > 1


@pytest.mark.parametrize("make", [our_blocks, someone_elses_blocks])
def test_jacobians_of_single_positions_are_the_diagonal_blocks(make):
    blocks, x = make()
    positions = (0, 3, 7)
    got = jacobians(blocks, x, positions, steps=16)
    L, B, (T, d) = len(blocks), len(x), x.shape[1:]
    J = dense(blocks, x).view(L, B, T, d, T, d)
    J = torch.stack([J[:, :, t, :, t] for t in positions], 2).flatten(1, 2)  # (L, B · P, d, d)
    U, S, Vh = torch.linalg.svd(J)
    torch.testing.assert_close(got.sigma, S[..., 0].double(), rtol=1e-4, atol=0)
    exact = (Vh[1:, :, 0] * U[:-1, :, :, 0]).sum(-1).abs().double()
    torch.testing.assert_close(got.alignment[~got.flagged], exact[~got.flagged], rtol=0, atol=0.1)
    assert got.product.isnan().all()


@pytest.mark.parametrize("make", [our_blocks, someone_elses_blocks])
def test_jacobians_change_nothing(make):
    blocks, x = make()
    blocks = torch.nn.ModuleList(blocks)
    before = {n: p.detach().clone() for n, p in blocks.named_parameters()}
    blocks[1].eval()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    jacobians(blocks, x, steps=4)
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in blocks.named_parameters())
    assert [block.training for block in blocks] == [True, False, True]


def test_dropout_is_off_while_measuring():
    blocks, x = someone_elses_blocks()
    noisy = [torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.5, batch_first=True) for _ in range(3)]
    for mine, other in zip(blocks, noisy, strict=True):
        other.load_state_dict(mine.state_dict())
    torch.testing.assert_close(jacobians(noisy, x).sigma, jacobians(blocks, x).sigma)


def test_a_block_that_is_not_finite_is_named_and_the_rest_measured():
    blocks, x = our_blocks()
    whole = jacobians(blocks, x, steps=30)
    with torch.no_grad():
        blocks[2].mlp.W_up.weight[0, 0] = math.inf
    part = jacobians(blocks, x, steps=30)
    assert part.errors == ("block 2: its mlp.W_up.weight is not finite",)
    torch.testing.assert_close(part.sigma[:2], whole.sigma[:2], rtol=1e-4, atol=0)
    torch.testing.assert_close(part.alignment[:1], whole.alignment[:1], rtol=0, atol=1e-3)
    assert part.sigma[2].isnan().all()
    assert part.alignment[1].isnan().all()
    assert part.product.isnan().all()


@pytest.mark.parametrize("positions", [(), (1, 5)])
def test_a_few_blocks_at_a_time_give_the_same(positions, monkeypatch):
    """Five blocks, two at a time; then one whose output is not finite. Of the linearised blocks only two ever live."""
    model = noisy_model(n_layer=5)
    x = model.embed(torch.arange(16).view(2, 8)).detach()
    whole, alive, most = jacobians(model.blocks, x, positions), weakref.WeakSet(), []
    linearised = probes._Linearised.along.__func__

    def along(cls, *args):
        made = linearised(cls, *args)
        alive.add(made[0])
        most.append(sum(len(one.z) for one in alive))
        return made

    monkeypatch.setattr(probes._Linearised, "along", classmethod(along))
    parts = jacobians(model.blocks, x, positions, together=2)
    assert max(most) == 2
    for name in ("sigma", "ratio", "alignment", "product"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-3, atol=1e-4, equal_nan=True)
    with torch.no_grad():
        model.blocks[3].mlp.W_up.weight[0, 0] = math.inf
    cut = jacobians(model.blocks, x, positions, together=2)
    assert cut.errors == ("block 3: its mlp.W_up.weight is not finite",)
    assert torch.equal(cut.sigma[:3], parts.sigma[:3]) and cut.sigma[3:].isnan().all()


def test_wrapped_modules_are_refused_by_name():
    blocks, x = our_blocks()
    with pytest.raises(TypeError, match="OptimizedModule"):
        jacobians([torch.compile(block) for block in blocks], x)
    with pytest.raises(TypeError, match="DataParallel"):
        jacobians([torch.nn.DataParallel(block) for block in blocks], x)


def test_blocks_compiled_in_place_are_measured_uncompiled():
    blocks, x = our_blocks()
    compiled = copy.deepcopy(blocks)
    for block in compiled:
        block.compile(backend=lambda *_: pytest.fail("compiled"))
    assert torch.equal(jacobians(compiled, x).sigma, jacobians(blocks, x).sigma)


def test_sharded_modules_are_refused_by_name(tmp_path):
    """FSDP2 replaces a block's parameters by DTensors, also with one process."""
    blocks, x = our_blocks()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        fully_shard(blocks[0], mesh=mesh)
        with pytest.raises(TypeError, match="holds shards"):
            jacobians(blocks, x)
    finally:
        torch.distributed.destroy_process_group()


def test_activations_are_their_definitions():
    model = noisy_model(n_layer=3)
    cfg = model.cfg
    tokens = torch.arange(16).view(2, 8)
    got = forward_pass(model, tokens)
    x, T = model.embed(tokens), 8
    for i, block in enumerate(model.blocks):
        torch.testing.assert_close(got.residual_rms[i], x.double().square().mean().sqrt(), rtol=1e-5, atol=0)
        h, k = cfg.n_head, cfg.d_model // cfg.n_head
        q, key = ((block.attn_norm(x) @ W.weight.T).view(2, T, h, k) for W in (block.attn.W_Q, block.attn.W_K))
        largest, entropies = -math.inf, []
        for b, head, t in itertools.product(range(2), range(h), range(T)):
            row = (key[b, : t + 1, head] @ q[b, t, head] / math.sqrt(k)).double()
            p = row.softmax(0)
            largest = max(largest, row.max().item())
            entropies.append(-(p * p.log()).sum().item())
        assert got.max_logit[i].item() == pytest.approx(largest, rel=1e-5)
        assert got.entropy[i].item() == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
        x = block(x)
    torch.testing.assert_close(got.hidden, x)
    assert got.log_z == pytest.approx(model(tokens).exp().sum(-1).log().mean().item(), rel=1e-5)
    assert got.errors == ()
    assert forward_pass(model, tokens).hidden.grad_fn is None


@pytest.mark.parametrize("options", [{}, {"n_kv_head": 1}, {"norm": "rmsnorm"}, {"position": "rope"}], ids=str)
def test_no_logit_exceeds_its_bound_and_some_input_reaches_it(options):
    model = noisy_model(d_model=16, n_head=2, **options)
    tokens = torch.arange(64).view(8, 8) % 256
    got = forward_pass(model, tokens)
    assert (got.max_logit < got.logit_bound).all() and (got.logit_bound < 100 * got.max_logit).all()
    attn, gains = model.blocks[1].attn, model.blocks[1].attn_norm.weight
    inputs = torch.nn.functional.normalize(torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))) * 4
    bounds = []
    for head in range(2):
        Q = attn.W_Q.weight[8 * head : 8 * (head + 1)] * gains
        K = attn.W_K.weight.view(-1, 8, 16)[head % attn.n_kv_head] * gains
        U, _, Vh = torch.linalg.svd(Q.T @ K)
        reached = attn.scale * (Q @ U[:, 0] * 4) @ (K @ Vh[0] * 4)
        bounds.append(reached)
        assert (attn.scale * (inputs @ Q.T) @ (K @ inputs.T)).abs().max() <= reached * (1 + 1e-5)
    capped = forward_pass(noisy_model(d_model=16, n_head=2, logit_cap=5.0, **options), tokens)
    assert (capped.max_logit < capped.logit_bound).all() and (capped.logit_bound < got.logit_bound).all()
    if attn.theta is None:
        assert got.logit_bound[1].item() == pytest.approx(max(bounds).item(), rel=1e-5)
    else:
        assert got.logit_bound[1] > max(bounds)


def test_a_bound_is_nan_where_it_is_not_known():
    tokens = torch.arange(16).view(2, 8)
    for options in ({"qk_norm": True}, {"attention": "mla", "mla_rank": 4}):
        assert forward_pass(noisy_model(**options), tokens).logit_bound.isnan().all()
    assert logit_bound(torch.full((2, 3, 4), math.nan), torch.ones(2, 3, 4), 1.0).isnan().all()


def test_activations_name_a_block_that_is_not_finite():
    cfg = small(n_layer=3)
    model = GPT(cfg)
    mup.init_weights(model, cfg)
    tokens = torch.arange(16).view(2, 8)
    whole = forward_pass(model, tokens)
    with torch.no_grad():
        model.blocks[1].attn.W_V.weight[0, 0] = math.nan
    got = forward_pass(model, tokens)
    assert got.errors == ("block 1: its attn.W_V.weight is not finite",)
    assert torch.equal(got.residual_rms[:2], whole.residual_rms[:2])
    assert got.residual_rms[2].isnan()
    assert torch.equal(got.entropy[:1], whole.entropy[:1])
    with torch.no_grad():
        model.blocks[1].attn.W_V.weight[0, 0] = 0
        model.tok_emb.weight[tokens[0, 0]] = math.inf
    for measured in (forward_pass(model, tokens), jacobians(model.blocks, model.embed(tokens))):
        assert measured.errors == ("block 0: its input is not finite",)
    with pytest.raises(TypeError, match="OptimizedModule"):
        forward_pass(torch.compile(model), tokens)


def test_norms():
    assert norms({"a": torch.tensor([3.0, 4.0]), "b": torch.ones(2, 2)}) == {"a": 5.0, "b": 2.0}


def measured_exactly(J):
    """sigma, ratio, alignment of a chain of matrices (L, d, d), from dense SVDs, and the norm of their product."""
    U, S, Vh = torch.linalg.svd(J)
    alignment = (Vh[1:, 0] * U[:-1, :, 0]).sum(-1).abs()
    return S[:, 0], S[:, 1] / S[:, 0], alignment, torch.linalg.matrix_norm(torch.linalg.multi_dot(list(J.flip(0))), 2)


def test_theorem_4_2_does_not_hold_as_stated():
    """Three maps of norm M = 1 with adjacent alignments a = 1/√2: the theorem promises a product of at least a² = 1/2.

    J1 sends everything to u1 = (e1 + e2)/√2. J2 = e1 e1ᵀ + s e2 e2ᵀ has the top vector e1, as s is just below 1. J3
    projects on (e1 − e2)/√2. J1 and J3 are both aligned with e1, but what J2 carries along e2 cancels the rest.
    """
    e1, e2 = torch.eye(2, dtype=torch.float64)
    s = 1 - 1e-6
    J = torch.stack([torch.outer((e1 + e2), e1), torch.diag(torch.tensor([1, s])), torch.outer(e1, e1 - e2)]).double()
    J[0] /= math.sqrt(2)
    J[2] /= math.sqrt(2)
    sigma, ratio, alignment, product = measured_exactly(J)
    torch.testing.assert_close(sigma, torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(alignment, torch.full((2,), 1 / math.sqrt(2), dtype=torch.float64), rtol=1e-5, atol=0)
    stated, held = product_bounds(sigma, ratio, alignment)
    assert stated == pytest.approx(0.5, rel=1e-4)
    assert product < 1e-5
    assert held <= product


def test_product_bounds_where_they_hold():
    g = torch.Generator().manual_seed(0)
    useful = 0
    for trial in range(300):
        d, L, decay = 5, 2 + trial % 4, 10 ** -(trial % 7 / 2)
        U, V = (torch.linalg.qr(torch.randn(L, d, d, generator=g, dtype=torch.float64))[0] for _ in range(2))
        if trial % 2:  # near-aligned neighbours, where the bounds say something
            V[1:] = torch.linalg.qr(U[:-1] + 0.1 * torch.randn(L - 1, d, d, generator=g, dtype=torch.float64))[0]
        S = decay ** torch.arange(d, dtype=torch.float64) * (0.5 + torch.rand(L, 1, generator=g, dtype=torch.float64))
        J = (U * S[:, None]) @ V.mT
        sigma, ratio, alignment, product = measured_exactly(J)
        stated, held = product_bounds(sigma, ratio, alignment)
        assert held <= product * (1 + 1e-9)
        useful += bool(held > 0.1 * product)
        if L == 2:  # Lemma B.1
            assert stated <= product * (1 + 1e-9)
    assert useful > 50
    rank_one = torch.stack([torch.outer(*torch.randn(2, 4, generator=g, dtype=torch.float64)) for _ in range(4)])
    sigma, ratio, alignment, product = measured_exactly(rank_one)
    stated, held = product_bounds(sigma, ratio, alignment)
    assert stated <= product * (1 + 1e-9)
    assert held == pytest.approx(float(product), rel=1e-6)
