"""Inject faults into training runs and check how each run ends.

Every fault is a generator. For each injection it yields None if all went as expected, or else a line that says what
did not. A run must print at most one line of error and keep every step up to its last checkpoint. Resumed, it must end
bit for bit like a run without a fault. Where a fault has another rule, its function says so. A *victim* is a run that
carries a fault inside.
"""

import contextlib
import itertools
import json
import math
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import torch

from config import load_config
from engine import checkpoint, parallel
from model import GPT
from trials.place import PATIENCE, Place, children, output, refused, tensors, wait_until

Outcome = Iterator[str | None]  # for every injected fault None, or what was not as expected


# --- inside the victim ---
class Deadly:
    """A function that kills its process in its nth call: before the work, after it, or with the file half written."""

    def __init__(self, function: Callable, nth: int, moment: str):
        self.function, self.nth, self.moment = function, nth, moment
        self.calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        due = self.calls == self.nth
        if due and self.moment == "half":
            file = args[1]  # of torch.save(object, file)
            file.write(b"PK" + bytes(10_000))
            file.flush()
        if due and self.moment != "after":
            os.kill(os.getpid(), signal.SIGKILL)
        result = self.function(*args, **kwargs)
        if due:
            os.kill(os.getpid(), signal.SIGKILL)
        return result


# moment in the writing of a checkpoint at which a victim kills itself -> (module, function, when in the call)
MOMENTS = {
    "half written": (torch, "save", "half"),
    "written, not named": (os, "replace", "before"),
    "named": (os, "replace", "after"),
    "before the old one goes": (checkpoint, "prune", "before"),
    "after the old one went": (checkpoint, "prune", "after"),
}


def plan_victim(fault: str, nth: int):
    """Make this process kill itself at the nth checkpoint, or ("impatient") wait at most 5 s for other ranks."""
    if fault == "impatient":
        parallel.PATIENCE = timedelta(seconds=5)
    else:
        owner, name, moment = MOMENTS[fault]
        setattr(owner, name, Deadly(getattr(owner, name), nth, moment))


# --- kills and hangs ---
def until_finished(place: Place, name: str, start: Callable, kill: Callable, reference: str = "whole") -> Outcome:
    """Kill and resume a run until it finishes, then compare it bit for bit with the reference.

    `start()` starts or resumes the run; `kill(process)` may kill it and returns whether it did.
    """
    while not (place.of(name) / "summary.json").exists():
        before = place.saved(name)
        process = start()
        killed = kill(process)
        said = output(process)
        if said is None:
            yield f"{name}: hangs after a kill"
            return
        if killed:
            now = place.saved(name)
            lost = before is not None and (now is None or now < before)
            yield f"{name}: the checkpoint of step {before} is gone" if lost else None
        elif process.returncode:
            yield f"{name}: cannot go on: {said[1].strip()[-300:]}"
            return
    if wrong := place.differs(name, reference):
        yield wrong


class Kills:
    """Kills a run `count` times at random moments; of several processes, one rank is killed."""

    def __init__(self, place: Place, count: int, processes: int, seed: int):
        self.place, self.left, self.processes = place, count, processes
        self.rng = np.random.default_rng(seed)

    def kill(self, name: str, process: subprocess.Popen) -> bool:
        """Wait for a new logged step and a random while more; kill the run if it still lives. True if killed."""
        before = self.place.steps(name)
        wait_until(lambda: self.place.steps(name) not in (0, before), process)
        time.sleep(self.rng.exponential(0.1))
        ranks = children(process) if self.processes > 1 else []
        started = self.processes == 1 or len(ranks) == self.processes
        if process.poll() is not None or not started or not self.left:
            return False
        if ranks:
            ranks[self.rng.integers(len(ranks))].kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
        self.left -= 1
        return True

    def outcomes(self, prefix: str, reference: str) -> Outcome:
        for number in itertools.count():
            if not self.left:
                return
            name = f"{prefix}{number}"
            start = partial(self.place.start, f"--name={name}", "--resume", processes=self.processes)
            yield from until_finished(self.place, name, start, partial(self.kill, name), reference)


def kills_at_random(place: Place, count: int) -> Outcome:
    return Kills(place, count, processes=1, seed=0).outcomes("random", "whole")


def kills_of_two_processes(place: Place, count: int) -> Outcome:
    if place.start("--name=two", processes=2).wait():
        yield "the run on two processes that nothing happens to failed"
    else:
        yield from Kills(place, count, processes=2, seed=1).outcomes("pair", "two")


