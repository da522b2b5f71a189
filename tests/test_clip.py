"""LogitClip: after a step no input can have a larger attention logit than the limit, whatever optimizer and model."""

import math

import pytest
import torch
import transformers

from engine.announce import intervention
from engine.runlog import read_metrics
from model import GPT
from msign import Layout, Target
from remedies.clip import MAPS, LogitClip
from tests.conftest import here, noisy_model, refused, small
from tests.test_trust import KINDS, factors_of_example, stepped
from train import build_optimizer


def heads_of(attn) -> tuple[torch.Tensor, torch.Tensor]:
    """Every head's rows of W_Q and of W_K, (h, k, n)."""
    found = []
    for W, heads in ((attn.W_Q, attn.n_head), (getattr(attn, "W_UK", None) or attn.W_K, attn.n_kv_head)):
        rows = W.weight.detach().double().unflatten(0, (heads, -1))
        found.append(rows.repeat_interleave(attn.n_head // heads, 0))
    return found[0], found[1]


def largest(W_Q, W_K, rotated=False):
    """The largest logit (W_Q x)ᵀ(W_K y) / √k for inputs of root mean square 1, (h,); with RoPE what bounds it."""
    norm = torch.linalg.matrix_norm
    product = norm(W_Q, 2) * norm(W_K, 2) if rotated else norm(W_Q.mT @ W_K, 2)
    return product * math.sqrt(W_Q.shape[-1] * W_K.shape[-1] / W_Q.shape[-2])


def clipped(model: GPT, limit: float, how: str = "clip", **options) -> LogitClip:
    return LogitClip(torch.optim.AdamW(model.parameters()), model, limit, how, **options)


def rested(model, optimizer):
    """A step at rate 0, after which only the limit has changed the weights."""
    return stepped(model, optimizer, lr=0.0)


@pytest.mark.parametrize("how", MAPS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_input_has_a_logit_above_the_limit_and_heads_below_it_do_not_change(kind, how):
    model, rotated = noisy_model(**KINDS[kind]), kind == "grouped"
    before = [largest(*heads_of(block.attn), rotated) for block in model.blocks]
    limit = torch.cat(before).median().item()
    old = [heads_of(block.attn) for block in model.blocks]
    optimizer = clipped(model, limit, how, rotated=rotated)
    rested(model, optimizer)
    for i, block in enumerate(model.blocks):
        torch.testing.assert_close(
            largest(*heads_of(block.attn), rotated), before[i].clamp(max=limit), rtol=1e-5, atol=0
        )
        factors = optimizer.factors[f"blocks.{i}.attn"]
        torch.testing.assert_close(factors, (limit / before[i]).clamp(max=1), rtol=1e-5, atol=0)
        for W, was in zip(heads_of(block.attn), old[i], strict=True):
            assert torch.equal(W[factors == 1], was[factors == 1])
    assert 0 < sum((factors < 1).sum() for factors in optimizer.factors.values()) < sum(map(len, before))


def test_clip_changes_the_singular_values_above_the_limit_alone_and_splits_evenly():
    model = noisy_model()
    W_Q, W_K = heads_of(model.blocks[0].attn)
    U, S, Vh = torch.linalg.svd(W_Q.mT @ W_K)
    unit = largest(W_Q, W_K)[0] / S[0, 0]
    limit = (unit * S[0, 2]).item()  # two singular values of the first head exceed it
    rested(model, clipped(model, limit))
    new_Q, new_K = heads_of(model.blocks[0].attn)
    torch.testing.assert_close(new_Q.mT @ new_K, U * (S.clamp(max=S[0, 2])).unsqueeze(-2) @ Vh, rtol=1e-5, atol=1e-6)
    # a product's direction shrinks by the same factor in both, so what they are relative to each other stays
    for i in range(2):
        shrunk = (S[0, 2] / S[0, i]).sqrt()
        torch.testing.assert_close(new_Q[0] @ U[0][:, i], shrunk * W_Q[0] @ U[0][:, i], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(new_K[0] @ Vh[0][i], shrunk * W_K[0] @ Vh[0][i], rtol=1e-4, atol=1e-6)


def test_scale_multiplies_both_matrices_alike():
    model = noisy_model()
    W_Q, W_K = heads_of(model.blocks[0].attn)
    optimizer = clipped(model, 0.05, "scale")
    rested(model, optimizer)
    root = optimizer.factors["blocks.0.attn"].sqrt()[:, None, None]
    for W, old in zip(heads_of(model.blocks[0].attn), (W_Q, W_K), strict=True):
        torch.testing.assert_close(W, root * old, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("how", MAPS)
def test_keys_that_heads_share_do_not_change(how):
    model = noisy_model(n_head=4, n_kv_head=2)
    keys = model.blocks[0].attn.W_K.weight.clone()
    rested(model, clipped(model, 0.05, how))
    assert torch.equal(model.blocks[0].attn.W_K.weight, keys)
    assert largest(*heads_of(model.blocks[0].attn)).max() < 0.0501


def test_a_limit_that_is_not_reached_changes_no_bit():
    model, other = noisy_model(), noisy_model()
    assert all(map(torch.equal, stepped(model, clipped(model, 1e9))[1],
                   stepped(other, torch.optim.AdamW(other.parameters()))[1]))  # fmt: skip


def test_a_step_that_changes_nothing_reads_every_matrix_once(monkeypatch):
    """Where weights are sharded, every read gathers them."""
    read, matrices = [], Target.matrices
    monkeypatch.setattr(Target, "matrices", lambda target: read.append(target.roles) or matrices(target))
    model = noisy_model()
    stepped(model, clipped(model, 1e9))
    assert sorted(read) == [("W_K",), ("W_K",), ("W_Q",), ("W_Q",)]  # of two blocks


@pytest.mark.parametrize("how", MAPS)
def test_fused_and_transposed_weights_are_corrected_as_separate_ones(how):
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=256, n_positions=8)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    attention = model.transformer.h[0].attn
    old = attention.c_attn.weight.detach().T.unflatten(0, (3, 2, 8)).clone()
    optimizer = LogitClip(torch.optim.SGD(model.parameters(), lr=0.0), model, 0.01, how)
    optimizer.step()
    new = attention.c_attn.weight.detach().T.unflatten(0, (3, 2, 8))
    torch.testing.assert_close(largest(new[0], new[1]), torch.full((2,), 0.01), rtol=1e-5, atol=0)
    assert largest(old[0], old[1]).min() > 0.01 and torch.equal(new[2], old[2])


def test_a_weight_that_fuses_attention_with_an_mlp_keeps_the_mlps_part():
    torch.manual_seed(0)
    attn = torch.nn.Module()
    attn.num_heads, attn.fused = 2, torch.nn.Linear(16, 80, bias=False)
    old = attn.fused.weight.detach().clone()
    layout = Layout((("W_Q", 16), ("W_K", 16), ("W_V", 16), ("W_up", 32)))
    model = torch.nn.ModuleDict({"attn": attn})
    optimizer = LogitClip(torch.optim.SGD(model.parameters(), lr=0.0), model, 0.01, split={"fused": layout})
    optimizer.step()
    new = attn.fused.weight.detach()
    W_Q, W_K, _ = new[:48].unflatten(0, (3, 2, 8))
    torch.testing.assert_close(largest(W_Q, W_K), torch.full((2,), 0.01), rtol=1e-5, atol=0)
    assert torch.equal(new[32:], old[32:])


def test_a_matrix_of_deficient_rank_and_one_that_is_not_finite():
    model = noisy_model()
    first, second = (block.attn.W_Q.weight for block in model.blocks)
    with torch.no_grad():
        first[1:8] = 0  # the first head's queries have rank one
        second[0, 0] = math.nan
    untouched = second.clone()
    optimizer = clipped(model, 0.05)
    with torch.no_grad():
        optimizer._correct({**next(iter(optimizer.alike.values()))}, 0.05 * 8**0.5 / 16)
    assert largest(*heads_of(model.blocks[0].attn)).max() < 0.0501 and torch.equal(first[1:8], torch.zeros(7, 16))
    assert torch.equal(second[:8].isnan(), untouched[:8].isnan()) and torch.equal(second[1:8], untouched[1:8])
    factors = optimizer.factors["blocks.1.attn"]
    assert factors[0].isnan() and factors[1] < 1


def test_what_it_cannot_do_is_refused():
    model = noisy_model()
    with pytest.raises(ValueError, match=r"limit = 0: must be above 0"):
        clipped(model, 0)
    with pytest.raises(ValueError, match=r"how = 'cut': must be one of clip, scale"):
        clipped(model, 1.0, "cut")
    rotary = noisy_model(attention="mla", mla_rank=6, mla_rope_dim=4, position="rope")
    with pytest.raises(ValueError, match=r"blocks\.0\.attn: keys with a part that all heads share \(W_KR\)"):
        clipped(rotary, 1.0)


@pytest.mark.parametrize("how", MAPS)
def test_it_is_announced_logged_and_holds_during_a_run(config_file, tmp_path, how):
    options = ("--logit_clip=0.5", f"--logit_clip_map={how}", "--lr=0.02", f"--name={how}")
    done = here("train.py", config_file, *options)
    assert done.returncode == 0, done.stderr
    assert f"plain AdamW; logit_clip ({how}): the weights allow no logit above 0.5 nats" in done.stdout
    logged = [line for line in read_metrics(tmp_path / "runs" / how) if "clip/least" in line]
    assert 0 < logged[-1]["clip/least"] < logged[-1]["clip/mean"] < 1
    # the bound that is logged has the norm's gains, which have moved by then
    assert logged[-1]["attention/logit_bound"] == pytest.approx(0.5, rel=0.5)


def test_the_example_of_the_documentation_runs():
    assert torch.equal(factors_of_example("LogitClip"), torch.ones(4).double())


def test_where_it_has_no_bound_it_is_refused(config_file):
    refused(
        "train.py", config_file, "--logit_clip=1", "--qk_norm=true", says="logit_clip = 1.0: must be 0 with qk_norm"
    )


def test_it_is_announced_beside_the_others():
    cfg = small(msign_period=5, logit_trust=0.5, logit_clip=50.0)
    said = intervention(cfg, build_optimizer(cfg, GPT(cfg)))
    assert said.startswith("MSign every 5 steps") and "by at most 0.5 nats; logit_clip (clip): " in said
