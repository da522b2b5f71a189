"""A grid of runs: read from a file, compared with the runs already recorded, run, and listed in results.csv.

A grid file is plain assignments to the names of config.py, and to `config`, the config file that the runs start from.
A name that is assigned a list is an axis. `arm` is an axis, too: a dict that maps an arm's name to a dict of fields.
Every other assignment holds for all runs. A point is one combination of the axes' values. It is one run of train.py, or
of the program that `program` names, in runs_dir/<grid>/<point>, where <point> is made of its values. Points that differ
only in a field without effect, such as msign_targets where MSign is never applied, are one point.
"""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text

from config import FIELDS, ROOT, Config, UserError, assignments, check_type, parse_value, read_config_file, unknown_key
from engine import machine
from engine.plan import duration
from engine.pool import Job, Pool
from engine.runlog import changes, first_line, wandb_mode

PER_POINT = ("name", "resume", "dry_run")  # fields that this module sets for every point; a grid file must not
PER_GRID = ("runs_dir", "wandb_project", "wandb_group")  # fields that have one value in a grid
# (field, value) -> the fields that have no effect where the field has this value
IDLE = {
    ("logit_clip", 0.0): ("logit_clip_map",),
    ("msign_period", 0): ("msign_targets", "msign_backend", "msign_map", "msign_below", "msign_reset", "msign_probe"),
    ("msign_map", "zero"): ("msign_backend",),
    ("n_experts", 0): ("top_k", "balance_coef"),
    ("attention", "mha"): ("mla_rank", "mla_rope_dim"),
    ("position", "learned"): ("rope_theta", "mla_rope_dim"),
    ("position", "none"): ("rope_theta", "mla_rope_dim"),
    ("base_width", 0): ("embed_lr_power", "logit_power"),
    ("schedule", "constant"): ("min_lr_ratio",),
    ("eval_every", 0): ("eval_batches",),
    ("probe_every", 0): ("layers_every",),
}
SHOWN = {"loss": "train/loss", "grad norm": "grad_norm", "stable rank": "srank/attention"}  # column -> metric
COLUMNS = ["point", "step", *SHOWN, "tokens/s", ""]
SECONDS_BETWEEN_LINES = 30  # where there is no terminal


class Point(Job):
    """One point of the grid and its run. axes: its values on the axes; given: `config` and the fields to override."""

    def __init__(self, axes: dict, given: dict, cfg: Config):
        self.axes, self.cfg, self.error = axes, cfg, None
        options = {**given, "name": cfg.name, "runs_dir": cfg.runs_dir, "wandb_group": cfg.wandb_group}
        program = ROOT / options.pop("program", "train.py")
        command = [sys.executable, str(program), options.pop("config"), "--resume"]
        command += [f"--{name}={value}" for name, value in options.items()]
        super().__init__(cfg.name, Path(cfg.runs_dir) / cfg.name, command)
        self.summary = self.read("summary.json")

    def read(self, name: str) -> dict | None:
        path = self.folder / name
        return json.loads(path.read_text()) if path.is_file() else None

    @property
    def state(self) -> str:
        """ "failed", "done", "cut" (begun and not finished) or "missing" (not begun)."""
        if self.error:
            return "failed"
        return "done" if self.summary else "cut" if self.folder.exists() else "missing"

    def check(self):
        """Raise UserError if the point's folder holds a run with another configuration: the grid was changed."""
        record = self.read("record.json")
        for name, value, was in changes(record["config"], self.cfg) if record else ():
            raise UserError(
                f"{name} = {value!r}: {self.folder} was started with {was!r}; move it away or choose another --runs_dir"
            )

    def close(self):
        """Set `summary` and `error` to how the run ended."""
        self.summary = self.read("summary.json")
        self.error = self.failure or (None if self.summary else f"{self.name}: ended without a summary, see {self.log}")

    def row(self) -> dict[str, str]:
        """{column: text} of this point in the table that is shown while the grid runs."""
        if self.error:
            return {"point": self.name, "": "failed"}
        total = self.cfg.max_steps
        if self.summary:
            collapse = self.summary["collapse"]
            return {
                "point": self.name,
                "step": f"{self.summary['steps']}/{total}",
                "loss": f"{self.summary['train/loss']:.3f}",
                "grad norm": f"max {self.summary['max_grad_norm']:.3g}",
                "tokens/s": f"{self.summary['tokens_per_second']:,.0f}",
                "": f"collapsed at step {collapse['step']}" if collapse else "no collapse",
            }
        line, rate = self.follow(), self.steps_per_second
        step = line.get("iter", 0)
        row = {"point": self.name, "step": f"{step}/{total}"}
        row |= {column: f"{line[key]:.3g}" for column, key in SHOWN.items() if line.get(key) is not None}
        if rate:
            row |= {
                "tokens/s": f"{rate * self.cfg.tokens_per_step:,.0f}",
                "": duration((total - step) / rate) + " left",
            }
        return row

    def result(self, axes: Iterable[str]) -> dict:
        """The point's row of results.csv: its values on the axes, its state, and its summary."""
        summary = dict(self.summary or {})
        collapse = summary.pop("collapse", None) or {}
        return {
            "point": self.name,
            **{axis: self.axes.get(axis) for axis in axes},
            "state": self.state,
            **{f"collapse_{key}": collapse.get(key) for key in ("step", "why", "lr_multiple")},
            **summary,
        }