def kills_in_checkpoints(place: Place, count: int) -> Outcome:
    for i, moment in zip(range(count), itertools.cycle(MOMENTS), strict=False):
        name, plans = f"inside{i}", [(moment, 1 + i)]  # the first start is deadly, those after it are not

        def start(name=name, plans=plans):
            return place.start(f"--name={name}", "--resume", victim=plans.pop() if plans else ())

        yield from until_finished(place, name, start, lambda process: process.wait() == -signal.SIGKILL)


def hung_rank(place: Place, count: int) -> Outcome:
    """Suspend one of two ranks. The other must end with an error instead of waiting for ever."""
    for i in range(count):
        name = f"hung{i}"
        process = place.start(f"--name={name}", "--max_steps=1000000", victim=("impatient", 0), processes=2)
        wait_until(lambda name=name: place.steps(name) >= 20, process)
        ranks = children(process)
        ranks[i % 2].suspend()
        said = output(process)
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGKILL)
        if said is None:
            yield f"{name}: the other rank waits for ever"
        else:
            yield None if process.returncode else f"{name}: exit 0"


# --- damaged and foreign files ---
def unfinished(place: Place, name: str) -> Path:
    """Copy the reference run as `name`, without its summary, so that it can be resumed.

    Returns the path of its last checkpoint.
    """
    shutil.copytree(place.of("whole"), place.of(name))
    (place.of(name) / "summary.json").unlink()
    record = json.loads((place.of(name) / "record.json").read_text())
    record["config"]["name"] = name
    (place.of(name) / "record.json").write_text(json.dumps(record))
    return checkpoint.checkpoints(place.of(name))[-1]


