"""The record of a run: its folder, metrics.jsonl, W&B, the progress bar and the summary.

runs/<name>/record.json    config, code, versions, data and machine; written before the first step
runs/<name>/metrics.jsonl  one line for each step; no times, so a resumed run repeats the file to the byte
runs/<name>/times.jsonl    where the time went, a line for about ten seconds (clock.py); a resumed run adds lines
runs/<name>/events.jsonl   what happened and when: fallbacks, resumptions, signals, collapse
runs/<name>/abandoned.jsonl, rescue.json  of a run that went back (stability/rescue.py): lines cut off, and when
runs/<name>/summary.json   how the run ended; written at its end, which may be a collapse
runs/<name>/ckpt_*         see checkpoint.py
runs/<name>/stacks         of a run that hung (hang.py): what each process did
runs/<name>/trace_*.json   of some steps, if cfg.profile asks for it (trace.py)
runs/<name>/wandb          the run's W&B files, if W&B is on
"""

import dataclasses
import gzip
import hashlib
import json
import math
import os
import platform
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from config import FIELDS, ROOT, Config, UserError, up_to_date

# fields that may change when a run is resumed; all others decide what is computed. The validation set has eval_batches
# · micro_batch sequences, so this product stays
FREE_ON_RESUME = {
    "resume", "dry_run", "runs_dir", "device", "threads", "ckpt_every", "wandb", "wandb_project", "parallel",
    "recompute", "micro_batch", "eval_batches", "profile", "patience",
    "start_patience",
}  # fmt: skip
HASHED_FOLDERS = ("data", "engine", "remedies", "stability")  # their source is hashed, besides the top level's
PER_LAYER = re.compile(r"(.+)/(\d+)((?:\.\w+)?)")  # a layer's key in metrics.jsonl, such as srank/3.W_Q
# for these metrics W&B's table of runs shows an extreme value instead of the last one
SUMMARY = {
    "train/loss": "min", "val/loss": "min", "grad_norm": "max", "attention/max_logit": "max", "srank/attention": "min",
    "jacobian/sigma1": "max", "jacobian/alignment": "max", "precision/error": "max",
}  # fmt: skip


def code_version() -> dict:
    """The code of a run: "git" revision, "dirty" (whether files differ from it), and the "sha256" of the source.

    The first two are None without git.
    """

    def git(*args):
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        revision, dirty = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except OSError:  # no git on this machine
        revision, dirty = None, None
    sources = sorted([*ROOT.glob("*.py"), *(p for name in HASHED_FOLDERS for p in (ROOT / name).glob("*.py"))])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return {"git": revision, "dirty": None if revision is None else bool(dirty), "sha256": digest}


def versions() -> dict:
    """Versions of Python, PyTorch and NumPy, and the platform."""
    import numpy
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
    }


def changes(recorded: dict, cfg: Config) -> list[tuple[str, object, object]]:
    """(field, value in cfg, recorded value) wherever cfg differs from a run's recorded configuration and must not."""
    now = dataclasses.asdict(cfg)
    recorded = up_to_date(recorded)
    differ = [
        (name, value, recorded[name])
        for name, value in now.items()
        if name not in FREE_ON_RESUME and value != recorded[name]
    ]
    sequences, before = (c["eval_batches"] * c["micro_batch"] for c in (now, recorded))
    if cfg.eval_every and sequences != before:
        differ.append(("eval_batches · micro_batch", sequences, before))
    return differ


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the error's type if it has no message."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def wandb_mode(cfg: Config) -> tuple[str, str | None]:
    """W&B's mode (online, offline or off) for cfg.wandb and, if that is not what cfg.wandb asks for, the reason.

    With cfg.wandb = "auto" the mode is online if the user is logged in and the server answers, and otherwise offline;
    it is off only where W&B cannot start its service on this machine. The user is never asked for anything. Raises
    UserError when cfg.wandb is "online" and that is impossible.
    """
    if cfg.wandb in ("off", "offline"):
        return cfg.wandb, None
    import wandb

    try:
        session = wandb.setup(wandb.Settings(silent=True))
    except Exception as error:
        if cfg.wandb == "online":
            raise UserError(f"wandb = 'online': {first_line(error)}") from error
        return "off", first_line(error)
    if not wandb.login(prompt=False, verify=False):
        if cfg.wandb == "online":
            raise UserError("wandb = 'online': not logged in; run `wandb login` first, or use --wandb=offline")
        return "offline", None
    why = _unreachable(session.settings.base_url)
    if why and cfg.wandb == "online":
        raise UserError(f"wandb = 'online': {why}; use --wandb=offline to go on without the server")
    return ("offline" if why else "online"), why


