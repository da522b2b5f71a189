"""A grid of runs in one file: sizes × optimizers × periods × targets × learning rates × seeds.

    python scripts/sweep.py configs/sweeps/table2_small.py --dry_run     # the points, and what is done of them
    python scripts/sweep.py configs/sweeps/table2_small.py               # run what is missing, go on with what was cut
    python scripts/sweep.py configs/sweeps/table2_small.py --seed=0,1    # a field as in train.py; of an axis, these values alone
    python scripts/sweep.py configs/sweeps/table2_small.py --record=results --dry_run    # pack what is done into results/table2_small/
    python scripts/sweep.py configs/sweeps/ladder.py --wandb             # register it with W&B, for many machines

A grid file is plain assignments to the names of config.py, and to `config`, the config file that the runs start from. A
list is an axis, and so is `arm`, a dict: name -> the fields that make this arm. Anything else holds for all points. Points that differ only in what does not matter (the targets of an MSign
that is never applied) are one. Every point is a run of train.py in runs_dir/<grid>/<point>, named after its values on the
axes; results.csv beside them has a line for each. One runs on every GPU, or as many as there are cores for their threads.

With --wandb nothing is run: W&B hands the points that are not done here to whoever calls the `wandb agent` command that is
printed, in a checkout of this repository and once for each GPU (CUDA_VISIBLE_DEVICES says which).
"""

import argparse
import collections
import contextlib
import csv
import dataclasses
import hashlib
import itertools
import json
import os
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rich.console import Console
from rich.live import Live
from rich.text import Text

from analysis.runs import load_run, load_runs, record_grid
from config import (
    FIELDS,
    Config,
    Number,
    Parser,
    UserError,
    assignments,
    check_type,
    output_folder,
    parse_value,
    read_config_file,
    run_cli,
    unknown_key,
)
from engine.pool import Job, Pool
from engine.runlog import FREE_ON_RESUME, first_line, wandb_mode

OURS = ("name", "resume", "dry_run")  # set for every point
ONE = ("runs_dir", "wandb_project", "wandb_group")  # of the whole grid
# a field with this value -> the fields that then change nothing
IDLE = {
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
HEAD = ["point", "step", "loss", "grad norm", "stable rank", "tokens/s", ""]
PERIOD = 30  # seconds between lines where there is no terminal


class Point(Job):
    """One point of the grid: its values on the axes, and its run."""

    def __init__(self, axes: dict, given: dict, cfg: Config):
        self.axes, self.cfg, self.error = axes, cfg, None
        options = {**given, "name": cfg.name, "runs_dir": cfg.runs_dir, "wandb_group": cfg.wandb_group}
        command = [sys.executable, str(ROOT / "train.py"), options.pop("config"), "--resume"]
        super().__init__(
            cfg.name, Path(cfg.runs_dir) / cfg.name, [*command, *(f"--{k}={v}" for k, v in options.items())]
        )
        self.summary = self.read("summary.json")

    def read(self, name: str) -> dict | None:
        path = self.folder / name
        return json.loads(path.read_text()) if path.is_file() else None

    @property
    def state(self) -> str:
        return "done" if self.summary else "cut" if self.folder.exists() else "missing"

    def check(self):
        """Raise UserError if what is recorded here is another run: the grid was changed since."""
        recorded = (self.read("record.json") or {"config": {}})["config"]
        for key, value in dataclasses.asdict(self.cfg).items():
            if key not in FREE_ON_RESUME and recorded.get(key, value) != value:
                raise UserError(
                    f"{key} = {value!r}: {self.folder} was started with {recorded[key]!r}; move it away or choose another --runs_dir"
                )

    def close(self):
        """Take note of how the run ended."""
        self.summary = self.read("summary.json")
        self.error = self.failure or (None if self.summary else f"{self.name}: ended without a summary, see {self.log}")

    def row(self) -> list[str]:
        """This point's line of the table, with the columns of HEAD."""
        total = self.cfg.max_steps
        if self.error:
            return [self.name, "", "", "", "", "", "failed"]
        if s := self.summary:
            fell = s["collapse"] and f"collapsed at step {s['collapse']['step']}"
            norm = f"max {s['max_grad_norm']:.3g}"
            speed = f"{s['tokens_per_second']:,.0f}"
            return [
                self.name,
                f"{s['steps']}/{total}",
                f"{s['train/loss']:.3f}",
                norm,
                "",
                speed,
                fell or "no collapse",
            ]
        line, rate = self.follow(), self.steps_per_second
        step = line.get("iter", 0)
        shown = [line.get(key) for key in ("train/loss", "grad_norm", "srank/attention")]
        shown = ["" if value is None else f"{value:.3g}" for value in shown]
        speed = (
            [f"{rate * self.cfg.tokens_per_step:,.0f}", duration((total - step) / rate) + " left"] if rate else ["", ""]
        )
        return [self.name, f"{step}/{total}", *shown, *speed]


def duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.0f} min" if minutes >= 1 else f"{seconds:.0f} s"


def aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def read_grid(path: Path, overrides: list[str]) -> dict:
    """The assignments of a grid file and of the command line. Raises UserError unless all are known and of their types."""
    if not path.is_file():
        raise UserError(f"{path}: no such grid file; there is {', '.join(sorted(here('configs/sweeps/*.py')))}")
    values = assignments(path)
    for text in overrides:
        name, equals, value = text.removeprefix("--").partition("=")
        if not text.startswith("--"):
            raise UserError(f"{text!r}: unexpected; overrides are written --field=value")
        if name == "arm" and "arm" in values:
            if value not in values["arm"]:
                raise UserError(f"arm = {value!r}: must be one of {', '.join(values['arm'])}")
            values["arm"] = {value: values["arm"][value]}
            continue
        if name not in FIELDS:
            raise unknown_key(name, "on the command line")
        if not equals and FIELDS[name].type is not bool:
            raise UserError(f"{text}: must have a value, --{name}=…")
        axis = isinstance(values.get(name), list)  # stays one, so that the points keep their names
        texts = value.split(",") if axis and FIELDS[name].type is not str else [value if equals else "true"]
        parsed = [parse_value(FIELDS[name], text) for text in texts]
        values[name] = parsed if axis else parsed[0]
    for name, value in values.items():
        if name in OURS:
            raise UserError(f"{name} = {value!r}: is set for every point; must not be in {path}")
        if name == "arm":
            check_arms(value, path)
            continue
        if name not in FIELDS and name != "config":
            raise unknown_key(name, f"in {path}")
        if value == [] or (name in ONE and isinstance(value, list)):
            raise UserError(f"{name} = {value!r}: must be {'one value' if name in ONE else 'at least one value'}")
        for one in value if isinstance(value, list) else [value]:
            if name != "config":
                check_type(FIELDS[name], one)
            elif not isinstance(one, str):
                raise UserError(f"config = {one!r}: must be a config file, such as configs/nano_5m_adamw.py")
    if "config" not in values:
        raise UserError(
            f"config: missing in {path}; must be a config file, such as configs/nano_5m_adamw.py, or several"
        )
    return values


def check_arms(arms, path: Path):
    if not isinstance(arms, dict) or not arms or not all(isinstance(fields, dict) for fields in arms.values()):
        raise UserError(f"arm = {arms!r}: must be a dict of dicts, such as {{'MSign': {{'msign_period': 100}}}}")
    for name, value in (item for fields in arms.values() for item in fields.items()):
        if name in OURS + ONE:
            raise UserError(f"{name} = {value!r}: must not be in an arm of {path}")
        if name not in FIELDS:
            raise unknown_key(name, f"in an arm of {path}")
        check_type(FIELDS[name], value)


def here(pattern: str) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern)]


