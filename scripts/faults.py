"""Inject faults into training runs and count what comes of them.

python scripts/faults.py --out=results/faults    # half an hour on two cores: a hundred kills and more
python scripts/faults.py --quick                 # a few of each, some two minutes

Expected every time: one clear line or none, no step lost beyond the last checkpoint, and a run that is resumed ends with the bits
of one that nothing happened to. Whatever was otherwise is listed below the table; the exit code is then 1.
"""

import argparse
import contextlib
import io
import json
import math
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

import train
from config import Parser, UserError, load_config, output_stem, run_cli
from engine import checkpoint, parallel
from model import GPT

CONFIG = """
n_layer = 2; d_model = 16; n_head = 2; d_ff = 64; vocab_size = 256; block_size = 8; batch_size = 4; micro_batch = 2
max_steps = 120; warmup_steps = 5; probe_every = 10; layers_every = 20; jacobian_every = 40; eval_every = 10; eval_batches = 2
ckpt_every = 4; msign_period = 7; threads = 1; wandb = "off"
"""
PATIENCE = 120  # seconds after which a run that should have ended hangs
Outcome = Iterator[str | None]  # for every fault None, or what was not as expected


# --- the runs that faults are injected into ---
class Place:
    """A folder with a corpus, a configuration, and the run that nothing happens to."""

    def __init__(self, folder: Path):
        self.folder, self.runs, self.corpus, self.config = (
            folder,
            folder / "runs",
            folder / "corpus",
            folder / "victim.py",
        )
        self.corpus.mkdir()
        rng = np.random.default_rng(0)
        for split, n in (("train", 5000), ("val", 1000)):
            (np.cumsum(rng.integers(0, 4, n)) % 256).astype(np.uint16).tofile(self.corpus / f"{split}.bin")
        self.config.write_text(f"{CONFIG}dataset = {str(self.corpus)!r}\nruns_dir = {str(self.runs)!r}\n")
        if self.here("--name=whole"):
            raise UserError("the run that nothing happens to failed; there is nothing to compare with")

    def here(self, *overrides: str) -> str:
        """Train in this process; the line that it was refused with, or ''."""
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                train.train(load_config([str(self.config), *overrides]))
        except UserError as error:
            return str(error)
        return ""

    def start(self, *overrides: str, victim: tuple = (), processes: int = 1, **environment) -> subprocess.Popen:
        """train.py in processes of its own, the first one's fault planned by `victim`."""
        program = (
            [str(ROOT / "scripts" / "faults.py"), "--victim", *map(str, victim)] if victim else [str(ROOT / "train.py")]
        )
        if processes > 1:
            launch = (
                f"-m torch.distributed.run --nproc_per_node={processes} --rdzv_backend=c10d --rdzv_endpoint=localhost:0"
            )
            program = [*launch.split(), *program]
        return subprocess.Popen(
            [sys.executable, *program, str(self.config), *overrides], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, start_new_session=True,
        )  # fmt: skip

    def of(self, name: str) -> Path:
        return self.runs / name

    def steps(self, name: str) -> int:
        path = self.of(name) / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def differs(self, name: str, other: str = "whole") -> str | None:
        """What a finished run has otherwise than the whole one: a line of its metrics, a weight, a moment."""
        a, b = ((self.of(n) / "metrics.jsonl").read_text() for n in (other, name))
        if a != b:
            step = next(
                i
                for i, pair in enumerate(zip((a + "\n").split("\n"), (b + "\n").split("\n"), strict=False), 1)
                if pair[0] != pair[1]
            )
            return f"{name}: metrics differ from line {step} on"
        states = [tensors(self.of(n)) for n in (other, name)]
        if states[0].keys() != states[1].keys():
            return f"{name}: the last checkpoint holds other things"
        for key, value in states[0].items():
            if not torch.equal(value, states[1][key]):
                return f"{name}: {key} differs"
        return None


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in a run's last checkpoint of one file."""
    found = {}

    def walk(prefix: str, value):
        if torch.is_tensor(value):
            found[prefix] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}/{key}", inner)

    walk("", torch.load(checkpoint.checkpoints(folder)[-1], weights_only=True))
    return found


def lines(process: subprocess.Popen, patience: float = PATIENCE) -> tuple[str, str] | None:
    """What a process said, or None if it had to be killed for not ending."""
    try:
        return process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None


