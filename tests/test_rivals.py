import json
import math

import numpy as np
import pytest
import torch

import mup
from config import FIELDS, UserError
from engine import checkpoint
from model import GPT
from msign import MSign
from remedies import rivals
from tests.conftest import refused, run, small

NAMES = FIELDS["optimizer"].type.__args__


def model_and(name):
    cfg = small(optimizer=name)
    model = GPT(cfg)
    mup.init_weights(model, cfg)
    return model, rivals.build(cfg, mup.param_groups(model, cfg), model)


def test_every_name_has_an_optimizer():
    assert set(NAMES) == set(rivals.WHOLE) | set(rivals.MATRICES)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_in_one_group_with_adamws_rate_and_decay(name):
    model, optimizer = model_and(name)
    want = {id(p): (g["lr_mult"], g["weight_decay"]) for g in mup.param_groups(model, small()) for p in g["params"]}
    got = [(id(p), (g["lr_mult"], g["weight_decay"])) for g in optimizer.param_groups for p in g["params"]]
    assert len(got) == len(want) and dict(got) == want


@pytest.mark.parametrize("name", ["muon", "spectral_sphere"])
def test_matrices_of_the_blocks_and_no_others_are_orthogonalised(name):
    model, optimizer = model_and(name)
    first = {id(p) for g in optimizer.parts[0].param_groups for p in g["params"]}
    assert first == {id(p) for n, p in model.named_parameters() if ".W_" in n}


@pytest.mark.parametrize("name", NAMES)
def test_a_step_lowers_the_loss_and_respects_the_rate(name):
    model, optimizer = model_and(name)
    x = torch.arange(32).view(4, 8)
    losses = []
    for step in range(30):
        for group in optimizer.param_groups:
            group["lr"] = group["lr_mult"] * (0.0 if step == 0 else 1e-3)
        before = [p.detach().clone() for p in model.parameters()]
        loss = model(x, x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        moved = any(not torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))
        assert moved == (step > 0)
    assert math.isfinite(losses[-1]) and losses[-1] < losses[0] - 0.5


def steps(model, optimizer, first, last):
    for step in range(first, last):
        x = torch.randint(256, (4, 8), generator=torch.Generator().manual_seed(step))
        model(x, x).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_in_between_changes_no_bit(name, tmp_path):
    model, optimizer = model_and(name)
    steps(model, optimizer, 0, 3)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    checkpoint.save(tmp_path, 3, state | {"architecture": {}, "metrics_bytes": 0})
    steps(model, optimizer, 3, 6)
    other, resumed = model_and(name)
    checkpoint.load(checkpoint.checkpoints(tmp_path)[0], {}, other, resumed)
    steps(other, resumed, 3, 6)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_zclip_sees_the_whole_gradient_and_clips_what_stands_out(config_file, tmp_path):
    model, optimizer = model_and("zclip")
    rng = np.random.default_rng(0)
    for norm in [*(0.5 + 0.01 * rng.standard_normal(40)), 100.0]:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        total = sum(p.numel() for p in model.parameters()) ** 0.5
        for p in model.parameters():
            p.grad *= norm / total
        optimizer.step()
    clipped = sum(p.grad.square().sum().item() for p in model.parameters()) ** 0.5
    assert 0.49 < clipped < 0.56
    run("train.py", config_file, "--optimizer=zclip", "--grad_clip=0.001", "--name=x")
    folder = tmp_path / "runs" / "x"
    norms = [json.loads(line)["grad_norm"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    state = torch.load(next(folder.glob("ckpt*")), weights_only=True)["optimizer"]["zclip"]
    assert state["buffer"] == pytest.approx(norms, rel=1e-4) and min(norms) > 0.01  # not what train.py clipped


def test_msign_works_on_top_of_several_optimizers():
    model, base = model_and("muon")
    optimizer = MSign(base, model, period=1, targets="W_V")
    model(torch.arange(8)[None], torch.arange(8)[None]).backward()
    optimizer.step()
    s = torch.linalg.svdvals(model.blocks[0].attn.W_V.weight)
    torch.testing.assert_close(s, s[:1].expand(16), rtol=1e-4, atol=0)


def test_what_does_not_go_together_is_refused(config_file):
    for way in ("fsdp", "hsdp"):
        with pytest.raises(UserError, match=f"parallel = '{way}': must be ddp or auto with optimizer='muon'"):
            small(optimizer="muon", parallel=way)
    refused("train.py", config_file, "--optimizer=adam", says="optimizer = 'adam': must be one of")
