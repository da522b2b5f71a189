import copy
import math

import pytest
import torch

import msign as room
import mup
from model import GPT
from msign import MSign, apply_, find, msign, polar_cutoff, polar_steps, rank_cutoff, restored_sign
from tests.conftest import small

EPS32 = torch.finfo(torch.float32).eps


def cutoff(W):
    return 4 * math.sqrt(max(W.shape[-2:])) * EPS32


def oracle(W):
    """UVᵀ from an fp64 SVD, the rank counted with the documented cut-off."""
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    keep = S[..., :1] * cutoff(W) < S
    return (U * keep.unsqueeze(-2)) @ Vh


def with_spectrum(m, n, s, batch=(), seed=0):
    """A float32 stack of (m, n) matrices with the singular values s."""
    g = torch.Generator().manual_seed(seed)
    U, _ = torch.linalg.qr(torch.randn(*batch, m, len(s), generator=g, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(*batch, n, len(s), generator=g, dtype=torch.float64))
    return ((U * s) @ V.mT).float()


def error(got, want):
    return (torch.linalg.matrix_norm(got.double() - want) / torch.linalg.matrix_norm(want)).max().item()


@pytest.mark.parametrize("shape", [(48, 48), (192, 48), (48, 192)])
@pytest.mark.parametrize("log_kappa", [0, 2, 4, 5])
def test_sign_against_fp64_over_condition_numbers(shape, log_kappa):
    n = min(shape)
    W = with_spectrum(*shape, torch.logspace(0, -log_kappa, n, dtype=torch.float64), batch=(4,))
    # the error of fp32 input rounding alone grows like κ · eps; eigh has to stay far below the SVD's
    assert error(msign(W, "eigh"), oracle(W)) < 3e-7
    assert error(msign(W, "svd"), oracle(W)) < 1e-5 + 10**log_kappa * EPS32


def test_eigh_is_at_least_as_accurate_as_svd_up_to_1e6():
    for log_kappa in (2, 4, 5, 5.8):
        s = torch.logspace(0, -log_kappa, 8, dtype=torch.float64)  # 8 wide: the cut-off lies at 1.35e-6 < 1/κ
        W = with_spectrum(8, 8, s, batch=(16,))
        assert error(msign(W, "eigh"), oracle(W)) <= max(error(msign(W, "svd"), oracle(W)), 3e-7)
        assert error(msign(W, "eigh"), oracle(W)) < 1e-4


def test_the_rank_cutoff_is_the_stated_one():
    edge = cutoff(torch.empty(48, 48))
    assert rank_cutoff(48, 48) == edge > polar_cutoff(48, 48)
    for factor, rank in ((2.0, 2), (0.5, 1)):
        W = with_spectrum(48, 48, torch.tensor([1.0, factor * edge], dtype=torch.float64)).double()
        for backend in ("svd", "eigh"):
            assert torch.linalg.matrix_norm(msign(W, backend)).item() ** 2 == pytest.approx(rank, abs=1e-3)


@pytest.mark.parametrize("backend", ["svd", "eigh", "polar"])
@pytest.mark.parametrize("shape", [(48, 48), (192, 48), (48, 192)])
def test_rank_deficient_becomes_a_partial_isometry(backend, shape):
    W = with_spectrum(*shape, torch.logspace(0, -2, 8, dtype=torch.float64), batch=(3,))
    sign = msign(W, backend)
    assert error(sign, oracle(W)) < 1e-4
    s = torch.linalg.svdvals(sign.double())
    torch.testing.assert_close(s[..., :8], torch.ones(3, 8, dtype=torch.float64), atol=1e-5, rtol=0)
    assert s[..., 8:].max() < 1e-5


@pytest.mark.parametrize("backend", ["svd", "eigh", "polar"])
def test_zero_stays_zero_and_batches_are_independent(backend):
    W = torch.randn(2, 3, 6, 4, generator=torch.Generator().manual_seed(0))
    W[0, 1] = 0
    sign = restored_sign(W, backend)
    assert torch.equal(sign[0, 1], torch.zeros(6, 4))
    assert torch.isfinite(sign).all()
    torch.testing.assert_close(sign[1, 2], restored_sign(W[1, 2], backend), rtol=1e-5, atol=1e-6)
    assert msign(torch.zeros(0, 5), backend).shape == (0, 5)


@pytest.mark.parametrize("backend", ["svd", "eigh", "polar"])
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_frobenius_norm_is_kept(backend, scale):
    for shape in [(48, 48), (192, 48), (48, 192), (1, 7)]:
        W = scale * torch.randn(5, *shape, generator=torch.Generator().manual_seed(1))
        norms = [torch.linalg.matrix_norm(M.double()) for M in (W, restored_sign(W, backend))]
        torch.testing.assert_close(norms[1], norms[0], rtol=1e-6, atol=0)


def test_products_computed_in_fp32_stay_far_below_the_cutoff():
    g = torch.Generator().manual_seed(0)
    for n in (48, 192, 512):
        product = torch.randn(n, n // 2, generator=g) @ torch.randn(n // 2, n, generator=g)
        s = torch.linalg.svdvals(product.double())
        assert s[n // 2] < s[0] * cutoff(product) / 20


# Singular values at the end of an AdamW run that collapsed: python train.py configs/stress_ramp.py --seed=0
COLLAPSED = {
    "0.attn.W_Q": [
        11.9, 9.92, 8.38, 6.96, 6.87, 5.81, 5.22, 3.85, 3.3, 3.12, 2.76, 2.29, 1.93, 1.68, 1.44, 1.37, 1.26, 0.835,
        0.821, 0.667, 0.553, 0.516, 0.475, 0.375, 0.36, 0.304, 0.282, 0.264, 0.24, 0.2, 0.175, 0.169, 0.15, 0.123,
        0.114, 0.105, 0.0974, 0.0901, 0.0629, 0.0543, 0.0493, 0.0448, 0.0373, 0.0331, 0.0263, 0.0173, 0.00827, 0.00483,
    ],
    "12.attn.W_O": [
        6.17, 4.7, 4.04, 3.32, 2.93, 2.12, 1.74, 1.67, 1.36, 1.14, 1.09, 0.942, 0.791, 0.709, 0.669, 0.593, 0.489,
        0.446, 0.393, 0.356, 0.352, 0.324, 0.282, 0.256, 0.213, 0.2, 0.177, 0.149, 0.144, 0.132, 0.119, 0.107, 0.102,
        0.0927, 0.0777, 0.0696, 0.0603, 0.051, 0.0476, 0.0461, 0.0352, 0.0318, 0.0271, 0.0187, 0.017, 0.00752, 0.00147,
        0.000988,
    ],
    "0.mlp.W_up": [
        19.5, 17.7, 17.4, 16.1, 14.5, 13.7, 13.3, 7.81, 1.37, 1.26, 1.18, 1.05, 0.972, 0.879, 0.764, 0.74, 0.709,
        0.627, 0.611, 0.565, 0.555, 0.508, 0.487, 0.468, 0.43, 0.416, 0.398, 0.374, 0.361, 0.348, 0.325, 0.321, 0.308,
        0.289, 0.278, 0.259, 0.251, 0.243, 0.234, 0.22, 0.192, 0.188, 0.179, 0.168, 0.158, 0.143, 0.131, 0.121,
    ],
}  # fmt: skip


@pytest.mark.parametrize("shape", [(48, 48), (48, 192), (256, 256), (384, 512)])
@pytest.mark.parametrize("name", COLLAPSED)
def test_polar_at_real_spectra(name, shape):
    """Wider matrices have the same spectrum, interpolated to more singular values."""
    at = torch.linspace(0, 47, min(shape), dtype=torch.float64)
    s = torch.tensor(COLLAPSED[name], dtype=torch.float64).log()
    below = at.long().clamp(max=46)
    W = with_spectrum(*shape, torch.lerp(s[below], s[below + 1], at - below).exp(), batch=(2,))
    room.counts.clear()
    assert error(msign(W, "polar"), oracle(W)) < 1e-4
    assert room.counts["fallbacks"] == 0


@pytest.mark.parametrize("shape", [(48, 48), (192, 48), (512, 512)])
@pytest.mark.parametrize("log_kappa", [0, 2, 4])
def test_polar_over_condition_numbers(shape, log_kappa):
    W = with_spectrum(*shape, torch.logspace(0, -log_kappa, min(shape), dtype=torch.float64), batch=(2,))
    # the bound that an fp32 SVD is held to above
    assert error(msign(W, "polar"), oracle(W)) < 1e-5 + 10**log_kappa * EPS32


def truncated(A, B, C=None, scale=1.0):
    """`_add` on a matrix unit that rounds badly: after every 4 products it cuts the sum off to fp32, towards 0.

    The sign of a 512 × 512 matrix of half the rank is then 5.1e-5 off; an H100's was 4.2e-5 off (results/LOG.md).
    """
    A, B = A.double(), B.double()
    total = torch.zeros(*A.shape[:-1], B.shape[-1], dtype=torch.float64)
    for k in range(0, A.shape[-1], 4):
        total += A[..., k : k + 4] @ B[..., k : k + 4, :]
        total.view(torch.int64).bitwise_right_shift_(29).bitwise_left_shift_(29)  # fp64 has 29 digits more than fp32
    return total.float() if C is None else C.copy_(scale * (total.float() + C))


def hard_spectra(m, n, above=2.0):
    """{name: singular values} down to `above` times the cut-off, and of condition 1e6, beyond the cut-off."""
    k, low = min(m, n), above * rank_cutoff(m, n)
    down_to = lambda low, rank: torch.logspace(0, math.log10(low), rank, dtype=torch.float64)  # noqa: E731
    return {
        "to the cut-off": down_to(low, k),
        "to 1e-6": down_to(1e-6, k),
        "half the rank": down_to(low, k // 2),
        "one large": torch.tensor([1.0] + [low] * (k - 1), dtype=torch.float64),
        "one small": torch.tensor([1.0] * (k - 1) + [low], dtype=torch.float64),
        "rank 1": torch.ones(1, dtype=torch.float64),
    }


@pytest.mark.parametrize("sums", ["rounded", "truncated"])
@pytest.mark.parametrize("shape", [(48, 48), (192, 48), (128, 448), (256, 256)])
def test_polar_is_within_1e_4_of_the_sign_for_hard_spectra(shape, sums, monkeypatch):
    """On a CPU the products of fp16 matrices are those of a GPU, but for the order and the rounding of their sums."""
    if sums == "truncated":
        monkeypatch.setattr(room, "_add", truncated)
    for name, s in hard_spectra(*shape).items():
        W = with_spectrum(*shape, s)
        room.counts.clear()
        assert error(msign(W, "polar"), oracle(W)) < 1e-4, name
        assert room.counts["fallbacks"] == (name == "to 1e-6"), name  # values at the cut-off end between 0 and 1


def test_long_sums_are_added_up_from_parts(monkeypatch):
    """Cut off after every 4 products, a sum of 512 keeps more digits if it is made of parts; nothing else changes."""
    generator = torch.Generator().manual_seed(0)
    A, B, C = (torch.rand(1, *shape, generator=generator) for shape in ((8, 512), (512, 6), (8, 6)))
    exact = (A.half().double() @ B.half().double() + C) / 4
    monkeypatch.setattr(room, "_add", truncated)
    errors = []
    for parts in (512, 32):
        monkeypatch.setattr(room, "PARTIAL", parts)
        errors.append(error(room._mm(A.half(), B.half(), C.clone(), 1 / 4), exact))
    assert errors[1] < errors[0] / 4 and errors[0] < 1e-4
    monkeypatch.undo()
    monkeypatch.setattr(room, "PARTIAL", 32)
    assert error(room._mm(A.half(), B.half(), C.clone(), 1 / 4), exact) < 1e-6


def test_two_fp16_matrices_hold_an_fp32_matrix():
    X = torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 4, 64)
    high, low = room._halves(X)
    assert high.dtype == low.dtype == torch.float16
    assert ((X.double() - high.double() - low.double()).abs() <= 2.0**-22 * X.abs() + 2.0**-25).all()


def test_a_gram_matrix_is_symmetric_to_the_last_bit():
    X = torch.rand(2, 40, 30, generator=torch.Generator().manual_seed(0))
    gram = room._gram(room._halves(X)) * room.SCALE
    assert torch.equal(gram, gram.mT)
    torch.testing.assert_close(gram, X.mT @ X, rtol=1e-6, atol=0)


def test_fp16_products_are_summed_in_fp32_whatever_the_process_allows():
    matmul = torch.backends.cuda.matmul
    matmul.allow_fp16_accumulation = True
    try:
        with room._exact_sums(torch.device("cuda")):
            assert not matmul.allow_fp16_accumulation
        assert matmul.allow_fp16_accumulation
    finally:
        matmul.allow_fp16_accumulation = False


def test_polar_is_0_or_1_everywhere_and_says_where_it_was_not():
    """Smallest singular values on both sides of the cut-off: matrices that end between 0 and 1 go to "eigh"."""
    edge = polar_cutoff(48, 48)
    s = torch.ones(200, 48, dtype=torch.float64)
    s[:, -1] = torch.logspace(-1.5, 0.5, 200, dtype=torch.float64) * edge
    W = torch.stack([with_spectrum(48, 48, one, seed=i) for i, one in enumerate(s)])
    room.counts.clear()
    smallest = torch.linalg.svdvals(msign(W, "polar").double())[:, -1]
    assert torch.minimum(smallest.abs(), (smallest - 1).abs()).max() < 1e-3
    assert smallest[0] < 1e-3 and smallest[-1] > 1 - 1e-3
    assert 0 < room.counts["fallbacks"] < 100
    assert room.counts["matrices"] == 200


def test_polar_restores_the_precision_of_products():
    """PyTorch's older setting cannot be read once a program has used the newer one, as machine.set_arithmetic does."""
    W = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    expected = msign(W, "polar")
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    assert torch.equal(msign(W, "polar"), expected)
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"


def test_polar_falls_back_when_its_residual_says_so(monkeypatch):
    W = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    room.counts.clear()
    polar = msign(W, "polar")
    assert not room.counts["fallbacks"]
    monkeypatch.setattr(room, "POLAR_TOLERANCE", -1.0)
    assert torch.equal(msign(W, "polar"), msign(W, "eigh"))
    assert not torch.equal(polar, msign(W, "eigh"))
    assert room.counts["fallbacks"] == 3


@pytest.mark.parametrize("shape", [(48, 48), (2048, 5440)])
def test_the_quintics_map_the_whole_interval_to_one_and_cancel_nothing_large(shape):
    low = polar_cutoff(*shape)
    x = torch.logspace(math.log10(low), 0, 100_000, dtype=torch.float64)
    large = x > 0.1
    for a, b, c in polar_steps(low):
        x = a * x + b * x**3 + c * x**5
        assert x[large].min() > 0.1
    assert (x - 1).abs().max() < 0.0101
    assert len(polar_steps(low)) <= 10


@pytest.mark.parametrize("shape", [(48, 48), (2048, 5440)])
def test_the_quintics_bring_back_what_rounding_lifts_above_one(shape):
    x = 1 + 1e-5
    for a, b, c in polar_steps(polar_cutoff(*shape)):
        x = a * x + b * x**3 + c * x**5
    assert abs(x - 1) < 0.0101


def test_dtype_and_input_are_kept():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        W = torch.randn(6, 4).to(dtype)
        before = W.clone()
        assert restored_sign(W).dtype == dtype
        assert torch.equal(W, before)
    with pytest.raises(ValueError, match="backend = 'qr'"):
        msign(torch.eye(2), "qr")


def model_and_adamw(**overrides):
    cfg = small(**overrides)
    model = GPT(cfg)
    mup.init_weights(model, cfg)
    return model, torch.optim.AdamW(mup.param_groups(model, cfg))


def train_steps(model, optimizer, steps, scheduler=None):
    g = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randint(256, (4, 9), generator=g)
        model(x[:, :-1], x[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_infinite_period_is_bitwise_adamw():
    model, adamw = model_and_adamw()
    plain = train_steps(model, adamw, 7)
    model, adamw = model_and_adamw()
    assert same(plain, train_steps(model, MSign(adamw, model, math.inf), 7))
    model, adamw = model_and_adamw()
    assert not same(plain, train_steps(model, MSign(adamw, model, 7), 7))


def test_applied_at_every_pth_step_counted_from_one():
    model, adamw = model_and_adamw()
    calls = []
    optimizer = MSign(adamw, model, 3, update=lambda W: calls.append(optimizer.steps) or W)
    train_steps(model, optimizer, 10)
    assert sorted(set(calls)) == [3, 6, 9]


def test_application_is_algorithm_1_and_leaves_the_rest_alone():
    model, adamw = model_and_adamw()
    train_steps(model, adamw, 3)
    twin, twin_adamw = model_and_adamw()
    train_steps(twin, MSign(twin_adamw, twin, 3), 3)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if any(w in name for w in ("W_Q", "W_K", "W_V", "W_O")):
            sign = oracle(p.detach())
            want = sign * torch.linalg.matrix_norm(p.detach().double()) / torch.linalg.matrix_norm(sign)
            torch.testing.assert_close(q.detach().double(), want, rtol=1e-5, atol=1e-6)
            assert not torch.equal(p, q)
        else:
            assert torch.equal(p, q), name
        assert same(adamw.state[p].values(), twin_adamw.state[q].values())  # moments are left alone


def test_targets():
    model = GPT(small())
    assert {n.split(".")[3] for n in find(model, "attention")} == {"W_Q", "W_K", "W_V", "W_O"}
    assert {n.split(".")[3] for n in find(model, "mlp")} == {"W_up", "W_down"}
    assert len(find(model, "blocks")) == 2 * 6
    assert list(find(model, "W_V,blocks.1.attn.W_O.weight")) == [
        "blocks.0.attn.W_V.weight", "blocks.1.attn.W_V.weight", "blocks.1.attn.W_O.weight",
    ]  # fmt: skip
    assert all(t.parameter.ndim == 2 for t in find(model, "blocks.*").values())
    with pytest.raises(ValueError, match="'W_X' matches no matrix"):
        find(model, "attention,W_X")


def test_nonfinite_weight_is_named_and_nothing_changes():
    model = GPT(small())
    with torch.no_grad():
        model.blocks[1].attn.W_V.weight[2, 3] = math.nan
    targets = find(model)
    before = [t.parameter.detach().clone() for t in targets.values()]
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.W_V\.weight holds a value that is not finite"):
        apply_(targets)
    now = [t.parameter.nan_to_num(7.0) for t in targets.values()]
    assert all(torch.equal(p, b.nan_to_num(7.0)) for p, b in zip(now, before, strict=True))


def test_stacks_are_split_without_changing_the_result(monkeypatch):
    g = torch.Generator().manual_seed(0)
    params = {f"w{i}": torch.randn(8, 8, generator=g) for i in range(7)}
    want = {name: restored_sign(W) for name, W in params.items()}
    monkeypatch.setattr("msign.STACK_ELEMENTS", 3 * 64)
    apply_(find(params.items(), "*"))
    for name, W in params.items():
        torch.testing.assert_close(W, want[name])


def test_state_dict_resumes_bitwise():
    model, adamw = model_and_adamw()
    optimizer = MSign(adamw, model, 3)
    train_steps(model, optimizer, 4)
    state, weights = copy.deepcopy((optimizer.state_dict(), model.state_dict()))
    straight = train_steps(model, optimizer, 2)  # applies at step 6
    other, other_adamw = model_and_adamw(seed=5)
    other.load_state_dict(weights)
    resumed = MSign(other_adamw, other, 3)
    resumed.load_state_dict(state)
    assert resumed.steps == 4
    assert same(straight, train_steps(other, resumed, 2))
    with pytest.raises(ValueError, match="no 'msign' entry"):
        resumed.load_state_dict(adamw.state_dict())


def test_schedulers_closures_hooks_and_groups_keep_working():
    model, adamw = model_and_adamw()
    optimizer = MSign(adamw, model, 2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    peak = optimizer.param_groups[0]["lr"]
    train_steps(model, optimizer, 2, scheduler)
    assert adamw.param_groups[0]["lr"] == pytest.approx(peak * 0.25)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append("hook"))

    def closure():
        model.zero_grad()
        loss = model(torch.zeros(1, 8, dtype=torch.long), torch.ones(1, 8, dtype=torch.long))
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    assert seen == ["hook"]
    assert optimizer.steps == 3
    extra = torch.nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [extra]})
    assert adamw.param_groups[-1]["params"] == [extra]
    for bad in (dict(period=0), dict(backend="qr"), dict(targets="nothing")):
        with pytest.raises(ValueError, match=r"period|backend|nothing"):
            MSign(adamw, model, **bad)
    optimizer.param_groups = adamw.param_groups[:1]
    assert len(adamw.param_groups) == 1


def test_gradient_scaler_skips_the_step_and_the_count():
    model, adamw = model_and_adamw()
    optimizer = MSign(adamw, model, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    before = [p.detach().clone() for p in model.parameters()]
    x = torch.randint(256, (4, 9))
    for poison, steps in ((True, 0), (False, 1)):
        scaler.scale(model(x[:, :-1], x[:, 1:])).backward()
        if poison:
            model.head.weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert optimizer.steps == steps
        assert same(before, [p.detach() for p in model.parameters()]) is poison


def test_any_update_can_take_the_signs_place():
    model, adamw = model_and_adamw()
    train_steps(model, MSign(adamw, model, 1, update=torch.zeros_like), 3)
    assert all(not t.parameter.any() for t in find(model).values())
    assert all(t.parameter.any() for t in find(model, "mlp").values())
