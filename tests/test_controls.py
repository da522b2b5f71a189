import math

import pytest
import torch

import msign
from msign import MSign, apply_, find, restored_sign
from remedies.controls import MAPS, below, update_of
from tests.test_msign import COLLAPSED, model_and_adamw, train_steps, with_spectrum

S = torch.tensor(COLLAPSED["0.attn.W_Q"], dtype=torch.float64)


def weights(shape=(48, 48)):
    return with_spectrum(*shape, S, batch=(3,)) * torch.tensor([1.0, 1e-3, 20.0])[:, None, None]


def svdvals(W):
    return torch.linalg.svdvals(W.double())


@pytest.mark.parametrize("shape", [(48, 48), (192, 48), (48, 192)])
@pytest.mark.parametrize("name", ["scale", "clip", "random"])
def test_controls_have_the_spectral_norm_that_msign_gives(name, shape):
    W = weights(shape)
    got, sign = svdvals(MAPS[name](W)), svdvals(restored_sign(W))
    torch.testing.assert_close(got[:, 0], sign[:, 0], rtol=1e-5, atol=0)


def srank(s):
    return s.square().sum(-1) / s[..., 0].square()


def test_what_each_leaves_alone():
    W, before = weights(), svdvals(weights())
    assert not MAPS["zero"](W).any()
    scaled, clipped, soft, random = (svdvals(MAPS[name](W)) for name in ("scale", "clip", "soft", "random"))
    torch.testing.assert_close(srank(scaled), srank(before), rtol=1e-5, atol=0)
    limit = before.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(clipped, before.clamp(max=limit), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(soft.square().sum(-1), before.square().sum(-1), rtol=1e-5, atol=0)
    torch.testing.assert_close(soft / soft[:, :1], (before / before[:, :1]).sqrt(), rtol=1e-3, atol=0)
    torch.testing.assert_close(srank(random), torch.full((3,), 48.0, dtype=torch.float64), rtol=1e-5, atol=0)
    for name in ("scale", "clip", "soft"):  # the same singular vectors: WᵀX is symmetric positive
        product = W.double().mT @ MAPS[name](W).double()
        torch.testing.assert_close(product, product.mT, rtol=1e-4, atol=1e-4 * product.abs().max().item())
    cosine = (MAPS["random"](W) * restored_sign(W)).sum((-2, -1)) / restored_sign(W).square().sum((-2, -1))
    assert cosine.abs().max() < 0.2


def test_random_is_drawn_anew_for_other_weights_and_the_same_for_the_same():
    W = weights()
    assert torch.equal(MAPS["random"](W), MAPS["random"](W.clone()))
    one, other = MAPS["random"](W[0]), MAPS["random"](W[0] * 1.001)
    assert (one * other).sum() / one.square().sum() < 0.5


@pytest.mark.parametrize("name", MAPS)
def test_zero_stays_zero_and_nothing_becomes_nan(name):
    assert torch.equal(MAPS[name](torch.zeros(2, 5, 3)), torch.zeros(2, 5, 3))
    assert MAPS[name](weights().bfloat16()).dtype == torch.bfloat16


def test_below_a_threshold_only():
    W = torch.stack([with_spectrum(8, 8, torch.logspace(0, -k, 8, dtype=torch.float64)) for k in (0.1, 1, 2)])
    ranks = srank(svdvals(W))
    threshold = ((ranks[0] + ranks[1]) / 2).item()
    msign.counts.clear()
    new = below(threshold, restored_sign, W)
    assert torch.equal(new[0], W[0])
    assert torch.equal(new[1:], restored_sign(W[1:]))
    assert msign.counts["matrices"] == 4
    assert torch.equal(below(1.0, restored_sign, W), W)


def test_update_of_a_configuration():
    W = weights()
    assert torch.equal(update_of("sign", "svd", 0.0)(W), restored_sign(W, "svd"))
    assert torch.equal(update_of("clip", "svd", 0.0)(W), MAPS["clip"](W))
    assert torch.equal(update_of("clip", "svd", 48.1)(W), MAPS["clip"](W))
    assert torch.equal(update_of("clip", "svd", 1.0)(W), W)


def test_reset_starts_the_targets_moments_anew_and_no_others():
    model, base = model_and_adamw()
    optimizer = MSign(base, model, period=3, targets="W_V", reset=True)
    train_steps(model, optimizer, 3)
    for name, p in model.named_parameters():
        state = base.state[p]
        zero = not state["exp_avg"].any() and not state["exp_avg_sq"].any()
        assert zero == ("W_V" in name), name
        assert state["step"] == (0 if "W_V" in name else 3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_steps(model, optimizer, 1)
    for name, p in model.named_parameters():
        if "W_V" in name:  # with its bias corrected, Adam's first step is at most the learning rate
            lr = next(g["lr"] for g in base.param_groups if any(p is q for q in g["params"]))
            assert (p - before[name] * (1 - lr * 0.1)).abs().max() <= 1.001 * lr
    assert all(base.state[p]["exp_avg"].any() for p in model.parameters() if p.ndim == 2)


def test_reset_refuses_a_part_of_a_weight_because_its_parts_share_one_step_count():
    model = torch.nn.MultiheadAttention(16, 2)
    base = torch.optim.AdamW(model.parameters())
    said = "one step count of in_proj_weight to 0: targets must name all of W_Q, W_K, W_V, not W_Q, W_K alone"
    with pytest.raises(ValueError, match=said):
        MSign(base, model, targets="W_Q,W_K", reset=True)
    for fine in (dict(targets="W_Q,W_K"), dict(targets="attention", reset=True), dict(targets="W_O", reset=True)):
        MSign(base, model, **fine)


def test_controls_serve_as_msigns_update():
    params = {"a.W_V": weights()[0].clone(), "b.W_V": weights()[2].clone()}
    apply_(find(params.items()), MAPS["clip"])
    assert svdvals(params["a.W_V"])[0].item() == pytest.approx(S.square().sum().sqrt().item() / math.sqrt(48), rel=1e-4)