def _unreachable(address: str) -> str | None:
    """Why no connection to the server at `address` can be made, or None.

    W&B would also try, but it takes from ten seconds to forever to find that a server is not there. Behind a proxy the
    answer is None, because a direct connection would tell nothing.
    """
    if urllib.request.getproxies():
        return None
    server = urllib.parse.urlsplit(address)
    port = server.port or {"http": 80}.get(server.scheme, 443)
    try:
        socket.create_connection((server.hostname, port), timeout=5).close()
    except OSError as error:
        return f"{server.hostname}: {error.strerror or error}"
    return None


class RunLog:
    """The open record of one run. Metrics go to metrics.jsonl first, then to W&B and to the progress bar."""

    def __init__(self, cfg: Config, record: dict):
        """Create the folder runs/<name>; with cfg.resume, open it if it exists.

        Raises UserError if the folder exists and is not to be resumed, if it holds no run, or if its run was started
        with another configuration or other data.
        """
        self.cfg = cfg
        self.folder = Path(cfg.runs_dir) / cfg.name
        self.resumed = cfg.resume and self.folder.exists()
        if self.folder.exists() and not self.resumed:
            raise UserError(f"name = {cfg.name!r}: {self.folder} exists; go on with --resume or choose another --name")
        self._wandb_mode, why = wandb_mode(cfg)
        record = {"config": dataclasses.asdict(cfg), "code": code_version(), "versions": versions(), **record}
        if self.resumed:
            self._check_same(record)
        else:
            self._create(record)
        if why:
            self._without_wandb(why)
        self.metrics_path = self.folder / "metrics.jsonl"
        self._metrics = None
        self._wandb = None
        self._bar = None
        self._srank = math.nan  # the stable rank that was measured last, for the progress bar

    def _create(self, record: dict):
        try:  # the folder appears with its record in it, or not at all
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=f".{self.cfg.name}-", dir=self.folder.parent))
            scratch.chmod(0o755)
            (scratch / "record.json").write_text(json.dumps(record, indent=1) + "\n")
            scratch.rename(self.folder)
        except OSError as error:
            raise UserError(f"runs_dir = {self.cfg.runs_dir!r}: cannot write there ({error.strerror})") from error

    def _check_same(self, record: dict):
        path = self.folder / "record.json"
        if not path.is_file():
            raise UserError(f"name = {self.cfg.name!r}: {self.folder} is not a run (no record.json)")
        before = json.loads(path.read_text())
        for name, value, was in changes(before["config"], self.cfg):
            raise UserError(
                f"{name} = {value!r}: the run {self.folder} was started with {was!r}; a run keeps its config"
            )
        if before["data"]["fingerprint"] != record["data"]["fingerprint"]:
            raise UserError(f"dataset = {self.cfg.dataset!r}: not the data that {self.folder} was started with")
        if "init_from" in record and before["init_from"] != record["init_from"]:
            raise UserError(f"init_from = {self.cfg.init_from!r}: not the weights that {self.folder} was started with")
        changed = [k for k in ("code", "versions", "machine") if before.get(k) != record.get(k)]
        if changed:
            what = ", ".join(changed)
            print(f"note: {what} changed since {self.folder} began; from here on the run may differ in rounding")
        self._changed = {k: record.get(k) for k in changed}

    @property
    def finished(self) -> bool:
        """Whether the run has ended and written its summary."""
        return (self.folder / "summary.json").is_file()

    def event(self, what: str, **details):
        """Append an event and the time to events.jsonl."""
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": what, **details}
        with open(self.folder / "events.jsonl", "a") as f:
            f.write(json.dumps(line) + "\n")

    def start(self, step: int, metrics_bytes: int) -> list[dict]:
        """The lines of metrics.jsonl up to the checkpoint of `step`; later lines are cut off.

        metrics_bytes: the length of metrics.jsonl when the checkpoint was written, 0 for a new run. Opens metrics.jsonl
        to append lines, starts W&B and shows the progress bar. A run that goes back to a checkpoint calls this again;
        then the lines cut off go to abandoned.jsonl. Raises UserError if metrics.jsonl is shorter than metrics_bytes.
        """
        self.metrics_path.touch()
        if self.metrics_path.stat().st_size < metrics_bytes:
            raise UserError(f"{self.metrics_path}: shorter than when the checkpoint of step {step} was written")
        if self._metrics:
            self._metrics.close()
            self._bar.close()
            with open(self.folder / "abandoned.jsonl", "wb") as f:
                f.write(self.metrics_path.read_bytes()[metrics_bytes:])
        elif self.resumed:
            self.event("resumed", step=step, **self._changed)
        os.truncate(self.metrics_path, metrics_bytes)
        lines = read_metrics(self.folder)
        self._metrics = open(self.metrics_path, "a", buffering=1)  # noqa: SIM115 (closed in `close`)
        self._start_wandb()
        self._bar = tqdm(
            total=self.cfg.max_steps, initial=step, desc=self.cfg.name, unit="step", dynamic_ncols=True,
            disable=not sys.stderr.isatty(), file=sys.stderr,
        )  # fmt: skip
        self._began, self._first = time.perf_counter(), step
        return lines

    def _without_wandb(self, why: str):
        """Say and record that W&B is offline or off although more was expected."""
        self.event(f"wandb {self._wandb_mode}", why=why)
        left = "logging offline" if self._wandb_mode == "offline" else "metrics.jsonl has everything"
        print(f"note: W&B cannot be {'reached' if self._wandb_mode == 'offline' else 'used'} ({why}); {left}")

    def _start_wandb(self):
        """Open the W&B run; if that fails, fall back from online to offline, and from offline to off."""
        cfg = self.cfg
        if self._wandb_mode == "off" or self._wandb:
            return
        import wandb

        id_path = self.folder / "wandb_id"
        if not id_path.exists():
            id_path.write_text(secrets.token_hex(4))
        arguments = dict(
            project=cfg.wandb_project, name=cfg.name, group=cfg.wandb_group or None, dir=self.folder,
            job_type=f"msign-{cfg.msign_targets}" if cfg.msign_period else "adamw",
            id=id_path.read_text(), resume="allow", config=dataclasses.asdict(cfg),
        )  # fmt: skip
        settings = wandb.Settings(console="off", silent=True, init_timeout=30)
        while self._wandb is None:
            try:
                self._wandb = wandb.init(mode=self._wandb_mode, settings=settings, **arguments)
            except Exception as error:  # no failure of W&B may stop the training
                if cfg.wandb == "online":
                    raise UserError(f"wandb = 'online': {first_line(error)}") from error
                self._wandb_mode = "offline" if self._wandb_mode == "online" else "off"
                self._without_wandb(first_line(error))
                if self._wandb_mode == "off":
                    return
        self._wandb.define_metric("iter", hidden=True)
        self._wandb.define_metric("*", step_metric="iter")
        for name, best in SUMMARY.items():
            self._wandb.define_metric(name, step_metric="iter", summary=best)

    def log(self, step: int, metrics: dict[str, float]):
        """Append the step's metrics as one line {"iter": step, …}; NaN and infinities become null.

        Values are rounded to nine digits; those of single layers, which fill most of the file, to five.
        """
        line = {"iter": step}
        for key, value in metrics.items():
            digits = 5 if PER_LAYER.fullmatch(key) else 9
            line[key] = float(f"{value:.{digits}g}") if math.isfinite(value) else None
        self._metrics.write(json.dumps(line) + "\n")
        self._to_wandb(line)
        self._show_progress(step, metrics)

    def alarm(self, step: int, text: str):
        """Say that a collapse is near: on stdout, as an event, and as an alert in W&B."""
        self.event("alarm", step=step, said=text)
        self.say(f"ALARM {text}")
        self._with_wandb(lambda run: run.alert(title=f"{self.cfg.name}: a collapse is near", text=text))

    def times(self, line: dict[str, float]):
        """Append a line of `Clock.line` to times.jsonl, and give it to W&B."""
        with open(self.folder / "times.jsonl", "a") as f:
            f.write(json.dumps(line) + "\n")
        self._to_wandb(line)

    def _to_wandb(self, line: dict):
        def send(run):
            import wandb

            scalars, charts = wandb_payload(line)
            run.log(scalars | {k: wandb.Histogram(np_histogram=v) for k, v in charts.items()})

        self._with_wandb(send)

    def _with_wandb(self, do: Callable):
        """Call do(the W&B run), if there is one; if that fails, go on without W&B."""
        if self._wandb:
            try:
                do(self._wandb)
            except Exception as error:  # W&B's service is another process, which may die
                self._wandb, self._wandb_mode = None, "off"
                self._without_wandb(first_line(error))

    def _show_progress(self, step: int, metrics: dict[str, float]):
        """Update the progress bar; where stderr is no terminal, print a line about twenty times in a run instead."""
        self._bar.update()
        self._srank = metrics.get("srank/attention", self._srank)
        shown = {"loss": metrics["train/loss"], "grad_norm": metrics["grad_norm"], "srank": self._srank}
        shown = {k: f"{v:.3g}" for k, v in shown.items()} | {"tokens/s": f"{self.tokens_per_second(step):,.0f}"}
        self._bar.set_postfix(shown, refresh=False)
        every = max(1, self.cfg.max_steps // 20)  # and one line soon after the start, to tell the time that is left
        if self._bar.disable and (step % every == 0 or step == self._first + 3):
            left = (time.perf_counter() - self._began) / (step - self._first) * (self.cfg.max_steps - step)
            print(f"step {step}/{self.cfg.max_steps}", *map(" ".join, shown.items()), f"{left:.0f} s left", flush=True)

    def metrics_bytes(self) -> int:
        """The length of metrics.jsonl in bytes, after forcing its content to disk."""
        os.fsync(self._metrics.fileno())
        return self.metrics_path.stat().st_size

    def tokens_per_second(self, step: int) -> float:
        """Tokens per second from the start (or resumption) of the run up to `step`."""
        return (step - self._first) * self.cfg.tokens_per_step / (time.perf_counter() - self._began)

    def say(self, text: str):
        """Print one line on stdout without breaking the progress bar."""
        tqdm.write(text)

    def close(self, summary: dict | None = None):
        """Close everything. With `summary` the run is over, so summary.json and W&B's summary are written."""
        if summary is not None:
            partial = self.folder / "summary.json.partial"
            partial.write_text(json.dumps(summary, indent=1) + "\n")
            partial.replace(self.folder / "summary.json")
        if self._bar is not None:
            self._bar.close()
        if self._metrics is not None:
            self._metrics.close()
        if self._wandb:
            try:
                if summary is not None:
                    self._wandb.summary["final"] = summary  # W&B's own "val/loss" is the minimum (SUMMARY)
                self._wandb.finish()
            except Exception as error:
                self._wandb_mode = "off"
                self._without_wandb(first_line(error))


class NoLog:
    """The log of a process that keeps no record: it has every method of RunLog, and none does anything."""

    finished, resumed = False, False

    def __getattr__(self, name: str):
        return lambda *args, **kwargs: None


def wandb_payload(line: dict) -> tuple[dict, dict]:
    """What W&B gets of a line of metrics.jsonl: scalars {name: value}, and histograms {name: (values, edges)}.

    The values srank/0.W_Q, srank/1.W_Q … of n layers become one histogram layers/srank.W_Q with one bin for each layer
    and edges 0 … n. W&B draws a histogram that is logged repeatedly as a heatmap, here of layers × steps. Otherwise it
    would draw n charts.
    """
    scalars, charts = {}, {}
    for key, value in line.items():
        if found := PER_LAYER.fullmatch(key):
            family, layer, role = found.groups()
            charts.setdefault(f"layers/{family}{role}", {})[int(layer)] = value
        else:
            scalars[key] = value
    for name, values in charts.items():
        layers = max(values) + 1
        # a bin of a histogram cannot be missing, so 0 stands for null
        charts[name] = [values.get(layer) or 0.0 for layer in range(layers)], list(range(layers + 1))
    return scalars, charts


def read_wandb(path: str | Path) -> tuple[dict, list[dict]]:
    """(config, lines) of an offline W&B run, as in record.json and metrics.jsonl; a layer's null has become 0.0.

    path: a .wandb file, or a folder that contains one at any depth. A run that was resumed left a file per part, all of
    the same name; of a step in two parts the later one counts. Raises UserError if there is no file or those of several
    runs, if one is damaged or its run has not ended, or if the installed wandb cannot read it.
    """
    path = Path(path)
    files = [path] if path.suffix == ".wandb" and path.is_file() else sorted(path.rglob("*.wandb"))
    names = sorted({file.name for file in files})
    if len(names) != 1:
        raise UserError(f"{path}: not a run (no record.json, and {', '.join(names) or 'no .wandb file'} in it)")
    parts = [read_part(file) for file in files]
    by_step = {line["iter"]: line for _, lines in parts for line in lines if set(line) > {"iter"}}
    return parts[0][0], [by_step[step] for step in sorted(by_step)]


def read_part(file: Path) -> tuple[dict, list[dict]]:
    """(config, lines) of one .wandb file."""
    # wandb has no other reader of its files than this command; it reports damage on stderr but still returns 0
    inspect = [sys.executable, "-W", "ignore", "-m", "wandb", "leet", "inspect", "--json", file]
    done = subprocess.run(inspect, capture_output=True, env={**os.environ, "WANDB_MODE": "offline"})
    complaint = done.stderr.decode(errors="replace").strip().split("\n")[-1]
    if re.search("No such (command|option)|No module named", complaint):
        raise UserError(f"{file}: read by wandb 0.31, not by the one installed here ({complaint})")
    if complaint or done.returncode or b'"type":"exit"' not in done.stdout:  # a run that was killed has no such record
        why = complaint or "no record of its end"
        raise UserError(f"{file}: must be the whole, undamaged file of a run that has ended ({why})")
    records = [json.loads(record) for record in done.stdout.splitlines()]
    config = next(record["run"]["config"]["update"] for record in records if record["type"] == "run")
    # the command prints 1.0 as 1, so fields of type float are converted back
    config = {k: float(v) if k in FIELDS and FIELDS[k].type is float else v for k, v in config.items() if k != "_wandb"}
    return config, [_unpacked(record["history"]["item"]) for record in records if record["type"] == "history"]


def _unpacked(item: dict) -> dict:
    """The line of metrics.jsonl that W&B recorded as `item`; a histogram h is there as h._type, h.bins and h.values.

    Of a line of times.jsonl only "iter" is returned.
    """
    line = {}
    for key, value in item.items():
        if found := re.fullmatch(r"layers/(.+?)((?:\.\w+)?)\.values", key):
            family, role = found.groups()
            line |= {f"{family}/{layer}{role}": float(v) for layer, v in enumerate(value)}
        elif not key.startswith(("_", "layers/", "time/", "memory/")):  # W&B adds _step, _runtime and _timestamp
            line[key] = value if key == "iter" or value is None else float(value)
    return line


def read_metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl or metrics.jsonl.gz.

    Raises UserError if the folder holds neither or if a line is not JSON.
    """
    path = Path(folder) / "metrics.jsonl"
    packed = path.with_suffix(".jsonl.gz")
    if path.is_file():
        text = path.read_text()
    elif packed.is_file():
        text = gzip.decompress(packed.read_bytes()).decode()
    else:
        raise UserError(f"{folder}: not a run (no metrics.jsonl)")
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error.msg})") from error
    return lines
