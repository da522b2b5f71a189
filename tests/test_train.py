import fcntl
import json
import math
import os
import pty
import re
import resource
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from functools import partial

import numpy as np
import pytest
import torch
from torch._inductor import config as inductor_config

import mup
import train
from analysis.runs import load_run
from analysis.statistics import judged
from config import UserError, load_config
from data.reader import TokenFiles
from engine import checkpoint
from engine.signals import Signals
from model import GPT
from tests.conftest import ROOT, refused, run, small, start


def lines_of(folder):
    return (folder / "metrics.jsonl").read_text()


def final_state(folder):
    return torch.load(sorted(folder.glob("ckpt_*.pt"))[-1], weights_only=True)


def assert_same_state(a, b):
    assert a["step"] == b["step"]
    for key in a["model"]:
        assert torch.equal(a["model"][key], b["model"][key]), key
    moments = [list(s["optimizer"]["state"].values()) for s in (a, b)]
    for x, y in zip(*moments, strict=True):
        assert all(torch.equal(x[k], y[k]) for k in x)
    assert a["optimizer"].get("msign") == b["optimizer"].get("msign")


@pytest.fixture
def in_process(config_file, monkeypatch):
    """train.train on the small config with overrides; returns (exit code, run folder)."""

    def go(*overrides):
        cfg = load_config([str(config_file), *overrides])
        return train.train(cfg), ROOT / cfg.runs_dir / cfg.name

    return go


def test_golden_first_step():
    """The first step of the stress test's model on fixed tokens, frozen: a change here changes every result."""
    cfg = load_config([f"{ROOT}/configs/stress_constant.py", "--threads=1"])
    model = GPT(cfg)
    mup.init_weights(model, cfg)
    optimizer = train.build_optimizer(cfg, model)
    for group in optimizer.param_groups:
        group["lr"] = cfg.lr_at(300) * group["lr_mult"]
    x = torch.arange(16 * 33).view(16, 33) * 7 % 256
    losses = []
    for _ in range(2):
        loss = model(x[:, :-1], x[:, 1:])
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    W = model.blocks[3].mlp.W_up.weight
    assert [*losses, grad_norm.item(), W.norm().item()] == pytest.approx([5.55358, 5.54098, 0.71750, 8.21640], rel=2e-4)


def test_a_run_leaves_its_whole_record(in_process):
    code, folder = in_process("--msign_period=7")
    assert code == 0
    record = json.loads((folder / "record.json").read_text())
    assert record["config"]["msign_period"] == 7
    assert record["data"]["fingerprint"].startswith("sha256:")
    assert record["code"]["sha256"]
    assert record["versions"]["torch"] == torch.__version__
    assert record["machine"]["threads"] == 1
    assert record["machine"]["attention_kernel"] == "chunked"
    assert record["machine"]["fp32_matmul"] in ("default", "oneDNN")
    assert record["machine"]["denormals"] in ("flushed", "kept")
    assert record["machine"]["dtype"] == "float32"
    lines = [json.loads(line) for line in lines_of(folder).splitlines()]
    assert [line["iter"] for line in lines] == list(range(1, 21))
    assert all({"train/loss", "grad_norm", "lr"} <= set(line) for line in lines)
    assert [line["iter"] for line in lines if "srank/attention" in line] == [5, 10, 15, 20]
    assert [line["iter"] for line in lines if "val/loss" in line] == [10, 20]
    assert [line["iter"] for line in lines if "srank/1.W_V" in line] == [10, 20]
    roles = [[lines[9][f"{key}/{i}.W_V"] for i in range(2)] for key in ("srank", "sigma1")]
    assert lines[9]["srank/W_V"] == pytest.approx((roles[0][0] * roles[0][1]) ** 0.5, rel=1e-4)
    assert lines[9]["sigma1/W_V"] == pytest.approx((roles[1][0] * roles[1][1]) ** 0.5, rel=1e-4)
    assert lines[9]["srank/early"] > 0
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["collapse"]) == ("finished", 20, None)
    assert [p.name for p in folder.glob("ckpt*")] == ["ckpt_0000020.pt"]


def test_a_gradient_norm_of_zero_is_no_infinity(in_process, corpus):
    """With one token in the vocabulary the loss is 0 whatever the weights."""
    for path in corpus.glob("*.bin"):
        np.zeros(1000, np.uint16).tofile(path)
    _, folder = in_process("--vocab_size=1", "--max_steps=2", "--probe_every=0")
    assert [line["grad_norm"] for line in lines(folder)] == [0, 0]
    assert json.loads((folder / "summary.json").read_text())["max_grad_norm"] == 0