def one_line(process: subprocess.Popen, says: str, patience: float = PATIENCE) -> str | None:
    """None if the process ended with code 2 and one line that contains `says`."""
    said = lines(process, patience)
    if said is None:
        return f"hangs, instead of {says!r}"
    error = said[1].strip()
    if process.returncode == 2 and len(error.splitlines()) == 1 and says in error:
        return None
    return f"exit {process.returncode}, {error[-200:]!r} instead of {says!r}"


# --- inside the victim ---
def victim(at: str, nth: int):
    """Arrange this process's own SIGKILL at the nth checkpoint: while it is written, before or after it gets its name, in between."""
    seen = 0

    def deadly(function: Callable, before: bool, half: bool = False):
        def call(*args, **kwargs):
            nonlocal seen
            seen += 1
            if seen == nth and before:
                if half:
                    args[1].write(b"PK" + bytes(10_000))
                    args[1].flush()
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if seen == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    def patient():
        parallel.PATIENCE = parallel.timedelta(seconds=5)

    {
        "half written": lambda: setattr(torch, "save", deadly(torch.save, True, True)),
        "written, not named": lambda: setattr(os, "replace", deadly(os.replace, True)),
        "named": lambda: setattr(os, "replace", deadly(os.replace, False)),
        "before the old one goes": lambda: setattr(checkpoint, "prune", deadly(checkpoint.prune, True)),
        "after the old one went": lambda: setattr(checkpoint, "prune", deadly(checkpoint.prune, False)),
        "impatient": patient,
    }[at]()


# --- the faults ---
def until_finished(place: Place, name: str, start: Callable, kill: Callable) -> Outcome:
    """Kill a run again and again until it is through; afterwards, does it end with the bits of the whole one?"""
    while not (place.of(name) / "summary.json").exists():
        saved = checkpoint.checkpoints(place.of(name)) if place.of(name).exists() else []
        process = start()
        killed = kill(process)
        said = lines(process)
        if said is None:
            yield f"{name}: hangs after a kill"
            return
        if killed:
            now = checkpoint.checkpoints(place.of(name)) if place.of(name).exists() else []
            lost = saved and (not now or checkpoint.step_of(now[-1]) < checkpoint.step_of(saved[-1]))
            yield f"{name}: the checkpoint of step {checkpoint.step_of(saved[-1])} is gone" if lost else None
        elif process.returncode:
            yield f"{name}: cannot go on: {said[1].strip()[-300:]}"
            return
    if wrong := place.differs(name, "whole"):
        yield wrong


def kills_at_random(place: Place, count: int) -> Outcome:
    rng, done, run = np.random.default_rng(0), 0, 0

    def kill(process: subprocess.Popen) -> bool:
        nonlocal done
        before, deadline = place.steps(f"random{run}"), time.time() + PATIENCE
        while process.poll() is None and place.steps(f"random{run}") in (0, before) and time.time() < deadline:
            time.sleep(0.002)
        time.sleep(rng.exponential(0.1))
        alive = process.poll() is None and done < count
        if alive:
            os.killpg(process.pid, signal.SIGKILL)
            done += 1
        return alive

    while done < count:
        name = f"random{run}"
        yield from until_finished(place, name, lambda name=name: place.start(f"--name={name}", "--resume"), kill)
        run += 1


def kills_in_checkpoints(place: Place, count: int) -> Outcome:
    moments = ["half written", "written, not named", "named", "before the old one goes", "after the old one went"]
    for i in range(count):
        name, plans = f"inside{i}", [(moments[i % len(moments)], 1 + i)]

        def start(name=name, plans=plans):
            return place.start(f"--name={name}", "--resume", victim=plans.pop() if plans else ())

        yield from until_finished(place, name, start, lambda process: process.wait() == -signal.SIGKILL)


