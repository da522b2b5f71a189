"""Recorded runs, read and written.

Runs are read from run folders (runs/<name>, or copies under results/), offline W&B runs, and recorded grids. A grid
is a folder of Parquet files: runs.parquet has a row a run, with columns such as config.lr, axes.seed and code.git;
steps-0.parquet and those that follow have a row a run and step, to four digits, whole runs in one file.
"""

import gzip
import json
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from config import FIELDS, UserError
from engine.runlog import PER_LAYER, read_metrics, read_wandb

DEFAULTS = {name: f.default for name, f in FIELDS.items()}  # of fields that a record is older than
# what a grid keeps of its runs: three values of every step, the others at their cadences
KEPT = ("lr", "train/loss", "grad_norm", "val/loss", "srank/attention", "srank/mlp", "sigma1/attention",
        "attention/max_logit", "attention/entropy", "log_z", "residual/gain", "jacobian/alignment", "jacobian/sigma1",
        "jacobian/product", "precision/error", "msign/matrices")  # fmt: skip
ROWS = 150_000  # of one file of steps, which keeps it below 1 MB; a longer run has a file for itself
OFF = "attention off"


@dataclass(frozen=True, eq=False)
class Run:
    """One recorded run.

    `steps` has a row a step, `layers` a row for each step at which single layers were measured (columns such as
    srank/0.W_Q); both are indexed by the step. NaN: not logged; infinity: logged, and not finite.
    """

    folder: Path
    config: dict
    steps: pd.DataFrame
    layers: pd.DataFrame = field(default_factory=pd.DataFrame)
    axes: dict = field(default_factory=dict)  # its values on the axes of its grid
    code: dict = field(default_factory=dict)  # the revision that made it
    summary: dict = field(default_factory=dict)

    @property
    def arm(self) -> str:
        """What sets this run apart, in words: its name in its grid, or its optimizer and what MSign is applied to."""
        if self.axes.get("arm"):
            return self.axes["arm"]
        if not self.config["msign_period"]:
            return self.config["optimizer"].replace("adamw", "AdamW")
        what = {"zero": OFF, "sign": "MSign"}.get(self.config["msign_map"], self.config["msign_map"])
        return OFF if what == OFF else f"{what} ({self.config['msign_targets']})"

    def series(self, key: str) -> pd.Series:
        """The finite values of `key` by step."""
        values = (self.layers if key in self.layers else self.steps).get(key, pd.Series(dtype=float))
        return values[np.isfinite(values)]

    def by_layer(self, family: str, combine: str | Callable = "mean", roles: str = r"\w+") -> pd.DataFrame:
        """Values of `family`/<layer> or `family`/<layer>.<role>: a row a layer, a column for each step with one.

        `combine` makes one value of a layer's roles, of those that match `roles`. NaN: not logged, or not finite.
        """
        layer = self.layers.columns.astype(str).str.extract(rf"^{family}/(\d+)(?:\.(?:{roles}))?$", expand=False)
        logged = self.layers.loc[:, layer.notna()].dropna(how="all").T
        values = logged.groupby(layer.dropna().astype(int)).agg(combine)
        return values.reindex(range(max(values.index, default=-1) + 1)).where(np.isfinite)