def lines(folder):
    return [json.loads(line) for line in lines_of(folder).splitlines()]


def test_logged_values_are_those_of_a_plain_loop(in_process):
    """Loss, pre-clip gradient norm and learning rate against a loop written without train.py."""
    _, folder = in_process("--grad_clip=0.5")
    cfg = small(grad_clip=0.5)
    data = TokenFiles(json.loads((folder / "record.json").read_text())["config"]["dataset"], "train", 8, 256)
    model = GPT(cfg)
    mup.init_weights(model, cfg)
    optimizer = torch.optim.AdamW(mup.param_groups(model, cfg), betas=(0.9, 0.95), eps=1e-8)
    for line in map(json.loads, lines_of(folder).splitlines()):
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr_at(line["iter"]) * group["lr_mult"]
        x, y = data.batch(0, line["iter"], 4)
        loss = model(x, y)
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        assert line["train/loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert line["lr"] == pytest.approx(cfg.lr_at(line["iter"]))
        for p in model.parameters():
            p.grad *= min(1.0, 0.5 / (norm.item() + 1e-6))
        optimizer.step()
        optimizer.zero_grad()
    assert norm > 0.5  # clipping was at work


def test_accumulation_and_evaluation_do_not_change_the_data(in_process):
    _, whole = in_process("--name=whole")
    _, split = in_process("--name=split", "--micro_batch=1", "--eval_every=3", "--probe_every=1")
    a, b = ([json.loads(line)["train/loss"] for line in lines_of(f).splitlines()] for f in (whole, split))
    assert a == pytest.approx(b, rel=1e-5)


def test_validation_is_of_the_weights_that_the_step_began_with(in_process):
    """Not of those that MSign leaves: right after an application a model is worse than before and soon after."""
    zeroed = ["--msign_period=10", "--msign_map=zero", "--msign_targets=blocks"]
    (_, plain), (_, zeroed) = (
        in_process(f"--name={name}", *more) for name, more in (("plain", []), ("zeroed", zeroed))
    )
    a, b = ([json.loads(line).get("val/loss") for line in lines_of(f).splitlines()] for f in (plain, zeroed))
    assert a[9] == b[9] and a[19] != b[19]


def test_measuring_and_saving_change_nothing(in_process):
    """200 steps with every instrument on and off, MSign and single positions included, end in the same bits."""
    run = ["--max_steps=200", "--msign_period=50"]
    _, noisy = in_process(
        *run, "--name=noisy", "--eval_every=1", "--probe_every=1", "--layers_every=1", "--ckpt_every=20",
        "--jacobian_every=10", "--jacobian_positions=2", "--theory_every=40", "--msign_probe",
    )  # fmt: skip
    _, quiet = in_process(
        *run, "--name=quiet", "--eval_every=0", "--probe_every=0", "--ckpt_every=0", "--jacobian_every=0"
    )
    assert_same_state(final_state(noisy), final_state(quiet))
    of_both = ("iter", "train/loss", "grad_norm", "lr")
    for loud, silent in zip(lines(noisy), lines(quiet), strict=True):
        assert {k: loud[k] for k in of_both} == {k: silent[k] for k in of_both}
        assert set(silent) - {"msign/fallbacks", "msign/matrices"} == set(of_both)


def test_instruments_are_logged_at_their_cadences(in_process):
    _, folder = in_process("--jacobian_every=10", "--jacobian_positions=3", "--theory_every=20")
    logged = lines(folder)
    assert [line["iter"] for line in logged if "attention/max_logit" in line] == [5, 10, 15, 20]
    assert [line["iter"] for line in logged if "grad_norm/1.W_V" in line] == [10, 20]
    assert [line["iter"] for line in logged if "jacobian/sigma1" in line] == [10, 20]
    assert [line["iter"] for line in logged if "theory/4.6/holds" in line] == [20]
    for line in logged:
        if "grad_norm/W_V" in line:
            roles = [v for k, v in line.items() if k.startswith("grad_norm/") and "." not in k]
            assert math.hypot(*roles) == pytest.approx(line["grad_norm"], rel=1e-5)
            assert line["update_norm/W_V"] > 0
            assert 0 <= line["precision/error"] < 1e-4
    last = logged[-1]
    assert math.hypot(last["grad_norm/0.W_V"], last["grad_norm/1.W_V"]) == pytest.approx(
        last["grad_norm/W_V"], rel=1e-4
    )
    for name in ("sigma1", "product", "ratio", "residual", "sigma1/0", "sigma1/1", "alignment/0", "token_sigma1/mean"):
        assert last[f"jacobian/{name}"] >= 0
    assert last["jacobian/alignment"] == pytest.approx(last["jacobian/alignment/0"], rel=1e-4)
    assert last["jacobian/ill_conditioned"] == last["jacobian/ill_conditioned/0"]
    assert last["jacobian/token_sigma1/max"] >= last["jacobian/token_sigma1/mean"]
    # Lemma B.1 and submultiplicativity, on what was logged for this two-block model
    assert last["jacobian/product"] <= 1.05 * last["jacobian/sigma1"] ** 2
    assert "jacobian/alignment/1" not in last


def test_update_norms_are_of_the_whole_step(in_process):
    _, folder = in_process(
        "--max_steps=1", "--probe_every=1", "--layers_every=1", "--msign_period=1", "--msign_targets=W_V"
    )
    cfg = small()
    model = GPT(cfg)
    mup.init_weights(model, cfg)
    after = final_state(folder)["model"]
    (line,) = lines(folder)
    for i in range(2):
        for role, part in (("W_V", "attn"), ("W_up", "mlp")):
            name = f"blocks.{i}.{part}.{role}.weight"
            moved = (after[name] - dict(model.named_parameters())[name]).norm().item()
            assert line[f"update_norm/{i}.{role}"] == pytest.approx(moved, rel=1e-4)


def test_measured_right_before_and_after_msign_on_request(in_process):
    _, folder = in_process("--msign_period=8", "--msign_probe", "--msign_targets=W_V,W_O")
    logged = lines(folder)
    assert [line["iter"] for line in logged if "before_msign/srank/W_V" in line] == [8, 16]
    for line in (logged[7], logged[15]):
        assert line["before_msign/srank/W_V"] < 15
        assert line["after_msign/srank/W_V"] == pytest.approx(16, rel=1e-4)  # of a full-rank 16 × 16 matrix
        assert line["after_msign/srank/W_K"] == line["before_msign/srank/W_K"]
        for key in ("jacobian/alignment", "jacobian/product", "residual/rms"):
            assert line[f"before_msign/{key}"] != line[f"after_msign/{key}"]
    assert not any("_msign" in key for key in logged[8])
    assert [line["iter"] for line in logged if "msign/fallbacks" in line] == [8, 16]


def test_dry_run_writes_nothing(in_process, capsys):
    code, folder = in_process("--dry_run", "--warmup_steps=20")
    assert code == 0
    assert not folder.parent.exists()
    said = capsys.readouterr().out
    for part in (
        "parameters 14,",
        "W_Q 512",
        "a step: 32 tokens = 1 × 4 × 8",
        "FLOPs",
        "memory ≈",
        "warm-up (20 steps) outlasts",
        "plain AdamW",
    ):
        assert part in said, said


@pytest.mark.parametrize("kernel", ["math", "flash"])
def test_kernels_and_autocast_run(in_process, kernel):
    _, folder = in_process(f"--attn_kernel={kernel}", "--dtype=bfloat16", "--max_steps=6", f"--name={kernel}")
    assert json.loads((folder / "summary.json").read_text())["train/loss"] < 6


@pytest.mark.parametrize("what", ["blocks", "whole"])
def test_compiled_equals_eager(in_process, request, what):
    """Blocks by the C++ compiler, in code without vectors, which compiles in half the time; the whole without it."""
    if what == "whole":
        request.getfixturevalue("traced_only")
    measured = ["--max_steps=6", "--jacobian_every=3", "--theory_every=3"]
    _, eager = in_process("--name=eager", *measured)
    with inductor_config.patch({"cpp.vec_isa_ok": False}):  # no vectors, and no trials whether there are any
        _, compiled = in_process("--name=compiled", f"--compile={what}", *measured)
    a, b = ([json.loads(line) for line in lines_of(f).splitlines()] for f in (eager, compiled))
    for name in ("train/loss", "jacobian/sigma1", "theory/4.6/measured/0"):
        both = [[line[name] for line in lines if name in line] for lines in (a, b)]
        assert both[0], name
        assert both[0] == pytest.approx(both[1], rel=1e-3), name
    assert json.loads((compiled / "record.json").read_text())["machine"]["compile"] == what


def test_without_a_compiler_the_run_says_so_and_goes_on_uncompiled(in_process, capsys):
    from torch._inductor import config  # its own `patch`: pytest's would delete the settings afterwards

    torch.compiler.reset()
    with config.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}):
        _, folder = in_process("--compile=blocks", "--max_steps=3", "--seed=5")
    (said,) = re.findall(r"^WARNING COMPILE: 'blocks' failed, running uncompiled: (.*)$", capsys.readouterr().err, re.M)
    assert "No working C++ compiler" in said
    assert json.loads((folder / "summary.json").read_text())["steps"] == 3
    assert "compile" not in json.loads((folder / "record.json").read_text())["machine"]
    assert config.fx_graph_cache  # for the tests after this one


