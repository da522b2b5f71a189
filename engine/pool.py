"""Runs of train.py in processes of their own, some at a time: started, followed through metrics.jsonl, stopped."""

import fcntl
import json
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from config import UserError

TAIL = 2**18  # bytes of metrics.jsonl that a first look reads; a line with every layer is long
EVERY = 0.5  # seconds between looks


class Job:
    """One run in its own process, recorded in `folder`; its output goes to <folder>.log.

    `line` holds the latest value of every key of metrics.jsonl, {} before there is one.
    """

    def __init__(self, name: str, folder: Path, command: list[str]):
        self.name, self.folder, self.command = name, folder, command
        self.log = folder.parent / f"{name}.log"
        self.line: dict[str, float | None] = {}
        self._at: int | None = None  # where in metrics.jsonl the next look begins
        self._seen = deque(maxlen=64)  # (time, step) of the last looks that found something

    def start(self, environment: dict[str, str]):
        """Raises UserError if this run is being trained already, for instance by what a `kill -9` left behind."""
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}  # the log ends with its last words
        with open(self.log, "a") as lock, open(self.log, "a") as out:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # train.py inherits it and keeps it to its end
            except BlockingIOError:
                raise UserError(f"{self.name}: another process is training it (it holds {self.log})") from None
            out.truncate(0)
            self.process = subprocess.Popen(
                self.command, stdout=out, stderr=subprocess.STDOUT, env=environment, pass_fds=[lock.fileno()]
            )

    def follow(self) -> dict[str, float | None]:
        """Return `line`, brought up to date by what was appended since the last look."""
        try:
            with open(self.folder / "metrics.jsonl", "rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                if self._at is None or size < self._at:  # the first look, or the file was cut back to a checkpoint
                    self._at, self.line = max(0, size - TAIL), {}
                    self._seen.clear()
                stream.seek(self._at)
                whole = stream.read().rpartition(b"\n")[0]
        except OSError:
            return self.line
        if whole:
            self._at += len(whole) + 1
            for line in whole.split(b"\n"):
                with suppress(ValueError):  # a first look may begin in the middle of a line
                    self.line |= json.loads(line)
            self._seen.append((time.monotonic(), self.line.get("iter", 0)))
        return self.line

    @property
    def steps_per_second(self) -> float:
        """Over the last looks; 0 before there are two."""
        if len(self._seen) < 2:
            return 0.0
        (then, first), (now, last) = self._seen[0], self._seen[-1]
        return (last - first) / (now - then)

    @property
    def failure(self) -> str | None:
        """Why the process that ended failed, with its last words; None if it did not."""
        if not self.process.returncode:
            return None
        said = self.log.read_text(errors="replace").strip().splitlines() or ["no output"]
        return f"{self.name}: exit code {self.process.returncode}: {said[-1]} (all of it in {self.log})"


class Pool:
    """Runs jobs, one for each slot at a time; a slot is what its worker adds to the environment.

    with Pool(jobs, slots) as pool:
        for ended in pool: ...    # twice a second; pool.running are those started, these among them

    Whatever still runs when the block is left is told to save and waited for. Ctrl-C and SIGTERM end the `for` as
    KeyboardInterrupt and SystemExit, between two looks, so that no process is left behind half started; a second
    Ctrl-C or SIGTERM kills the jobs.
    """

    def __init__(self, jobs: Sequence[Job], slots: Sequence[dict[str, str]]):
        self.waiting, self.free = list(jobs), list(slots)
        self.running: list[Job] = []
        self._received = 0

    def __enter__(self):
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number, frame):
        if self._received:
            for job in self.running:
                job.process.kill()
        self._received = number

    def __iter__(self) -> Iterator[list[Job]]:
        held = {}
        while self.waiting or self.running:
            while self.waiting and self.free and not self._received:
                job, slot = self.waiting.pop(0), self.free.pop(0)
                job.start(slot)
                held[job] = slot
                self.running.append(job)
            time.sleep(EVERY)
            if self._received:
                raise KeyboardInterrupt if self._received == signal.SIGINT else SystemExit(128 + self._received)
            ended = [job for job in self.running if job.process.poll() is not None]
            yield ended
            for job in ended:
                self.running.remove(job)
                self.free.append(held.pop(job))

    def __exit__(self, *_):
        for job in self.running:
            job.process.terminate()
        for job in self.running:
            job.process.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)
