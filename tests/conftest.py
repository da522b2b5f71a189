"""Shared helpers: small configurations, corpora on disk, and train.py in a subprocess."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import mup
from config import Config
from model import GPT

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)

SMALL = dict(
    n_layer=2, d_model=16, n_head=2, d_ff=64, vocab_size=256, block_size=8, batch_size=4, micro_batch=4,
    max_steps=20, warmup_steps=5, probe_every=5, layers_every=10, eval_every=10, eval_batches=2, ckpt_every=5, wandb="off", threads=1,
)  # fmt: skip


@pytest.fixture(autouse=True)
def default_arithmetic():
    """What machine.set_arithmetic chooses holds for the whole process; no test leaves it to the next."""
    yield
    torch.set_flush_denormal(False)
    torch.backends.mkldnn.matmul.fp32_precision = "none"


def small(**overrides) -> Config:
    return Config(**{**SMALL, **overrides})


def noisy_model(**overrides) -> GPT:
    """A small model none of whose parameters is at its initial zero or one."""
    cfg = small(**overrides)
    model = GPT(cfg)
    mup.init_weights(model, cfg)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


@pytest.fixture
def corpus(tmp_path):
    """A folder with train.bin and val.bin of bytes that follow a pattern a small model can learn a little of."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, n in (("train", 5000), ("val", 1000)):
        steps = rng.integers(0, 4, n)
        (np.cumsum(steps) % 256).astype(np.uint16).tofile(folder / f"{split}.bin")
    return folder


@pytest.fixture
def config_file(tmp_path, corpus):
    """A config file of the small run on that corpus, recorded below tmp_path/runs."""
    lines = [f"{k} = {v!r}" for k, v in {**SMALL, "dataset": str(corpus), "runs_dir": str(tmp_path / "runs")}.items()]
    path = tmp_path / "small.py"
    path.write_text("\n".join(lines) + "\n")
    return path


def command(*args) -> list[str]:
    return [sys.executable, str(ROOT / args[0]), *map(str, args[1:])]


def run(*args, cwd=ROOT, timeout=300, **env) -> subprocess.CompletedProcess:
    """A script of the repository as a user would call it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(command(*args), cwd=cwd, capture_output=True, text=True, timeout=timeout, env=environment)


def refused(*args, says: str, **kwargs):
    """Assert that the call exits with code 2 and one line on stderr that contains `says`."""
    done = run(*args, **kwargs)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert says in done.stderr, done.stderr
