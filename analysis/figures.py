"""Figures of recorded runs: the overview, the paper's Figures 1 to 4, heat maps of layers, and values of many runs.

Each function returns a matplotlib Figure, which `save` writes, and raises UserError when no run logged what it needs.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from analysis.runs import OFF, Run, judged
from analysis.statistics import Arm, geometric_mean, grouped, loss
from config import UserError
from stability.collapse import WINDOW

plt.style.use(Path(__file__).with_suffix(".mplstyle"))
GREEN, PURPLE, BLACK, ORANGE, SKY, BLUE, VERMILLION = plt.rcParams["axes.prop_cycle"].by_key()["color"]
COLORS = {"AdamW": VERMILLION, "MSign (attention)": BLUE, "MSign (mlp)": ORANGE, "MSign (blocks)": SKY, OFF: "#666666"}
COLUMNS = 4  # that stay legible side by side
LOSS = "final training loss, nats per token (× collapsed)"


def save(fig: Figure, stem: Path) -> list[Path]:
    """Write <stem>.png and .svg; the same runs give the same bytes."""
    paths = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    plt.rcParams["svg.hashsalt"] = stem.name
    for path in paths:
        fig.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(fig)
    return paths


def colors_of(names: Sequence[str]) -> dict[str, str]:
    """A colour for each arm: its own, or one that is left."""
    spare = itertools.cycle((GREEN, PURPLE, BLACK))
    return {name: COLORS.get(name) or next(spare) for name in dict.fromkeys(names)}


def smooth(values: pd.Series, window: int = WINDOW) -> pd.Series:
    """Mean over the last `window` values, NaN before there are that many."""
    return values.rolling(window).mean()


def peaks(values: pd.Series, size: int = 10) -> pd.Series:
    """The largest finite value of every `size` steps, at the first of them: spikes stay, and the figure is small."""
    largest = values.where(np.isfinite(values)).groupby(np.arange(len(values)) // size).max()
    return largest.set_axis(values.index[::size])


def legend(on: Axes | Figure, **where):
    """A legend of all axes, every label once."""
    found = {}
    for ax in on.axes if isinstance(on, Figure) else [on]:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    on.legend(found.values(), found, **where)


def whole_decades(ax: Axes):
    """Make it a log axis from a power of ten to a power of ten: no axis without a labelled tick."""
    ax.set_yscale("log")
    low, high = np.log10(ax.get_ylim())
    ax.set_ylim(10.0 ** np.floor(low), 10.0 ** np.ceil(high))
    ax.yaxis.set_minor_formatter(NullFormatter())


def draw_training(losses: Axes, norms: Axes, runs: Sequence[Run], styles: Sequence[dict]):
    """Loss and gradient norm of every run in its line style, with a cross where it collapsed."""
    means = [smooth(run.steps["train/loss"]) for run in runs]
    for run, mean, style in zip(runs, means, styles, strict=True):
        losses.plot(mean[::5], **style)
        norms.plot(peaks(run.steps["grad_norm"]), **style | {"lw": 0.8})
        if run.collapse:
            losses.plot(run.end, mean[run.end], "x", color=style["color"], ms=9, mew=2.5)
    visible = pd.concat([mean[len(mean) // 5 :] for mean in means])  # the fall from ln V would flatten the rest
    if visible.notna().any():
        losses.set_ylim(visible.min() - 0.05, visible.max() + 0.1)
    losses.set(title="Training loss, mean of 100 steps (× collapse)", ylabel="nats per token")
    norms.set(title="Gradient norm before clipping, largest of 10 steps", ylabel="‖∇‖₂", ylim=(0.1, None), yscale="log")
    legend(losses)


def by_arm(runs: Sequence[Run], **style) -> list[dict]:
    """A line style for each run: its arm's name and colour."""
    colors = colors_of([run.arm for run in runs])
    return [{"color": colors[run.arm], "alpha": 0.85, "label": run.arm, **style} for run in runs]


def overview(runs: Sequence[Run]) -> Figure:
    """The headline figure: loss, gradient norm, stable rank and learning rate against step."""
    fig, ((losses, norms), (srank, rate)) = plt.subplots(2, 2, figsize=(10, 6.4), sharex=True)
    runs, styles = judged(runs), by_arm(runs)
    draw_training(losses, norms, runs, styles)
    for run, style in zip(runs, styles, strict=True):
        srank.plot(run.series("srank/attention"), **style)
        rate.plot(run.steps["lr"][::5], **style)
    width = runs[0].config["d_model"]
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 1000) if tick < width] + [width]
    srank.set(ylim=(1, width * 1.05), yscale="log")
    srank.set_yticks(ticks, ticks)
    srank.minorticks_off()
    srank.set(title="Stable rank of the attention matrices, geometric mean", ylabel="‖W‖²_F / ‖W‖²₂", xlabel="step")
    rate.set(title="Learning rate (before μP's multipliers)", ylabel="learning rate", xlabel="step")
    return fig


