import math
from dataclasses import replace

import pytest
import torch

import mup
from config import ROOT, Config, load_config
from model import GPT
from tests.conftest import small


def test_initial_deviations_and_rates_are_table_4():
    cfg = load_config([f"{ROOT}/configs/nano_5m_adamw.py"])
    model = GPT(cfg)
    mup.init_weights(model, cfg)
    group_of = {id(p): g for g in mup.param_groups(model, cfg) for p in g["params"]}
    depth = math.sqrt(48)
    table_4 = {  # role: std, learning-rate multiplier, decay
        "tok_emb": (0.02, 4, 0.1), "pos_emb": (0.02, 4, 0.1), "head": (0.02, 1, 0.1),
        "W_Q": (0.0, 16, 0.1), "W_K": (0.08, 16, 0.1), "W_V": (0.08, 16, 0.1), "W_O": (0.08 / depth, 16, 0.1),
        "W_up": (0.08, 16, 0.1), "W_down": (0.08 / depth, 16, 0.1),
        "attn_norm": (None, 1, 0.0), "mlp_norm": (None, 1, 0.0), "final_norm": (None, 1, 0.0),
    }  # fmt: skip
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == 24 * 8 + 4
    for name, p in model.named_parameters():
        std, mult, decay = table_4[mup.role_of(name)]
        group = group_of[id(p)]
        assert (group["lr_mult"], group["weight_decay"]) == (mult, decay), name
        assert group["lr"] == pytest.approx(6e-4 * mult)
        if std is None:
            assert torch.equal(p, torch.ones_like(p))
        else:
            tolerance = 5 * std / math.sqrt(2 * p.numel())  # five standard errors of a standard deviation
            assert abs(p.std().item() - std) <= tolerance, name
            assert abs(p.mean().item()) <= 5 * std / math.sqrt(p.numel()), name


def test_every_parameter_is_in_one_group():
    cfg = small()
    model = GPT(cfg)
    grouped = [id(p) for g in mup.param_groups(model, cfg) for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_a_parameter_without_a_role_is_named():
    cfg = small()
    model = GPT(cfg)
    model.blocks[1].attn.W_X = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.W_X\.weight: 0 roles"):
        mup.param_groups(model, cfg)
    with pytest.raises(ValueError, match="2 roles"):
        mup.role_of("head.W_Q.weight")


def test_initial_values_depend_on_seed_and_name_alone():
    a, b, c = GPT(small()), GPT(small(n_layer=3)), GPT(small(seed=1))
    for model in (a, b, c):
        mup.init_weights(model, model.cfg)
    assert torch.equal(a.tok_emb.weight, b.tok_emb.weight)
    assert torch.equal(a.blocks[1].attn.W_K.weight, b.blocks[1].attn.W_K.weight)
    assert not torch.equal(a.tok_emb.weight, c.tok_emb.weight)
    assert not torch.equal(a.blocks[0].attn.W_K.weight, a.blocks[1].attn.W_K.weight)


@pytest.mark.parametrize("coupling", ["coupled", "independent"])
def test_decay_of_one_step(coupling):
    """With a zero gradient AdamW only decays: by lr·mult·λ when coupled, by λ·lr/peak when independent."""
    decay = 0.1 if coupling == "coupled" else 1e-4
    cfg = small(schedule="constant", warmup_steps=4, weight_decay=decay, decay_coupling=coupling)
    model = GPT(cfg)
    mup.init_weights(model, cfg)
    optimizer = torch.optim.AdamW(mup.param_groups(model, cfg))
    W, gain = model.blocks[0].mlp.W_up.weight, model.final_norm.weight
    before = W.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["lr"] = cfg.lr_at(2) * group["lr_mult"]  # half way through warm-up
    optimizer.step()
    share = 0.5 * (cfg.peak_lr * 48 * decay if coupling == "coupled" else decay)  # 768 / 16 = 48
    torch.testing.assert_close(W.detach(), before * (1 - share), rtol=1e-6, atol=0)
    assert torch.equal(gain, torch.ones_like(gain))


CHECK = Config(vocab_size=64, block_size=16, batch_size=4, micro_batch=4, n_layer=3, d_model=48, n_head=6)
WIDTHS = [48, 96, 192, 384]


def slopes(**changes):
    """The steepest slope of an activation inside the blocks, and the slopes of the logits at each step."""
    sizes = mup.coordinate_check(replace(CHECK, **changes), WIDTHS, steps=4, seeds=2)
    blocks = [
        mup.width_slope(WIDTHS, per_width)
        for kind in ("attention", "mlp", "residual")
        for per_width in sizes[kind]
        if min(per_width) > 0
    ]
    return max(blocks, key=abs), [mup.width_slope(WIDTHS, per_width) for per_width in sizes["logits"]]


def test_coordinate_check_passes_for_mup_and_fails_without():
    worst, logits = slopes()
    assert abs(worst) < 0.4
    assert max(logits) > 0.4  # the paper states no read-out multiplier, and its logits do grow with width
    worst, logits = slopes(embed_lr_power=0.0, logit_power=1.0, attn_scale_power=1.0)
    assert abs(worst) < 0.4
    assert max(logits) < 0.1
    worst, _ = slopes(base_width=0)
    assert worst > 0.8


@pytest.mark.parametrize("field, roles", [
    ("attn_lr", "W_Q W_K W_V W_O W_DKV W_UK W_UV W_KR"), ("head_lr", "head"),
    ("norm_lr", "attn_norm mlp_norm final_norm kv_norm q_norm k_norm"),
])  # fmt: skip
def test_attention_norms_and_read_out_have_rates_of_their_own(field, roles):
    plain, slow = small(), small(**{field: 0.1})
    for role in mup.RULES:
        scale = 0.1 if role in roles.split() else 1
        assert mup.lr_mult(role, slow) == pytest.approx(mup.lr_mult(role, plain) * scale)