# --- from a grid file to points ---
def read_grid(path: Path, overrides: list[str]) -> dict:
    """The assignments of a grid file and of the command line. Raises UserError unless all are known and well typed."""
    if not path.is_file():
        known = sorted(file.relative_to(ROOT).as_posix() for file in ROOT.glob("configs/sweeps/*.py"))
        raise UserError(f"{path}: no such grid file; there is {', '.join(known)}")
    values = assignments(path)
    for text in overrides:
        override(values, text)
    for name, value in values.items():
        check(name, value, path)
    if "config" not in values:
        raise UserError(
            f"config: missing in {path}; must be a config file, such as configs/nano_5m_adamw.py, or several"
        )
    return values


def override(values: dict, text: str):
    """Set what `--field=value` says. An axis stays an axis, so that the points keep their names."""
    name, equals, value = text.removeprefix("--").partition("=")
    if not text.startswith("--"):
        raise UserError(f"{text!r}: unexpected; overrides are written --field=value")
    if name == "arm" and "arm" in values:
        if value not in values["arm"]:
            raise UserError(f"arm = {value!r}: must be one of {', '.join(values['arm'])}")
        values["arm"] = {value: values["arm"][value]}
        return
    if name == "config" and isinstance(values.get("config"), list):
        if unknown := [file for file in value.split(",") if file not in values["config"]]:
            raise UserError(f"config = {unknown[0]!r}: must be one of {', '.join(values['config'])}")
        values["config"] = value.split(",")
        return
    if name not in FIELDS:
        raise unknown_key(name, "on the command line")
    field = FIELDS[name]
    if not equals and field.type is not bool:
        raise UserError(f"{text}: must have a value, --{name}=…")
    if not isinstance(values.get(name), list):
        values[name] = parse_value(field, value if equals else "true")
    else:  # a comma may be part of a text, as in msign_targets
        values[name] = [parse_value(field, part) for part in ([value] if field.type is str else value.split(","))]


def check(name: str, value, path: Path):
    """Raise UserError unless `name = value` may stand in the grid file `path`."""
    if name in PER_POINT:
        raise UserError(f"{name} = {value!r}: is set for every point; must not be in {path}")
    if name == "arm":
        check_arms(value, path)
        return
    if name == "program":
        if not isinstance(value, str) or not (ROOT / value).is_file():
            raise UserError(f"program = {value!r}: must be a file of this repository, such as scripts/client.py")
        return
    if name not in FIELDS and name != "config":
        raise unknown_key(name, f"in {path}")
    if value == [] or (name in PER_GRID and isinstance(value, list)):
        raise UserError(f"{name} = {value!r}: must be {'one value' if name in PER_GRID else 'at least one value'}")
    for one in value if isinstance(value, list) else [value]:
        if name != "config":
            check_type(FIELDS[name], one)
        elif not isinstance(one, str):
            raise UserError(f"config = {one!r}: must be a config file, such as configs/nano_5m_adamw.py")


