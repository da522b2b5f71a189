"""scripts/faults.py: a few of each fault; and that it would see it if something went wrong."""

import os
import subprocess
import tempfile
import types
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from engine import checkpoint, parallel
from tests.conftest import ROOT, Forked, here, refused, start
from trials import faults
from trials.place import CONFIG, Place


def table(path) -> list[list[str]]:
    """The cells of the rows of a Markdown table, without its head."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def in_a_session_of_its_own(first: Callable | None):
    os.setsid()
    subprocess_handler.Popen = Forked  # with which torchrun, should this process become it, starts its processes
    if first:
        first()


class Started:
    """What trials/ needs of subprocess.Popen, by a fork: the new process need not import PyTorch again."""

    def __init__(
        self, command: list[str], preexec_fn: Callable | None = None, env: Mapping[str, str] = os.environ, **_
    ):
        folder = Path(tempfile.mkdtemp())
        self.said = folder / "out", folder / "err"
        first = partial(in_a_session_of_its_own, preexec_fn)
        words = command[1:] if command[1] != "-m" else [find_spec(command[2]).origin, *command[3:]]
        self.process = start(*words, output=tuple(map(str, self.said)), first=first, **env)
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    returncode = property(poll)

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.is_alive():
            raise subprocess.TimeoutExpired("", timeout)
        return self.process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return tuple(path.read_text() for path in self.said)


FORKING = types.SimpleNamespace(Popen=Started, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired)


def test_a_few_of_each_fault_do_no_harm(tmp_path, monkeypatch):
    """In forked processes; tests/test_readme.py injects a fault into one that is started as a user starts it."""
    monkeypatch.setattr("trials.place.subprocess", FORKING)
    monkeypatch.setattr("trials.place.CONFIG", CONFIG.replace("max_steps = 120", "max_steps = 40"))
    done = here("scripts/faults.py", "--quick", f"--out={tmp_path / 'faults'}")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = table(tmp_path / "faults.md")
    assert len(rows) == len(faults.FAULTS)
    for (title, _, quick), row in zip(faults.FAULTS.values(), rows, strict=True):
        assert row[0] == title and int(row[1]) >= quick and row[1] == row[2]
    assert "No exceptions." in done.stdout


def test_what_is_recorded_is_the_whole_and_without_exception():
    rows = table(ROOT / "results" / "faults.md")
    assert [row[0] for row in rows] == [title for title, *_ in faults.FAULTS.values()]
    assert all(row[1] == row[2] for row in rows)
    assert sum(int(row[1]) for row in rows if "SIGKILL" in row[0]) >= 100
    soak = (ROOT / "results" / "soak.md").read_text()
    assert soak.count("| yes |") == 5 and "| no |" not in soak and "6000 steps" in soak


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def test_a_poisoned_checkpoint_is_seen(place, monkeypatch):
    monkeypatch.setattr(parallel, "finite", lambda p: True)
    assert any(outcome and "the last checkpoint holds it" in outcome for outcome in faults.planted_values(place, 60))


def test_a_checkpoint_that_is_read_unchecked_is_seen(place, monkeypatch):
    monkeypatch.setattr(checkpoint.zipfile.ZipFile, "testzip", lambda self: None)
    assert any(outcome and "damaged, and accepted" in outcome for outcome in faults.damaged_checkpoints(place, 20))


def test_a_run_with_another_bit_is_seen(place):
    place.here("--name=other", "--seed=1")
    assert "metrics differ from line 1 on" in place.differs("other")
    place.here("--name=same")
    assert place.differs("same") is None


def test_what_is_no_fault_is_refused():
    refused("scripts/faults.py", "--only", "earthquake", says="only = 'earthquake': must be one of kills_at_random")
