"""Figures of recorded runs: the overview, the paper's Figures 1 to 4, and heat maps of layers against steps.

Each returns the matplotlib Figure (`save` writes it) and raises UserError when no run logged what it needs.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from analysis.runs import Run, Verdict, geometric_mean, verdicts
from config import UserError
from stability.collapse import WINDOW

# Okabe and Ito's colours, which the colour-blind can tell apart
COLORS = {
    "AdamW": "#D55E00",
    "MSign (attention)": "#0072B2",
    "MSign (mlp)": "#E69F00",
    "MSign (blocks)": "#56B4E9",
    "attention off": "#666666",
}
GREEN, PURPLE, BLUE, VERMILLION, BLACK = "#009E73", "#CC79A7", "#0072B2", "#D55E00", "#000000"
COLUMNS = 4  # that stay legible side by side


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


def plain(*axes: Axes):
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)


def draw_training(loss: Axes, grad: Axes, shown: Sequence[tuple[Verdict, dict]]):
    """Loss and gradient norm of every run in its line style, with a cross where it collapsed."""
    visible = []
    for verdict, style in shown:
        run = verdict.run
        steps, mean = np.array(run.series("iter")), smooth(run.series("train/loss"))
        loss.plot(steps[::5], mean[::5], **style)
        visible.extend(mean[len(mean) // 5 :])  # the fall from ln V at the start would flatten the rest
        grad.plot(*peaks(steps, run.series("grad_norm")), **{**style, "lw": 0.8})
        if verdict.collapse:
            at = verdict.collapse.step - 1
            loss.plot(steps[at], mean[at], "x", color=style["color"], ms=9, mew=2.5)
    if np.isfinite(visible).any():
        loss.set_ylim(np.nanmin(visible) - 0.05, np.nanmax(visible) + 0.1)
    grad.set(ylim=(0.1, None), yscale="log")
    loss.set(title="Training loss, 100-step mean (× collapse)", ylabel="nats per token")
    grad.set(title="Gradient norm before clipping, largest of 10 steps", ylabel="‖∇‖₂")
    loss.legend(fontsize=9, frameon=False)
    plain(loss, grad)


def by_arm(judged: Sequence[Verdict], **style) -> list[tuple[Verdict, dict]]:
    """A line style for each run: its arm's colour, and the arm's name once."""
    labels, shown = set(), []
    for verdict in judged:
        arm = verdict.run.arm
        label = None if arm in labels else arm
        labels.add(arm)
        shown.append((verdict, {"color": COLORS.get(arm, GREEN), "alpha": 0.85, "label": label, **style}))
    return shown


def save(fig: Figure, stem: Path) -> list[Path]:
    """Write <stem>.png and .svg; the same runs give the same bytes."""
    paths = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    plt.rcParams["svg.hashsalt"] = stem.name
    for path in paths:
        fig.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(fig)
    return paths


def overview(runs: Sequence[Run]) -> Figure:
    """The headline figure: loss, gradient norm, stable rank and learning rate against step."""
    fig, axes = plt.subplots(2, 2, figsize=(10, 6.4), sharex=True, constrained_layout=True)
    loss, grad, srank, rate = axes.flat
    shown = by_arm(verdicts(runs), lw=1.2)
    draw_training(loss, grad, shown)
    for verdict, style in shown:
        run = verdict.run
        srank.plot(*run.sparse("srank/attention"), **style)
        rate.plot(run.series("iter")[::5], run.series("lr")[::5], **style)
    width = runs[0].config["d_model"]
    ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 1000) if t < width] + [width]
    srank.set(ylim=(1, width * 1.05), yscale="log")
    srank.set_yticks(ticks, ticks)
    srank.minorticks_off()
    srank.set(title="Stable rank of the attention matrices, geometric mean", ylabel="‖W‖²_F / ‖W‖²₂", xlabel="step")
    rate.set(title="Learning rate (before μP's multipliers)", ylabel="lr", xlabel="step")
    plain(srank, rate)
    return fig


def side_by_side(judged: Sequence[Verdict], needs: str) -> Sequence[Verdict]:
    """The runs that get a column: all when they fit, else the first of each arm. Raises UserError if there is none."""
    if not judged:
        raise UserError(f"needs a run that logs {needs}")
    if len(judged) <= COLUMNS:
        return judged
    first = {}
    for verdict in judged:
        first.setdefault(verdict.run.arm, verdict)
    return list(first.values())[:COLUMNS]


def mark_collapse(ax: Axes, verdict: Verdict):
    """A dashed line at the step of the collapse; its white rim keeps it visible on any colour."""
    if verdict.collapse:
        rim = [patheffects.withStroke(linewidth=3, foreground="white")]
        style = {"color": BLACK, "ls": "--", "lw": 1.2, "path_effects": rim, "zorder": 1.5}
        ax.axvline(verdict.collapse.step, label="collapse", **style)


def shared_legend(fig: Figure):
    """One legend below all axes, every label once."""
    found = {}
    for ax in fig.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    fig.legend(found.values(), found, loc="outside lower center", ncols=3, fontsize=9, frameon=False)


def draw_grad(ax: Axes, run: Run):
    steps, norms = peaks(np.array(run.series("iter")), run.series("grad_norm"))
    ax.plot(steps, norms, color=BLACK, lw=0.8, alpha=0.6, label="gradient norm, largest of 10 steps")


def whole_decades(ax: Axes):
    """A log axis from a power of ten to a power of ten: never without a labelled tick, never crowded with minor ones."""
    ax.set_yscale("log")
    low, high = np.log10(ax.get_ylim())
    ax.set_ylim(10.0 ** np.floor(low), 10.0 ** np.ceil(high))
    ax.yaxis.set_minor_formatter(NullFormatter())


def fig1(runs: Sequence[Run]) -> Figure:
    """Figure 1, a column per run: early layers' stable rank and the adjacent Jacobians' alignment against gradient norm."""
    keys = ("srank/early", "jacobian/alignment")
    judged = [v for v in verdicts(runs) if all(v.run.sparse(key)[0] for key in keys)]
    judged = side_by_side(judged, " and ".join(keys))
    fig, axes = plt.subplots(
        2, len(judged), figsize=(9, 5.6), sharex=True, sharey="row", squeeze=False, constrained_layout=True
    )
    twins = np.array([[ax.twinx() for ax in row] for row in axes])
    for column, verdict in enumerate(judged):
        run = verdict.run
        srank, alignment = axes[:, column]
        srank.plot(*run.sparse(keys[0]), ".-", color=GREEN, label="stable rank")
        alignment.plot(*run.sparse(keys[1]), ".-", color=PURPLE, label="alignment")
        flagged, pairs = run.sparse("jacobian/ill_conditioned"), run.config["n_layer"] - 1
        band = {"step": "mid", "color": PURPLE, "alpha": 0.2, "lw": 0}
        alignment.fill_between(
            flagged[0], np.array(flagged[1]) / pairs, label="share of pairs that are ill-conditioned", **band
        )
        for ax, twin in zip(axes[:, column], twins[:, column], strict=True):
            draw_grad(twin, run)
            twin.sharey(twins[0, 0])
            twin.tick_params(labelright=column == len(judged) - 1)
            mark_collapse(ax, verdict)
            plain(ax, twin)
            twin.grid(False)
        srank.set_title(run.name, fontsize=10)
        alignment.set(xlabel="step", ylim=(0, 1))
    whole_decades(twins[0, 0])
    for row in twins:
        row[-1].set_ylabel("gradient norm ‖∇‖₂")
    axes[0, 0].set(ylabel="(a) stable rank of the\nearly layers, geometric mean", ylim=(1, None))
    axes[1, 0].set_ylabel("(b) adjacent alignment\n|v(ℓ+1)ᵀ u(ℓ)|, mean")
    shared_legend(fig)
    return fig


def fig2(runs: Sequence[Run]) -> Figure:
    """Figure 2, a column per run: the product of the Jacobians and the gradient norm above two lower bounds of that product.

    The bounds, Theorem 4.2's and the one that can be proved, are up to a hundred decades smaller and get an axis of
    their own, down to the smallest of Theorem 4.2's; what lies below is a mark at its foot.
    """
    judged = side_by_side([v for v in verdicts(runs) if v.run.sparse("jacobian/product")[0]], "jacobian/product")
    fig, axes = plt.subplots(
        2, len(judged), figsize=(9, 5.6), sharex=True, sharey="row", squeeze=False, constrained_layout=True
    )
    bounds = (
        ("jacobian/bound", "provable bound", BLUE, "s-"),
        ("jacobian/bound_4_2", "Theorem 4.2's bound (aM)ᴸ/a", VERMILLION, "D-"),
    )
    stated = [bound for v in judged for bound in v.run.sparse("jacobian/bound_4_2")[1] if bound > 0]
    floor = min(stated, default=1.0) / 10
    for (norms, below), verdict in zip(axes.T, judged, strict=True):
        run = verdict.run
        steps, product = map(np.array, run.sparse("jacobian/product"))
        norms.plot(steps, product, ".-", color=GREEN, label="product ‖J(L)···J(1)‖₂")
        draw_grad(norms, run)
        said = []
        for key, name, color, style in bounds:
            bound = np.array([run.lines[step - 1].get(key) or 0.0 for step in steps])  # null also stands for zero
            hidden = bound < floor
            below.plot(steps, np.where(hidden, np.nan, bound), style, color=color, ms=3, label=name)
            below.plot(steps[hidden], np.full(hidden.sum(), floor), "v", color=color, ms=5)
            if hidden.any():
                said.append(f"{name}: ▾ below the axis\nat {hidden.sum()} of {len(steps)} measurements")
        below.set_title("\n".join(said), fontsize=8)
        for ax in (norms, below):
            mark_collapse(ax, verdict)
            plain(ax)
        below.set_xlabel("step")
        norms.set_title(run.name, fontsize=10)
    axes[0, 0].set_ylabel("norm")
    whole_decades(axes[0, 0])
    axes[1, 0].set(ylabel="lower bound of the product", yscale="log", ylim=(floor, None))
    shared_legend(fig)
    return fig


def training(shown: Sequence[tuple[Verdict, dict]]) -> Figure:
    """Loss above gradient norm, of runs in their line styles. Raises UserError if all are too short for a mean loss."""
    if all(len(v.run.lines) < WINDOW for v, _ in shown):
        raise UserError(f"needs a run of at least {WINDOW} steps")
    fig, axes = plt.subplots(2, 1, figsize=(9, 6.4), sharex=True, constrained_layout=True)
    draw_training(*axes, shown)
    whole_decades(axes[1])
    axes[1].set_xlabel("step")
    fig.suptitle(", ".join(sorted({v.run.experiment for v, _ in shown})), fontsize=10)
    return fig


def fig3(runs: Sequence[Run]) -> Figure:
    """Figure 3: loss and gradient norm of every run, a colour per arm."""
    return training(by_arm(verdicts(runs), lw=0.9))


def fig4(runs: Sequence[Run]) -> Figure:
    """Figure 4: loss and gradient norm for every period P of MSign, on the targets with the most periods; AdamW is P = ∞."""
    arms = [arm for arm in [*COLORS, *(run.arm for run in runs)] if arm.startswith("MSign")]
    arm = max(arms, key=lambda arm: len({run.config["msign_period"] for run in runs if run.arm == arm}))
    judged = [(v, v.run.config["msign_period"] or np.inf) for v in verdicts(runs) if v.run.arm in ("AdamW", arm)]
    periods = sorted({period for _, period in judged})
    if len(periods) < 2:
        raise UserError("needs runs with at least two different msign_period")
    colors = dict(zip(periods, plt.get_cmap("viridis")(np.linspace(0.9, 0, len(periods))), strict=True))
    shown, labels = [], set()
    for verdict, period in sorted(judged, key=lambda item: item[1]):
        label = "P = ∞ (AdamW)" if period == np.inf else f"P = {period}, {arm}"
        shown.append((verdict, {"color": colors[period], "lw": 1.2, "label": None if label in labels else label}))
        labels.add(label)
    return training(shown)


def strips(found: Sequence[tuple[str, Sequence[Verdict]]], floor: str = "attention off") -> Figure:
    """Final loss of every run, a row per arm: a cross for one that collapsed, a dot for one that did not; the line is the mean of the
    `floor` arm, what the model is worth without attention."""
    fig, ax = plt.subplots(figsize=(9, 0.9 + 0.34 * len(found)), constrained_layout=True)
    for row, (name, judged) in enumerate(found):
        for verdict in judged:
            mark = {"marker": "x", "color": VERMILLION} if verdict.collapse else {"marker": "o", "color": BLUE}
            ax.plot(min(verdict.run.final_loss(), 99), row, **mark, ms=6, mew=1.8, alpha=0.8, ls="")
        if name == floor:
            ax.axvline(np.mean([v.run.final_loss() for v in judged]), color=COLORS[floor], lw=1, ls="--")
    ax.set_yticks(range(len(found)), [name for name, _ in found])
    ax.invert_yaxis()
    ax.set(xlabel="final training loss, nats per token (× collapsed)")
    plain(ax)
    return fig


def against(
    found: Sequence[tuple[str, str, Sequence[Verdict]]], label: str, x: Callable[[Run], float] | None = None
) -> Figure:
    """Final loss of every run (at most its initial one) against a field of its configuration, or against `x` of the run, on a log scale,
    crosses collapsed. `found`: name, field and runs of every line, which goes through the means of the runs of equal field."""
    fig, ax = plt.subplots(figsize=(9, 4), constrained_layout=True)
    spare = iter((GREEN, PURPLE, BLACK))
    for name, field, judged in found:
        color, at = COLORS.get(name) or next(spare), {}
        for v in judged:
            value = v.run.config[field]
            point = x(v.run) if x else value, min(v.run.final_loss(), v.run.lines[0]["train/loss"])
            at.setdefault(value, []).append(point)
            ax.plot(*point, marker="x" if v.collapse else "o", color=color, ms=5, mew=1.5, alpha=0.7, ls="")
        ax.plot(*np.array([np.mean(at[value], axis=0) for value in sorted(at)]).T, color=color, label=name)
    ax.set(xscale="log", xlabel=label, ylabel="final training loss, nats per token (× collapsed)")
    if len(found) > 1:
        ax.legend(frameon=False)
    plain(ax)
    return fig


def scatter(
    panels: Sequence[tuple[str, Sequence[tuple[str, Sequence[Run]]]]],
    x: tuple[str, Callable[[Run], float]],
    y: tuple[str, Callable[[Run], float]],
) -> Figure:
    """One value of a run against another, each with its name: a column per panel, a colour per arm."""
    fig, axes = plt.subplots(1, len(panels), figsize=(9, 3.6), squeeze=False, constrained_layout=True)
    for ax, (title, found) in zip(axes.flat, panels, strict=True):
        spare = iter((GREEN, PURPLE, BLACK))
        for name, runs in found:
            color = COLORS.get(name) or next(spare)
            ax.plot([x[1](run) for run in runs], [y[1](run) for run in runs], "o", color=color, label=name, alpha=0.8)
        ax.set(title=title, xlabel=x[0], ylabel=y[0])
        plain(ax)
    axes[0, 0].legend(frameon=False)
    return fig


class HeatMap(NamedTuple):
    label: str
    family: str
    log: bool = True  # else from 0 to 1
    combine: Callable[[np.ndarray], float] = np.mean
    roles: tuple[str, ...] = ()
    between: float = 0.0  # 0.5: values of adjacent layers, drawn between them
    first: int = 0  # the layer from which on values set the colour scale


# the first block lifts small embeddings to the scale of the stream: its Jacobian and gradient would flatten all others
HEATMAPS = (
    HeatMap("stable rank of attention,\ngeometric mean", "srank", combine=geometric_mean, roles=("W_Q", "W_K", "W_V", "W_O")),
    HeatMap("Jacobian norm ‖J(ℓ)‖₂", "jacobian/sigma1", first=1),
    HeatMap("alignment |v(ℓ+1)ᵀ u(ℓ)|\n(dots: ill-conditioned)", "jacobian/alignment", log=False, between=0.5),
    HeatMap("gradient norm ‖∇‖₂", "grad_norm", combine=np.linalg.norm, first=1),
)  # fmt: skip


def edges(positions: np.ndarray) -> np.ndarray:
    """Borders of cells around increasing positions: halfway between them; the outer ones lie as far out."""
    half = np.diff(positions) / 2 if len(positions) > 1 else np.array([0.5])
    return np.r_[positions[0] - half[0], positions[:-1] + half[: len(positions) - 1], positions[-1] + half[-1]]


def heatmaps(runs: Sequence[Run]) -> Figure:
    """Layers against steps, a column per run and a colour scale per row: how a collapse spreads. Grey: not measured."""
    measured = {v.run.folder: [v.run.by_layer(m.family, m.combine, m.roles) for m in HEATMAPS] for v in verdicts(runs)}
    judged = [v for v in verdicts(runs) if any(len(steps) for steps, _ in measured[v.run.folder])]
    judged = side_by_side(judged, "/<layer> or ".join(m.family for m in HEATMAPS) + "/<layer>")
    fig, axes = plt.subplots(
        len(HEATMAPS), len(judged), figsize=(9, 9), sharex=True, sharey=True, squeeze=False, constrained_layout=True
    )
    for i, (row, heat) in enumerate(zip(axes, HEATMAPS, strict=True)):
        found = [measured[v.run.folder][i] for v in judged]
        scale = np.concatenate([values[heat.first :].ravel() for _, values in found])
        scale = scale[scale > 0] if (scale > 0).any() else np.array([1, 10])
        norm = LogNorm(scale.min(), scale.max()) if heat.log else Normalize(0, 1)
        for ax, verdict, (steps, values) in zip(row, judged, found, strict=True):
            ax.set_facecolor("#e0e0e0")
            mark_collapse(ax, verdict)
            if not len(steps):
                ax.text(0.5, 0.5, "not logged", transform=ax.transAxes, ha="center", va="center")
                continue
            cells = np.ma.masked_where(~(values > 0), values)  # 0 is what W&B makes of a layer's null
            borders = edges(steps), edges(np.arange(len(values)) + heat.between)
            ax.pcolormesh(*borders, cells, norm=norm, cmap="viridis", rasterized=True)
            if heat.between:
                at, flags = verdict.run.by_layer("jacobian/ill_conditioned")
                pair, step = np.nonzero(flags == 1)
                ax.scatter(at[step], pair + heat.between, s=2, c="white", ec="black", lw=0.3)
        row[0].set_ylabel("layer")
        colors = plt.cm.ScalarMappable(norm, "viridis")
        bar = fig.colorbar(colors, ax=row, label=heat.label, pad=0.01, extend="both" if heat.first else "neither")
        if heat.log:
            within = (1, 2, 5) if norm.vmax < 100 * norm.vmin else (1,)
            bar.locator, bar.formatter = LogLocator(subs=within), "{x:g}"
            bar.minorformatter = NullFormatter()
    for ax, verdict in zip(axes[0], judged, strict=True):
        ax.set_title(verdict.run.name, fontsize=10)
    for ax in axes[-1]:
        ax.set_xlabel("step")
    return fig


def theorems(run: Run) -> Figure:
    """Both sides of Theorems 4.5, 4.6, 4.8 and 4.10, layer by layer, at the last step at which the run logged them."""
    needs = ("4.5/measured", "4.6/measured", "4.8/log10_measured", "4.10/srank_hidden")
    steps = run.by_layer(f"theory/{needs[0]}")[0]
    if not len(steps):
        raise UserError("needs a run that logs theory/… (theory_every)")

    def last(name: str) -> np.ndarray:
        return run.by_layer(f"theory/{name}")[1][:, -1]

    fig, axes = plt.subplots(2, 2, figsize=(9, 6.2), sharex=True, constrained_layout=True)
    layers = np.arange(len(last(needs[0])))
    for ax, theorem, what in zip(axes.flat, ("4.5", "4.6"), ("attention", "MLP"), strict=False):
        ax.plot(layers, last(f"{theorem}/bound"), "v-", color=VERMILLION, ms=4, label="upper bound")
        ax.plot(layers, last(f"{theorem}/measured"), "o-", color=GREEN, ms=4, label="measured")
        ax.set(title=f"Theorem {theorem}: {what}'s Jacobian", ylabel="‖∂Y/∂H‖₂", yscale="log")
    gradients, ranks = axes[1]
    gradients.plot(layers, last("4.8/log10_measured"), "o-", color=GREEN, ms=4, label="measured")
    gradients.plot(layers, last("4.8/log10_bound"), "^-", color=BLUE, ms=4, label="lower bound")
    gradients.set(title="Theorem 4.8: gradient of W_down", ylabel="log₁₀ ‖∂L/∂W‖_F", xlabel="layer")
    ranks.plot(layers, last("4.10/srank_hidden"), "s-", color=PURPLE, ms=4, label="hidden states H")
    ranks.plot(layers, last("4.10/srank_cohidden"), "D-", color=BLACK, ms=4, label="co-hidden states ∂L/∂Y")
    ranks.set(title="Theorem 4.10: what the gradients inherit", ylabel="stable rank", xlabel="layer", ylim=(1, None))
    for ax in axes.flat:
        ax.legend(fontsize=9, frameon=False)
    plain(*axes.flat)
    fig.suptitle(f"{run.name}, step {steps[-1]}", fontsize=10)
    return fig