def test_a_value_that_is_not_finite_ends_the_run_in_good_order(in_process):
    code, folder = in_process(
        "--lr=1e18", "--schedule=constant", "--warmup_steps=11", "--grad_clip=0", "--max_steps=40"
    )
    assert code == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "stopped: not finite"
    assert "not finite" in summary["collapse"]["why"]
    assert summary["collapse"]["lr_multiple"] > 0
    events = [json.loads(line)["event"] for line in (folder / "events.jsonl").read_text().splitlines()]
    assert "collapse" in events
    for path in folder.glob("ckpt_*.pt"):
        weights = torch.load(path, weights_only=True)["model"].values()
        assert all(torch.isfinite(w).all() for w in weights)


def test_the_last_healthy_checkpoint_outlives_a_collapse(in_process, monkeypatch):
    for name, value in dict(WINDOW=4, RISE=0.3, STAYS=8).items():
        monkeypatch.setattr(f"stability.collapse.{name}", value)
    losses = []

    def loss_that_rises(self, *batch, loss=GPT.forward):  # a real collapse comes at another step on another processor
        losses.append(loss(self, *batch))
        return losses[-1] + (len(losses) > 30)

    monkeypatch.setattr(GPT, "forward", loss_that_rises)
    _, folder = in_process("--warmup_steps=60", "--max_steps=60", "--ckpt_every=3", "--eval_every=0")
    summary = json.loads((folder / "summary.json").read_text())
    collapse = summary["collapse"]
    assert summary["status"] == "finished"  # a finite collapse is watched to the end
    assert collapse["noticed"] == collapse["step"] + 8
    assert 31 <= collapse["step"] <= 34
    assert collapse["lr_multiple"] == pytest.approx(collapse["step"] / 60)
    healthy = collapse["last_healthy_checkpoint"]
    assert 0 < healthy < collapse["step"]
    assert [p.name for p in sorted(folder.glob("ckpt*"))] == [f"ckpt_{healthy:07}.pt", "ckpt_0000060.pt"]
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "collapse"] == [collapse["step"]]


