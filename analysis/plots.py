"""The plots of a page of recorded runs: what is shown, with a sentence that says what to see in it, and how."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import bokeh.models as bk
import numpy as np
import pandas as pd
from bokeh.palettes import Viridis256
from bokeh.plotting import figure
from scipy.stats import gmean

from analysis.runs import Run
from stability.collapse import WINDOW, Collapse, Onsets

BINS = 500  # of a curve; the least and the largest value of each are drawn
FEW = 100  # applications of MSign that can be told apart
DASHES = {"collapse": "7 4", "last healthy checkpoint": "2 3", "resumed": "8 3 2 3", "stopped": "8 3 2 3"}
APPLIED = "MSign applied"  # marked by short lines at the lower end of a plot
NO_VALUE = "not finite, or not above 0 on a log scale"
BUTTON = """
.bk-btn.bk-btn-default { padding: 3px 12px 3px 9px; border: 1px solid #d5d7da; border-left: 12px solid var(--run);
  background: #fff; color: #1d1f23; font: 14px system-ui, sans-serif; box-shadow: none; text-shadow: none; }
.bk-btn.bk-btn-default:not(.bk-active) { opacity: .45; text-decoration: line-through; }"""


class Panel(NamedTuple):
    """A plot of one logged quantity against step, a line for each run."""

    title: str
    key: str
    axis: str
    says: str  # what to see in it
    needs: str = "probe_every"  # the field that switches it on
    log: bool = False


class HeatMap(NamedTuple):
    """A plot of one quantity of every block against step, for one run."""

    title: str
    key: str
    says: str
    combine: Callable = gmean  # makes one value of a block's matrices
    roles: str = ""  # those of the block's parameters that count
    unit: bool = False  # from 0 to 1, else on a log scale
    first: int = 0  # the block from which on values set the scale of colours
    needs: str = "layers_every"


PANELS = {
    "Training": (
        Panel("Training loss", "train/loss", "nats per token", "A collapse is a loss that turns upwards and stays up.",
              ""),
        Panel("Gradient norm before clipping", "grad_norm", "‖∇‖₂", "Spikes of ten times the median and more are a "
              "warning, not a collapse by themselves.", "", True),
        Panel("Validation loss", "val/loss", "nats per token", "It should follow the training loss; a growing distance "
              "is overfitting.", "eval_every"),
        Panel("Learning rate", "lr", "before μP's multipliers", "Compare the height at which a run collapses with where"
              " the others stay.", ""),
    ),
    "Weights": (
        Panel("Stable rank of attention", "srank/attention", "stable rank, geometric mean", "It falls when a few "
              "directions take over; MSign lifts it to full rank at each application.", log=True),
        Panel("Stable rank of the MLP", "srank/mlp", "stable rank, geometric mean", "Compare it with attention's: "
              "the part that falls further is the one in danger.", log=True),
        Panel("Stable rank of early attention", "srank/early", "stable rank, geometric mean", "The first quarter of "
              "the blocks: does it fall before that of all blocks?", log=True),
        Panel("Spectral norm of attention", "sigma1/attention", "σ₁, geometric mean", "Growth here feeds attention "
              "logits and Jacobians.", log=True),
        Panel("Spectral norm of the MLP", "sigma1/mlp", "σ₁, geometric mean", "Growth here feeds the residual stream.",
              log=True),
        Panel("Spectral norm of early attention", "sigma1/early", "σ₁, geometric mean", "The first quarter of the "
              "blocks.", log=True),
    ),
    "Activations": (
        Panel("Largest attention logit", "attention/max_logit", "logit", "Beyond some 50 a softmax looks at one token "
              "only.", log=True),
        Panel("Entropy of attention", "attention/entropy", "nats, mean over blocks", "Towards 0 every token looks at "
              "one other token only."),
        Panel("Output normaliser log Z", "log_z", "nats, mean over tokens", "A drift of log Σ exp(logits) shows output "
              "logits that grow together."),
        Panel("Gain of the first block", "residual/gain", "rms after / rms before", "How much the first block lifts the"
              " residual stream: most of its Jacobian's norm.", log=True),
        Panel("Residual stream after the last block", "residual/rms", "rms", "A stream that keeps growing drowns what "
              "later blocks add.", log=True),
        Panel("Error of the run's precision", "precision/error", "‖ΔH‖ / ‖H‖", "The last block's output in the run's "
              "kernel and precision against fp32 math; it grows with the logits.", log=True),
    ),
    "Jacobians of the blocks": (
        Panel("Norm of a block's Jacobian", "jacobian/sigma1", "‖J(ℓ)‖₂, geometric mean", "Above 1 a block amplifies "
              "what comes in; depth multiplies it.", "jacobian_every", True),
        Panel("Alignment of adjacent Jacobians", "jacobian/alignment", "|v(ℓ+1)ᵀ u(ℓ)|, mean", "At 1 the norms of "
              "adjacent blocks multiply fully, at 0 hardly.", "jacobian_every"),
        Panel("Norm of the product of all Jacobians", "jacobian/product", "‖J(L)···J(1)‖₂", "How much a change of the "
              "embeddings grows on its way through all blocks.", "jacobian_every", True),
        Panel("Uncertain alignments", "jacobian/ill_conditioned", "pairs of blocks", "Where many pairs are "
              "ill-conditioned, the mean alignment says little.", "jacobian_every"),
    ),
}  # fmt: skip
# the first block lifts small embeddings to the scale of the stream: its Jacobian and gradient would flatten all others
HEATMAPS = (
    HeatMap("Stable rank of attention", "srank", "Dark: few directions. Do all blocks fall at once, or the early ones "
            "first? (‖W‖²_F / ‖W‖²₂, geometric mean over W_Q, W_K, W_V, W_O.)", roles="W_[QKVO]"),
    HeatMap("Norm of the Jacobian", "jacobian/sigma1", "Bright: the block amplifies. Blocks 2 and up set the "
            "scale (‖J(ℓ)‖₂); block 1 may lie beyond it.", first=1, needs="jacobian_every"),
    HeatMap("Alignment with the next block", "jacobian/alignment", "Bright: the norms of two adjacent blocks multiply "
            "(|v(ℓ+1)ᵀ u(ℓ)|). A dot: uncertain, ill-conditioned.", unit=True, needs="jacobian_every"),
    HeatMap("Gradient norm", "grad_norm", "Bright: where the gradient is largest. Blocks 2 and up set the "
            "scale (‖∇‖₂ before clipping).", np.linalg.norm, r"\w+", first=1),
)  # fmt: skip


@dataclass(eq=False)
class Track:
    """A run on the page: its colour, what is said of it, and what its folder holds beside the metrics."""

    run: Run
    color: str
    label: str
    verdict: str
    collapse: Collapse | None
    onsets: Onsets
    record: dict
    events: list[dict]

    @property
    def steps(self) -> int:
        return len(self.run.steps)

    @property
    def marks(self) -> pd.DataFrame:
        """What happened at which step, in words of DASHES, or APPLIED."""
        found = [("collapse", self.collapse.step)] if self.collapse else []
        found += [(event["event"], event["step"]) for event in self.events
                  if event["event"] in ("resumed", "stopped") and "step" in event]  # fmt: skip
        healthy = (self.run.summary.get("collapse") or {}).get("last_healthy_checkpoint")
        found += [("last healthy checkpoint", healthy)] if healthy else []
        if period := self.run.config["msign_period"]:
            done = self.run.steps.get("msign/matrices", pd.Series(1, range(period, self.steps + 1, period)))
            found += [(APPLIED, step) for step in done[done > 0].index] if (done > 0).sum() <= FEW else []
        return pd.DataFrame(found, columns=["what", "step"])

    def by_block(self, heat: HeatMap) -> pd.DataFrame:
        """A row a block, a column for each step at which it was measured. Infinity: not finite."""
        role = rf"\.(?:{heat.roles})" if heat.roles else ""
        block = self.run.layers.columns.astype(str).str.extract(rf"^{heat.key}/(\d+){role}$", expand=False)
        logged = self.run.layers.loc[:, block.notna()].dropna(how="all").T
        groups = logged.groupby(block.dropna().astype(int).to_numpy())
        values = pd.DataFrame({number: heat.combine(of.to_numpy(), axis=0) for number, of in groups}, logged.columns).T
        return values.where(values > 0)  # 0 is what W&B makes of a layer's null


def thinned(values: pd.Series) -> pd.Series:
    """The least and the largest value of each of BINS bins, where they were: spikes stay, and the page is small."""
    size = math.ceil(len(values) / BINS)
    if size <= 2:
        return values
    bins = values.groupby(np.arange(len(values)) // size)
    return values[sorted({*bins.idxmin(), *bins.idxmax()})]


def label(axis: bk.Axis, values: pd.Series, log: bool):
    """Choose an axis' ticks: the powers of ten, or on a log axis of few decades some values between them."""
    if not log or values.max() < 100 * values.min():
        axis.formatter = bk.PrintfTickFormatter(format="%.3g")
    if log and values.max() < 100 * values.min():
        axis.ticker = bk.FixedTicker(ticks=[m * 10.0**k for k in range(-12, 12) for m in (1, 2, 3, 5, 7)])


class Plots:
    """The plots of a page. They share their range of steps, a crosshair, a toolbar, and a button for each run."""

    def __init__(self, found: Sequence[Track]):
        self.tracks = found
        last = max(track.steps for track in found)
        self.steps = bk.Range1d(1 - last / 100, last * 1.01, bounds=(1 - last / 20, last * 1.05))
        self.crosshair = bk.Span(dimension="height", line_color="#aaa")
        self.buttons = {}
        for track in found:
            look = dict(stylesheets=[BUTTON], css_variables={"--run": track.color})
            self.buttons[track] = bk.Toggle(label=track.label, active=True, **look)
        self.tools, self.lost = [], False

    def empty(self, axis: str, **options) -> figure:
        """A plot without curves."""
        tools = [bk.BoxZoomTool(), bk.PanTool(), bk.WheelZoomTool(modifiers="ctrl", dimensions="width"),
                 bk.ZoomInTool(dimensions="width"), bk.ZoomOutTool(dimensions="width"), bk.ResetTool()]  # fmt: skip
        plot = figure(x_range=self.steps, height=230, sizing_mode="stretch_width", toolbar_location=None, tools=tools,
                      x_axis_label="step", y_axis_label=axis, **options)  # fmt: skip
        plot.xaxis.ticker.desired_num_ticks = 5
        plot.extra_y_ranges, plot.extra_y_scales = {"frame": bk.Range1d(0, 1)}, {"frame": bk.LinearScale()}
        plot.toolbar.active_drag = None  # else a finger that scrolls the page would zoom
        plot.xaxis.formatter = bk.NumeralTickFormatter(format="0,0")
        plot.add_tools(bk.CrosshairTool(dimensions="height", overlay=self.crosshair))
        self.tools += tools
        return plot

    def hover(self, plot: figure, renderers: list, text: str):
        formatters = {"@y": "printf", "@image": "printf"}
        plot.add_tools(bk.HoverTool(renderers=renderers, tooltips=text, formatters=formatters, visible=False))

    def panel(self, panel: Panel) -> figure | None:
        """The plot of a quantity; None if no run logged it."""
        logged = {track: track.run.steps.get(panel.key, pd.Series(dtype=float)).dropna() for track in self.tracks}
        if not any(map(len, logged.values())):
            return None
        plot = self.empty(panel.axis, y_axis_type="log" if panel.log else "linear")
        plot.y_range.only_visible = True
        least = 0 if panel.log else -math.inf
        finite = {track: values[np.isfinite(values) & (values > least)] for track, values in logged.items()}
        label(plot.yaxis, pd.concat(finite.values()), panel.log)
        settled = []
        for track, values in finite.items():
            mean = values.rolling(WINDOW).mean().dropna() if panel.key == "train/loss" else values[:0]
            faint = dict(line_width=0.8, line_alpha=0.2) if len(mean) else dict(line_width=1.6, line_alpha=0.9)
            curves = self.curve(plot, track, values, **faint)
            curves += self.curve(plot, track, mean, line_width=2) if len(mean) else []
            plot.y_range.renderers = [*plot.y_range.renderers, *curves]
            self.hover(plot, curves, "<b>$name</b><br>step @x{0}: @y{%.4g}")
            self.marks(plot, track, logged[track].index.difference(values.index))
            for renderer in curves:
                self.buttons[track].js_link("active", renderer, "visible")
            settled.append(mean[len(mean) // 5 :] if len(mean) else values)
        if panel.key == "train/loss" and len(settled := pd.concat(settled)):  # the fall from ln V would flatten it
            plot.y_range = bk.Range1d(settled.min() - 0.15, settled.max() + 0.15)
        elif not any(map(len, finite.values())):
            plot.y_range = bk.Range1d(0.1, 1)  # for the triangles
        return plot

    def curve(self, plot: figure, track: Track, values: pd.Series, **style) -> list[bk.GlyphRenderer]:
        """A run's curve, with dots where they are few."""
        values = thinned(values)
        drawn = [plot.line(values.index, values, color=track.color, name=track.label, **style)]
        if len(values) <= 40:
            drawn.append(plot.scatter(values.index, values, color=track.color, name=track.label, size=5))
        return drawn

    def marks(self, plot: figure, track: Track, lost: pd.Index):
        """What happened to a run: vertical lines, triangles at the steps in `lost`, short lines where MSign acted."""
        drawn = []
        for what, found in track.marks.groupby("what"):
            look = dict(line_color=track.color, line_width=1.5, name=f"{track.label}: {what}")
            if what == APPLIED:
                low = 0.035 * self.tracks.index(track)
                y = dict(y0=low, y1=low + 0.03, y_range_name="frame")
                drawn.append(plot.segment(x0=found["step"], x1=found["step"], **y, **look))
            else:
                drawn.append(plot.vspan(x=found["step"], line_dash=DASHES[what], **look))
        if len(lost):
            self.lost = True
            look = dict(marker="inverted_triangle", size=11, color=track.color, fill_color="white", line_width=2)
            y = dict(y=np.full(len(lost), 0.96), y_range_name="frame")
            drawn.append(plot.scatter(x=lost, name=f"{track.label}: {NO_VALUE}", **y, **look))
        self.hover(plot, [line for line in drawn if APPLIED not in line.name], "<b>$name</b><br>step @x{0}")
        for renderer in drawn:
            self.buttons[track].js_link("active", renderer, "visible")

    def heat(self, heat: HeatMap) -> dict[Track, figure]:
        """The heat map of each run that logged what it needs, with one scale of colours for all."""
        cells = {track: track.by_block(heat) for track in self.tracks}
        cells = {track: values for track, values in cells.items() if values.size}
        scale = np.concatenate([values.loc[heat.first :].to_numpy().ravel() for values in cells.values()] or [[]])
        scale = scale[np.isfinite(scale)] if np.isfinite(scale).any() else np.array([1.0, 10.0])
        low, high = (0, 1) if heat.unit else (scale.min(), max(scale.max(), scale.min() * 1.01))
        mapper = bk.LinearColorMapper if heat.unit else bk.LogColorMapper
        colors = mapper(palette=Viridis256, low=low, high=high, nan_color="rgba(0,0,0,0)")
        return {track: self.cells(track, values, heat, colors) for track, values in cells.items()}

    def cells(self, track: Track, values: pd.DataFrame, heat: HeatMap, colors: bk.Model) -> figure:
        """One heat map: colours where measured, grey where not, a cross where not finite."""
        blocks, steps = len(values), values.columns.to_numpy()
        plot = self.empty("block", y_range=bk.Range1d(0.5, blocks + 0.5), background_fill_color="#e4e4e4")
        plot.title = bk.Title(text=bk.PlainText(track.label), text_color=track.color)
        plot.xaxis.ticker.desired_num_ticks = 3
        plot.grid.visible = False
        width = max(np.diff(steps).min(initial=track.steps), np.ptp(steps) / BINS)
        middles = np.arange(steps[0], steps[-1] + width / 2, width)
        nearest = np.abs(steps[:, None] - middles).argmin(0)
        image = values.replace(math.inf, math.nan).to_numpy(np.float32)[:, nearest]
        where = dict(x=[middles[0] - width / 2], dw=[width * len(middles)], y=[0.5], dh=[blocks])
        drawn = plot.image(image=[image], color_mapper=colors, name=track.label, **where)
        self.hover(plot, [drawn], "<b>$name</b><br>block $y{0}, step $x{0}: @image{%.4g}")
        block, step = np.nonzero(np.isinf(values.to_numpy()))
        plot.scatter(steps[step], block + 1, marker="x", color="#d55e00", size=7, line_width=2)
        if heat.unit:
            flags = track.by_block(heat._replace(key="jacobian/ill_conditioned", combine=np.max))
            block, step = np.nonzero(flags.to_numpy() == 1)
            at = flags.columns.to_numpy()[step]
            plot.scatter(at, block + 1, size=3, color="white", line_color="black", line_width=0.4)
        if track.collapse:
            plot.vspan(x=[track.collapse.step], line_color="white", line_width=4)
            plot.vspan(x=[track.collapse.step], line_color="black", line_width=1.5, line_dash="dashed")
        ticker = (
            bk.BasicTicker(desired_num_ticks=4) if heat.unit else bk.LogTicker(desired_num_ticks=4, mantissas=[1, 2, 5])
        )
        plot.add_layout(bk.ColorBar(color_mapper=colors, ticker=ticker, width=10, padding=4, margin=0), "right")
        self.buttons[track].js_link("active", plot, "visible")
        return plot
