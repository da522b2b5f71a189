"""Recorded runs, read, judged and tabulated. Reads run folders (or their copies under results/); trains and draws nothing."""

import gzip
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import FIELDS, UserError
from engine.runlog import read_metrics
from stability.collapse import CLEARLY, SIGNALS, Collapse, final_loss, find_collapse, find_onsets

DEFAULTS = {name: f.default for name, f in FIELDS.items()}  # of what a record is older than


@dataclass(frozen=True)
class Run:
    """One recorded run. Every series is an array over its steps; `sparse(key)` gives those logged at a cadence."""

    folder: Path
    config: dict
    lines: list[dict]

    @property
    def arm(self) -> str:
        optimizer = "AdamW" if self.config["optimizer"] == "adamw" else self.config["optimizer"]
        if not self.config["msign_period"]:
            return optimizer
        if self.config["msign_map"] == "zero":
            return "attention off"
        what = "MSign" if self.config["msign_map"] == "sign" else self.config["msign_map"]
        return f"{what} ({self.config['msign_targets']})"

    @property
    def name(self) -> str:
        return self.config["name"]

    @property
    def experiment(self) -> str:
        return self.config["wandb_group"]

    def series(self, key: str) -> list[float | None]:
        return [line[key] for line in self.lines]

    def sparse(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of the lines that hold a finite `key`."""
        found = [(line["iter"], line[key]) for line in self.lines if line.get(key) is not None]
        return [s for s, _ in found], [v for _, v in found]

    def by_layer(
        self, family: str, combine: Callable[[np.ndarray], float] = np.mean, roles: Sequence[str] = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """Steps (n,) at which `family`/<layer> or `family`/<layer>.<role> was logged, and values (layers, n).

        `combine` makes one value of a layer's roles (all of them, or those named). NaN: not logged, or not finite.
        """
        pattern = re.compile(rf"{family}/(\d+)(?:\.(\w+))?")
        found = {}
        for line in self.lines:
            layers = defaultdict(list)
            for key, value in line.items():
                match = pattern.fullmatch(key)
                if match and (not roles or match[2] in roles):
                    layers[int(match[1])].append(np.nan if value is None else value)
            if layers:
                found[line["iter"]] = {layer: combine(np.array(values)) for layer, values in layers.items()}
        size = 1 + max((max(layers) for layers in found.values()), default=-1)
        values = [[layers.get(layer, np.nan) for layers in found.values()] for layer in range(size)]
        return np.array(list(found)), np.array(values, float).reshape(size, len(found))

    def final_loss(self) -> float:
        return final_loss(self.series("train/loss"))

    def max_grad_norm(self, after: int = 1000) -> float:
        """Largest gradient norm after step `after`; infinity if one is not finite."""
        norms = self.series("grad_norm")[after:] or self.series("grad_norm")
        return max(math.inf if g is None else g for g in norms)

    def lr_multiple(self, step: int) -> float:
        return self.lines[step - 1]["lr"] / self.config["lr"]


def load_run(path: str | Path) -> Run:
    """A run from its folder, or from an offline W&B run: a .wandb file or a folder that holds one.

    Raises UserError naming what is missing.
    """
    path = Path(path)
    if (path / "record.json").is_file():
        config, lines = json.loads((path / "record.json").read_text())["config"], read_metrics(path)
    else:
        config, lines = read_offline(path)
    if not lines:
        raise UserError(f"{path}: no step was recorded")
    for key in ("iter", "train/loss", "grad_norm", "lr"):
        if any(key not in line for line in lines):
            raise UserError(f"{path}: not a run of train.py (a line without {key})")
    if [line["iter"] for line in lines] != list(range(1, len(lines) + 1)):
        raise UserError(f"{path}: its steps are not 1, 2, 3, …; a part of a run cannot be judged")
    return Run(path, DEFAULTS | config, lines)


def read_offline(path: Path) -> tuple[dict, list[dict]]:
    """Config and lines of an offline W&B run. One that was resumed left a file per part, all of the same name."""
    from engine.runlog import read_wandb

    files = [path] if path.is_file() and path.suffix == ".wandb" else sorted(path.rglob("*.wandb"))
    names = sorted({file.name for file in files})
    if len(names) != 1:
        raise UserError(f"{path}: not a run (no record.json, and {', '.join(names) or 'no .wandb file'} in it)")
    parts = [read_wandb(file) for file in files]
    by_step = {line["iter"]: line for _, lines in parts for line in lines if "iter" in line}
    return parts[0][0], [by_step[step] for step in sorted(by_step)]


def geometric_mean(values: np.ndarray) -> float:
    """exp(mean log) of the positive values, NaN when there are none."""
    positive = values[values > 0]
    return np.exp(np.log(positive).mean()) if len(positive) else np.nan


def floors(runs: Sequence[Run]) -> dict[tuple[str, int], float]:
    """Final loss of the attention-off arm by (experiment, seed)."""
    return {(r.experiment, r.config["seed"]): r.final_loss() for r in runs if r.arm == "attention off"}


@dataclass(frozen=True)
class Verdict:
    run: Run
    collapse: Collapse | None
    floor: float | None  # the attention-off arm's final loss, same experiment and seed

    @property
    def rescued(self) -> bool:
        """No collapse, and clearly better than the same model without attention."""
        return self.collapse is None and self.floor is not None and self.run.final_loss() < self.floor - CLEARLY

    def __str__(self) -> str:
        """One line, such as `AdamW: collapsed at step 1450 (9.3x): ...`."""
        if self.collapse:
            step = self.collapse.step
            return f"{self.run.arm}: collapsed at step {step} ({self.run.lr_multiple(step):.1f}x): {self.collapse.why}"
        text = f"{self.run.arm}: no collapse, final loss {self.run.final_loss():.2f}"
        if self.floor is None or self.run.arm == "attention off":
            return text
        gap = self.floor - self.run.final_loss()
        if self.rescued:
            return f"{text}, {gap:.2f} below attention-off: attention lives"
        return f"{text}, but not clearly below attention-off ({self.floor:.2f}): attention is of no use"


def verdicts(runs: Sequence[Run]) -> list[Verdict]:
    """collapse.py's rules on every run, with the attention-off arm of its own experiment and seed as the floor."""
    floor_of = floors(runs)
    result = []
    for run in runs:
        floor = floor_of.get((run.experiment, run.config["seed"]))
        against = None if run.arm == "attention off" else floor
        result.append(Verdict(run, find_collapse(run.series("train/loss"), run.series("grad_norm"), against), floor))
    return result


def table(runs: Sequence[Run]) -> str:
    """Markdown, a row per arm: seeds, collapses and where, final losses, largest gradient norm; mean [min, max]."""
    rows = {}
    for verdict in verdicts(runs):
        rows.setdefault(verdict.run.arm, []).append(verdict)

    def spread(values: Sequence[float], digits: int = 2) -> str:
        values = np.asarray(values, float)
        if len(values) == 1:
            return f"{values[0]:.{digits}f}"
        return f"{values.mean():.{digits}f} [{values.min():.{digits}f}, {values.max():.{digits}f}]"

    out = [
        "| arm | seeds | collapsed | at step | at lr multiple | final loss | below attention-off | largest gradient norm after step 1000 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, group in rows.items():
        fell = [v for v in group if v.collapse]
        gaps = [v.floor - v.run.final_loss() for v in group if v.floor is not None]
        out.append(
            f"| {arm} | {len(group)} | {len(fell)} of {len(group)} "
            f"| {spread([v.collapse.step for v in fell], 0) if fell else '–'} "
            f"| {spread([v.run.lr_multiple(v.collapse.step) for v in fell], 1) if fell else '–'} "
            f"| {spread([v.run.final_loss() for v in group])} "
            f"| {spread(gaps) if gaps and arm != 'attention off' else '–'} "
            f"| {spread([v.run.max_grad_norm() for v in group], 1)} |"
        )
    return "\n".join(out) + "\n"


def onsets_table(runs: Sequence[Run]) -> str:
    """Markdown, a row per run that logged a signal: when each of collapse.SIGNALS moved; the first to move in bold.

    With its lead over the gradient norm, in steps, when both moved. Up to the collapse, or over the whole run if it has none.
    """
    out = [
        f"| run | collapse | {' | '.join(SIGNALS)} | gradient norm |",
        "|---|---|" + "---|" * (len(SIGNALS) + 1),
    ]
    for verdict in verdicts(runs):
        run = verdict.run
        if not any(run.sparse(key)[0] for key, _ in SIGNALS.values()):
            continue
        collapse = verdict.collapse.step if verdict.collapse else None
        onsets = find_onsets(run.lines, collapse)
        cells = []
        for name, step in onsets.signals.items():
            if step is None:
                cells.append("–" if run.sparse(SIGNALS[name][0])[0] else "not logged")
                continue
            lead = onsets.lead(name)
            cell = f"{step}" + ("" if lead is None else f" ({lead:+d})")
            cells.append(f"**{cell}**" if name in onsets.first else cell)
        out.append(f"| {run.name} | {collapse or '–'} | {' | '.join(cells)} | {onsets.grad_norm or '–'} |")
    return "\n".join(out) + "\n"


# what a theorem's row says: the logged shares and how to word them
THEOREMS = {
    "4.2": "product of the Jacobians above its bound",
    "4.4": "‖W‖₂ = ‖W‖_F / √srank(W), every matrix",
    "4.5": "attention's Jacobian below its bound",
    "4.6": "MLP's Jacobian below its bound",
    "4.8": "gradient of W_down above its bound",
    "4.9": "sum of squared gradients above its bound",
    "4.10": "attention gradients of rank ≤ hidden and co-hidden states'",
    "4.12": "condition for a falling stable rank",
}


def theory_table(run: Run) -> str:
    """Markdown, a row per theorem, over all measurements of a run: where it holds, how loose it is, where it is empty.

    Looseness in powers of ten, mean [smallest, largest] over measurements. Raises UserError if the run did not log theory/….
    """
    logged = [line for line in run.lines if "theory/4.4/error" in line]
    if not logged:
        raise UserError(f"{run.folder}: did not log both sides of the theorems (theory_every)")

    both = [[line.get(f"jacobian/{side}") for side in ("product", "bound_4_2")] for line in run.lines]
    products, bounds = np.array([sides for sides in both if all(sides)]).reshape(-1, 2).T

    def mean(key: str) -> float:
        return float(
            np.mean([line[f"theory/{key}"] for line in logged if line[f"theory/{key}"] is not None] or [np.nan])
        )

    def spread(values: Sequence[float]) -> str:
        return f"{np.nanmean(values):.1f} [{np.nanmin(values):.1f}, {np.nanmax(values):.1f}]"

    def mean_holds(theorem: str) -> float:
        return float(np.mean(products >= bounds)) if theorem == "4.2" else mean(f"{theorem}/holds")

    def looseness(theorem: str) -> str:
        if theorem == "4.2":
            return spread(np.log10(products / bounds))
        if theorem in ("4.5", "4.6"):
            return spread([line[f"theory/{theorem}/looseness"] for line in logged])
        if theorem == "4.9":
            sides = [[line[f"theory/4.9/log10_{side}"] for side in ("measured", "bound")] for line in logged]
            return spread([measured - bound for measured, bound in sides])
        if theorem == "4.8":
            measured, bound = (run.by_layer(f"theory/4.8/log10_{side}")[1] for side in ("measured", "bound"))
            return spread((measured - bound).ravel())
        return "–"

    remarks = {
        "4.2": f"at {len(products)} measurements of the Jacobians",
        "4.4": f"largest relative error {max(line['theory/4.4/error'] for line in logged):.0e}",
        "4.5": f"empty (χ = 1) in {mean('4.5/vacuous'):.0%} of blocks",
        "4.8": f"smallest alignment a = {min(line['theory/4.8/a'] for line in logged):.0e}; Jacobian ill-conditioned in {mean('4.8/ill_conditioned'):.0%} of blocks",
        "4.10": f"empty (full rank anyway) in {mean('4.10/vacuous'):.0%} of blocks; true of stable ranks in {mean('4.10/srank_holds'):.0%}",
        "4.12": f"the stable rank falls in {mean('4.12/falls'):.0%} of matrices, as the first-order formula says in {mean('4.12/agrees'):.0%}",
    }  # fmt: skip
    out = ["| theorem | statement | holds in | looseness, powers of ten | |", "|---|---|---|---|---|"]
    for theorem, statement in THEOREMS.items():
        if theorem == "4.2" and not len(products):
            continue  # the Jacobians have a cadence of their own
        holds = "identity" if theorem == "4.4" else f"{mean_holds(theorem):.0%}"
        out.append(f"| {theorem} | {statement} | {holds} | {looseness(theorem)} | {remarks.get(theorem, '')} |")
    return "\n".join(out) + "\n"


def portable(config: dict) -> dict:
    """A run's configuration without the place on this machine where it was recorded."""
    return config | {"runs_dir": DEFAULTS["runs_dir"]}


def pack_run(folder: Path, target: Path):
    """Copy a run's small records to `target` for results/: record.json, events, summary and gzipped metrics."""
    target.mkdir(parents=True, exist_ok=True)
    record = json.loads((folder / "record.json").read_text())
    (target / "record.json").write_text(json.dumps(record | {"config": portable(record["config"])}, indent=1) + "\n")
    for name in ("events.jsonl", "summary.json"):
        if (folder / name).is_file():
            (target / name).write_bytes((folder / name).read_bytes())
    packed = gzip.compress((folder / "metrics.jsonl").read_bytes(), mtime=0)
    (target / "metrics.jsonl.gz").write_bytes(packed)