def frames(lines: Sequence[dict]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`Run.steps` and `Run.layers` of the lines of a metrics.jsonl."""
    per_layer = {key for key in set().union(*lines) if PER_LAYER.fullmatch(key)}
    rows = [{key: math.inf if value is None else value for key, value in line.items()} for line in lines]
    steps = [{key: value for key, value in row.items() if key not in per_layer} for row in rows]
    layers = [{key: value for key, value in row.items() if key == "iter" or key in per_layer} for row in rows]
    layers = [row for row in layers if len(row) > 1]  # a matrix of all steps and layers would be large
    return tuple(pd.DataFrame(part or [{"iter": 1}]).set_index("iter").astype(float) for part in (steps, layers))


def load_run(path: str | Path) -> Run:
    """A run from its folder, or from an offline W&B run: a .wandb file or a folder that holds one. Raises UserError
    naming what is missing."""
    path = Path(path)
    if (path / "record.json").is_file():
        record, lines = json.loads((path / "record.json").read_text()), read_metrics(path)
    else:
        record, lines = read_offline(path)
    if not lines:
        raise UserError(f"{path}: no step was recorded")
    for key in ("iter", "train/loss", "grad_norm", "lr"):
        if any(key not in line for line in lines):
            raise UserError(f"{path}: not a run of train.py (a line without {key})")
    if [line["iter"] for line in lines] != list(range(1, len(lines) + 1)):
        raise UserError(f"{path}: its steps are not 1, 2, 3, …; a part of a run cannot be judged")
    summary = path / "summary.json"
    more = {"code": record.get("code", {}), "summary": json.loads(summary.read_text()) if summary.is_file() else {}}
    return Run(path, DEFAULTS | record["config"], *frames(lines), **more)


def read_offline(path: Path) -> tuple[dict, list[dict]]:
    """Record and lines of an offline W&B run. One that was resumed left a file per part, all of the same name."""
    files = [path] if path.is_file() and path.suffix == ".wandb" else sorted(path.rglob("*.wandb"))
    names = sorted({file.name for file in files})
    if len(names) != 1:
        raise UserError(f"{path}: not a run (no record.json, and {', '.join(names) or 'no .wandb file'} in it)")
    parts = [read_wandb(file) for file in files]
    by_step = {line["iter"]: line for _, lines in parts for line in lines if "iter" in line}
    return {"config": parts[0][0]}, [by_step[step] for step in sorted(by_step)]


def load_runs(folder: str | Path) -> list[Run]:
    """The runs of a recorded grid, as they were recorded, or of a folder of run folders, by name. Raises UserError if
    there is none."""
    folder = Path(folder)
    if not (folder / "runs.parquet").is_file():
        runs = [load_run(path.parent) for path in sorted(folder.glob("*/record.json"))]
        if not runs:
            raise UserError(f"{folder}: no recorded runs; scripts/sweep.py and reproduce.py write them with --record")
        return runs
    parts = pd.concat(map(pd.read_parquet, folder.glob("steps-*.parquet")))
    steps = {name: of.drop(columns="run").set_index("iter") for name, of in parts.groupby("run")}
    runs = []
    for row in pq.read_table(folder / "runs.parquet").to_pylist():
        record = {"config": dict(DEFAULTS), "axes": {}, "code": {}, "summary": {}}
        for column, value in row.items():
            part, key = column.split(".", 1)
            record[part] |= {} if value is None else {key: value}
        name = record["config"]["name"]
        runs.append(Run(folder / name, steps=steps[name], **record))
    return runs


def short(value):
    return float(f"{value:.4g}") if isinstance(value, float) else value


def record_grid(folder: Path, runs: Iterable[Run]):
    """Write runs to a grid's folder, in the place of those of the same names; others that it holds stay."""
    before = load_runs(folder) if (folder / "runs.parquet").is_file() else []
    rows, parts = [], [[]]
    for name, run in {run.config["name"]: run for run in (*before, *runs)}.items():
        summary = {key: short(value) for key, value in run.summary.items() if not isinstance(value, dict)}
        record = {"config": portable(run.config), "axes": run.axes, "code": run.code, "summary": summary}
        rows.append({f"{part}.{key}": value for part, values in record.items() for key, value in values.items()})
        if parts[-1] and sum(map(len, parts[-1])) + len(run.steps) > ROWS:
            parts.append([])
        parts[-1].append(run.steps.reindex(columns=KEPT).map(short).reset_index(names="iter").assign(run=name))
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("steps-*.parquet"):
        path.unlink()
    for number, part in enumerate(parts):
        steps = pa.Table.from_pandas(pd.concat(part), preserve_index=False)
        pq.write_table(steps, folder / f"steps-{number}.parquet", compression="zstd", compression_level=19)
    columns = dict.fromkeys(column for row in rows for column in row)
    pq.write_table(pa.Table.from_pylist([columns | row for row in rows]), folder / "runs.parquet", compression="zstd")


def portable(config: dict) -> dict:
    """A run's configuration without the place on this machine where it was recorded."""
    return config | {"runs_dir": DEFAULTS["runs_dir"]}


def pack_run(folder: Path, target: Path):
    """Copy a run's small records to `target` for results/: record.json, events, summary and gzipped metrics."""
    target.mkdir(parents=True, exist_ok=True)
    record = json.loads((folder / "record.json").read_text())
    (target / "record.json").write_text(json.dumps(record | {"config": portable(record["config"])}, indent=1) + "\n")
    for path in filter(Path.is_file, (folder / "events.jsonl", folder / "summary.json")):
        shutil.copyfile(path, target / path.name)
    (target / "metrics.jsonl.gz").write_bytes(gzip.compress((folder / "metrics.jsonl").read_bytes(), mtime=0))