def training(runs: Sequence[Run], styles: Sequence[dict]) -> Figure:
    """Loss above gradient norm, of runs in their line styles. Raises UserError if all are too short for a mean loss."""
    if all(len(run.steps) < WINDOW for run in runs):
        raise UserError(f"needs a run of at least {WINDOW} steps")
    fig, axes = plt.subplots(2, 1, sharex=True)
    draw_training(*axes, runs, styles)
    whole_decades(axes[1])
    axes[1].set_xlabel("step")
    return fig


def fig3(runs: Sequence[Run]) -> Figure:
    """Figure 3: loss and gradient norm of every run, a colour per arm."""
    return training(judged(runs), by_arm(runs, lw=0.9))


def fig4(runs: Sequence[Run]) -> Figure:
    """Figure 4: loss and gradient norm for every period P of MSign, on the targets with the most; AdamW is P = ∞."""
    names = [arm for arm in [*COLORS, *(run.arm for run in runs)] if arm.startswith("MSign")]
    arm = max(names, key=lambda arm: len({run.config["msign_period"] for run in runs if run.arm == arm}))
    period = {run: run.config["msign_period"] or np.inf for run in judged(runs) if run.arm in ("AdamW", arm)}
    periods = sorted(set(period.values()))
    if len(periods) < 2:
        raise UserError("needs runs with at least two different msign_period")
    colors = dict(zip(periods, plt.get_cmap()(np.linspace(0.9, 0, len(periods))), strict=True))
    words = {p: "P = ∞ (AdamW)" if p == np.inf else f"P = {p}, {arm}" for p in periods}
    shown = sorted(period, key=period.get)
    return training(shown, [{"color": colors[period[run]], "label": words[period[run]]} for run in shown])


def columns(runs: Sequence[Run], rows: int, height: float, needs: str) -> tuple[Figure, np.ndarray, Sequence[Run]]:
    """A figure of axes (rows, columns), with dashed lines at collapses, and the runs that get a column: all when they
    fit, else the first of each arm. Raises UserError if there is none."""
    if not runs:
        raise UserError(f"needs a run that logs {needs}")
    if len(runs) > COLUMNS:
        runs = [arm.runs[0] for arm in grouped(runs)][:COLUMNS]
    fig, axes = plt.subplots(rows, len(runs), figsize=(9, height), sharex=True, sharey="row", squeeze=False)
    titles = [title(run) for run in runs]
    rim = [patheffects.withStroke(linewidth=3, foreground="white")]  # keeps the line visible on any colour
    for column, run, words in zip(axes.T, runs, titles, strict=True):
        column[0].set_title(words if titles.count(words) == 1 else run.name)
        column[-1].set_xlabel("step")
        for ax in column if run.collapse else ():
            ax.axvline(run.end, label="collapse", color=BLACK, ls="--", path_effects=rim, zorder=1.5)
    return fig, axes, runs


def title(run: Run) -> str:
    return f"{run.arm}, seed {run.config['seed']}"


def draw_grad(ax: Axes, run: Run):
    norms = peaks(run.steps["grad_norm"])
    ax.plot(norms, color=BLACK, lw=0.8, alpha=0.6, label="gradient norm, largest of 10 steps")


def fig1(runs: Sequence[Run]) -> Figure:
    """Figure 1, a column per run: early layers' stable rank and the Jacobians' alignment against gradient norm."""
    keys = ("srank/early", "jacobian/alignment")
    logged = [run for run in judged(runs) if not any(run.series(key).empty for key in keys)]
    fig, axes, runs = columns(logged, 2, 5.6, " and ".join(keys))
    twins = np.array([[ax.twinx() for ax in row] for row in axes])
    for run, (srank, alignment), pair in zip(runs, axes.T, twins.T, strict=True):
        srank.plot(run.series(keys[0]), ".-", color=GREEN, label="stable rank")
        alignment.plot(run.series(keys[1]), ".-", color=PURPLE, label="alignment")
        flagged = run.series("jacobian/ill_conditioned") / (run.config["n_layer"] - 1)
        words = "share of pairs that are ill-conditioned"
        alignment.fill_between(flagged.index, flagged, step="mid", color=PURPLE, alpha=0.2, lw=0, label=words)
        alignment.set_ylim(0, 1)
        for twin in pair:
            draw_grad(twin, run)
            twin.sharey(twins[0, 0])
            twin.tick_params(labelright=run is runs[-1])
            twin.grid(False)
    whole_decades(twins[0, 0])
    for row in twins:
        row[-1].set_ylabel("gradient norm ‖∇‖₂")
    axes[0, 0].set(ylabel="(a) stable rank of the\nearly layers, geometric mean", ylim=(1, None))
    axes[1, 0].set_ylabel("(b) adjacent alignment\n|v(ℓ+1)ᵀ u(ℓ)|, mean")
    legend(fig, loc="outside lower center", ncols=3)
    return fig


