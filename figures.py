"""Recorded runs -> verdicts, tables and figures. Reads run folders (or their copies under results/); trains nothing."""

import gzip
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from collapse import CLEARLY, WINDOW, Collapse, final_loss, find_collapse
from config import UserError
from runlog import read_metrics

# Okabe and Ito's colours, which the colour-blind can tell apart
COLORS = {
    "AdamW": "#D55E00",
    "MSign (attention)": "#0072B2",
    "MSign (mlp)": "#E69F00",
    "MSign (blocks)": "#56B4E9",
    "attention off": "#666666",
}


@dataclass(frozen=True)
class Run:
    """One recorded run. Every series is an array over its steps; `sparse(key)` gives those logged at a cadence."""

    folder: Path
    config: dict
    lines: list[dict]

    @property
    def arm(self) -> str:
        if not self.config["msign_period"]:
            return "AdamW"
        if self.config["msign_map"] == "zero":
            return "attention off"
        return f"MSign ({self.config['msign_targets']})"

    @property
    def experiment(self) -> str:
        return self.config["wandb_group"]

    def series(self, key: str) -> list[float | None]:
        return [line[key] for line in self.lines]

    def sparse(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of the lines that hold a finite `key`."""
        found = [(line["iter"], line[key]) for line in self.lines if line.get(key) is not None]
        return [s for s, _ in found], [v for _, v in found]

    def final_loss(self) -> float:
        return final_loss(self.series("train/loss"))

    def max_grad_norm(self, after: int = 1000) -> float:
        """Largest gradient norm after step `after`; infinity if one is not finite."""
        norms = self.series("grad_norm")[after:] or self.series("grad_norm")
        return max(math.inf if g is None else g for g in norms)

    def lr_multiple(self, step: int) -> float:
        return self.lines[step - 1]["lr"] / self.config["lr"]


def load_run(folder: str | Path) -> Run:
    """A run from its folder. Raises UserError naming what is missing."""
    folder = Path(folder)
    record = folder / "record.json"
    if not record.is_file():
        raise UserError(f"{folder}: not a run (no record.json)")
    lines = read_metrics(folder)
    if not lines:
        raise UserError(f"{folder}: metrics.jsonl is empty")
    return Run(folder, json.loads(record.read_text())["config"], lines)


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


def smooth(values: Sequence[float | None], window: int = WINDOW) -> np.ndarray:
    """Mean over the last `window` values, NaN before there are that many."""
    values = np.array([np.nan if v is None else v for v in values], float)
    out = np.full(len(values), np.nan)
    if len(values) >= window:
        out[window - 1 :] = np.convolve(values, np.ones(window) / window, "valid")
    return out


def peaks(steps: np.ndarray, values: Sequence[float | None], size: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """The largest finite value of every `size` steps: spikes stay visible and the figure small."""
    values = np.array([np.nan if v is None else v for v in values], float)
    starts = range(0, len(values), size)
    largest = np.array([np.nanmax(values[i : i + size], initial=0.0) for i in starts])
    return steps[::size], np.where(largest > 0, largest, np.nan)


def overview(runs: Sequence[Run], stem: Path) -> list[Path]:
    """The headline figure: loss, gradient norm, stable rank and learning rate against step. Writes <stem>.png and .svg."""
    fig, axes = plt.subplots(2, 2, figsize=(10, 6.4), sharex=True, constrained_layout=True)
    loss, grad, srank, rate = axes.flat
    labels, visible = set(), []
    for verdict in verdicts(runs):
        run = verdict.run
        label = None if run.arm in labels else run.arm
        labels.add(run.arm)
        style = {"color": COLORS.get(run.arm, "#009E73"), "lw": 1.2, "alpha": 0.85, "label": label}
        steps, mean = np.array(run.series("iter")), smooth(run.series("train/loss"))
        loss.plot(steps[::5], mean[::5], **style)
        visible.extend(mean[len(mean) // 5 :])  # the fall from ln V at the start would flatten the rest
        grad.plot(*peaks(steps, run.series("grad_norm")), **{**style, "lw": 0.8})
        srank.plot(*run.sparse("srank/attention"), **style)
        rate.plot(steps[::5], run.series("lr")[::5], **style)
        if verdict.collapse:
            at = verdict.collapse.step - 1
            loss.plot(steps[at], mean[at], "x", color=style["color"], ms=9, mew=2.5)
    if np.isfinite(visible).any():
        loss.set_ylim(np.nanmin(visible) - 0.05, np.nanmax(visible) + 0.1)
    width = runs[0].config["d_model"]
    ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 1000) if t < width] + [width]
    srank.set(ylim=(1, width * 1.05), yscale="log")
    srank.set_yticks(ticks, ticks)
    srank.minorticks_off()
    grad.set(ylim=(0.1, None), yscale="log")
    loss.set(title="Training loss, 100-step mean (× collapse)", ylabel="nats per token")
    grad.set(title="Gradient norm before clipping, largest of 10 steps", ylabel="‖∇‖₂")
    srank.set(title="Stable rank of the attention matrices, geometric mean", ylabel="‖W‖²_F / ‖W‖²₂", xlabel="step")
    rate.set(title="Learning rate (before μP's multipliers)", ylabel="lr", xlabel="step")
    loss.legend(fontsize=9, frameon=False)
    for ax in axes.flat:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    paths = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    plt.rcParams["svg.hashsalt"] = stem.name  # the same runs give the same file
    for path in paths:
        fig.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(fig)
    return paths


def pack_run(folder: Path, target: Path):
    """Copy a run's small records to `target` for results/: record.json, events, summary and gzipped metrics."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("record.json", "events.jsonl", "summary.json"):
        if (folder / name).is_file():
            (target / name).write_bytes((folder / name).read_bytes())
    packed = gzip.compress((folder / "metrics.jsonl").read_bytes(), mtime=0)
    (target / "metrics.jsonl.gz").write_bytes(packed)
