"""karpathy/nanoGPT, unmodified, at a pinned commit, as a client.

Its train.py runs as a script with its own command line. Ours is around it: the method that makes the optimizer is
wrapped, the gradient norm is noted where train.py clips it, and the loss by a hook on the model. train.py seeds PyTorch
with 1337; a run of seed s is seeded with 1337 + s.
"""

import os
import pickle
import runpy
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from unittest.mock import patch

import torch

from clients.record import Record, with_msign
from config import Config, UserError
from msign import NonFiniteWeightError
from stability.monitor import Monitor

COMMIT = "3adf61e154c3fe3fca428ad6bc3818b27a3b8291"
SOURCE = "https://github.com/karpathy/nanoGPT"


def checkout(folder: Path) -> Path:
    """nanoGPT at COMMIT below `folder`, cloned from the git folder or URL in the variable NANOGPT, else from GitHub.

    Raises UserError if it cannot be had, or if a file of an earlier clone was changed.
    """
    target, source = (folder / f"nanoGPT-{COMMIT[:7]}").absolute(), os.environ.get("NANOGPT", SOURCE)

    def git(*words: str):
        done = subprocess.run(["git", *words], capture_output=True, text=True, env=quiet)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["files were changed"])[-1]
            raise UserError(f"NANOGPT = {source!r}: must be a git folder or URL with commit {COMMIT[:7]} ({said})")

    quiet = os.environ | {"GIT_TERMINAL_PROMPT": "0"}
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            git("clone", "--quiet", source, f"{scratch}/clone")
            git("-C", f"{scratch}/clone", "checkout", "--quiet", COMMIT)
            with suppress(OSError):  # another run has just put it there
                Path(scratch, "clone").rename(target)
    git("-C", str(target), "diff", "--exit-code", "--quiet", COMMIT)
    return target


def arguments(cfg: Config, dataset: Path, out: Path) -> list[str]:
    """The command line of nanoGPT's train.py that trains `cfg` on the text in the folder `dataset`."""
    values = {
        "device": "cpu", "dtype": "float32", "compile": False, "dataset": dataset, "out_dir": out,
        "n_layer": cfg.n_layer, "n_head": cfg.n_head, "n_embd": cfg.d_model, "block_size": cfg.block_size,
        "batch_size": cfg.batch_size, "gradient_accumulation_steps": 1,
        "max_iters": cfg.max_steps - 1,  # train.py takes one more
        "warmup_iters": cfg.warmup_steps, "lr_decay_iters": max(cfg.max_steps, cfg.warmup_steps + 1),
        "learning_rate": cfg.peak_lr, "min_lr": cfg.peak_lr,  # a decay to the peak: the rate stays
        "beta1": cfg.beta1, "beta2": cfg.beta2, "weight_decay": cfg.weight_decay, "grad_clip": cfg.grad_clip,
        "eval_interval": cfg.max_steps, "eval_iters": 1,  # one evaluation, which train.py cannot do without
        "log_interval": 100,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in values.items()]


def write_text(tokens: Path, vocab_size: int, folder: Path):
    """A corpus of ours in nanoGPT's form: train.bin, val.bin and meta.pkl."""
    for name in ("train.bin", "val.bin"):
        (folder / name).symlink_to(tokens.absolute() / name)
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))


class Client:
    """What is put around nanoGPT's functions, for one run."""

    def __init__(self, cfg: Config, record: Record):
        self.cfg, self.record, self.loss, self.grad_norm = cfg, record, None, None

    def configure_optimizers(self, original):
        def wrapped(model, *settings):
            optimizer = with_msign(original(model, *settings), model, self.cfg)
            monitor = Monitor(model, every=self.cfg.probe_every, warn=print)
            model.register_forward_hook(self.note_loss)
            optimizer.register_step_post_hook(lambda *_: self.log(optimizer, monitor))
            return optimizer

        return wrapped

    def note_loss(self, model, _, output):
        if model.training:
            self.loss = output[1].item()

    def clip(self, original):
        def wrapped(*settings):
            self.grad_norm = original(*settings)
            return self.grad_norm

        return wrapped

    def log(self, optimizer, monitor: Monitor):
        report = monitor.step(self.loss, self.grad_norm)
        self.record.step(report["loss"], report["grad_norm"], optimizer.param_groups[0]["lr"], report)


def train(cfg: Config):
    """Train `cfg` by nanoGPT's train.py and record the run."""
    nanogpt = checkout(Path(cfg.runs_dir))
    record = Record(cfg, {"name": "nanoGPT", "commit": COMMIT})
    if record.finished:
        return
    sys.path.insert(0, str(nanogpt))
    from model import GPT

    client, seeded, clipped = Client(cfg, record), torch.manual_seed, torch.nn.utils.clip_grad_norm_
    stopped = None
    with tempfile.TemporaryDirectory() as folder, ExitStack() as patches:
        write_text(record.tokens.folder, cfg.vocab_size, Path(folder))
        for place, name, value in (
            (GPT, "configure_optimizers", client.configure_optimizers(GPT.configure_optimizers)),
            (torch.nn.utils, "clip_grad_norm_", client.clip(clipped)),
            (torch, "manual_seed", lambda seed: seeded(seed + cfg.seed)),
            (sys, "argv", ["train.py", *arguments(cfg, Path(folder), Path(folder))]),
        ):
            patches.enter_context(patch.object(place, name, value))
        patches.callback(os.chdir, Path.cwd())
        os.chdir(nanogpt)  # train.py reads configurator.py from there
        try:
            runpy.run_path("train.py", run_name="__main__")
        except NonFiniteWeightError as error:
            stopped = error
    record.end(stopped)
