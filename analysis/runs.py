"""Recorded runs as data frames: read, judged, and written.

Runs are read from run folders (runs/<name>, or copies under results/), offline W&B runs, and recorded grids. A grid
is a folder of Parquet files: runs.parquet has a row a run, with columns such as config.lr, axes.seed and code.git;
steps-0.parquet and those that follow have a row a run and step, to four digits, whole runs in one file.
"""

import functools
import gzip
import json
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from config import FIELDS, UserError
from engine.runlog import PER_LAYER, read_metrics, read_wandb
from stability.collapse import CLEARLY, SIGNALS, Collapse, Onsets, final_loss, find_collapse, find_onsets

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
    floor: float | None = None  # what the same model ends at without attention

    @property
    def name(self) -> str:
        return self.config["name"]

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

    def by_layer(self, family: str, combine: Callable = np.mean, roles: Sequence[str] = ()) -> tuple[np.ndarray, ...]:
        """Steps (n,) at which `family`/<layer> or `family`/<layer>.<role> was logged, and values (layers, n).

        `combine` makes one value of a layer's roles (all of them, or those named). NaN: not logged, or not finite.
        """
        role = rf"\.(?:{'|'.join(roles)})" if roles else r"(?:\.\w+)?"
        layer = pd.Series(self.layers.columns, dtype=str).str.extract(rf"^{family}/(\d+){role}$", expand=False)
        logged = self.layers.loc[:, layer.notna().to_numpy()].dropna(how="all")
        groups = logged.T.groupby(layer.dropna().astype(int).to_numpy())
        values = np.full((1 + max(groups.groups, default=-1), len(logged)), np.nan)
        for number, of in groups:
            found = [column[~np.isnan(column)] for column in of.to_numpy().T]
            values[number] = [combine(column) if len(column) else np.nan for column in found]
        return logged.index.to_numpy(), np.where(np.isinf(values), np.nan, values)

    @functools.cached_property
    def collapse(self) -> Collapse | None:
        """The collapse by collapse.py's rules; without a floor, by the two that need none."""
        floor = None if self.arm == OFF else self.floor
        return find_collapse(self.steps["train/loss"].tolist(), self.steps["grad_norm"].tolist(), floor)

    @property
    def end(self) -> int:
        """The step of the collapse, or the last step."""
        return self.collapse.step if self.collapse else len(self.steps)

    @functools.cached_property
    def onsets(self) -> Onsets:
        """What moved first, up to the collapse, or in the whole run if there is none (collapse.find_onsets)."""
        logged = self.steps.reindex(columns=["grad_norm", *(key for key, _ in SIGNALS.values())])
        logged = logged.astype(object).where(np.isfinite(logged), None)
        return find_onsets(logged.reset_index(names="iter").to_dict("records"), self.end)

    def final_loss(self) -> float:
        """Mean of the last 100 training losses; infinity if one of them is not finite."""
        return final_loss(self.steps["train/loss"].tolist())

    def max_grad_norm(self, after: int = 1000) -> float:
        """Largest gradient norm after step `after`, or of all in a shorter run; infinity if one is not finite."""
        norms = self.steps["grad_norm"]
        return (norms.iloc[after:] if len(norms) > after else norms).max()

    def lr_multiple(self) -> float:
        """Learning rate at the collapse, in multiples of the paper's; NaN without one."""
        return self.steps["lr"][self.end] / self.config["lr"] if self.collapse else math.nan

    def below_floor(self) -> float:
        """By how much the final loss is below the floor; NaN without one."""
        return math.nan if self.floor is None or self.arm == OFF else self.floor - self.final_loss()

    @property
    def rescued(self) -> bool:
        """No collapse, and clearly better than the same model without attention."""
        return self.collapse is None and self.below_floor() > CLEARLY

    @property
    def verdict(self) -> str:
        """One line, such as `AdamW: collapsed at step 1450 (9.3x): ...`."""
        if self.collapse:
            return f"{self.arm}: collapsed at step {self.end} ({self.lr_multiple():.1f}x): {self.collapse.why}"
        text, below = f"{self.arm}: no collapse, final loss {self.final_loss():.2f}", self.below_floor()
        if self.rescued:
            return f"{text}, {below:.2f} below attention-off: attention lives"
        if math.isnan(below):
            return text
        return f"{text}, but not clearly below attention-off ({self.floor:.2f}): attention is of no use"


def judged(runs: Sequence[Run], off: Sequence[Run] = (), same: str = "wandb_group") -> list[Run]:
    """The runs with their floors: the final loss of the attention-off run, among `runs` or else in `off`, that has the
    same seed and the same value of the field `same`."""
    floors = {(run.config[same], run.config["seed"]): run.final_loss() for run in (*runs, *off) if run.arm == OFF}
    return [replace(run, floor=floors.get((run.config[same], run.config["seed"]))) for run in runs]


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
    for name, run in {run.name: run for run in (*before, *runs)}.items():
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
