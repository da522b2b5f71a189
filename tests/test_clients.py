"""clients/: nanoGPT and the Trainer of transformers as they are, with MSign in their training."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import clients.trainer
from analysis import report
from clients import nanogpt
from clients.record import Record
from config import Config, UserError, load_config
from data.reader import corpus_dir
from data.stdlib import prepare
from engine.grid import points, read_grid
from engine.runlog import read_metrics
from msign import ATTENTION, find
from stability.collapse import RISE
from tests.conftest import ROOT, refused, run

SHORT = ["--max_steps=20", "--warmup_steps=10", "--msign_period=10", "--probe_every=10", "--wandb=off", "--threads=1"]
README, PAGE = (" ".join((ROOT / page).read_text().split()) for page in ("README.md", "docs/extending.md"))
PYTHON = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    """An unmodified nanoGPT; the tests that need one are skipped unless NANOGPT says where it is to be had."""
    if "NANOGPT" not in os.environ:
        pytest.skip(f"nanoGPT is not here: set NANOGPT to a git folder or URL, such as {nanogpt.SOURCE}")
    return nanogpt.checkout(tmp_path_factory.mktemp("nanogpt"))


def short(name: str, folder: Path, *more: str) -> Config:
    return load_config([f"configs/clients/{name}.py", f"--runs_dir={folder}", *SHORT, *more])


def is_restored(W: torch.Tensor) -> bool:
    """Whether all singular values of a matrix are equal."""
    s = torch.linalg.svdvals(W.detach().double())
    return bool(s[-1] > (1 - 1e-4) * s[0])


def client(name: str, folder: Path, *more: str) -> subprocess.CompletedProcess:
    """The run; nanoGPT's in a process in which our `model` is not imported yet: it has one of that name."""
    words = ["scripts/client.py", f"configs/clients/{name}.py", f"--runs_dir={folder}", *SHORT, "--resume", *more]
    if name != "nanogpt":
        return run(*words)
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=PYTHON, capture_output=True, text=True)


def snippet(first: str) -> str:
    """The indented block of code in docs/extending.md that begins with this line."""
    page = (ROOT / "docs" / "extending.md").read_text()
    return textwrap.dedent(re.search(rf"^    {first}\n(?:(?:    .*)?\n)*", page, re.M).group()).strip() + "\n"


def equal_to_four_digits(lines: list[dict], said: str) -> bool:
    """Whether the losses of a record are those that nanoGPT printed."""
    printed = re.findall(r"iter \d+: loss ([\d.]+)", said)
    return [f"{line['train/loss']:.4f}" for line in lines] == printed