def flipped(data: bytes, rng: np.random.Generator, every: int = 1) -> bytes:
    """The data with one random bit flipped, in a byte whose index is a multiple of `every`."""
    changed = bytearray(data)
    changed[rng.integers(len(data)) // every * every] ^= 1 << rng.integers(8)
    return bytes(changed)


def damaged_checkpoints(place: Place, count: int) -> Outcome:
    rng, path = np.random.default_rng(2), unfinished(place, "damaged")
    good, before = path.read_bytes(), tensors(path.parent)
    for i in range(count):
        path.write_bytes(flipped(good, rng) if i % 3 else good[: rng.integers(len(good))])
        error = place.here("--name=damaged", "--resume")
        if error:
            yield None if "not a whole checkpoint" in error and "\n" not in error else f"checkpoint {i}: {error}"
        else:  # accepted: right only if the bit means nothing, such as one of a date in the archive
            now = tensors(path.parent)
            same = now.keys() == before.keys() and all(torch.equal(now[key], value) for key, value in before.items())
            yield None if same else f"checkpoint {i}: damaged, and accepted"
            (path.parent / "summary.json").unlink(missing_ok=True)


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def foreign_checkpoints(place: Place, count: int) -> Outcome:
    path, exploded = unfinished(place, "foreign"), place.folder / "exploded"
    good = torch.load(path, weights_only=True)
    cases = [
        ({"step": 1, "model": Bomb(exploded)}, "not a whole checkpoint"),
        ({"step": 1}, "not a whole checkpoint"),
        ([1, 2], "not a whole checkpoint"),
        (good | {"architecture": good["architecture"] | {"d_ff": 128}}, "another architecture"),
    ]
    for content, says in cases[:count]:
        torch.save(content, path)
        error = place.here("--name=foreign", "--resume")
        if exploded.exists():
            yield f"a pickle ran: {error}"
        else:
            yield None if says in error else f"{says}: {error!r}"


def damaged_data(place: Place, count: int) -> Outcome:
    """Damage the training tokens (two bytes each) before a resumption; last, train on tokens outside the vocabulary."""
    unfinished(place, "data")
    rng, path = np.random.default_rng(3), place.corpus / "train.bin"
    good, other = path.read_bytes(), (place.corpus / "val.bin").read_bytes()
    damages = {
        "changed": lambda: flipped(good, rng, every=2),  # the low byte, so that the token stays in the vocabulary
        "cut": lambda: good[: rng.integers(100, len(good) // 2) * 2],
        "swapped": lambda: other,
        "odd": lambda: good[:-1],
        "tiny": lambda: good[:8],
        "gone": lambda: None,
    }
    try:
        for what in itertools.islice(itertools.cycle(damages), count):
            data = damages[what]()
            if data is None:
                path.unlink()
            else:
                path.write_bytes(data)
            error = place.here("--name=data", "--resume")
            yield None if error and "\n" not in error else f"{what} data: {error or 'accepted'!r}"
        path.write_bytes(np.full(5000, 300, np.uint16).tobytes())
        error = place.here("--name=outside")
        yield None if "vocab_size = 256" in error else f"a token outside the vocabulary: {error or 'accepted'!r}"
    finally:
        path.write_bytes(good)


# --- the machine and its surroundings ---
def full_disk(place: Place, count: int) -> Outcome:
    """Imitate a full disk by a limit to the size of every file, larger each time."""
    for i in range(count):
        name, limit = f"full{i}", int(1000 * 1.6 ** (i % 14))
        limited = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
        process = place.start(f"--name={name}", first=limited, PYTHONDONTWRITEBYTECODE="1")
        said = output(process)
        error = "hangs" if said is None else said[1].strip()
        if process.returncode == 2 and len(error.splitlines()) == 1:
            yield place.here(f"--name={name}", "--resume") or place.differs(name)
        elif process.returncode == 0:
            yield place.differs(name)
        else:
            yield f"{name} at {limit} bytes a file: exit {process.returncode}, {error[-300:]!r}"


def read_only(place: Place, count: int) -> Outcome:
    for folder in ("/proc/runs", "/sys/runs", str(place.config / "runs"))[:count]:
        yield refused(place.start("--name=x", f"--runs_dir={folder}"), "runs_dir = ")


def clock_going_backwards(place: Place, count: int) -> Outcome:
    for i in range(count):
        back = itertools.count(1e9, -3600).__next__  # an hour with every look
        with mock.patch.multiple(time, time=back, perf_counter=back, monotonic=back):
            error = place.here(f"--name=clock{i}")
        yield error or place.differs(f"clock{i}")


def wandb_faults(place: Place, count: int) -> Outcome:
    """Unreachable: nobody listens. Slow: a server never answers. Killed: W&B's own process dies during the run."""
    key = {"WANDB_API_KEY": "0" * 40, "HOME": str(place.folder)}
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for what in ("unreachable", "slow", "killed")[:count]:
            port = 9 if what == "unreachable" else silent.getsockname()[1]
            options = ["--wandb=auto"]
            if what == "killed":
                options = ["--wandb=offline", "--max_steps=3000", "--ckpt_every=0"]
            server = f"http://127.0.0.1:{port}"
            process = place.start(f"--name=wandb-{what}", *options, WANDB_BASE_URL=server, **key)
            if what == "killed":
                wait_until(lambda: place.steps("wandb-killed") >= 20, process)
                for service in children(process):
                    service.kill()
            yield wandb_outcome(place, f"wandb-{what}", process, 3000 if what == "killed" else place.steps("whole"))


def wandb_outcome(place: Place, name: str, process: subprocess.Popen, steps: int) -> str | None:
    said = output(process, 2 * PATIENCE)
    if said is None:
        return f"{name}: hangs"
    if process.returncode:
        return f"{name}: exit {process.returncode}, {said[1].strip()[-300:]!r}"
    if place.steps(name) != steps:
        return f"{name}: {place.steps(name)} steps"
    return place.differs(name) if steps == place.steps("whole") else None


# --- values that are not finite ---
class Planted:
    """A context in which the first element of one tensor of parameter `name` becomes `value` in step `at`.

    `where`: "weight", "gradient", "clipped gradient", "exp_avg" or "exp_avg_sq"; with "loss", the loss is multiplied by
    `value`. `names` are those of all parameters, in the model's order.
    """

    def __init__(self, where: str, name: str, value: float, names: list[str], at: int):
        self.where, self.name, self.value, self.names, self.at = where, name, value, names, at
        self.step, self.params = 0, {}
        self.plain_step, self.plain_clip, self.plain_forward = torch.optim.AdamW.step, parallel.clip_, GPT.forward

    def __enter__(self):
        def optimizer_step(optimizer, closure=None):
            return self.optimizer_step(optimizer, closure)

        def forward(model, tokens, targets=None):
            return self.forward(model, tokens, targets)

        torch.optim.AdamW.step, parallel.clip_, GPT.forward = optimizer_step, self.clip, forward

    def __exit__(self, *_):
        torch.optim.AdamW.step, parallel.clip_, GPT.forward = self.plain_step, self.plain_clip, self.plain_forward

    def due(self, *places: str) -> bool:
        return self.step == self.at and self.where in places

    def plant(self, tensor: torch.Tensor):
        tensor.view(-1)[0] = self.value

    def clip(self, parameters, limit):
        self.step += 1
        self.params.update(zip(self.names, parameters, strict=True))
        if self.due("gradient"):
            self.plant(self.params[self.name].grad)
        return self.plain_clip(parameters, limit)

    def optimizer_step(self, optimizer, closure):
        if self.due("clipped gradient"):
            self.plant(self.params[self.name].grad)
        result = self.plain_step(optimizer, closure)
        if self.due("weight"):
            self.plant(self.params[self.name].data)
        if self.due("exp_avg", "exp_avg_sq"):
            self.plant(optimizer.state[self.params[self.name]][self.where])
        return result

    def forward(self, model, tokens, targets):
        out = self.plain_forward(model, tokens, targets)
        return out * self.value if self.due("loss") and targets is not None else out


def planted_values(place: Place, count: int) -> Outcome:
    """Plant NaN or infinity in runs of 40 steps, at step 31 or at step 32, where a checkpoint is due.

    The run must stop, say so in its summary, and have no such value in its last checkpoint.
    """
    with torch.device("meta"):
        names = [name for name, _ in GPT(load_config([str(place.config)])).named_parameters()]
    tensors_of = ("weight", "gradient", "clipped gradient", "exp_avg", "exp_avg_sq")
    places = [("loss", ""), *((where, name) for where in tensors_of for name in names)]
    cases = [(where, name, value, at) for where, name in places for value in (math.nan, math.inf) for at in (31, 32)]
    if count < len(cases):
        cases = [cases[i] for i in np.random.default_rng(4).permutation(len(cases))[:count]]
    for i, (where, name, value, at) in enumerate(cases):
        try:
            with Planted(where, name, value, names, at):
                wrong = place.here(f"--name=planted{i}", "--max_steps=40")
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        wrong = wrong or poisoned(place, f"planted{i}")
        yield f"{value} as {where} {name} in step {at}: {wrong}" if wrong else None


def poisoned(place: Place, name: str) -> str | None:
    """None if a run that met a non-finite value stopped and saved no such value; otherwise what is wrong."""
    summary = json.loads((place.of(name) / "summary.json").read_text())
    held = [key for key, tensor in tensors(place.of(name)).items() if not tensor.isfinite().all()]
    if held:
        return f"the last checkpoint holds it, in {held[0]}"
    if summary["status"] != "stopped: not finite":
        return f"{summary['status']} after {summary['steps']} steps"
    return None


# fault -> (its name in the table, injections, injections in quick mode)
FAULTS: dict[Callable[[Place, int], Outcome], tuple[str, int, int]] = {
    kills_at_random: ("SIGKILL at random moments, one process", 60, 1),
    kills_in_checkpoints: ("SIGKILL inside checkpoint writes", 30, 2),
    kills_of_two_processes: ("SIGKILL of one of two processes", 20, 0),
    hung_rank: ("one of two processes hangs", 4, 0),
    damaged_checkpoints: ("checkpoint truncated, or a bit flipped", 300, 6),
    foreign_checkpoints: ("foreign checkpoint", 4, 4),
    damaged_data: ("token file changed, cut, swapped or gone between runs", 60, 6),
    full_disk: ("disk full", 14, 2),
    read_only: ("read-only run folder", 3, 1),
    clock_going_backwards: ("clock going backwards", 3, 1),
    wandb_faults: ("W&B unreachable, slow, killed", 3, 1),
    planted_values: ("NaN or infinity in loss, weights, gradients, moments", 10_000, 6),
}
NAMES = {fault.__name__: fault for fault in FAULTS}


def inject(names: list[str], quick: bool, place: Place) -> tuple[pd.DataFrame, list[str]]:
    """Inject these faults. Returns a table (fault, times, as expected) and the lines on what was not as expected."""
    rows, exceptions = [], []
    torch.set_num_threads(1)
    for name in names:
        title, full_count, quick_count = FAULTS[NAMES[name]]
        count = quick_count if quick else full_count
        outcomes = list(NAMES[name](place, count)) if count else []
        wrong = [outcome for outcome in outcomes if outcome]
        rows.append({"fault": title, "times": len(outcomes), "as expected": len(outcomes) - len(wrong)})
        exceptions += [f"{title}: {text}" for text in wrong]
        print(f"{title}: {len(outcomes)}, {len(wrong)} otherwise than expected", *wrong, sep="\n", file=sys.stderr)
    return pd.DataFrame(rows), exceptions


def report(table: pd.DataFrame, exceptions: list[str]) -> str:
    """Table and exceptions as Markdown."""
    listed = "\n".join(f"* {text}" for text in exceptions) or "No exceptions."
    return f"{table.to_markdown(index=False)}\n\n{listed}\n"