def fig2(runs: Sequence[Run]) -> Figure:
    """Figure 2, a column per run: the Jacobians' product and the gradient norm above two lower bounds of that product.

    The bounds are up to a hundred decades smaller and get an axis of their own, down to the smallest of Theorem 4.2's;
    what lies below is a mark at its foot.
    """
    logged = [run for run in judged(runs) if not run.series("jacobian/product").empty]
    fig, axes, runs = columns(logged, 2, 5.6, "jacobian/product")
    stated = pd.concat([run.series("jacobian/bound_4_2") for run in runs])
    floor = stated[stated > 0].min() / 10 if (stated > 0).any() else 0.1
    bounds = {"provable bound": ("jacobian/bound", BLUE, "s-"),
              "Theorem 4.2's bound (aM)ᴸ/a": ("jacobian/bound_4_2", VERMILLION, "D-")}  # fmt: skip
    for run, (norms, below) in zip(runs, axes.T, strict=True):
        product, said = run.series("jacobian/product"), []
        norms.plot(product, ".-", color=GREEN, label="product ‖J(L)···J(1)‖₂")
        draw_grad(norms, run)
        for name, (key, color, style) in bounds.items():
            bound = run.series(key).reindex(product.index, fill_value=0.0)  # null also stands for zero
            hidden = bound < floor
            below.plot(bound.mask(hidden), style, color=color, ms=3, label=name)
            below.plot(bound.index[hidden], np.full(hidden.sum(), floor), "v", color=color)
            if hidden.any():
                said.append(f"{name}: ▾ below the axis\nat {hidden.sum()} of {len(product)} measurements")
        below.set_title("\n".join(said), fontsize=8)
    axes[0, 0].set_ylabel("norm")
    whole_decades(axes[0, 0])
    axes[1, 0].set(ylabel="lower bound of the product", yscale="log", ylim=(floor, None))
    legend(fig, loc="outside lower center", ncols=3)
    return fig


def dots(ax: Axes, runs: Sequence[Run], x: Callable, y: Callable, color: str = ""):
    """Draw a cross for each run that collapsed and a dot for each that did not, in two colours unless one is given."""
    for run in runs:
        marker, its_color = ("x", VERMILLION) if run.collapse else ("o", BLUE)
        ax.plot(x(run), y(run), marker, color=color or its_color, mew=1.5, alpha=0.75)


def strips(found: Sequence[Arm]) -> Figure:
    """Final loss of every run, a row per arm; the line is attention-off's mean."""
    fig, ax = plt.subplots(figsize=(9, 0.9 + 0.34 * len(found)))
    for row, arm in enumerate(found):
        dots(ax, arm.runs, lambda run: min(loss(run), 99), lambda run, row=row: row)
        if arm.name == OFF:
            ax.axvline(np.mean(arm.values(loss)), color=COLORS[OFF], lw=1, ls="--")
    ax.set_yticks(range(len(found)), [arm.name for arm in found])
    ax.invert_yaxis()
    ax.set_xlabel(LOSS)
    return fig


def against(panels: Mapping[str, Mapping[str, Sequence[Arm]]], x: Callable[[Run], float], y: Callable[[Run], float],
            height: float = 4, **labels) -> Figure:  # fmt: skip
    """One value of every run against another, a column per panel and a colour per line through the means of its arms.

    `panels`: title -> name of a line -> its arms. `labels`: of the axes, and their scales, as in Axes.set.
    """
    fig, axes = plt.subplots(1, len(panels), figsize=(9, height), squeeze=False)
    for ax, (heading, lines) in zip(axes.flat, panels.items(), strict=True):
        for (name, color), arms in zip(colors_of([*lines]).items(), lines.values(), strict=True):
            means = sorted((np.mean(arm.values(x)), np.mean(arm.values(y))) for arm in arms)
            ax.plot(*zip(*means, strict=True), color=color, label=name, marker="" if len(means) > 1 else "o", ms=4)
            for arm in arms:
                dots(ax, arm.runs, x, y, color)
        ax.set(title=heading, **labels)
    if len(lines) > 1:
        axes[0, 0].legend()
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
    HeatMap("stable rank of attention,\ngeometric mean", "srank", combine=geometric_mean,
            roles=("W_Q", "W_K", "W_V", "W_O")),
    HeatMap("Jacobian norm ‖J(ℓ)‖₂", "jacobian/sigma1", first=1),
    HeatMap("alignment |v(ℓ+1)ᵀ u(ℓ)|\n(dots: ill-conditioned)", "jacobian/alignment", log=False, between=0.5),
    HeatMap("gradient norm ‖∇‖₂", "grad_norm", combine=np.linalg.norm, first=1),
)  # fmt: skip


