"""One HTML file of recorded runs: verdicts in words, plots that can be zoomed, settings, events and environment.

`write` makes it. Bokeh draws the plots and brings the only JavaScript; everything lies in the file, so it opens without
a network. page.html beside this file is the template, which escapes every text of a record.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import bokeh.models as bk
import jinja2
import numpy as np
import pandas as pd
from bokeh.document import Document
from bokeh.embed import components
from bokeh.layouts import group_tools
from bokeh.palettes import Viridis256
from bokeh.plotting import figure
from bokeh.resources import Resources
from bokeh.themes import Theme

from analysis.figures import COLORS
from analysis.panels import HEATMAPS, PANELS, HeatMap, Panel
from analysis.runs import Run, judged
from config import FIELDS, GROUPS, UserError
from stability.collapse import SIGNALS, WINDOW, Collapse, Onsets

HERE = Path(__file__).parent
BINS = 500  # of a curve; the least and the largest value of each are drawn
FEW = 40  # applications of MSign that can be told apart as vertical lines
SPARE = ("#009e73", "#cc79a7", "#000000", "#56b4e9", "#e69f00", "#0072b2", "#d55e00", "#666666")
OF_A_RUN = {"name", "runs_dir", "resume", "dry_run"}  # fields that make no difference between runs
DASHES = {
    "collapse": "7 4",
    "last healthy checkpoint": "2 3",
    "resumed": "8 3 2 3",
    "stopped": "8 3 2 3",
    "MSign applied": "",
}


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
        """What happened at which step, in words of DASHES."""
        found = [("collapse", self.collapse.step)] if self.collapse else []
        found += [(event["event"], event["step"]) for event in self.events
                  if event["event"] in ("resumed", "stopped") and "step" in event]  # fmt: skip
        healthy = (self.run.summary.get("collapse") or {}).get("last_healthy_checkpoint")
        found += [("last healthy checkpoint", healthy)] if healthy else []
        if period := self.run.config["msign_period"]:
            done = self.run.steps.get("msign/matrices", pd.Series(1, range(period, self.steps + 1, period)))
            found += [("MSign applied", step) for step in done[done > 0].index] if (done > 0).sum() <= FEW else []
        return pd.DataFrame(found, columns=["what", "step"])

    def by_block(self, heat: HeatMap) -> pd.DataFrame:
        """A row a block, a column for each step at which it was measured. Infinity: not finite."""
        role = rf"\.(?:{heat.roles})" if heat.roles else ""
        block = self.run.layers.columns.astype(str).str.extract(rf"^{heat.key}/(\d+){role}$", expand=False)
        logged = self.run.layers.loc[:, block.notna()].dropna(how="all").T
        groups = logged.groupby(block.dropna().astype(int).to_numpy())
        values = pd.DataFrame({number: heat.combine(of.to_numpy(), axis=0) for number, of in groups}, logged.columns).T
        return values.where(values > 0)  # 0 is what W&B makes of a layer's null


def tracks(runs: Sequence[Run]) -> list[Track]:
    """The runs as the page shows them. Raises UserError if there are more than colours that can be told apart."""
    if len(runs) > len(SPARE):
        raise UserError(f"{len(runs)} runs: at most {len(SPARE)} fit on a page, a colour each")
    runs = judged(runs)
    own = {run.arm: COLORS[run.arm].lower() for run in runs if run.arm in COLORS}
    spare = iter([color for color in SPARE if color not in own.values()])
    seeds, arms = {run.config["seed"] for run in runs}, [(run.arm, run.config["seed"]) for run in runs]
    found = []
    for run in runs:
        label = f"{run.arm}, seed {run.config['seed']}" if len(seeds) > 1 else run.arm
        label = label if len(set(arms)) == len(arms) else run.folder.name
        record, events = run.folder / "record.json", run.folder / "events.jsonl"
        record = json.loads(record.read_text()) if record.is_file() else {}
        events = [json.loads(line) for line in events.read_text().splitlines()] if events.is_file() else []
        color = own.pop(run.arm, None) or next(spare)
        verdict = run.verdict.removeprefix(f"{run.arm}: ")
        found.append(Track(run, color, label, verdict, run.collapse, run.onsets, record, events))
    return found


def thinned(values: pd.Series) -> pd.Series:
    """The least and the largest value of each of BINS bins, where they were: spikes stay, and the page is small."""
    size = math.ceil(len(values) / BINS)
    if size <= 2:
        return values
    bins = values.groupby(np.arange(len(values)) // size)
    return values[sorted({*bins.idxmin(), *bins.idxmax()})]


class Plots:
    """The plots of a page. They share their range of steps, a crosshair, a toolbar, and a button for each run."""

    def __init__(self, found: Sequence[Track]):
        self.tracks = found
        last = max(track.steps for track in found)
        self.steps = bk.Range1d(1 - last / 100, last * 1.01, bounds=(1 - last / 20, last * 1.05))
        self.crosshair = bk.Span(dimension="height", line_color="#aaa")
        style = ":host {{ --color: {}; }} .bk-btn {{ border-left: 12px solid var(--color) !important; }}"
        self.buttons = {track: bk.Toggle(label=track.label, active=True, stylesheets=[style.format(track.color)])
                        for track in found}  # fmt: skip
        self.tools = []

    def empty(self, axis: str, **options) -> figure:
        """A plot without curves."""
        tools = [bk.BoxZoomTool(), bk.PanTool(), bk.WheelZoomTool(modifiers="ctrl", dimensions="width"),
                 bk.ZoomInTool(dimensions="width"), bk.ZoomOutTool(dimensions="width"), bk.ResetTool()]  # fmt: skip
        plot = figure(x_range=self.steps, height=230, sizing_mode="stretch_width", toolbar_location=None, tools=tools,
                      x_axis_label="step", y_axis_label=axis, **options)  # fmt: skip
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
        finite = {track: values[np.isfinite(values) & (values > 0 if panel.log else True)]
                  for track, values in logged.items()}  # fmt: skip
        if not any(map(len, logged.values())):
            return None
        plot = self.empty(panel.axis, y_axis_type="log" if panel.log else "linear")
        if not panel.log:
            plot.yaxis.formatter = bk.BasicTickFormatter(power_limit_low=-6)  # 0.0003 rather than 3.000e-4
        means = {track: values.rolling(WINDOW).mean().dropna() if panel.key == "train/loss" else []
                 for track, values in finite.items()}  # fmt: skip
        top = max((values.max() for values in finite.values() if len(values)), default=1.0)
        if settled := [mean[len(mean) // 5 :] for mean in means.values() if len(mean)]:
            settled = pd.concat(settled)  # the fall from ln V would flatten the rest
            top = settled.max() + 0.15
            plot.y_range = bk.Range1d(settled.min() - 0.15, top)
        for track, values in finite.items():
            faint = len(means[track])
            drawn = self.curve(plot, track, values, line_width=0.8 if faint else 1.6, line_alpha=0.3 if faint else 0.9)
            drawn += self.curve(plot, track, means[track], line_width=2) if faint else []
            lost = logged[track].index[np.isinf(logged[track])]
            if len(lost):
                look = dict(marker="inverted_triangle", size=11, color=track.color, fill_color="white", line_width=2)
                drawn.append(plot.scatter(lost, np.full(len(lost), top), name=f"{track.label}, not finite", **look))
            for renderer in drawn:
                self.buttons[track].js_link("active", renderer, "visible")
            self.marks(plot, track)
        return plot

    def curve(self, plot: figure, track: Track, values: pd.Series, **style) -> list:
        """A run's curve, with dots where they are few."""
        values = thinned(values)
        drawn = [plot.line(values.index, values, color=track.color, name=track.label, **style)]
        if len(values) <= 40:
            drawn.append(plot.scatter(values.index, values, color=track.color, name=track.label, size=5))
        self.hover(plot, drawn, "<b>$name</b><br>step @x{0}: @y{%.4g}")
        return drawn

    def marks(self, plot: figure, track: Track):
        """Vertical lines where something happened to a run."""
        for what, found in track.marks.groupby("what"):
            faint = what == "MSign applied"
            look = dict(line_dash=DASHES[what], line_alpha=0.2 if faint else 0.9, line_width=1 if faint else 1.5)
            line = plot.vspan(x=found["step"], line_color=track.color, name=f"{track.label}: {what}", **look)
            self.buttons[track].js_link("active", line, "visible")
            if not faint:
                self.hover(plot, [line], "<b>$name</b><br>step @x{0}")

    def heat(self, heat: HeatMap) -> dict[Track, figure]:
        """The heat map of each run that logged what it needs, with one scale of colours for all."""
        cells = {track: track.by_block(heat) for track in self.tracks}
        cells = {track: values for track, values in cells.items() if values.size}
        scale = np.concatenate([values.loc[1 + heat.first :].to_numpy().ravel() for values in cells.values()] or [[]])
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
        ticker = bk.BasicTicker(desired_num_ticks=4) if heat.unit else bk.LogTicker(desired_num_ticks=4)
        plot.add_layout(bk.ColorBar(color_mapper=colors, ticker=ticker, width=10, padding=4, margin=0), "right")
        self.buttons[track].js_link("active", plot, "visible")
        return plot


