"""One HTML file of recorded runs: verdicts in words, plots that can be zoomed, settings, events and environment.

`write` makes it. Bokeh draws the plots and brings the only JavaScript; everything lies in the file, so it opens without
a network. page.html beside this file is the template, which escapes every text of a record.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import bokeh.models as bk
import jinja2
import pandas as pd
from bokeh.document import Document
from bokeh.embed import components
from bokeh.layouts import group_tools
from bokeh.resources import Resources
from bokeh.themes import Theme

from analysis.figures import COLORS
from analysis.plots import APPLIED, BINS, DASHES, HEATMAPS, NO_VALUE, PANELS, Plots, Track
from analysis.runs import Run
from analysis.statistics import judged, moved
from config import FIELDS, GROUPS, UserError
from stability.collapse import SIGNALS

HERE = Path(__file__).parent
SPARE = ("#009e73", "#cc79a7", "#000000", "#56b4e9", "#e69f00", "#0072b2", "#d55e00", "#666666")
OF_A_RUN = {"name", "runs_dir", "resume", "dry_run"}  # fields that make no difference between runs


def tracks(runs: Sequence[Run]) -> list[Track]:
    """The runs as the page shows them. Raises UserError if there are more than colours that can be told apart."""
    if len(runs) > len(SPARE):
        raise UserError(f"{len(runs)} runs: at most {len(SPARE)} fit on a page, a colour each")
    rows = moved(judged(runs))
    own = {arm: COLORS[arm].lower() for arm in rows["arm"] if arm in COLORS}
    spare = iter([color for color in SPARE if color not in own.values()])
    found = []
    for row in rows.itertuples():
        label = f"{row.arm}, seed {row.seed}" if rows["seed"].nunique() > 1 else row.arm
        label = row.run.folder.name if rows.duplicated(["arm", "seed"]).any() else label
        record, events = row.run.folder / "record.json", row.run.folder / "events.jsonl"
        record = json.loads(record.read_text()) if record.is_file() else {}
        events = [json.loads(line) for line in events.read_text().splitlines()] if events.is_file() else []
        color = own.pop(row.arm, None) or next(spare)
        verdict = row.verdict.removeprefix(f"{row.arm}: ")
        found.append(Track(row.run, color, label, verdict, row.collapse, row.onsets, record, events))
    return found


def settings(found: Sequence[Track]) -> dict[str, dict[str, list]]:
    """{group: {field: its value in each run}}; the first group, "differ", holds the fields that differ."""
    rows = {name: [track.run.config[name] for track in found] for name in FIELDS if name not in OF_A_RUN}
    groups = {"differ": {name: values for name, values in rows.items() if any(value != values[0] for value in values)}}
    for group, fields in GROUPS.items():
        groups[group] = {f.name: rows[f.name] for f in fields if f.name in rows}
    return groups


def environment(found: Sequence[Track]) -> dict[str, list]:
    """{what: its value in each run} of versions, machine, data and code."""
    records = [{key: value for key, value in track.record.items() if key != "config"} for track in found]
    frame = pd.json_normalize(records, sep=", ").astype(object)
    return {name: ["" if value is None or value != value else value for value in frame[name]] for name in frame}


def happened(events: list[dict]) -> Iterator[tuple[str, str, str]]:
    """(time, what, details in words) of a run's events; what could not be measured is said once, with its number."""
    lines = {}
    for event in events:
        details = {key: value for key, value in event.items() if key not in ("time", "event", "step", "noticed")}
        said = "; ".join(str(value) if key in ("why", "note") else f"{key}: {value}" for key, value in details.items())
        alike = said if event["event"] == "not measured" else len(lines)
        lines.setdefault((event["event"], alike), []).append((event["time"], event.get("step"), said))
    for (what, _), found in lines.items():
        (time, step, said), last = found[0], found[-1][1]
        more = f" ({len(found)} times, the last one at step {last})" if len(found) > 1 else ""
        yield time, what if step is None else f"{what} at step {step}", said + more


def write(runs: Sequence[Run], path: Path):
    """Write the page of the runs to `path`; an older file there is replaced as a whole."""
    found = tracks(runs)
    plots = Plots(found)
    panels = {section: {panel: plots.panel(panel) for panel in panels} for section, panels in PANELS.items()}
    heats = {heat: plots.heat(heat) for heat in HEATMAPS}
    drawn = {panel: plot for of in panels.values() for panel, plot in of.items()}
    models = {panel.key: plot for panel, plot in drawn.items() if plot}
    missing = {}
    for shown, plot in [*drawn.items(), *heats.items()]:
        if not plot:
            where = " of every block" if shown in heats else ""
            missing.setdefault(shown.needs, []).append(shown.title[0].lower() + shown.title[1:] + where)
    for number, track in enumerate(found):
        models |= {f"{heat.key}/{number}": maps[track] for heat, maps in heats.items() if track in maps}
        models |= {f"button/{number}": plots.buttons[track]} if len(found) > 1 else {}
    toolbar = bk.Toolbar(tools=group_tools(plots.tools), logo=None, active_drag=None)
    models["toolbar"] = bk.GridPlot(children=[], toolbar=toolbar, toolbar_location="above", min_width=230)
    marked = {what for track in found for what in track.marks["what"]}
    words = dict(
        tracks=found, panels=panels, heats=heats, missing=missing, signals=SIGNALS, settings=settings(found),
        environment=environment(found), happened=happened, fields=FIELDS, bins=BINS, applied=APPLIED in marked,
        marks={what: dash for what, dash in DASHES.items() if what in marked},
        lost=NO_VALUE if plots.lost else "",
        absent={key: [track.label for track in found if key not in track.run.steps] for key in models},
        **embedded(models),
    )  # fmt: skip
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(templates.get_template("page.html").render(words))
    beside.replace(path)


def embedded(models: dict[str, bk.Model]) -> dict:
    """What draws the models in a browser: Bokeh itself, their script, and the place of each."""
    document = Document()
    with document.models.freeze():  # else each of them makes Bokeh look at all
        for model in models.values():
            document.add_root(model)
    script, divs = components(models, theme=Theme(HERE / "page.yaml"))
    return {
        "bokeh": Resources("inline", components=["bokeh", "bokeh-widgets"]).render(),
        "script": script,
        "divs": divs,
    }