def check_arms(arms, path: Path):
    """Raise UserError unless `arm = arms` may stand in the grid file `path`."""
    if not isinstance(arms, dict) or not arms or not all(isinstance(fields, dict) for fields in arms.values()):
        raise UserError(f"arm = {arms!r}: must be a dict of dicts, such as {{'MSign': {{'msign_period': 100}}}}")
    for name, value in (item for fields in arms.values() for item in fields.items()):
        if name in PER_POINT + PER_GRID:
            raise UserError(f"{name} = {value!r}: must not be in an arm of {path}")
        if name not in FIELDS:
            raise unknown_key(name, f"in an arm of {path}")
        check_type(FIELDS[name], value)


def axes_of(values: dict) -> list[str]:
    """The names of the axes in a grid file's assignments."""
    return [name for name, value in values.items() if isinstance(value, list) or name == "arm"]


def points(path: Path, values: dict) -> list[Point]:
    """The different points of the grid, the last axis varying fastest.

    Raises UserError if a point's fields contradict each other.
    """
    axes = axes_of(values)
    found: dict[tuple[Config, str], tuple[dict, dict]] = {}
    for combination in itertools.product(*(values[name] for name in axes)):
        on_axes, given, fields = point_fields(values, dict(zip(axes, combination, strict=True)), path.stem)
        try:
            file = given["config"] if "program" in given else ""  # a program may read more in it than its fields
            found.setdefault((Config(**fields), file), (on_axes, given))
        except UserError as error:
            raise UserError(f"{error} (point {name_of(on_axes) or path.stem} of {path})") from error
    names = [name_of(on_axes) or path.stem for on_axes, _ in found.values()]
    often = collections.Counter(map(str.lower, names))  # some file systems do not tell upper case from lower
    result = []
    for name, ((cfg, _), (on_axes, given)) in zip(names, found.items(), strict=True):
        if often[name.lower()] > 1 or len(name) > 120:
            name = f"{name[:100]}-{hashlib.sha256(repr(on_axes).encode()).hexdigest()[:6]}"
        result.append(Point(on_axes, given, dataclasses.replace(cfg, name=name)))
    return result


def point_fields(values: dict, on_axes: dict, group: str) -> tuple[dict, dict, dict]:
    """The values of one combination `on_axes` in the grid named `group`, without fields that have no effect (IDLE).

    Returns three dicts: its values on the axes; `config` and the fields that the grid sets; all fields of its Config
    but `name`.
    """
    given = values | on_axes
    arm = given.pop("arm", None)
    given |= values["arm"][arm] if arm else {}
    if not Path(given["config"]).is_file() and (ROOT / given["config"]).is_file():
        given["config"] = str(ROOT / given["config"])
    base = read_config_file(given["config"])
    effective = {name: field.default for name, field in FIELDS.items()} | base | given
    idle = {name for (field, value), names in IDLE.items() if effective[field] == value for name in names}
    given = {name: value for name, value in given.items() if name not in idle}
    # an arm's own field wins over the axis of the same name
    on_axes = {name: arm if name == "arm" else given[name] for name in on_axes if name == "arm" or name in given}
    fields = base | {"wandb_group": group} | given
    fields["runs_dir"] = str(Path(fields.get("runs_dir", FIELDS["runs_dir"].default)) / group)
    return on_axes, given, {name: value for name, value in fields.items() if name not in ("config", "program", "name")}


def name_of(on_axes: dict) -> str:
    """A folder name from a point's values on its axes, such as gpt_5m-period100-W_V+W_O-seed0."""

    def part(name: str, value) -> str:
        if name == "config":
            return Path(value).stem
        if isinstance(value, bool) or value == "":
            return name if value else f"no_{name}"
        if isinstance(value, str):
            return value
        # six digits of a float, or all of them where six would not tell two values apart
        short = f"{value:g}" if isinstance(value, float) else str(value)
        return name.removeprefix("msign_") + (short if float(short) == value else repr(value))

    return "-".join(re.sub(r"[^\w.+-]+", "+", part(*item)) for item in on_axes.items()).lstrip(".-")