def kills_of_two_processes(place: Place, count: int) -> Outcome:
    rng, done, run = np.random.default_rng(1), 0, 0
    if place.start("--name=two", processes=2).wait():
        yield "the run on two processes that nothing happens to failed"
        return

    def kill(process: subprocess.Popen) -> bool:
        nonlocal done
        before, deadline = place.steps(f"pair{run}"), time.time() + PATIENCE
        while process.poll() is None and place.steps(f"pair{run}") in (0, before) and time.time() < deadline:
            time.sleep(0.002)
        time.sleep(rng.exponential(0.1))
        ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        alive = process.poll() is None and len(ranks) == 2 and done < count
        if alive:
            os.kill(int(ranks[rng.integers(2)]), signal.SIGKILL)
            done += 1
        return alive

    while done < count:
        name = f"pair{run}"
        for outcome in until_finished(
            place, name, lambda name=name: place.start(f"--name={name}", "--resume", processes=2), kill
        ):
            yield (
                None if outcome and outcome.startswith(f"{name}: ") and place.differs(name, "two") is None else outcome
            )
        run += 1


def hung_rank(place: Place, count: int) -> Outcome:
    for i in range(count):
        name = f"hung{i}"
        process = place.start(f"--name={name}", "--max_steps=1000000", victim=("impatient", 0), processes=2)
        deadline = time.time() + PATIENCE
        while place.steps(name) < 20 and time.time() < deadline:
            time.sleep(0.01)
        ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(ranks[i % 2]), signal.SIGSTOP)
        said = lines(process)
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(rank), signal.SIGKILL)
        yield (
            f"{name}: the other rank waits for ever"
            if said is None
            else None
            if process.returncode
            else f"{name}: exit 0"
        )


def unfinished(place: Place, name: str) -> Path:
    """A copy of the whole run, cut short: its last checkpoint is there, the end is not."""
    shutil.copytree(place.of("whole"), place.of(name))
    (place.of(name) / "summary.json").unlink()
    record = json.loads((place.of(name) / "record.json").read_text())
    record["config"]["name"] = name
    (place.of(name) / "record.json").write_text(json.dumps(record))
    return checkpoint.checkpoints(place.of(name))[-1]


def damaged_checkpoints(place: Place, count: int) -> Outcome:
    rng, path = np.random.default_rng(2), unfinished(place, "damaged")
    good, before = path.read_bytes(), tensors(path.parent)
    for i in range(count):
        data = bytearray(good)
        if i % 3:
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        else:
            del data[rng.integers(len(data)) :]
        path.write_bytes(bytes(data))
        error = place.here("--name=damaged", "--resume")
        if error:
            yield None if "not a whole checkpoint" in error and "\n" not in error else f"checkpoint {i}: {error}"
        else:  # a bit of the archive that means nothing, such as a date
            now = tensors(path.parent)
            same = now.keys() == before.keys() and all(torch.equal(now[key], value) for key, value in before.items())
            yield None if same else f"checkpoint {i}: damaged, and accepted"
            (path.parent / "summary.json").unlink(missing_ok=True)


def foreign_checkpoints(place: Place, count: int) -> Outcome:
    path = unfinished(place, "foreign")

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(place.folder / "exploded"),)

    good = torch.load(path, weights_only=True)
    for content, says in (
        ({"step": 1, "model": Bomb()}, "not a whole checkpoint"), ({"step": 1}, "not a whole checkpoint"), ([1, 2], "not a whole checkpoint"),
        (good | {"architecture": good["architecture"] | {"d_ff": 128}}, "another architecture"),
    )[:count]:  # fmt: skip
        torch.save(content, path)
        error = place.here("--name=foreign", "--resume")
        yield (
            f"a pickle ran: {error}"
            if (place.folder / "exploded").exists()
            else None
            if says in error
            else f"{says}: {error!r}"
        )


