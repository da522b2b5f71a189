"""Figures of recorded runs: the overview, the paper's Figures 1 to 4, heat maps of layers, and values of many runs.

Each function returns a matplotlib Figure of a frame of runs (statistics.judged), which `save` writes, and raises
UserError when no run logged what it needs.
"""

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from analysis.runs import OFF, Run
from config import UserError
from stability.collapse import WINDOW

plt.style.use(Path(__file__).with_suffix(".mplstyle"))
GREEN, PURPLE, BLACK, ORANGE, SKY, BLUE, VERMILLION = plt.rcParams["axes.prop_cycle"].by_key()["color"]
COLORS = {"AdamW": VERMILLION, "MSign (attention)": BLUE, "MSign (mlp)": ORANGE, "MSign (blocks)": SKY, OFF: "#666666"}
COLUMNS = 4  # that stay legible side by side
SRANK = "srank/attention"
LOSS = "final training loss, nats per token (× collapsed)"


def save(fig: Figure, stem: Path) -> list[Path]:
    """Write <stem>.png and .svg; the same runs give the same bytes."""
    paths = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    for path in paths:
        fig.savefig(path, metadata={"Date": None})
    plt.close(fig)
    return paths


def colors_of(names: Iterable[str]) -> dict[str, str]:
    """A colour for each arm: its own, or one that is left."""
    spare = itertools.cycle((GREEN, PURPLE, BLACK))
    return {name: COLORS.get(name) or next(spare) for name in dict.fromkeys(names)}


def geometric_mean(values: pd.Series) -> float:
    """exp(mean log) of the positive values, NaN when there are none."""
    return np.exp(np.log(values[values > 0]).mean())


