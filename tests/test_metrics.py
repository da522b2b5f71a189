"""Every logged number has the value that the probes measure."""

import math

import pytest
import torch

from stability import metrics
from stability.probes import jacobians, spectra
from tests.conftest import noisy_model

TOKENS = torch.arange(16).view(2, 8)


@pytest.fixture
def model():
    return noisy_model(n_layer=8)


def no_warning(text):
    raise AssertionError(text)


def test_weights(model):
    got = metrics.weights(model, True, no_warning)
    matrices = {n: p for n, p in model.named_parameters() if "W_" in n}
    found = spectra(matrices)
    for name, spectrum in found.items():
        _, i, _, role, _ = name.split(".")
        for family in ("srank", "sigma1", "fro"):
            assert got[f"{family}/{i}.{role}"] == getattr(spectrum, family)
    early = [s.srank for n, s in found.items() if n.startswith(("blocks.0.attn", "blocks.1.attn"))]
    assert len(early) == 8
    assert got["srank/early"] == pytest.approx(math.exp(sum(map(math.log, early)) / 8))
    gains = [block.mlp_norm.weight for block in model.blocks]
    assert got["norm_gain/mlp_norm"] == pytest.approx(torch.stack(gains).square().mean().sqrt().item())
    assert got["norm_gain/3.mlp_norm"] == pytest.approx(gains[3].square().mean().sqrt().item())
    summary = metrics.weights(model, False, no_warning)
    assert summary.items() <= got.items()
    assert not any("." in key for key in summary)


def test_activations(model):
    got = metrics.activations(model, TOKENS, True, no_warning, torch.autocast("cpu", torch.bfloat16))
    found = metrics.forward_pass(model, TOKENS)
    assert got["residual/gain"] == pytest.approx((found.residual_rms[1] / found.residual_rms[0]).item())
    assert got["residual/rms"] == got["residual/rms/7"] == found.residual_rms[8].item()
    assert got["attention/max_logit"] == max(got[f"attention/max_logit/{i}"] for i in range(8))
    assert got["attention/logit_bound"] == max(got[f"attention/logit_bound/{i}"] for i in range(8))
    normed = metrics.activations(noisy_model(qk_norm=True), TOKENS, True, no_warning)
    assert "attention/max_logit" in normed and not any("logit_bound" in name for name in normed)
    assert got["attention/entropy"] == pytest.approx(sum(got[f"attention/entropy/{i}"] for i in range(8)) / 8)
    assert got["log_z"] == found.log_z
    assert 1e-4 < got["precision/error"] < 0.1  # bfloat16 has 8 bits
    assert "precision/error" not in metrics.activations(model, TOKENS, False, no_warning)


def test_jacobians(model):
    got = metrics.jacobians(model, TOKENS, True, no_warning, positions=4)
    found = jacobians(model.blocks, model.embed(TOKENS))
    assert got["jacobian/sigma1/5"] == pytest.approx(found.sigma[5].mean().item())
    assert got["jacobian/ratio/5"] == pytest.approx(found.ratio[5].max().item())
    assert got["jacobian/residual"] == max(got[f"jacobian/residual/{i}"] for i in range(8))
    assert got["jacobian/alignment/6"] == pytest.approx(found.alignment[6].mean().item())
    assert got["jacobian/alignment"] == pytest.approx(found.alignment.mean().item())
    assert got["jacobian/ill_conditioned"] == sum(got[f"jacobian/ill_conditioned/{i}"] for i in range(7))
    tokens = jacobians(model.blocks, model.embed(TOKENS), [2, 4, 5, 7])
    assert got["jacobian/token_sigma1/max"] == tokens.sigma.max().item()
    assert got["jacobian/token_alignment/mean"] == pytest.approx(tokens.alignment.mean().item())


def test_a_broken_block_is_named_once_and_the_rest_measured(model):
    with torch.no_grad():
        model.blocks[4].mlp.W_down.weight[0, 0] = math.inf
    said = []
    got = metrics.weights(model, True, said.append) | metrics.activations(model, TOKENS, True, said.append)
    got |= metrics.jacobians(model, TOKENS, True, said.append)
    assert said == [f"{what}: block 4: its mlp.W_down.weight is not finite" for what in ("activations", "jacobians")]
    assert math.isnan(got["srank/4.W_down"])
    assert math.isfinite(got["srank/W_down"])
    assert math.isfinite(got["residual/rms/3"])
    assert not math.isfinite(got["residual/rms/5"])
    assert math.isfinite(got["jacobian/alignment"])
    assert math.isnan(got["jacobian/sigma1/4"])