def damaged_data(place: Place, count: int) -> Outcome:
    unfinished(place, "data")
    rng, path = np.random.default_rng(3), place.corpus / "train.bin"
    good = path.read_bytes()
    try:
        for i in range(count):
            data = bytearray(good)
            what = ("changed", "cut", "swapped", "odd", "tiny", "gone")[i % 6]
            if what == "changed":
                data[rng.integers(len(data)) // 2 * 2] ^= 1 << rng.integers(8)
            elif what == "cut":
                del data[rng.integers(100, len(data) // 2) * 2 :]
            elif what == "swapped":
                data = bytearray((place.corpus / "val.bin").read_bytes())
            elif what == "odd":
                data.pop()
            elif what == "tiny":
                del data[8:]
            path.write_bytes(bytes(data))
            if what == "gone":
                path.unlink()
            error = place.here("--name=data", "--resume")
            yield None if error and "\n" not in error else f"{what} data: {error or 'accepted'!r}"
        path.write_bytes(np.full(5000, 300, np.uint16).tobytes())
        error = place.here("--name=outside")
        yield None if "vocab_size = 256" in error else f"a token outside the vocabulary: {error or 'accepted'!r}"
    finally:
        path.write_bytes(good)


def full_disk(place: Place, count: int) -> Outcome:
    for i in range(count):
        name, limit = f"full{i}", int(1000 * 1.6 ** (i % 14))
        process = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), str(place.config), f"--name={name}"], capture_output=True, text=True, timeout=PATIENCE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
            preexec_fn=lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )  # fmt: skip
        error = process.stderr.strip()
        if process.returncode == 2 and len(error.splitlines()) == 1:
            going = place.here(f"--name={name}", "--resume")
            yield (f"{name}: {going}" if going else place.differs(name))
        elif process.returncode == 0:
            yield place.differs(name)
        else:
            yield f"{name} at {limit} bytes a file: exit {process.returncode}, {error[-300:]!r}"


def read_only(place: Place, count: int) -> Outcome:
    for folder in ("/proc/runs", "/sys/runs", str(place.config / "runs"))[:count]:
        yield one_line(place.start("--name=x", f"--runs_dir={folder}"), "runs_dir = ")


def clock_going_backwards(place: Place, count: int) -> Outcome:
    for i in range(count):
        now, originals = 1e9, {name: getattr(time, name) for name in ("time", "perf_counter", "monotonic")}

        def back() -> float:
            nonlocal now
            now -= 3600
            return now

        for name in originals:
            setattr(time, name, back)
        try:
            error = place.here(f"--name=clock{i}")
        finally:
            for name, function in originals.items():
                setattr(time, name, function)
        yield error or place.differs(f"clock{i}")


def wandb_faults(place: Place, count: int) -> Outcome:
    """Unreachable: nobody listens. Slow: someone does, and never answers. Killed: W&B's own process dies during the run."""
    key = {"WANDB_API_KEY": "0" * 40, "HOME": str(place.folder)}
    silent = socket.create_server(("127.0.0.1", 0))
    for what in ("unreachable", "slow", "killed")[:count]:
        name, port = f"wandb-{what}", 9 if what == "unreachable" else silent.getsockname()[1]
        mode = "offline" if what == "killed" else "auto"
        steps = ["--max_steps=3000", "--ckpt_every=0"] if what == "killed" else []
        process = place.start(
            f"--name={name}", f"--wandb={mode}", *steps, WANDB_BASE_URL=f"http://127.0.0.1:{port}", **key
        )
        if what == "killed":
            deadline = time.time() + PATIENCE
            while place.steps(name) < 20 and time.time() < deadline:
                time.sleep(0.01)
            subprocess.run(["pkill", "-KILL", "-P", str(process.pid)])
        said = lines(process, 2 * PATIENCE)
        if said is None:
            yield f"{name}: hangs"
        elif process.returncode:
            yield f"{name}: exit {process.returncode}, {said[1].strip()[-300:]!r}"
        elif place.steps(name) != (3000 if steps else 120):
            yield f"{name}: {place.steps(name)} steps"
        else:
            yield None if steps else place.differs(name)
    silent.close()


@contextlib.contextmanager
def planted(where: str, name: str, value: float, names: list[str], at: int):
    """While it lasts, the first element of that tensor of parameter `name` becomes `value` in step `at`."""
    originals, steps, params = (torch.optim.AdamW.step, parallel.clip_, GPT.forward), [0], {}

    def now(*places: str) -> bool:
        return steps[0] == at and where in places

    def optimizer_step(self, closure=None):
        if now("clipped gradient"):
            params[name].grad.view(-1)[0] = value
        result = originals[0](self, closure)
        if now("weight"):
            params[name].data.view(-1)[0] = value
        if now("exp_avg", "exp_avg_sq"):
            self.state[params[name]][where].view(-1)[0] = value
        return result

    def clip_(parameters, limit):
        steps[0] += 1
        params.update(zip(names, parameters, strict=True))
        if now("gradient"):
            params[name].grad.view(-1)[0] = value
        return originals[1](parameters, limit)

    def forward(self, tokens, targets=None):
        out = originals[2](self, tokens, targets)
        return out * value if now("loss") and targets is not None else out

    torch.optim.AdamW.step, parallel.clip_, GPT.forward = optimizer_step, clip_, forward
    try:
        yield
    finally:
        torch.optim.AdamW.step, parallel.clip_, GPT.forward = originals