def points(path: Path, values: dict) -> list[Point]:
    """The different points of the grid, the last axis varying fastest. Raises UserError if one is no Config."""
    axes = {name: list(value) for name, value in values.items() if isinstance(value, list) or name == "arm"}
    found = {}
    for combination in itertools.product(*axes.values()):
        given = values | dict(zip(axes, combination, strict=True))
        arm = given.pop("arm", None)
        given |= values["arm"][arm] if arm else {}
        if not Path(given["config"]).is_file() and (ROOT / given["config"]).is_file():
            given["config"] = str(ROOT / given["config"])
        base = read_config_file(given["config"])
        effective = {name: f.default for name, f in FIELDS.items()} | base | given
        idle = {name for (field, value), names in IDLE.items() if effective[field] == value for name in names}
        given = {name: value for name, value in given.items() if name not in idle}
        chosen = {name: arm if name == "arm" else given[name] for name in axes if name == "arm" or name in given}
        fields = {k: v for k, v in (base | {"wandb_group": path.stem} | given).items() if k not in ("config", "name")}
        fields["runs_dir"] = str(Path(fields.get("runs_dir", FIELDS["runs_dir"].default)) / path.stem)
        try:
            found.setdefault(Config(**fields), (chosen, given))
        except UserError as error:
            raise UserError(f"{error} (point {name_of(chosen) or path.stem} of {path})") from error
    names = [name_of(chosen) or path.stem for chosen, _ in found.values()]
    often = collections.Counter(map(str.lower, names))
    result = []
    for name, (cfg, (chosen, given)) in zip(names, found.items(), strict=True):
        if often[name.lower()] > 1 or len(name) > 120:
            name = f"{name[:100]}-{hashlib.sha256(repr(chosen).encode()).hexdigest()[:6]}"
        result.append(Point(chosen, given, dataclasses.replace(cfg, name=name)))
    return result


def name_of(chosen: dict) -> str:
    """A folder name from a point's values on its axes, such as gpt_5m-period100-W_V+W_O-seed0."""

    def part(name: str, value) -> str:
        if name == "config":
            return Path(value).stem
        if isinstance(value, bool) or value == "":
            return name if value else f"no_{name}"
        if isinstance(value, str):
            return value
        short = f"{value:g}" if isinstance(value, float) else str(value)
        return name.removeprefix("msign_") + (short if float(short) == value else repr(value))

    return "-".join(re.sub(r"[^\w.+-]+", "+", part(*item)) for item in chosen.items()).lstrip(".-")


