"""Small records of finished runs, for results/: a run folder packed, and recorded grids, written and read.

A recorded grid is a folder of Parquet files: runs.parquet has a row a run, with columns such as config.lr, axes.seed
and code.git; steps-N.parquet have a row a run and step, to four digits; no run is split over two files.
"""

import gzip
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from config import FIELDS, up_to_date
from engine.runlog import read_metrics

# what a grid keeps of its runs: three values of every step, the others at their cadences
KEPT = ("lr", "train/loss", "grad_norm", "val/loss", "srank/attention", "srank/mlp", "sigma1/attention",
        "attention/max_logit", "attention/logit_bound", "attention/entropy", "log_z", "residual/gain",
        "jacobian/alignment", "jacobian/sigma1", "jacobian/product", "precision/error", "msign/matrices")  # fmt: skip
ROWS = 150_000  # of one file of steps, which keeps it below 1 MB; a longer run has a file for itself


def read_record(folder: Path) -> dict[str, dict]:
    """{"config": …, "code": …, "summary": …} of a run folder: its configuration, revision, and end."""
    record, summary = json.loads((folder / "record.json").read_text()), folder / "summary.json"
    summary = json.loads(summary.read_text()) if summary.is_file() else {}
    return {"config": up_to_date(record["config"]), "code": record.get("code", {}), "summary": summary}


def read_grid(folder: Path) -> Iterator[tuple[dict[str, dict], pd.DataFrame]]:
    """Of every run in a recorded grid (what `read_record` returns, and "axes"; a frame of KEPT, indexed by the step).
    NaN: not logged; infinity: not finite."""
    parts = pd.concat(map(pd.read_parquet, folder.glob("steps-*.parquet")))
    steps = {name: of.drop(columns="run").set_index("iter") for name, of in parts.groupby("run")}
    for row in pq.read_table(folder / "runs.parquet").to_pylist():
        record = {"config": {}, "axes": {}, "code": {}, "summary": {}}
        for column, value in row.items():
            part, key = column.split(".", 1)
            record[part] |= {} if value is None else {key: value}
        record["config"] = up_to_date(record["config"])
        yield record, steps[record["config"]["name"]]


def short(value):
    return float(f"{value:.4g}") if isinstance(value, float) else value


def record_grid(folder: Path, runs: Mapping[Path, dict]) -> int:
    """Write runs, {run folder: its values on the axes}, to a grid's folder. They replace runs of the same names.
    Returns the grid's number of runs."""
    found = list(read_grid(folder)) if (folder / "runs.parquet").is_file() else []
    for path, axes in runs.items():
        lines = [{k: math.inf if value is None else value for k, value in line.items()} for line in read_metrics(path)]
        steps = pd.DataFrame(lines, columns=["iter", *KEPT]).set_index("iter").astype(float).map(short)
        found.append((read_record(path) | {"axes": axes}, steps))
    rows, parts = [], [[]]
    for name, (record, steps) in {record["config"]["name"]: (record, steps) for record, steps in found}.items():
        record["config"] = portable(record["config"])
        record["summary"] = {k: short(value) for k, value in record["summary"].items() if not isinstance(value, dict)}
        order = ("config", "axes", "code", "summary")
        rows.append({f"{part}.{key}": value for part in order for key, value in record[part].items()})
        if parts[-1] and sum(map(len, parts[-1])) + len(steps) > ROWS:
            parts.append([])
        parts[-1].append(steps.reset_index().assign(run=name))
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("steps-*.parquet"):
        path.unlink()
    for number, part in enumerate(parts):
        steps = pa.Table.from_pandas(pd.concat(part), preserve_index=False)
        pq.write_table(steps, folder / f"steps-{number}.parquet", compression="zstd", compression_level=19)
    columns = dict.fromkeys(column for row in rows for column in row)
    pq.write_table(pa.Table.from_pylist([columns | row for row in rows]), folder / "runs.parquet", compression="zstd")
    return len(rows)


def portable(config: dict) -> dict:
    """A run's configuration without the place on this machine where it was recorded."""
    return config | {"runs_dir": FIELDS["runs_dir"].default}


def pack_run(folder: Path, target: Path):
    """Copy a run's small records to `target` for results/: record.json, events, summary and gzipped metrics."""
    target.mkdir(parents=True, exist_ok=True)
    record = json.loads((folder / "record.json").read_text())
    (target / "record.json").write_text(json.dumps(record | {"config": portable(record["config"])}, indent=1) + "\n")
    for path in filter(Path.is_file, (folder / "events.jsonl", folder / "summary.json")):
        shutil.copyfile(path, target / path.name)
    (target / "metrics.jsonl.gz").write_bytes(gzip.compress((folder / "metrics.jsonl").read_bytes(), mtime=0))