def differing(rows: dict[str, list]) -> set[str]:
    return {name for name, values in rows.items() if any(value != values[0] for value in values)}


def settings(found: Sequence[Track]) -> dict[str, dict[str, list]]:
    """{group: {field: its value in each run}}; the first group holds those that differ."""
    rows = {name: [track.run.config.get(name, "") for track in found] for name in FIELDS if name not in OF_A_RUN}
    apart = differing(rows)
    groups = {group: {f.name: rows[f.name] for f in fields if f.name in rows} for group, fields in GROUPS.items()}
    return {"differ": {name: rows[name] for name in rows if name in apart}} | groups


def environment(found: Sequence[Track]) -> dict[str, list]:
    """{what: its value in each run} of versions, machine, data and code; a list per run is as long as `found`."""
    records = [{key: value for key, value in track.record.items() if key != "config"} for track in found]
    frame = pd.json_normalize(records, sep=", ").astype(object)
    return {name: ["" if value is None or value != value else value for value in frame[name]] for name in frame}


def happened(events: list[dict]) -> Iterator[tuple[str, str, str]]:
    """(time, what, details in words) of a run's events; equal ones one after another are one line with their number."""
    lines = []
    for event in events:
        details = {key: value for key, value in event.items() if key not in ("time", "event", "step", "noticed")}
        said = "; ".join(f"{value}" if key in ("why", "note") else f"{key}: {value}" for key, value in details.items())
        what = event["event"] + (f" at step {event['step']}" if "step" in event else "")
        if lines and lines[-1][2:4] == [event["event"], said]:
            lines[-1][4] += 1
        else:
            lines.append([event["time"], what, event["event"], said, 1])
    for time, what, _, said, count in lines:
        yield time, what, said + (f" (and {count - 1} more times)" if count > 1 else "")