def planted_values(place: Place, count: int) -> Outcome:
    """In the step before a checkpoint and in that of one; 40 steps would be the whole run."""
    with torch.device("meta"):
        names = [name for name, _ in GPT(load_config([str(place.config)])).named_parameters()]
    tensors_of = ("weight", "gradient", "clipped gradient", "exp_avg", "exp_avg_sq")
    places = [("loss", ""), *((where, name) for where in tensors_of for name in names)]
    cases = [(where, name, value, at) for where, name in places for value in (math.nan, math.inf) for at in (31, 32)]
    if count < len(cases):
        cases = [cases[i] for i in np.random.default_rng(4).permutation(len(cases))[:count]]
    for i, (where, name, value, at) in enumerate(cases):
        run, label = f"planted{i}", f"{value} as {where} {name} in step {at}"
        try:
            with planted(where, name, value, names, at):
                error = place.here(f"--name={run}", "--max_steps=40")
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
        if error:
            yield f"{label}: {error}"
            continue
        summary = json.loads((place.of(run) / "summary.json").read_text())
        poisoned = [key for key, held in tensors(place.of(run)).items() if not held.isfinite().all()]
        if poisoned:
            yield f"{label}: the last checkpoint holds it, in {poisoned[0]}"
        elif summary["status"] != "stopped: not finite":
            yield f"{label}: {summary['status']} after {summary['steps']} steps"
        else:
            yield None


# fault: how often, and in the quick mode
FAULTS: dict[Callable[[Place, int], Outcome], tuple[str, int, int]] = {
    kills_at_random: ("SIGKILL at random moments, one process", 60, 2),
    kills_in_checkpoints: ("SIGKILL inside checkpoint writes", 30, 2),
    kills_of_two_processes: ("SIGKILL of one of two processes", 20, 1),
    hung_rank: ("one of two processes hangs", 4, 0),
    damaged_checkpoints: ("checkpoint truncated, or a bit flipped", 300, 6),
    foreign_checkpoints: ("foreign checkpoint", 4, 4),
    damaged_data: ("token file changed, cut, swapped or gone between runs", 60, 6),
    full_disk: ("disk full", 14, 2),
    read_only: ("read-only run folder", 3, 1),
    clock_going_backwards: ("clock going backwards", 3, 1),
    wandb_faults: ("W&B unreachable, slow, killed", 3, 1),
    planted_values: ("NaN or infinity in loss, weights, gradients, moments", 10_000, 12),
}


def main() -> int:
    if sys.argv[1:2] == ["--victim"]:
        victim(sys.argv[2], int(sys.argv[3]))
        sys.argv = ["train.py", *sys.argv[4:]]
        return train.main()
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few of each")
    parser.add_argument("--only", nargs="+", metavar="FAULT", help=f"of {', '.join(f.__name__ for f in FAULTS)}")
    parser.add_argument("--out", type=output_stem, help="also write OUT.md")
    args = parser.parse_args()
    known = {fault.__name__: fault for fault in FAULTS}
    for name in args.only or ():
        if name not in known:
            raise UserError(f"only = {name!r}: must be of {', '.join(known)}")
    rows, exceptions = ["| fault | times | as expected |", "| --- | --- | --- |"], []
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        place = Place(Path(scratch))
        for name in args.only or known:
            title, often, quick = FAULTS[known[name]]
            count = quick if args.quick else often
            outcomes = list(known[name](place, count)) if count else []
            wrong = [outcome for outcome in outcomes if outcome]
            rows.append(f"| {title} | {len(outcomes)} | {len(outcomes) - len(wrong)} |")
            exceptions += [f"{title}: {text}" for text in wrong]
            print(rows[-1], *wrong, sep="\n", file=sys.stderr, flush=True)
    said = "\n".join(rows) + "\n\n" + ("\n".join(f"* {text}" for text in exceptions) or "No exceptions.") + "\n"
    print(said)
    if args.out:
        args.out.with_suffix(".md").write_text(said)
    return 1 if exceptions else 0


if __name__ == "__main__":
    run_cli(main, "faults.py")
