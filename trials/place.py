"""A small training run to inject faults into, in its own folder, started in this process or in others."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch

import train
from config import ROOT, UserError, load_config
from engine import checkpoint

CONFIG = """
n_layer = 2; d_model = 16; n_head = 2; d_ff = 64; vocab_size = 256; block_size = 8; batch_size = 4; micro_batch = 2
max_steps = 120; warmup_steps = 5; ckpt_every = 4; msign_period = 7; threads = 1; wandb = "off"
probe_every = 10; layers_every = 20; jacobian_every = 40; eval_every = 10; eval_batches = 2
"""
PATIENCE = 120  # seconds after which a run that should have ended is said to hang


class Place:
    """A folder with a corpus, a configuration, and the reference run "whole", to which nothing happens.

    settings: more lines of the configuration.
    """

    def __init__(self, folder: Path, settings: str = ""):
        self.folder, self.runs, self.corpus = folder, folder / "runs", folder / "corpus"
        self.config = folder / "victim.py"
        self.corpus.mkdir()
        rng = np.random.default_rng(0)
        for split, count in (("train", 5000), ("val", 1000)):
            # each token is the last plus 0 to 3, so that there is something to learn
            (np.cumsum(rng.integers(0, 4, count)) % 256).astype(np.uint16).tofile(self.corpus / f"{split}.bin")
        self.config.write_text(f"{CONFIG}{settings}\ndataset = {str(self.corpus)!r}\nruns_dir = {str(self.runs)!r}\n")
        if self.here("--name=whole"):
            raise UserError("the run that nothing happens to failed; there is nothing to compare with")

    def here(self, *overrides: str) -> str:
        """Train in this process; returns the message if the run is refused, otherwise ''."""
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                train.train(load_config([str(self.config), *overrides]))
        except UserError as error:
            return str(error)
        return ""

    def start(
        self, *overrides: str, victim: tuple = (), processes: int = 1, nodes: int = 1, port: int = 0,
        first: Callable | None = None, **environment,
    ) -> subprocess.Popen:  # fmt: skip
        """Start train.py in new processes.

        victim: arguments of `plan_victim`. nodes: how many calls with one `port` start one run, each with so many
        processes. first: a function that the new process calls before it becomes train.py or, with several processes,
        torchrun.
        """
        script = "scripts/faults.py" if victim else "train.py"
        program = [str(ROOT / script), *(["--victim", *map(str, victim)] if victim else [])]
        if processes > 1:
            launch = f"torch.distributed.run --nnodes={nodes} --nproc_per_node={processes} --rdzv_backend=c10d"
            program = ["-m", *launch.split(), f"--rdzv_endpoint=localhost:{port}", *program]
        return subprocess.Popen(
            [sys.executable, *program, str(self.config), *overrides],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            start_new_session=True,
            preexec_fn=first,
        )

    def of(self, name: str) -> Path:
        """The folder of the run of that name."""
        return self.runs / name

    def steps(self, name: str) -> int:
        """How many steps a run has logged."""
        path = self.of(name) / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def saved(self, name: str) -> int | None:
        """The step of a run's last checkpoint; None without one."""
        found = checkpoint.checkpoints(self.of(name)) if self.of(name).exists() else []
        return checkpoint.step_of(found[-1]) if found else None

    def differs(self, name: str, reference: str = "whole") -> str | None:
        """The first difference of a finished run from `reference`, in metrics, weights or moments; None without one."""
        lines = [(self.of(run) / "metrics.jsonl").read_text().split("\n") for run in (reference, name)]
        if lines[0] != lines[1]:
            same = [one == other for one, other in zip(*lines, strict=False)]
            return f"{name}: metrics differ from line {[*same, False].index(False) + 1} on"
        expected, got = (tensors(self.of(run)) for run in (reference, name))
        if expected.keys() != got.keys():
            return f"{name}: the last checkpoint holds other things"
        different = [key for key, value in expected.items() if not torch.equal(value, got[key])]
        return f"{name}: {different[0]} differs" if different else None


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in a run's last checkpoint, by its name."""
    return checkpoint.tensors_of(checkpoint.checkpoints(folder)[-1])


def wait_until(condition: Callable[[], bool], process: subprocess.Popen):
    """Wait until the condition holds, the process ends, or PATIENCE seconds have passed."""
    deadline = time.time() + PATIENCE
    while not condition() and process.poll() is None and time.time() < deadline:
        time.sleep(0.002)


def children(process: subprocess.Popen) -> list[psutil.Process]:
    """The processes that `process` started; for torchrun, these are the ranks."""
    try:
        return psutil.Process(process.pid).children()
    except psutil.NoSuchProcess:
        return []


def output(process: subprocess.Popen, patience: float = PATIENCE) -> tuple[str, str] | None:
    """What a process wrote to stdout and stderr, or None if it had to be killed for not ending."""
    try:
        return process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None


def refused(process: subprocess.Popen, says: str) -> str | None:
    """None if the process ends with exit code 2 and one line on stderr that contains `says`; otherwise what it did."""
    said = output(process)
    if said is None:
        return f"hangs, instead of {says!r}"
    error = said[1].strip()
    if process.returncode == 2 and len(error.splitlines()) == 1 and says in error:
        return None
    return f"exit {process.returncode}, {error[-200:]!r} instead of {says!r}"
