"""Shared helpers: small configurations, corpora on disk, and train.py in a subprocess."""

import io
import multiprocessing.util
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import engine.pool
import mup
from config import Config
from model import GPT

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)

SMALL = dict(
    n_layer=2, d_model=16, n_head=2, d_ff=64, vocab_size=256, block_size=8, batch_size=4, micro_batch=4,
    max_steps=20, warmup_steps=5, probe_every=5, layers_every=10, eval_every=10, eval_batches=2, ckpt_every=5,
    wandb="off", threads=1,
)  # fmt: skip


def pytest_configure(config):
    """All temporary files of this run of the tests go to one folder, which is deleted at its end.

    Some programs, such as torchrun, do not delete theirs. Only the code that torch.compile compiled is kept.
    """
    if not hasattr(config, "workerinput"):  # the process that starts the workers, which inherit its environment
        folder = tempfile.mkdtemp(prefix="msign-")
        os.environ["TMPDIR"], tempfile.tempdir = folder, folder
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / ".pytest_cache" / "torchinductor"))
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # with more, processes start that import PyTorch
        multiprocessing.util.Finalize(
            None, shutil.rmtree, (folder, True), exitpriority=-1000
        )  # after multiprocessing has deleted its own folder in there


# the files that take longest, half of the time in each row
SLOW = (
    ("test_parallel", "test_faults", "test_launch", "test_notebooks"),
    ("test_train", "test_readme", "test_sweep", "test_soak"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]):
    """Put one row of SLOW at the head of each half of the tests, with which pytest-xdist begins its two workers.

    Whoever is ready first takes over tests from the end of the other's, which are thus short.
    """
    rows = [[item for item in items if item.path.stem in row] for row in SLOW]
    others = [item for item in items if item not in rows[0] + rows[1]]
    middle = max(0, len(items) // 2 - len(rows[0]))
    items[:] = rows[0] + others[:middle] + rows[1] + others[middle:]


@pytest.fixture(autouse=True)
def default_arithmetic():
    """Undo after each test what machine.set_arithmetic changed, because it changes the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)
    torch.backends.mkldnn.matmul.fp32_precision = "none"


@pytest.fixture
def traced_only(monkeypatch):
    """torch.compile traces and differentiates as ever, but its graphs run as they are: no C++ compiler is called."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def small(**overrides) -> Config:
    return Config(**{**SMALL, **overrides})


def noisy_model(**overrides) -> GPT:
    """A small model with noise on every parameter, so that none is at its initial zero or one."""
    cfg = small(**overrides)
    model = GPT(cfg)
    mup.init_weights(model, cfg)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


@pytest.fixture
def corpus(tmp_path):
    """A folder with train.bin and val.bin: tokens below 256, with a pattern that a small model partly learns."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, n in (("train", 5000), ("val", 1000)):
        steps = rng.integers(0, 4, n)
        (np.cumsum(steps) % 256).astype(np.uint16).tofile(folder / f"{split}.bin")
    return folder


@pytest.fixture
def config_file(tmp_path, corpus):
    """A config file of a run with SMALL on `corpus`; the run is recorded below tmp_path/runs."""
    lines = [f"{k} = {v!r}" for k, v in {**SMALL, "dataset": str(corpus), "runs_dir": str(tmp_path / "runs")}.items()]
    path = tmp_path / "small.py"
    path.write_text("\n".join(lines) + "\n")
    return path


def command(*args) -> list[str]:
    return [sys.executable, str(ROOT / args[0]), *map(str, args[1:])]


# importing PyTorch takes longer than most tests: each pytest worker has a server that imports it once and is forked
FORKS = multiprocessing.get_context("forkserver")
RUN = subprocess.run
# the first optimizer imports torch._dynamo, which takes four times as long as a run of a test
FORKS.set_forkserver_preload(["tests.conftest", "train", "analysis.figures", "torch._dynamo"])


def _as_script(words: list[str], cwd: str, env: dict[str, str], output: tuple[str | int, str | int], first=None):
    """Do in the forked process what `python words` does; output: files, or open descriptors, for stdout and stderr.

    first: a function that is called before the script, such as one that sets a limit.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # not those of the script that forked this process
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for descriptor, target in zip((1, 2), output, strict=True):
        os.dup2(target if isinstance(target, int) else os.open(target, os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    if first:
        first()
    if ROOT in Path(words[0]).parents:
        engine.pool.EVERY = 0.05
        engine.pool.subprocess = types.SimpleNamespace(Popen=Forked, STDOUT=subprocess.STDOUT)
        subprocess.run = Forked.run if Path(words[0]).name == "evidence.py" else RUN
    else:  # perhaps of a copy of the project, whose modules it brings along
        ours = {path.stem for path in ROOT.iterdir()}
        for name in [name for name in sys.modules if name.split(".")[0] in ours]:
            del sys.modules[name]
    sys.path.insert(0, str(Path(words[0]).parent))
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


class Forked:
    """What the scripts and torchrun need of subprocess.Popen, by a fork: the process need not import PyTorch again."""

    def __init__(
        self, args, stdout=None, stderr=None, env=os.environ, pass_fds: Sequence[int] = (), start_new_session=False
    ):
        assert args[0] == sys.executable
        words = [word for word in args[1:] if word != "-u"]
        output = (stdout.fileno(), stdout.fileno()) if stderr == subprocess.STDOUT else (1, 2)
        first = os.setsid if start_new_session else None
        fork = multiprocessing.get_context("fork").Process
        self.process = fork(target=_as_script, args=(words, str(Path.cwd()), dict(env), output, first))
        self.process.start()
        self.pid = self.process.pid
        self.terminate, self.kill, self.wait = self.process.terminate, self.process.kill, self.process.join

    def poll(self) -> int | None:
        return self.process.exitcode

    returncode = property(poll)

    @classmethod
    def run(cls, command: list[str]) -> subprocess.CompletedProcess:
        sys.stdout.flush()
        process = cls(command)
        process.wait()
        return subprocess.CompletedProcess(command, process.returncode)


def start(*args, cwd=ROOT, output=(os.devnull, os.devnull), first=None, **env) -> multiprocessing.Process:
    """Start a script of the repository in its own process, forked from one that has already imported PyTorch."""
    words = [str(ROOT / args[0]), *map(str, args[1:])]
    process = FORKS.Process(
        target=_as_script, args=(words, str(cwd), {**os.environ, "OMP_NUM_THREADS": "1", **env}, output, first)
    )
    process.start()
    return process


def finished(processes: dict[multiprocessing.Process, str], timeout: float) -> list[subprocess.CompletedProcess]:
    """Wait for {process: path}; returns how each ended, with its output from <path>.out and <path>.err.

    Fails, and kills them, if any still runs after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
    said = [[Path(path + ending).read_text() for ending in (".out", ".err")] for path in processes.values()]
    assert not late, f"still running after {timeout} s: {said}"
    return [
        subprocess.CompletedProcess([], process.exitcode, *texts)
        for process, texts in zip(processes, said, strict=True)
    ]


def run(*args, cwd=ROOT, timeout=300, first=None, **env) -> subprocess.CompletedProcess:
    """Run a script of the repository in its own process; returns its exit code and output."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/0"
        output = (path + ".out", path + ".err")
        (done,) = finished({start(*args, cwd=cwd, output=output, first=first, **env): path}, timeout)
    return done


def ranks(size: int, *args, timeout=300, **env) -> list[subprocess.CompletedProcess]:
    """Run a script on `size` processes, as torchrun would; returns exit code and output of each, by rank.

    With LOCAL_WORLD_SIZE in `env` they count as processes of several nodes.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    per_node = env.get("LOCAL_WORLD_SIZE", size)
    together = {"WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests"}
    with tempfile.TemporaryDirectory() as folder:
        processes = {}
        for rank in range(size):
            path = f"{folder}/{rank}"
            environment = {
                k: str(v) for k, v in {**together, "RANK": rank, "LOCAL_RANK": rank % per_node, **env}.items()
            }
            processes[start(*args, output=(path + ".out", path + ".err"), **environment)] = path
        return finished(processes, timeout)


def here(script, *args, **env) -> subprocess.CompletedProcess:
    """Run a script of the repository (or, after "-m", a module) in this process; returns its exit code and output."""
    words = ["-m", *args] if script == "-m" else [script, *args]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "path", [str(ROOT), *sys.path])
        patch.chdir(ROOT)
        for name, value in env.items():
            patch.setenv(name, value)
        try:
            if script == "-m":
                patch.setattr(sys, "argv", list(map(str, args)))
                runpy.run_module(str(args[0]), run_name="__main__", alter_sys=True)
            else:
                patch.setattr(sys, "argv", list(map(str, words)))
                runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as left:
            code = left.code or 0
    return subprocess.CompletedProcess(list(map(str, words)), code, out.getvalue(), err.getvalue())


def refused(*args, says: str, call=here, **env):
    """Assert that the call exits with code 2 and one line on stderr that contains `says`."""
    done = call(*args, **env)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert says in done.stderr, done.stderr