@pytest.mark.parametrize("msign", ["--msign_period=1", "--msign_period=0"])
def test_a_weight_that_is_not_finite_is_named(in_process, monkeypatch, msign):
    adamw = torch.optim.AdamW.step

    def step_that_breaks(self, closure=None):
        adamw(self, closure)
        with torch.no_grad():
            self.param_groups[2]["params"][2][0, 0] = float("nan")  # blocks.0's W_V

    monkeypatch.setattr(torch.optim.AdamW, "step", step_that_breaks)
    code, folder = in_process(msign, "--ckpt_every=1" if msign.endswith("0") else "--ckpt_every=0")
    assert code == 0
    why = json.loads((folder / "summary.json").read_text())["collapse"]["why"]
    says = "holds a value that is not finite; MSign changed no weight" if msign.endswith("1") else "is not finite"
    assert why == f"blocks.0.attn.W_V.weight {says}"
    assert judged([load_run(folder)]).verdict[0].endswith(f"collapsed at step 1 (0.2x): {why}")
    assert not list(folder.glob("ckpt*"))


def test_killed_at_any_moment_and_resumed_is_bitwise_the_same(config_file, tmp_path):
    """SIGKILL at random moments, again and again, until the run is through; twelve times at most."""
    arguments = [config_file, "--max_steps=80", "--msign_period=7", "--ckpt_every=4"]
    assert run("train.py", *arguments, "--name=whole").returncode == 0
    rng = np.random.default_rng(0)
    folder, kills = tmp_path / "runs" / "killed", 0
    while not (folder / "summary.json").exists():
        process = start("train.py", *arguments, "--name=killed", "--resume")
        before = lines_of(folder) if (folder / "metrics.jsonl").exists() else ""
        deadline = time.time() + 120
        # let it start and get a few steps further before the clock of its death starts
        while process.is_alive() and time.time() < deadline:
            now = lines_of(folder) if (folder / "metrics.jsonl").exists() else ""
            if len(now) > len(before) + 1000:
                break
            before = min(before, now, key=len)
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.15))
        if process.is_alive() and kills < 12:  # a busy machine takes few steps between two kills
            process.kill()
            kills += 1
        process.join()
    assert kills >= 2
    whole = tmp_path / "runs" / "whole"
    assert lines_of(whole) == lines_of(folder)
    assert_same_state(final_state(whole), final_state(folder))


