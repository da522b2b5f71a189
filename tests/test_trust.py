"""LogitTrust: a step changes no attention logit by more than the limit, whatever the optimizer and the model."""

import copy
import math
import re
import textwrap

import pytest
import torch
import transformers

from config import ROOT
from engine.announce import intervention
from engine.runlog import read_metrics
from model import GPT
from remedies.trust import LogitTrust
from tests.conftest import here, noisy_model, refused, small
from train import build_optimizer

KINDS = {
    "heads": {},
    "grouped": dict(n_head=4, n_kv_head=2, position="rope"),
    "latent": dict(attention="mla", mla_rank=6, position="none"),
}


def stepped(model, optimizer, steps=1, lr=0.3):
    """The parameters before and after `steps` steps at a rate at which the logits jump."""
    before = [p.detach().clone() for p in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = lr
    x = torch.randint(256, (4, 9), generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        model(x[:, :-1], x[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, [p.detach().clone() for p in model.parameters()]


def trusted(model: GPT, limit: float) -> LogitTrust:
    return LogitTrust(torch.optim.AdamW(model.parameters()), model, limit)


def adversary(W_Q, W_K, old_Q, old_K):
    """The largest change of a logit (W_Q x)ᵀ(W_K y) / √k for inputs x, y of root mean square 1."""
    change = W_Q.mT @ W_K - old_Q.mT @ old_K
    inputs = math.sqrt(W_Q.shape[-1] * W_K.shape[-1])
    return torch.linalg.matrix_norm(change, 2) * inputs / math.sqrt(W_Q.shape[-2])


@pytest.mark.parametrize("kind", KINDS)
def test_no_logit_of_any_input_moves_further_than_the_limit(kind):
    model = noisy_model(**KINDS[kind])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = trusted(model, 0.5)
    stepped(model, optimizer)
    weights = dict(model.named_parameters())
    for i, block in enumerate(model.blocks):
        moved = []
        for role, heads in (("W_Q", block.attn.n_head), ("W_UK" if kind == "latent" else "W_K", block.attn.n_kv_head)):
            for of in (weights, before):
                W = of[f"blocks.{i}.attn.{role}.weight"].detach().unflatten(0, (heads, -1))
                moved.append(W.repeat_interleave(block.attn.n_head // heads, 0))
        W_Q, old_Q, W_K, old_K = moved
        largest = adversary(W_Q, W_K, old_Q, old_K).max()
        assert 0.01 < largest <= 0.5  # it moves, and by as much as the bound allows up to its looseness
        assert (optimizer.factors[f"blocks.{i}.attn"] < 1).all()


def test_a_heads_whole_step_is_shortened_and_nothing_else():
    model, other = noisy_model(), noisy_model()
    optimizer = trusted(model, 0.5)
    before, after = stepped(model, optimizer)
    _, free = stepped(other, torch.optim.AdamW(other.parameters()))
    for (name, _), old, new, unlimited in zip(model.named_parameters(), before, after, free, strict=True):
        if ".attn.W_" not in name:
            assert torch.equal(new, unlimited), name
            continue
        factor = optimizer.factors[name.partition(".W_")[0]].repeat_interleave(8)
        factor = factor if "W_O" in name else factor[:, None]
        torch.testing.assert_close(new - old, factor * (unlimited - old), atol=1e-7, rtol=1e-4)


def test_a_limit_that_is_not_reached_changes_no_bit():
    model, other = noisy_model(), noisy_model()
    assert all(map(torch.equal, stepped(model, trusted(model, 1e9))[1],
                   stepped(other, torch.optim.AdamW(other.parameters()))[1]))  # fmt: skip


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped():
    model, other = noisy_model(), noisy_model()
    optimizer = trusted(model, 0.5)
    stepped(model, optimizer, 2)
    other.load_state_dict(model.state_dict())
    resumed = trusted(other, 0.5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # else they would share the moments
    assert all(map(torch.equal, stepped(model, optimizer, 2)[1], stepped(other, resumed, 2)[1]))


def test_fused_and_transposed_weights_are_shortened_as_separate_ones():
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=256, n_positions=8)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    attention = model.transformer.h[0].attn
    before = {name: p.detach().clone() for name, p in attention.named_parameters()}
    optimizer = LogitTrust(torch.optim.SGD(model.parameters(), lr=1.0), model, 0.01)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    optimizer.step()
    (factor,) = optimizer.factors.values()
    old, step = before["c_attn.weight"].T, -attention.c_attn.weight.grad.T  # (3 · 16, 16): W_Q, W_K, W_V
    W_Q, W_K, _ = old.unflatten(0, (3, 2, 8))
    dW_Q, dW_K, _ = step.unflatten(0, (3, 2, 8))
    norm = torch.linalg.matrix_norm
    bound = 16 / math.sqrt(8) * (norm(dW_Q) * norm(W_K) + norm(W_Q) * norm(dW_K) + norm(dW_Q) * norm(dW_K))
    torch.testing.assert_close(factor, 0.01 / bound)
    rows = factor.repeat_interleave(8)
    torch.testing.assert_close(attention.c_attn.weight.T, old + rows.repeat(3)[:, None] * step)
    torch.testing.assert_close(
        attention.c_proj.weight, before["c_proj.weight"] - rows[:, None] * attention.c_proj.weight.grad
    )


def test_what_it_cannot_limit_is_refused():
    model = noisy_model()
    with pytest.raises(ValueError, match=r"limit = 0: must be above 0"):
        trusted(model, 0)
    rotary = noisy_model(attention="mla", mla_rank=6, mla_rope_dim=4, position="rope")
    with pytest.raises(ValueError, match=r"blocks\.0\.attn: keys with a part that all heads share \(W_KR\)"):
        trusted(rotary, 1.0)
    bare = torch.nn.ModuleDict({"attn": torch.nn.ModuleDict({"W_Q": torch.nn.Linear(8, 8, bias=False)})})
    with pytest.raises(ValueError, match="must have W_Q, W_K and a known number of heads"):
        trusted(bare, 1.0)


def test_a_scheduler_sets_the_rates_of_the_base():
    model = noisy_model()
    optimizer = LogitTrust(torch.optim.AdamW(model.parameters(), lr=1.0), model, 1.0)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert optimizer.base.param_groups[0]["lr"] == 0.5


def test_it_is_announced_and_attention_moves_less(config_file, tmp_path):
    moved, factors = {}, {}
    for limit in (0, 0.01):
        done = here("train.py", config_file, f"--logit_trust={limit}", "--lr=0.02", f"--name={limit}")
        assert done.returncode == 0, done.stderr
        moved[limit] = read_metrics(tmp_path / "runs" / str(limit))[-1]["update_norm/W_Q"]
        factors[limit] = {key: line[key] for line in read_metrics(tmp_path / "runs" / str(limit)) for key in line
                          if key.startswith("trust/")}  # fmt: skip
    assert "plain AdamW; logit_trust: a step moves a logit by at most 0.01 nats" in done.stdout
    assert moved[0.01] < moved[0] / 10
    assert not factors[0] and 0 < factors[0.01]["trust/least"] < factors[0.01]["trust/mean"] < 1


def test_where_it_has_no_bound_it_is_refused(config_file):
    says = "logit_trust = 1.0: must be 0 with qk_norm"
    refused("train.py", config_file, "--logit_trust=1", "--qk_norm=true", says=says)


def test_it_is_announced_beside_msign():
    cfg = small(msign_period=5, logit_trust=0.5)
    said = intervention(cfg, build_optimizer(cfg, GPT(cfg)))
    assert said.startswith("MSign every 5 steps") and said.endswith("a step moves a logit by at most 0.5 nats")


def factors_of_example(wrapper: str) -> torch.Tensor:
    """The factors after a step of docs/extending.md's lines with this wrapper, around the model of README's example."""
    text = (ROOT / "docs" / "extending.md").read_text()
    example = re.search(rf"(?:^    .*\n|^\n)*^    .*{wrapper}\(.*\n", text, re.M).group()
    assert f" import {wrapper}\n" in example
    model = torch.nn.TransformerEncoderLayer(64, 4, 256)
    known = {"torch": torch, "model": model}
    exec(textwrap.dedent(example), known)
    model(torch.randn(10, 2, 64)).square().mean().backward()
    known["optimizer"].step()
    (factors,) = known["optimizer"].factors.values()
    return factors


def test_the_example_of_the_documentation_runs():
    assert factors_of_example("LogitTrust").shape == (4,)