# --- running them ---
def slots(todo: list[Point], workers: int | None) -> list[dict[str, str]]:
    """The environment variables of each worker's runs, one dict a worker: CUDA_VISIBLE_DEVICES, or {} without a GPU.

    There are `workers` of them. By default there is one for each GPU; without a GPU there are as many as the CPU has
    cores for, given the threads of a run.
    """
    named = {point.cfg.device for point in todo}
    device = machine.pick_device("auto").type
    if device == "cuda" and named <= {"auto", "cuda"}:
        count, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(i) for i in range(count)]
        return [{"CUDA_VISIBLE_DEVICES": gpus[i % count]} for i in range(workers or count)]
    if workers is None:
        on_cpu = named == {"cpu"} or (device == "cpu" and named <= {"auto", "cpu"})
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        threads = max(point.cfg.threads or cores for point in todo)
        workers = max(1, cores // threads) if on_cpu else 1
    return [{}] * workers


def run(todo: list[Point], grid: list[Point], workers: list[dict[str, str]]):
    """Run the points `todo`, one at a time for each of `workers`, and show a table of the whole grid on stderr."""
    console, said = Console(stderr=True), time.monotonic()
    live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def note(text: str):
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    with Pool(todo, workers) as pool, live or contextlib.nullcontext():
        for ended in pool:
            for point in ended:
                point.close()
                note(point.error or "  ".join(point.row().values()))
            over = [point for point in grid if point.summary or point.error]
            running = [point for point in pool.running if point not in ended]
            title = f"{len(over)}/{len(grid)} finished"
            if live:
                shown = [*running, *reversed(over)][: console.height - 4]
                text = f"{title}\n{table(point.row() for point in shown)}"
                live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)
            elif time.monotonic() - said >= SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                note("; ".join([title, *("  ".join(point.row().values()) for point in running)]))


def table(rows: Iterable[dict[str, str]], columns: list[str] = COLUMNS) -> str:
    """Rows as text for a terminal, in aligned columns."""
    return (
        pd.DataFrame(list(rows), columns=columns)
        .fillna("")
        .to_markdown(tablefmt="plain", index=False, disable_numparse=True)
    )


def write_results(path: Path, grid: list[Point], axes: list[str]):
    """results.csv: a row for each point. It is replaced as a whole, so that no reader sees half of it."""
    partial = path.with_suffix(".partial")
    # dtype object: whole numbers stay whole in a column that has no value for some points
    pd.DataFrame([point.result(axes) for point in grid], dtype=object).to_csv(partial, index=False)
    partial.replace(path)


def register(path: Path, todo: list[Point], overrides: list[str], dry_run: bool):
    """Register the points as a W&B sweep and print the command that runs them.

    A dry run only prints the sweep's definition. Raises UserError if cfg.wandb is off or offline, or if W&B cannot be
    reached.
    """
    cfg = todo[0].cfg
    grid = path.resolve().relative_to(ROOT) if path.resolve().is_relative_to(ROOT) else path
    sweep = {
        "name": path.stem,
        "project": cfg.wandb_project,
        "method": "grid",
        "program": "scripts/sweep.py",
        "command": ["${env}", "${interpreter}", "${program}", grid.as_posix(), *overrides, "${args}"],
        "parameters": {"point": {"values": [point.name for point in todo]}},
    }
    if dry_run:
        print(json.dumps(sweep, indent=1))
        return
    if cfg.wandb in ("off", "offline"):
        raise UserError(f"wandb = {cfg.wandb!r}: must be auto or online for a sweep of W&B")
    wandb_mode(dataclasses.replace(cfg, wandb="online"))  # refuses if there is no server to register with
    import wandb

    try:
        sweep_id = wandb.sweep(sweep, project=cfg.wandb_project)
        entity = wandb.Api().default_entity
    except wandb.Error as error:
        raise UserError(f"wandb: the sweep cannot be registered ({first_line(error)})") from error
    print(f"{len(todo)} points; on every machine that takes part, in this repository's folder, once for each GPU:")
    print("wandb agent " + "/".join(filter(None, [entity, cfg.wandb_project, sweep_id])))