def test_a_signal_of_the_other_kind_changes_nothing_and_a_second_of_one_kind_kills():
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Signals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT and signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        signal.raise_signal(signal.SIGTERM)  # as a pool sends it after Ctrl-C
        assert signals.received == signal.SIGINT and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_first(config_file, tmp_path, number):
    arguments = [config_file, "--max_steps=5000", "--ckpt_every=0", "--eval_every=0"]
    said, metrics = tmp_path / "said", tmp_path / "runs" / "small" / "metrics.jsonl"
    process = start("train.py", *arguments, output=(str(said), os.devnull))
    while not (metrics.exists() and metrics.stat().st_size > 2000):
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number
    assert "go on with --resume" in said.read_text()
    last = json.loads(lines_of(tmp_path / "runs" / "small").splitlines()[-1])["iter"]
    assert final_state(tmp_path / "runs" / "small")["step"] == last
    events = (tmp_path / "runs" / "small" / "events.jsonl").read_text()
    assert signal.Signals(number).name in events


def test_a_resumed_run_keeps_its_validation_set(in_process):
    _, whole = in_process("--max_steps=6")
    _, split = in_process("--max_steps=6", "--name=split", "--micro_batch=2", "--eval_batches=4")
    assert lines(split)[-1]["val/loss"] == pytest.approx(lines(whole)[-1]["val/loss"], rel=1e-5)
    with pytest.raises(UserError, match=r"eval_batches · micro_batch = 4: the run .* was started with 8"):
        in_process("--max_steps=6", "--resume", "--micro_batch=2")
    assert in_process("--max_steps=6", "--resume", "--micro_batch=2", "--eval_batches=4")[0] == 0


def test_bad_input(config_file, corpus, tmp_path):
    runs = tmp_path / "runs"
    assert run("train.py", config_file, "--max_steps=6").returncode == 0
    before = {p: p.stat().st_mtime_ns for p in runs.rglob("*")}
    refused("train.py", config_file, "--max_steps=6", says="exists; go on with --resume or choose another --name")
    refused("train.py", config_file, "--max_steps=6", "--lr=1e-3", "--resume", says="was started with 0.0006")
    refused("train.py", config_file, "--device=cuda:99", "--name=x", says="device = 'cuda:99': not on this machine")
    refused("train.py", config_file, "--vocab_size=200", "--name=x", says="vocab_size = 200")
    refused(
        "train.py", config_file, "--msign_period=5", "--msign_targets=W_X", "--name=x", says="'W_X' matches no matrix"
    )
    refused("train.py", config_file, "--dataset=nowhere", "--name=x", says="dataset = 'nowhere'")
    refused("train.py", config_file, "--name=x", says="micro_batch = 4: times WORLD_SIZE=2 must divide", WORLD_SIZE="2")
    refused("train.py", config_file, "--runs_dir=/proc/nothing", "--name=x", says="runs_dir = '/proc/nothing'")
    assert before == {p: p.stat().st_mtime_ns for p in runs.rglob("*")}


def unfinished(config_file):
    """The folder of a run stopped half way."""
    folder = ROOT / load_config([str(config_file)]).runs_dir / "small"
    assert run("train.py", config_file).returncode == 0
    (folder / "summary.json").unlink()
    return folder


def test_damaged_state_is_refused(config_file, corpus):
    folder = unfinished(config_file)
    path = next(folder.glob("ckpt_*.pt"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-500])
    refused("train.py", config_file, "--resume", says="not a whole checkpoint")
    path.write_bytes(whole)
    metrics = folder / "metrics.jsonl"
    text = metrics.read_text()
    metrics.write_text(text[:100])
    refused("train.py", config_file, "--resume", says="shorter than when the checkpoint of step 20 was written")
    metrics.write_text(text)
    tokens = bytearray((corpus / "train.bin").read_bytes())
    tokens[0] ^= 1
    (corpus / "train.bin").write_bytes(bytes(tokens))
    refused("train.py", config_file, "--resume", says="not the data that")