def write(runs: Sequence[Run], path: Path):
    """Write the page of the runs to `path`; an older file there is replaced as a whole."""
    found = tracks(runs)
    plots = Plots(found)
    models, missing = {}, {}
    panels = {section: {panel: plots.panel(panel) for panel in panels} for section, panels in PANELS.items()}
    heats = {heat: plots.heat(heat) for heat in HEATMAPS}
    for panel, plot in [item for of in panels.values() for item in of.items()]:
        models |= {panel.key: plot} if plot else {}
        missing |= {} if plot else {panel.title: panel.needs}
    for heat, maps in heats.items():
        models |= {f"{heat.key}/{number}": maps[track] for number, track in enumerate(found) if track in maps}
        missing |= {} if maps else {f"{heat.title}, block by block": heat.needs}
    models |= {f"button/{number}": button for number, button in enumerate(plots.buttons.values()) if len(found) > 1}
    toolbar = bk.Toolbar(tools=group_tools(plots.tools), logo=None, active_drag=None)
    models["toolbar"] = bk.GridPlot(children=[], toolbar=toolbar, toolbar_location="above")
    document = Document()
    with document.models.freeze():  # else each of them makes Bokeh look at all
        for model in models.values():
            document.add_root(model)
    script, divs = components(models, theme=Theme(HERE / "page.yaml"))
    template = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), autoescape=True,
                                  trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)  # fmt: skip
    words = dict(
        tracks=found, panels=panels, heats=heats, missing=missing, divs=divs, script=script, signals=SIGNALS,
        settings=settings(found), environment=environment(found), happened=happened, fields=FIELDS, bins=BINS,
        marks={what: dash for what, dash in DASHES.items() if any(what in set(track.marks.what) for track in found)},
        lost=any(np.isinf(track.run.steps).any(axis=None) for track in found),
absent={key: [track.label for track in found if key not in track.run.steps] for key in models},
        bokeh=Resources("inline", components=["bokeh", "bokeh-widgets"]).render(),
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(template.get_template("page.html").render(words))
    beside.replace(path)
