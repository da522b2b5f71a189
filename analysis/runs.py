"""Recorded runs as data frames: run folders (runs/<name>, or copies under results/), offline W&B runs, and grids."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from config import UserError, up_to_date
from engine.records import read_grid, read_record
from engine.runlog import PER_LAYER, read_metrics, read_wandb

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

    @property
    def not_finite(self) -> str | None:
        """What the run was stopped for because it was not finite; a weight, say, which the steps do not show."""
        if self.summary.get("status") != "stopped: not finite":
            return None
        # a grid keeps of the summary only single values
        return (self.summary.get("collapse") or {}).get("why", "a weight or a moment is not finite")

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
    keys = dict.fromkeys(key for line in lines for key in line if key != "iter")
    per_layer = {key for key in keys if PER_LAYER.fullmatch(key)}
    rows = [{key: math.inf if value is None else value for key, value in line.items()} for line in lines]
    of_layers = [row for row in rows if row.keys() & per_layer]  # a matrix of all steps and layers would be large
    parts = (
        (rows, [key for key in keys if key not in per_layer]),
        (of_layers, [key for key in keys if key in per_layer]),
    )
    return tuple(pd.DataFrame(of, columns=["iter", *names]).set_index("iter").astype(float) for of, names in parts)


def load_run(path: str | Path) -> Run:
    """A run from its folder, or from an offline W&B run: a .wandb file or a folder that holds one. Raises UserError
    naming what is missing."""
    path = Path(path)
    if (path / "record.json").is_file():
        record, lines = read_record(path), read_metrics(path)
    else:
        config, lines = read_wandb(path)
        record = {"config": up_to_date(config)}
    if not lines:
        raise UserError(f"{path}: no step was recorded")
    for key in ("iter", "train/loss", "grad_norm", "lr"):
        if any(key not in line for line in lines):
            raise UserError(f"{path}: not a run of train.py (a line without {key})")
    if [line["iter"] for line in lines] != list(range(1, len(lines) + 1)):
        raise UserError(f"{path}: its steps are not 1, 2, 3, …; a part of a run cannot be judged")
    return Run(path, record.pop("config"), *frames(lines), **record)


def load_runs(folder: str | Path) -> list[Run]:
    """The runs of a recorded grid, as they were recorded, or of a folder of run folders, by name. Raises UserError if
    there is none."""
    folder = Path(folder)
    if (folder / "runs.parquet").is_file():
        return [Run(folder / record["config"]["name"], steps=steps, **record) for record, steps in read_grid(folder)]
    runs = [load_run(path.parent) for path in sorted(folder.glob("*/record.json"))]
    if not runs:
        raise UserError(f"{folder}: no recorded runs; scripts/sweep.py and reproduce.py write them with --record")
    return runs