def test_the_ten_lines_of_the_page_replace_the_thirds_of_nanogpts_fused_weights(checkout, tmp_path):
    lines = snippet("import runpy")
    assert len(lines.splitlines()) <= 10
    nanogpt.write_text(corpus_dir(prepare("stdlib-bytes")), 256, tmp_path)
    lines = lines.replace("period=100", "period=10").replace("runpy.run_path", "left = runpy.run_path")
    lines += """
for block in left["model"].transformer.h:
    torch.save([*block.attn.c_attn.weight.data.chunk(3), block.attn.c_proj.weight.data, block.mlp.c_fc.weight.data],
               f"{left['out_dir']}/{id(block)}.pt")
"""
    program = checkout / "train_msign.py"
    program.write_text(f"import torch\n{lines}")
    words = [sys.executable, program, *nanogpt.arguments(short("nanogpt", tmp_path), tmp_path, tmp_path)]
    done = subprocess.run(words, cwd=checkout, env=PYTHON, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    blocks = [torch.load(path, weights_only=True) for path in tmp_path.glob("*.pt")]
    assert len(blocks) == short("nanogpt", tmp_path).n_layer
    for *attention, c_fc in blocks:
        # the sign of the fused weight would leave its thirds with unequal singular values
        assert [is_restored(W) for W in attention] == [True] * 4 and not is_restored(c_fc)


def test_the_record_of_nanogpt_has_the_losses_that_it_prints_without_us(checkout, tmp_path):
    """Seed 0 is nanoGPT's own; logging, hooks and measuring change nothing."""
    options = ["--msign_period=0", "--name=plain"]
    nanogpt.write_text(corpus_dir(prepare("stdlib-bytes")), 256, tmp_path)
    words = nanogpt.arguments(short("nanogpt", tmp_path, *options), tmp_path, tmp_path) + ["--log_interval=1"]
    alone = subprocess.run(
        [sys.executable, "train.py", *words], cwd=checkout, env=PYTHON, capture_output=True, text=True
    )
    for seed in (0, 1):
        done = client("nanogpt", tmp_path, *options, f"--seed={seed}", f"--name=seed{seed}")
        assert done.returncode == 0, done.stderr
        assert equal_to_four_digits(read_metrics(tmp_path / f"seed{seed}"), alone.stdout) == (seed == 0)


def test_a_changed_nanogpt_is_refused(checkout, tmp_path):
    copy = nanogpt.checkout(tmp_path)
    (copy / "train.py").write_text("print()")
    with pytest.raises(UserError, match=r"^NANOGPT = .*files were changed\)$"):
        nanogpt.checkout(tmp_path)


def test_what_is_no_nanogpt_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOGPT", str(tmp_path / "none"))
    refused("scripts/client.py", "configs/clients/nanogpt.py", f"--runs_dir={tmp_path}", says="NANOGPT = ", call=run)
    refused("scripts/client.py", "configs/stress_ramp.py", says="one of nanogpt, gpt2, llama", call=run)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_trainer_replaces_the_matrices_of_attention(name, tmp_path):
    cfg = short(name, tmp_path)
    trainer = clients.trainer.build_trainer(cfg, clients.trainer.Rows(Record(cfg, {}).tokens), str(tmp_path))
    trainer.train()
    matrices = find(trainer.model, "blocks")
    assert len(matrices) == {"gpt2": 4, "llama": 7}[name] * cfg.n_layer
    for target in matrices.values():
        for role, W in target.matrices().items():
            assert is_restored(W) == (role in ATTENTION)
    logged = trainer.state.log_history
    assert [line["step"] for line in logged if "loss" in line] == list(range(1, 21))
    assert [line["step"] for line in logged if "srank/attention" in line] == [10, 20]


def test_a_run_is_recorded_once_and_anew_after_it_was_cut(tmp_path):
    folder = tmp_path / "llama"
    assert client("llama", tmp_path).returncode == 0
    lines = read_metrics(folder)
    assert [line["iter"] for line in lines] == list(range(1, 21))
    cfg = short("llama", tmp_path)
    assert [line["lr"] for line in lines] == pytest.approx([cfg.peak_lr * min(n, 10) / 10 for n in range(20)])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["train/loss"] < lines[0]["train/loss"]

    before = (folder / "metrics.jsonl").read_bytes()
    assert client("llama", tmp_path).returncode == 0 and (folder / "metrics.jsonl").read_bytes() == before
    (folder / "summary.json").unlink()
    (folder / "metrics.jsonl").write_bytes(before[:300])
    assert client("llama", tmp_path).returncode == 0
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert json.loads((folder / "summary.json").read_text())["steps"] == 20


def test_a_grid_may_name_a_program_of_this_repository(tmp_path):
    path = ROOT / "configs" / "sweeps" / "clients.py"
    for point in points(path, read_grid(path, [])):
        assert point.command[1] == str(ROOT / "scripts" / "client.py") and "--program" not in " ".join(point.command)
    grid = tmp_path / "grid.py"
    grid.write_text("config = 'configs/clients/llama.py'\nprogram = 'scripts/none.py'\n")
    with pytest.raises(UserError, match=r"^program = 'scripts/none.py': must be a file"):
        read_grid(grid, [])


def test_the_recorded_runs_are_those_of_the_protocol():
    runs = report.clients()
    assert {*runs.groupby("panel")["seed"].agg(tuple)} == {(0, 0, 0, 1, 1, 1, 2, 2, 2)} and len(runs) == 54
    tops = runs.groupby("program", sort=False)["top"].agg(lambda tops: [*tops.unique()]).to_dict()
    double = ["0.05", "0.1"]
    assert tops == {"nanoGPT": double, "Trainer, GPT-2": double, "Trainer, Llama": ["0.025", "0.05"]}
    assert all(not run.code["dirty"] and len(run.steps) == 1100 for run in runs["run"])
    cfg = runs.iloc[0]["run"].config
    said = f"{cfg['n_layer']} blocks of width {cfg['d_model']} and {cfg['n_head']} heads, read {cfg['batch_size']} × "
    said += f"{cfg['block_size']} bytes of"
    assert said in PAGE and "rises linearly from 0 in 800 steps" in PAGE and f"commit {nanogpt.COMMIT[:7]}," in PAGE


def test_the_page_says_what_the_runs_at_the_top_say():
    runs = report.clients().query("lr_scale == 1")
    adamw, msign = (runs[runs["arm"] == arm] for arm in ("AdamW", "MSign (attention)"))
    assert adamw.groupby("program")["collapsed"].sum().tolist() == [2, 2, 2]
    assert (adamw["rise"] >= RISE).all() and "two of three seeds of each program. In all nine runs" in PAGE
    assert msign["collapsed"].tolist() == [False] * 9 and "There MSign collapses in none of nine runs" in PAGE
    assert adamw["collapsed"].sum() == 6 and "AdamW collapses in 6 of 9 runs and MSign in 0 of 9" in README

    losses = runs.pivot(index=["program", "seed"], columns="arm", values="loss")
    below = losses["AdamW"] - losses["MSign (attention)"]
    others, llama = msign[msign["program"] != "Trainer, Llama"], msign[msign["program"] == "Trainer, Llama"]
    assert (below[["nanoGPT", "Trainer, GPT-2"]] > 0).all() and others["rescued"].all()
    assert (below["Trainer, Llama"] < 0).tolist() == (llama["rise"] >= RISE).tolist() == [True, True, False]
    assert (others["rise"] < RISE).all() and "With two of three seeds its own mean loss rises by 0.1 nats" in PAGE
    assert others["loss"].min() > 2.09 and "2.08 and 2.09, lower than all runs of MSign" in PAGE


def test_the_page_says_what_the_runs_at_twice_the_top_say():
    runs = report.clients().query("lr_scale == 2")
    adamw, msign = (runs[runs["arm"] == arm] for arm in ("AdamW", "MSign (attention)"))
    assert adamw["collapsed"].sum() == 8 and "AdamW collapses in eight of nine runs" in PAGE
    assert msign["collapsed"].sum() == 5 and "AdamW collapses in 8 of 9 and MSign in 5 of 9" in README
    others, llama = msign[msign["program"] != "Trainer, Llama"], msign[msign["program"] == "Trainer, Llama"]
    assert llama["rescued"].all() and "In Llama MSign rescues attention with every seed" in PAGE
    fell = adamw.loc[adamw["program"] != "Trainer, Llama", "fell_at"]
    assert others["collapsed"].sum() == 5 and fell.max() < 500 < others["fell_at"].min()
    assert not others["rescued"].any() and "it collapses in five of six runs, after step 500" in PAGE
    off = runs[runs["arm"] == "attention off"]
    assert off.groupby("program")["collapsed"].sum().to_dict() == {
        "Trainer, GPT-2": 1,
        "Trainer, Llama": 0,
        "nanoGPT": 0,
    }