def peaks(values: pd.Series, size: int = 10) -> pd.Series:
    """The largest finite value of every `size` steps, at the first of them: spikes stay, and the figure is small."""
    largest = values.where(np.isfinite(values)).groupby(np.arange(len(values)) // size).max()
    return largest.set_axis(values.index[::size])


def legend(on: Axes | Figure, axes: Iterable[Axes], **where):
    """A legend of these axes, every label once."""
    found = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    on.legend(found.values(), found.keys(), **where)


def whole_decades(ax: Axes):
    """Make it a log axis from a power of ten to a power of ten: no axis without a labelled tick."""
    ax.set_yscale("log")
    low, high = np.log10(ax.get_ylim())
    ax.set_ylim(10.0 ** np.floor(low), 10.0 ** np.ceil(high))


def mean_loss(run: Run) -> pd.Series:
    return run.steps["train/loss"].rolling(WINDOW).mean()


# what the overview draws against the step: a title, a label, and the values of a run
CURVES = (
    ("Training loss, mean of 100 steps (× collapse)", "nats per token", lambda run: mean_loss(run)[::5]),
    ("Gradient norm before clipping, largest of 10 steps", "‖∇‖₂", lambda run: peaks(run.steps["grad_norm"])),
    ("Stable rank of the attention matrices, geometric mean", "‖W‖²_F / ‖W‖²₂", lambda run: run.series(SRANK)),
    ("Learning rate (before μP's multipliers)", "learning rate", lambda run: run.steps["lr"][::5]),
)


def curves(runs: pd.DataFrame, columns: int, label: str = "arm", colors: dict | None = None) -> tuple:
    """Two rows of CURVES, a line a run in the colour of its column `label`, with a cross where its loss collapsed."""
    colors = colors or colors_of(runs[label])
    fig, axes = plt.subplots(2, columns, sharex=True, squeeze=False)
    for ax, (title, ylabel, values) in zip(axes.flat, CURVES, strict=False):
        for run, name in zip(runs["run"], runs[label], strict=True):
            ax.plot(values(run), color=colors[name], label=name, alpha=0.85, lw=1)
        ax.set(title=title, ylabel=ylabel)
    losses, norms = axes.flat[:2]
    mark_collapses(losses, runs, label, colors)
    legend(losses, [losses])
    whole_decades(norms)
    for ax in axes[-1]:
        ax.set_xlabel("step")
    return fig, axes


def mark_collapses(ax: Axes, runs: pd.DataFrame, label: str, colors: dict):
    """Put a cross where the mean loss of a run in `ax` collapsed, and show the losses after the fall from ln V."""
    for row in runs[runs["collapsed"]].itertuples():
        ax.plot(row.end, mean_loss(row.run)[row.end], "x", color=colors[getattr(row, label)], ms=9, mew=2.5)
    visible = pd.concat([mean_loss(run)[len(run.steps) // 5 :] for run in runs["run"]])
    if visible.notna().any():
        ax.set_ylim(visible.min() - 0.05, visible.max() + 0.1)


def loss_panels(runs: pd.DataFrame, columns: int) -> Figure:
    """The mean loss of every run against the step, a panel for each value of the column `panel`, a colour per arm."""
    colors, groups = colors_of(runs["arm"]), runs.groupby("panel", sort=False)
    rows = -(-groups.ngroups // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(9, 0.6 + 2.4 * rows), sharex=True, squeeze=False)
    for ax, (name, of) in zip(axes.flat, groups, strict=True):
        for row in of.itertuples():
            ax.plot(mean_loss(row.run)[::5], color=colors[row.arm], label=row.arm, alpha=0.85, lw=1)
        mark_collapses(ax, of, "arm", colors)
        ax.set_title(name)
    for ax in axes[-1]:
        ax.set_xlabel("step")
    for ax in axes[:, 0]:
        ax.set_ylabel("training loss")
    legend(fig, axes[0], loc="outside lower center", ncols=3)
    return fig


def overview(runs: pd.DataFrame) -> Figure:
    """The headline figure: loss, gradient norm, stable rank and learning rate against step."""
    fig, axes = curves(runs, 2)
    width = runs["d_model"].iloc[0]
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 1000) if tick < width] + [width]
    axes[1, 0].set(yscale="log", ylim=(1, width * 1.05), yticks=ticks, yticklabels=ticks)
    axes[1, 0].minorticks_off()
    return fig


def fig3(runs: pd.DataFrame, **lines) -> Figure:
    """Figure 3: loss and gradient norm of every run, a colour per arm, or per line (`curves`)."""
    if runs["steps"].max() < WINDOW:
        raise UserError(f"needs a run of at least {WINDOW} steps")
    return curves(runs, 1, **lines)[0]


def fig4(runs: pd.DataFrame) -> Figure:
    """Figure 4: loss and gradient norm for every period P of MSign, on the targets with the most; AdamW is P = ∞."""
    names = [arm for arm in [*COLORS, *runs["arm"]] if arm.startswith("MSign")]
    arm = max(names, key=lambda name: runs.loc[runs["arm"] == name, "msign_period"].nunique())
    shown = runs[runs["arm"].isin(["AdamW", arm])].sort_values("msign_period", key=lambda of: of.replace(0, np.inf))
    words = shown["msign_period"].map(lambda period: f"P = {period}, {arm}" if period else "P = ∞ (AdamW)")
    if words.nunique() < 2:
        raise UserError("needs runs with at least two different msign_period")
    colors = dict(zip(words.unique(), plt.get_cmap()(np.linspace(0.9, 0, words.nunique())), strict=True))
    return fig3(shown.assign(period=words), label="period", colors=colors)


def columns(runs: pd.DataFrame, logged: Callable[[Run], bool], needs: str, rows: int, height: float) -> tuple:
    """A figure of axes (rows, columns), with dashed lines at collapses, and the runs that get a column: all that
    `logged` what it needs when they fit, else the first of each arm. Raises UserError if there is none."""
    runs = runs[runs["run"].map(logged)]
    if runs.empty:
        raise UserError(f"needs a run that logs {needs}")
    runs = (runs if len(runs) <= COLUMNS else runs.drop_duplicates("arm"))[:COLUMNS]
    fig, axes = plt.subplots(rows, len(runs), figsize=(9, height), sharex=True, sharey="row", squeeze=False)
    titles = runs["arm"] + ", seed " + runs["seed"].map(str)
    titles = titles.mask(titles.duplicated(keep=False), runs["name"])
    for column, row, title in zip(axes.T, runs.itertuples(), titles, strict=True):
        column[0].set_title(title)
        column[-1].set_xlabel("step")
        for ax in column if row.collapsed else ():
            ax.axvline(row.end, color="white", lw=3, zorder=1.4)  # keeps the other visible on any colour
            ax.axvline(row.end, label="collapse", color=BLACK, ls="--", zorder=1.5)
    return fig, axes, runs["run"]


def draw_grad(ax: Axes, run: Run):
    label = "gradient norm, largest of 10 steps"
    ax.plot(peaks(run.steps["grad_norm"]), color=BLACK, lw=0.8, alpha=0.6, label=label)


def fig1(runs: pd.DataFrame) -> Figure:
    """Figure 1, a column per run: early layers' stable rank and the Jacobians' alignment above the gradient norm."""
    keys = ("srank/early", "jacobian/alignment")
    fig, axes, runs = columns(runs, lambda run: not any(run.series(k).empty for k in keys), " and ".join(keys), 3, 7)
    for run, (srank, alignment, norms) in zip(runs, axes.T, strict=True):
        srank.plot(run.series(keys[0]), ".-", color=GREEN, label="stable rank")
        alignment.plot(run.series(keys[1]), ".-", color=PURPLE, label="alignment")
        flagged = run.series("jacobian/ill_conditioned") / (run.config["n_layer"] - 1)
        words = "share of pairs that are ill-conditioned"
        alignment.fill_between(flagged.index, flagged, step="mid", color=PURPLE, alpha=0.2, lw=0, label=words)
        draw_grad(norms, run)
    axes[0, 0].set(ylabel="(a) stable rank of the\nearly layers, geometric mean", ylim=(1, None))
    axes[1, 0].set(ylabel="(b) adjacent alignment\n|v(ℓ+1)ᵀ u(ℓ)|, mean", ylim=(0, 1))
    axes[2, 0].set_ylabel("gradient norm ‖∇‖₂")
    whole_decades(axes[2, 0])
    legend(fig, fig.axes, loc="outside lower center", ncols=3)
    return fig


def fig2(runs: pd.DataFrame) -> Figure:
    """Figure 2, a column per run: the Jacobians' product and the gradient norm above two lower bounds of that product.

    The bounds are up to a hundred decades smaller and get an axis of their own, down to the smallest of Theorem 4.2's;
    what lies below is a mark at its foot.
    """
    key = "jacobian/product"
    fig, axes, runs = columns(runs, lambda run: not run.series(key).empty, key, 2, 5.6)
    stated = pd.concat([run.series("jacobian/bound_4_2") for run in runs])
    floor = stated[stated > 0].min() / 10 if (stated > 0).any() else 0.1
    for run, (norms, below) in zip(runs, axes.T, strict=True):
        product, said = run.series(key), []
        norms.plot(product, ".-", color=GREEN, label="product ‖J(L)···J(1)‖₂")
        draw_grad(norms, run)
        for name, key_of_bound, color, style in (
            ("provable bound", "jacobian/bound", BLUE, "s-"),
            ("Theorem 4.2's bound (aM)ᴸ/a", "jacobian/bound_4_2", VERMILLION, "D-"),
        ):
            bound = run.series(key_of_bound).reindex(product.index, fill_value=0.0)  # null also stands for zero
            hidden = bound[bound < floor]
            below.plot(bound.mask(bound < floor), style, color=color, ms=3, label=name)
            below.plot(hidden * 0 + floor, "v", color=color)
            if len(hidden):
                said.append(f"{name}: ▾ below the axis\nat {len(hidden)} of {len(product)} measurements")
        below.set_title("\n".join(said), fontsize=8)
    axes[0, 0].set_ylabel("norm")
    whole_decades(axes[0, 0])
    axes[1, 0].set(ylabel="lower bound of the product", yscale="log", ylim=(floor, None))
    legend(fig, fig.axes, loc="outside lower center", ncols=3)
    return fig


def dots(ax: Axes, runs: pd.DataFrame, x: str, y: str, color: str = ""):
    """Draw a cross for each run that collapsed and a dot for each that did not, in two colours unless one is given."""
    for marker, its_color, of in (("o", BLUE, runs[~runs["collapsed"]]), ("x", VERMILLION, runs[runs["collapsed"]])):
        ax.plot(of[x], of[y], marker, color=color or its_color, mew=1.5, alpha=0.75)


def strips(runs: pd.DataFrame, x: str = "loss", label: str = LOSS) -> Figure:
    """A column of the frame, the final loss if none is named: a mark for every run, a row per arm and a panel for each
    value of the column `panel`; the line is attention-off's mean."""
    panels = runs.assign(loss=runs["loss"].clip(upper=99)).groupby("panel", sort=False)
    height = 0.9 + 0.34 * runs["arm"].nunique()
    fig, axes = plt.subplots(1, panels.ngroups, figsize=(9, height), sharex=x != "loss", sharey=True, squeeze=False)
    for ax, (name, of) in zip(axes.flat, panels, strict=True):
        ax.yaxis.update_units(runs["arm"])  # the rows in their order, whichever run is drawn first
        dots(ax, of, x, "arm")
        ax.axvline(of.loc[of["arm"] == OFF, x].mean(), color=COLORS[OFF], lw=1, ls="--")
        ax.set_title(name)
    axes[0, 0].invert_yaxis()
    fig.supxlabel(label, fontsize=plt.rcParams["axes.labelsize"])
    return fig


def against(runs: pd.DataFrame, x: str, y: str, height: float = 4, **labels) -> Figure:
    """One column of the frame against another, a panel for each value of its column `panel`, and for each of its column
    `line` a colour, with a line through the means of its arms. `labels`: of the axes, and their scales, as Axes.set."""
    fig, axes = plt.subplots(1, runs["panel"].nunique(), figsize=(9, height), squeeze=False)
    for ax, (heading, panel) in zip(axes.flat, runs.groupby("panel", sort=False), strict=True):
        for name, color in colors_of(panel["line"]).items():
            of = panel[panel["line"] == name]
            means = of.groupby("arm")[[x, y]].mean().sort_values(x)
            ax.plot(means[x], means[y], color=color, label=name, marker="" if len(means) > 1 else "o", ms=4)
            dots(ax, of, x, y, color)
        ax.set(title=heading, **labels)
    if runs["line"].nunique() > 1:
        axes[0, 0].legend()
    return fig


# family -> label; how the roles of a layer combine, and which; the layer from which on values set the colour scale:
# the first block lifts small embeddings to the scale of the stream: its Jacobian and gradient would flatten all others
HEATMAPS = {
    "srank": ("stable rank of attention,\ngeometric mean", geometric_mean, "W_[QKVO]", 0),
    "jacobian/sigma1": ("Jacobian norm ‖J(ℓ)‖₂", "mean", "", 1),
    "jacobian/alignment": ("alignment |v(ℓ+1)ᵀ u(ℓ)|\n(dots: ill-conditioned)", "mean", "", 0),
    "grad_norm": ("gradient norm ‖∇‖₂", lambda norms: (norms**2).sum(min_count=1) ** 0.5, r"\w+", 1),
}


def edges(positions: np.ndarray) -> np.ndarray:
    """Borders of cells around increasing positions: halfway between them; the outer ones lie as far out."""
    half = np.diff(positions) / 2 if len(positions) > 1 else np.array([0.5])
    return np.r_[positions[0] - half[0], positions[:-1] + half[: len(positions) - 1], positions[-1] + half[-1]]


def draw_layers(ax: Axes, run: Run, values: pd.DataFrame, norm: Normalize):
    """A heat map of one run, of values by layer and step; grey: not measured. Those from 0 to 1 are alignments, of
    adjacent layers, drawn between them."""
    ax.set_facecolor("#e0e0e0")
    ax.grid(False)
    if values.empty:
        ax.text(0.5, 0.5, "not logged", transform=ax.transAxes, ha="center", va="center")
        return
    between = 0.0 if isinstance(norm, LogNorm) else 0.5
    cells = values.where(values > 0)  # 0 is what W&B makes of a layer's null
    ax.pcolormesh(edges(values.columns), np.arange(len(values) + 1) + between - 0.5, cells, norm=norm, rasterized=True)
    if between:
        flags = run.by_layer("jacobian/ill_conditioned").stack()
        pair, step = np.array([*flags[flags == 1].index]).reshape(-1, 2).T
        ax.scatter(step, pair + between, s=2, c="white", ec="black", lw=0.3)


def heatmaps(runs: pd.DataFrame) -> Figure:
    """Layers against steps, a column per run and a colour scale per row: how a collapse spreads."""
    needs = "/<layer> or ".join(HEATMAPS) + "/<layer>"

    def logged(run: Run) -> bool:
        return any(not run.by_layer(family, roles=roles).empty for family, (_, _, roles, _) in HEATMAPS.items())

    fig, axes, runs = columns(runs, logged, needs, len(HEATMAPS), 9)
    for row, (family, (label, combine, roles, first)) in zip(axes, HEATMAPS.items(), strict=True):
        values = [run.by_layer(family, combine, roles) for run in runs]
        scale = np.concatenate([of[first:].to_numpy().ravel() for of in values])
        scale = scale[scale > 0] if (scale > 0).any() else np.array([1, 10])
        norm = Normalize(0, 1) if family == "jacobian/alignment" else LogNorm(scale.min(), scale.max())
        for ax, run, of in zip(row, runs, values, strict=True):
            draw_layers(ax, run, of, norm)
        row[0].set_ylabel("layer")
        extend = "both" if first else "neither"
        bar = fig.colorbar(plt.cm.ScalarMappable(norm), ax=row, label=label, pad=0.01, extend=extend)
        if isinstance(norm, LogNorm):
            bar.locator = LogLocator(subs=(1, 2, 5) if norm.vmax < 100 * norm.vmin else (1,))
            bar.formatter, bar.minorformatter = "{x:g}", NullFormatter()
    return fig


# a theorem's panel -> its label, and what of it is logged, in words
PANELS = {
    "4.5: attention's Jacobian": ("‖∂Y/∂H‖₂", {"measured": "measured", "bound": "upper bound"}),
    "4.6: MLP's Jacobian": ("‖∂Y/∂H‖₂", {"measured": "measured", "bound": "upper bound"}),
    "4.8: gradient of W_down": ("log₁₀ ‖∂L/∂W‖_F", {"log10_measured": "measured", "log10_bound": "lower bound"}),
    "4.10: what the gradients inherit": (
        "stable rank", {"srank_hidden": "hidden states H", "srank_cohidden": "co-hidden states ∂L/∂Y"}),
}  # fmt: skip


def theorems(run: Run) -> Figure:
    """Both sides of Theorems 4.5, 4.6, 4.8 and 4.10, layer by layer, at the last step at which the run logged them."""
    steps = run.by_layer("theory/4.5/measured").columns
    if steps.empty:
        raise UserError("needs a run that logs theory/… (theory_every)")
    fig, axes = plt.subplots(2, 2, sharex=True)
    for ax, (heading, (ylabel, sides)) in zip(axes.flat, PANELS.items(), strict=True):
        theorem = heading.split(":")[0]
        values = {words: run.by_layer(f"theory/{theorem}/{side}")[steps[-1]] for side, words in sides.items()}
        labels = {"title": f"Theorem {heading}", "xlabel": "layer", "ylabel": ylabel}
        pd.DataFrame(values).plot(ax=ax, style=["o-", "D--"], ms=4, logy="Jacobian" in heading, **labels)
    axes[1, 1].set_ylim(1, None)
    fig.suptitle(f"{run.arm}, seed {run.config['seed']}, step {steps[-1]}")
    return fig
