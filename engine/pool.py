"""Runs of train.py in their own processes, a few at a time: start them, follow their metrics.jsonl, stop them."""

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

TAIL = 2**18  # bytes from the end of metrics.jsonl that the first look reads; a line with every layer is long
EVERY = 0.5  # seconds between two looks at metrics.jsonl


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
        """Start the process with these additions to the environment.

        Raises UserError if a process is training this run already, as after a `kill -9` of the process that started it.
        """
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}  # so that the log holds its last line
        with open(self.log, "a") as lock, open(self.log, "a") as out:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # train.py inherits the lock and holds it to the end
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
        """Training speed, measured over the last looks at metrics.jsonl; 0 before there are two."""
        if len(self._seen) < 2:
            return 0.0
        (then, first), (now, last) = self._seen[0], self._seen[-1]
        return (last - first) / (now - then)

    @property
    def failure(self) -> str | None:
        """For a process that has ended: its exit code and last line of output if it failed, otherwise None."""
        if not self.process.returncode:
            return None
        said = self.log.read_text(errors="replace").strip().splitlines() or ["no output"]
        return f"{self.name}: exit code {self.process.returncode}: {said[-1]} (all of it in {self.log})"


class Pool:
    """Runs jobs, at any time at most one for each slot; a slot is what is added to the environment of its job.

    with Pool(jobs, slots) as pool:
        # twice a second: `ended` are the jobs that have just ended; pool.running also holds those that still run
        for ended in pool: ...

    When the block is left, jobs that still run get a SIGTERM, so that they save, and are waited for. Ctrl-C raises
    KeyboardInterrupt in the `for`, SIGTERM raises SystemExit, both between two looks, so that no process is left behind
    half started. A second Ctrl-C or SIGTERM kills the jobs.
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
