import dataclasses
import re

import pytest

from config import FIELDS, ROOT, Config, UserError, load_config, up_to_date
from tests.conftest import refused, run, small


def write(tmp_path, text):
    path = tmp_path / "experiment.py"
    path.write_text(text)
    return str(path)


def test_file_then_command_line(tmp_path):
    cfg = load_config([write(tmp_path, "lr = 1e-3\nn_layer = 3  # why\n"), "--n_layer=5", "--lr=2", "--dry_run"])
    assert (cfg.lr, cfg.n_layer, cfg.dry_run, cfg.name) == (2.0, 5, True, "experiment")
    assert load_config([write(tmp_path, "dry_run = True"), "--dry_run=false"]).dry_run is False


@pytest.mark.parametrize(
    ("text", "args", "says"),
    [
        ("lrr = 1.0", [], "'lrr': no such field"),
        ("lrr = 1.0", [], "nearest is lr"),
        ("n_layer = 2.0", [], "n_layer = 2.0: must be a whole number"),
        ("n_layer = True", [], "n_layer = True: must be a whole number"),
        ("schedule = 'cosine'", [], "must be one of linear, constant"),
        ("lr = float('nan')", [], "lr = nan: must be a number above 0"),
        ("lr = float('inf')", [], "lr = inf: must be a number of 1.17549e-38 to 3.40282e+38"),
        ("n_layer = 10**9999", [], "n_layer = 2^33215…: must be a whole number of 1 to 9.22337e+18"),
        ("threads = 9999", [], "threads = 9999: must be a whole number of 0 to 1024"),
        ("logit_power = 100", [], "logit_power = 100: must be a power of 16 that float32 holds, such as 0"),
        ("name = 'two\\nlines'", [], "must be a string of at most 2000 bytes without control characters"),
        ("lr = ", [], "SyntaxError"),
        ("import os", [], "'os': no such field"),
        ("", ["--max_stps=3"], "nearest is max_steps"),
        ("", ["--max_steps=1e3"], "max_steps = '1e3': must be a whole number"),
        ("", ["--max_steps"], "expected one argument"),
        ("", ["--dry_run=maybe"], "dry_run = 'maybe': must be True or False"),
        ("", ["--n_head=5"], "n_head = 5: must be a divisor of d_model=48, such as 4"),
        ("", ["--micro_batch=7"], "micro_batch = 7: must be a divisor of batch_size=480"),
        ("", ["--lr=-1"], "lr = -1.0: must be a number above 0"),
        ("", ["--name=../elsewhere"], "must be a single folder name"),
        ("", ["--decay_coupling=independent"], "weight_decay = 0.1: must be below 0.01, such as 1e-4"),
        ("", ["--layers_every=30"], "layers_every = 30: must be a multiple of probe_every=50"),
        ("", ["--beta2=1"], "beta2 = 1.0"),
        ("", ["--profile=5"], "profile = '5': must be START:STOP with 1 ≤ START ≤ STOP ≤ max_steps=50000"),
        ("", ["--profile=0:5"], "profile = '0:5': must be START:STOP"),
        ("", ["--profile=7:5"], "profile = '7:5': must be START:STOP"),
        ("", ["--profile=1:9", "--max_steps=8"], "profile = '1:9': must be START:STOP"),
        ("", ["stray"], "overrides are written --field=value"),
    ],
)
def test_bad_input_is_named(tmp_path, text, args, says):
    with pytest.raises(UserError) as error:
        load_config([write(tmp_path, text), *args])
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_input_at_the_command(tmp_path):
    refused("train.py", "configs/nano_5m_msgn.py", says="nearest is configs/nano_5m_msign.py")
    refused("train.py", "configs/nano_5m_msign.py", "--n_heads=6", says="nearest is n_head")


def test_help_is_one_screen_with_every_field_and_its_default():
    text = run("train.py", "--help", COLUMNS="120").stdout
    assert len(text.splitlines()) <= 24
    words = text.split()
    for f in dataclasses.fields(Config):
        assert f"{f.name}={f.default}" in words
        assert re.search(rf"^{f.metadata['group']} ", text, re.MULTILINE)
    assert max(map(len, run("train.py", "--help", COLUMNS="80").stdout.splitlines()[3:])) <= 80


def test_help_says_what_a_field_means():
    text = run("train.py", "--help=all").stdout
    for f in dataclasses.fields(Config):
        assert f"--{f.name} " in text
        assert f"[{f.default}]" in " ".join(text.split())
    group, field = (run("train.py", f"--help={what}").stdout for what in ("MSign", "beta1"))
    assert "--msign_period INT" in group and "--beta1" not in group
    assert "AdamW β₁ [0.9]" in field and "--msign_period" not in field
    refused("train.py", "--help=beta_1", says="help = 'beta_1': no such group or field; nearest is beta1")


def test_every_config_file_loads():
    files = sorted(ROOT.glob("configs/*.py"))
    assert len(files) >= 4
    for path in files:
        load_config([str(path)])


def test_nano_5m_is_table_4():
    adamw, msign = (load_config([f"{ROOT}/configs/nano_5m_{arm}.py"]) for arm in ("adamw", "msign"))
    assert adamw.tokens_per_step == 122_880
    table_4 = dict(
        n_layer=24, d_model=48, n_head=6, d_ff=192, block_size=256, init_std=0.02, lr=6e-4, lr_scale=1.0, beta1=0.9,
        beta2=0.95, eps=1e-8, weight_decay=0.1, grad_clip=1.0, warmup_steps=2000, min_lr_ratio=0.1, schedule="linear",
        msign_period=0, decay_coupling="coupled", embed_lr_power=0.5, logit_power=0.0, attn_scale_power=0.5,
    )  # fmt: skip
    for name, value in table_4.items():
        assert getattr(adamw, name) == value, name
    differing = {k for k, v in dataclasses.asdict(adamw).items() if v != dataclasses.asdict(msign)[k]}
    assert differing == {"msign_period", "name", "wandb_group"}
    assert (msign.msign_period, msign.msign_targets) == (100, "attention")


def test_schedules():
    linear = small(schedule="linear", lr=1.0, lr_scale=2.0, warmup_steps=10, max_steps=110, min_lr_ratio=0.1)
    assert [linear.lr_at(s) for s in (1, 5, 10, 60, 110)] == pytest.approx([0.2, 1.0, 2.0, 1.1, 0.2])
    cut = small(schedule="linear", lr=1.0, warmup_steps=100, max_steps=20)
    assert [cut.lr_at(s) for s in (1, 20)] == pytest.approx([0.01, 0.2])
    constant = small(schedule="constant", lr=1.0, warmup_steps=4, max_steps=100)
    assert [constant.lr_at(s) for s in (1, 4, 5, 100)] == pytest.approx([0.25, 1.0, 1.0, 1.0])
    ramp = small(schedule="constant", lr=0.5, lr_scale=16.0, warmup_steps=100, max_steps=100)
    assert [ramp.lr_at(s) for s in (1, 50, 100)] == pytest.approx([0.08, 4.0, 8.0])


def test_an_older_record_has_todays_fields():
    assert up_to_date({"recompute": True, "n_layer": 3})["recompute"] == 3
    none = up_to_date({"recompute": False, "lr": 1.0})
    assert none["recompute"] == 0 and type(none["recompute"]) is int
    assert none | {"lr": FIELDS["lr"].default} == {name: f.default for name, f in FIELDS.items()}