@pytest.mark.parametrize("kilobytes", [80, 8])
def test_a_full_disk_is_one_line_and_what_was_saved_survives(config_file, tmp_path, kilobytes):
    """A limit on file sizes refuses the checkpoint (170 kB) or already metrics.jsonl, as a full disk would."""
    assert run("train.py", config_file, "--max_steps=60").returncode == 0
    folder = tmp_path / "runs" / "small"
    (folder / "summary.json").unlink()
    first_40 = sum(len(line) + 1 for line in lines_of(folder).splitlines()[:40])
    saved = checkpoint.save(folder, 40, {**final_state(folder), "step": 40, "metrics_bytes": first_40})
    for path in folder.glob("ckpt_*.pt"):
        if path != saved:
            path.unlink()
    before = saved.read_bytes()
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (1000 * kilobytes, 1000 * kilobytes))
    done = run("train.py", config_file, "--max_steps=60", "--resume", first=limit)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert ("File too large" in done.stderr) or ("cannot be written" in done.stderr)
    assert [p.name for p in folder.glob("ckpt*")] == [saved.name]
    assert saved.read_bytes() == before
    assert run("train.py", config_file, "--max_steps=60", "--resume").returncode == 0


def test_fallback_is_loud_and_recorded(tmp_path, config_file, monkeypatch):
    done = run("train.py", config_file, "--dataset=openwebtext-nowhere", "--fallback=stdlib-bytes", "--max_steps=6")
    assert done.returncode == 0, done.stderr
    assert "'openwebtext-nowhere' is not prepared here; training on 'stdlib-bytes' instead" in done.stderr
    folder = tmp_path / "runs" / "small"
    record = json.loads((folder / "record.json").read_text())
    assert record["data"]["folder"] == "stdlib-bytes"
    assert record["data"]["notes"]
    assert "fallback" in (folder / "events.jsonl").read_text()
    assert re.search(
        r"^step 6/6 loss [\d.]+ grad_norm [\d.]+ srank [\d.]+ tokens/s [\d,]+ \d+ s left$", done.stdout, re.M
    )


def test_a_terminal_sees_one_line_that_changes_and_no_scroll(config_file):
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("4H", 24, 140, 0, 0))
    process = start("train.py", config_file, "--max_steps=60", output=(os.ttyname(end), os.ttyname(end)))
    said = b""
    while process.is_alive() or select.select([terminal], [], [], 0)[0]:
        if select.select([terminal], [], [], 0.05)[0]:
            said += os.read(terminal, 4096)
    os.close(terminal)
    os.close(end)
    assert process.exitcode == 0
    lines = said.decode().replace("\r\n", "\n").split("\n")
    (bar,) = (line for line in lines if "/60 [" in line)
    assert bar.count("\r") > 1  # the same line again and again
    for item in ("loss=", "grad_norm=", "srank=", "tokens/s=", "60/60 ["):
        assert item in bar.split("\r")[-1]


def test_a_prepared_corpus_is_preferred_to_the_fallback(in_process, capsys):
    _, folder = in_process("--fallback=stdlib-bytes", "--max_steps=6")
    record = json.loads((folder / "record.json").read_text())
    assert (record["data"]["folder"], record["data"]["notes"]) == ("corpus", [])
    assert "WARNING" not in capsys.readouterr().err


def test_wandb_that_cannot_be_reached_is_announced_and_online_refused(config_file, tmp_path):
    key = dict(WANDB_API_KEY="0" * 40, WANDB_BASE_URL="http://127.0.0.1:9", HOME=str(tmp_path))
    done = run("train.py", config_file, "--wandb=auto", **key)
    assert done.returncode == 0, done.stderr
    assert "W&B cannot be reached" in done.stdout
    assert "wandb offline" in (tmp_path / "runs" / "small" / "events.jsonl").read_text()
    refused("train.py", config_file, "--wandb=online", "--name=x", says="wandb = 'online'", call=run, **key)
    assert not (tmp_path / "runs" / "x").exists()


def test_wandb_offline_gets_the_same_metrics(config_file, tmp_path):
    done = run("train.py", config_file, "--wandb=auto", WANDB_API_KEY="", HOME=str(tmp_path), NETRC="/dev/null")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "small"
    (recorded,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", str(recorded), "--json"]
    said = subprocess.run(inspect, capture_output=True, text=True, timeout=60).stdout
    last = json.loads(lines_of(folder).splitlines()[-1])
    assert "val/loss" in said
    assert str(last["train/loss"]) in said