def slots(todo: list[Point], workers: int | None) -> list[dict[str, str]]:
    """What each worker adds to the environment of its runs: which GPU is theirs, or nothing."""
    import torch

    from engine import machine

    named = {point.cfg.device for point in todo}
    chosen = machine.pick_device("auto").type
    if chosen == "cuda" and named <= {"auto", "cuda"}:
        count, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",")[:count] if visible else map(str, range(count))
        gpus = [{"CUDA_VISIBLE_DEVICES": name} for name in names]
        return [gpus[i % count] for i in range(workers or count)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    on_cpu = named == {"cpu"} or (chosen == "cpu" and named <= {"auto", "cpu"})
    return [{}] * (workers or (max(1, cores // max(p.cfg.threads or cores for p in todo)) if on_cpu else 1))


def prepare(todo: list[Point]):
    """Write the embedded corpora that are needed, before several runs would at once."""
    from data.corpora import open_splits

    for cfg in {(p.cfg.dataset, p.cfg.fallback): p.cfg for p in todo}.values():
        with contextlib.suppress(UserError):  # the run will say so
            open_splits(cfg)


def run(todo: list[Point], grid: list[Point], workers: list[dict[str, str]]):
    """Run the points that are to be done, under one table of the whole grid on stderr."""
    console, said = Console(stderr=True), time.monotonic()
    live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def note(text: str):
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    with Pool(todo, workers) as pool, live or contextlib.nullcontext():
        for ended in pool:
            for point in ended:
                point.close()
                note(point.error or "  ".join(filter(None, point.row())))
            over = [p for p in grid if p.summary or p.error]
            running = [p for p in pool.running if p not in ended]
            title = f"{len(over)}/{len(grid)} finished"
            if live:
                rows = [HEAD, *(p.row() for p in [*running, *reversed(over)][: console.height - 4])]
                live.update(Text(f"{title}\n{aligned(rows)}", no_wrap=True, overflow="ellipsis"), refresh=True)
            elif time.monotonic() - said >= PERIOD:
                said = time.monotonic()
                note("; ".join([title, *("  ".join(filter(None, p.row())) for p in running)]))


def write_results(path: Path, grid: list[Point], axes: list[str]):
    """A line for each point: its values on the axes, its state, and its summary."""
    rows = []
    for p in grid:
        row = {"point": p.name, **{a: p.axes.get(a) for a in axes}, "state": "failed" if p.error else p.state}
        summary = dict(p.summary or {})
        fell = summary.pop("collapse", None) or {}
        rows.append(row | {f"collapse_{key}": fell.get(key) for key in ("step", "why", "lr_multiple")} | summary)
    partial = path.with_suffix(".partial")
    with open(partial, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def register(path: Path, todo: list[Point], overrides: list[str], dry_run: bool):
    """The points as a W&B sweep; prints its definition, or how to take part."""
    cfg = todo[0].cfg
    grid = path.resolve().relative_to(ROOT) if path.resolve().is_relative_to(ROOT) else path
    sweep = {
        "name": path.stem, "project": cfg.wandb_project, "method": "grid", "program": "scripts/sweep.py",
        "command": ["${env}", "${interpreter}", "${program}", grid.as_posix(), *overrides, "${args}"],
        "parameters": {"point": {"values": [p.name for p in todo]}},
    }  # fmt: skip
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


def record(grid: list[Point], args):
    if args.record:
        target = args.record / args.grid.stem
        done = [p for p in grid if p.summary]
        record_grid(target, (dataclasses.replace(load_run(p.folder), axes=p.axes) for p in done))
        print(f"{len(done)} of {len(grid)} points packed into {target}, which holds {len(load_runs(target))}")


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                    usage="sweep.py GRID.py [--dry_run] [--workers=N] [--record=FOLDER] [--wandb] [--point=NAME] [--field=value ...]")  # fmt: skip
    parser.add_argument("grid", type=Path, help="a file of plain assignments, such as configs/sweeps/ladder.py")
    parser.add_argument("--dry_run", action="store_true", help="print the points (with --wandb: the sweep) and stop")
    parser.add_argument("--workers", type=Number(int, 1), help="runs at a time; with GPUs, spread over them")
    parser.add_argument(
        "--wandb", nargs="?", const="register", help="register with W&B; with a value, train.py's field"
    )
    parser.add_argument(
        "--record",
        type=output_folder,
        help="at the end, pack the runs that are done into this folder, as <grid>/*.parquet",
    )
    parser.add_argument("--point", help="run this point alone, in the foreground: what W&B's agents call")
    args, overrides = parser.parse_known_args()
    if args.wandb not in (None, "register"):
        overrides.append(f"--wandb={args.wandb}")
    values = read_grid(args.grid, overrides)
    grid = points(args.grid, values)
    if args.point:
        named = [p for p in grid if p.name == args.point]
        if not named:
            raise UserError(f"point = {args.point!r}: not in {args.grid}, whose first is {grid[0].name}")
        os.execv(sys.executable, named[0].command)  # signals and exit code are train.py's own
    for p in grid:
        p.check()
    todo = [p for p in grid if p.state != "done"]
    if args.wandb == "register":
        if not todo:
            raise UserError(f"{args.grid}: nothing to register; all {len(grid)} points are done here")
        register(args.grid, todo, overrides, args.dry_run)
        return 0
    folder = Path(grid[0].cfg.runs_dir)
    counted = collections.Counter(p.state for p in grid)
    print(f"{len(grid)} points in {folder}: " + ", ".join(f"{n} {state}" for state, n in counted.items()))
    if args.dry_run:
        print(aligned([[p.name, p.state] for p in grid]))
        record(grid, args)
        return 0
    sys.stdout.flush()
    if todo:
        folder.mkdir(parents=True, exist_ok=True)
        prepare(todo)
        try:
            run(todo, grid, slots(todo, args.workers))
        except (KeyboardInterrupt, SystemExit):
            print(f"stopped; {sum(not p.summary for p in grid)} to go with the same command", file=sys.stderr)
            raise
    axes = [name for name, value in values.items() if isinstance(value, list) or name == "arm"]
    write_results(folder / "results.csv", grid, axes)
    failed = [p.error for p in grid if p.error]
    record(grid, args)
    print("\n".join([aligned([HEAD, *(p.row() for p in grid)]), str(folder / "results.csv"), *failed]))
    return 1 if failed else 0


if __name__ == "__main__":
    run_cli(main, "sweep.py")