def edges(positions: np.ndarray) -> np.ndarray:
    """Borders of cells around increasing positions: halfway between them; the outer ones lie as far out."""
    half = np.diff(positions) / 2 if len(positions) > 1 else np.array([0.5])
    return np.r_[positions[0] - half[0], positions[:-1] + half[: len(positions) - 1], positions[-1] + half[-1]]


def draw_layers(ax: Axes, run: Run, heat: HeatMap, norm: Normalize):
    """One heat map of one run; grey: not measured."""
    steps, values = run.by_layer(heat.family, heat.combine, heat.roles)
    ax.set_facecolor("#e0e0e0")
    ax.grid(False)
    if not len(steps):
        ax.text(0.5, 0.5, "not logged", transform=ax.transAxes, ha="center", va="center")
        return
    cells = np.ma.masked_where(~(values > 0), values)  # 0 is what W&B makes of a layer's null
    ax.pcolormesh(edges(steps), edges(np.arange(len(values)) + heat.between), cells, norm=norm, rasterized=True)
    if heat.between:
        at, flags = run.by_layer("jacobian/ill_conditioned")
        pair, step = np.nonzero(flags == 1)
        ax.scatter(at[step], pair + heat.between, s=2, c="white", ec="black", lw=0.3)


def heatmaps(runs: Sequence[Run]) -> Figure:
    """Layers against steps, a column per run and a colour scale per row: how a collapse spreads."""
    logged = [run for run in judged(runs) if any(len(run.by_layer(heat.family)[0]) for heat in HEATMAPS)]
    needs = "/<layer> or ".join(heat.family for heat in HEATMAPS) + "/<layer>"
    fig, axes, runs = columns(logged, len(HEATMAPS), 9, needs)
    for row, heat in zip(axes, HEATMAPS, strict=True):
        values = [run.by_layer(heat.family, heat.combine, heat.roles)[1][heat.first :].ravel() for run in runs]
        scale = np.concatenate(values)
        scale = scale[scale > 0] if (scale > 0).any() else np.array([1, 10])
        norm = LogNorm(scale.min(), scale.max()) if heat.log else Normalize(0, 1)
        for ax, run in zip(row, runs, strict=True):
            draw_layers(ax, run, heat, norm)
        row[0].set_ylabel("layer")
        extend = "both" if heat.first else "neither"
        bar = fig.colorbar(plt.cm.ScalarMappable(norm), ax=row, label=heat.label, pad=0.01, extend=extend)
        if heat.log:
            bar.locator = LogLocator(subs=(1, 2, 5) if norm.vmax < 100 * norm.vmin else (1,))
            bar.formatter, bar.minorformatter = "{x:g}", NullFormatter()
    return fig


def theorems(run: Run) -> Figure:
    """Both sides of Theorems 4.5, 4.6, 4.8 and 4.10, layer by layer, at the last step at which the run logged them."""
    steps = run.by_layer("theory/4.5/measured")[0]
    if not len(steps):
        raise UserError("needs a run that logs theory/… (theory_every)")
    measured, upper, lower = ("measured", "o-", GREEN), ("upper bound", "v-", VERMILLION), ("lower bound", "^-", BLUE)
    hidden, cohidden = ("hidden states H", "s-", PURPLE), ("co-hidden states ∂L/∂Y", "D-", BLACK)
    panels = {
        "4.5: attention's Jacobian": ("‖∂Y/∂H‖₂", {"bound": upper, "measured": measured}),
        "4.6: MLP's Jacobian": ("‖∂Y/∂H‖₂", {"bound": upper, "measured": measured}),
        "4.8: gradient of W_down": ("log₁₀ ‖∂L/∂W‖_F", {"log10_measured": measured, "log10_bound": lower}),
        "4.10: what the gradients inherit": ("stable rank", {"srank_hidden": hidden, "srank_cohidden": cohidden}),
    }
    fig, axes = plt.subplots(2, 2, sharex=True)
    for ax, (heading, (ylabel, sides)) in zip(axes.flat, panels.items(), strict=True):
        for side, (words, style, color) in sides.items():
            values = run.by_layer(f"theory/{heading.split(':')[0]}/{side}")[1]
            ax.plot(values[:, -1], style, color=color, ms=4, label=words)
        ax.set(title=f"Theorem {heading}", ylabel=ylabel, yscale="log" if "Jacobian" in heading else "linear")
        ax.legend()
    axes[1, 0].set_xlabel("layer")
    axes[1, 1].set(xlabel="layer", ylim=(1, None))
    fig.suptitle(f"{title(run)}, step {steps[-1]}")
    return fig
