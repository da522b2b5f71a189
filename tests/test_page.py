"""scripts/page.py: what the page says, and what a browser without a network draws of it."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from analysis import page, plots
from analysis.runs import load_run
from tests.conftest import ROOT, here, refused
from tests.test_figures import probes
from tests.test_runs import made_up

RECORDED = ROOT / "results/ramp/ramp-adamw-seed0"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ATTACK = "</script><img src=x onerror=\"document.title='hit'\">"
# what the test adds to a page: it notes errors, waits for Bokeh, tries the page, and leaves what it found as text
LISTEN = """<script>
const errors = []
addEventListener("error", event => errors.push(event.message))
addEventListener("unhandledrejection", event => errors.push(String(event.reason)))
for (const name of ["error", "warn"]) console[name] = (...words) => errors.push(words.join(" "))
</script>"""
TRY = """<pre id="found"></pre><script>
function canvases(node) {
  const inside = [...node.querySelectorAll("*")].flatMap(el => el.shadowRoot ? canvases(el.shadowRoot) : [])
  return [...node.querySelectorAll("canvas"), ...inside]
}
function drawn(canvas) {
  if (!canvas.width || !canvas.height) return false
  return canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.some(value => value > 0)
}
const timer = setInterval(async () => {
  const [doc] = Bokeh.documents
  if (!doc || !doc.is_idle) return
  clearInterval(timer)
  const roots = doc.roots(), figures = roots.filter(model => model.type == "Figure")
  const found = {errors: [...errors], title: document.title, images: document.images.length, figures: figures.length}
  const places = figures.map(model => document.querySelector(`[data-root-id="${model.id}"]`))
  found.drawn = places.filter(place => canvases(place).some(drawn)).length
  found.loaded = performance.getEntriesByType("resource").map(entry => entry.name)
  found.wide = document.documentElement.scrollWidth - innerWidth
  figures[0].x_range.setv({start: 2, end: 9})
  found.linked = figures.every(figure => figure.x_range.start == 2 && figure.x_range.end == 9)
  const [button] = roots.filter(model => model.type == "Toggle")
  if (button) {
    const seen = () => figures.flatMap(figure => figure.renderers).filter(line => line.visible && line.name).length
    found.before = seen()
    button.active = false
    await new Promise(done => setTimeout(done, 200))
    found.after = seen()
  }
  document.getElementById("found").textContent = JSON.stringify(found)
}, 50)
</script>"""


def seen(path, width=1200) -> dict:
    """What a headless browser without a network finds on the page."""
    if BROWSER is None:
        pytest.skip("needs a browser: install the package chromium")
    text = path.read_text()
    copy = path.with_name("tried.html")
    copy.write_text(text.replace("<head>", "<head>" + LISTEN, 1).replace("</body>\n</html>", TRY))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
               "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={path.parent / 'profile'}",
               f"--window-size={width},900", "--enable-logging=stderr", "--v=0", "--virtual-time-budget=20000",
               "--dump-dom", copy.as_uri()]  # fmt: skip
    done = subprocess.run([BROWSER, *options], capture_output=True, text=True, timeout=120)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert said and all("[bokeh" in line for line in said), said or done.stderr
    found = json.loads(re.search(r'<pre id="found">(.+?)</pre>', done.stdout).group(1))
    assert (found["errors"], found["loaded"], found["images"]) == ([], [], 0)
    return found


@pytest.fixture
def hostile(tmp_path):
    """Two short runs without Jacobians, one of which ended non-finite; their records hold HTML."""
    good = made_up(
        tmp_path / "a&b", [2.5] * 150, probes={50: {"srank/0.W_Q": 3.0}}, msign_period=50, wandb_group=ATTACK
    )
    bad = made_up(tmp_path / "bad", [3.0] * 19 + [None], probes={10: {"log_z": None}}, msign_targets=ATTACK,
                  msign_period=10)  # fmt: skip
    events = [
        {"time": "2026-01-01T00:00:00+0000", "event": "not measured", "step": step, "why": ATTACK} for step in (1, 2)
    ]
    events.append({"time": "2026-01-01T00:00:01+0000", "event": "resumed", "step": 7})
    (bad / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return [load_run(folder) for folder in (good, bad)]


def text_of(path) -> str:
    """The words of a page, without its scripts, styles and tags."""
    bare = re.sub(r"<(script|style)\b.*?</\1>|<[^>]*>", " ", path.read_text(), flags=re.DOTALL)
    return html.unescape(" ".join(bare.split()))


def test_a_recorded_run(tmp_path):
    out = tmp_path / "new" / "page.html"
    done = here("scripts/page.py", RECORDED, f"--out={out}")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout == f"{out}: {out.stat().st_size / 1e6:.1f} MB\n"
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
    assert 1e6 < out.stat().st_size < 5e6
    said = text_of(out)
    for words in (
        "Collapsed at step 2463 (4.9x): mean loss rose from 2.45 to 2.69 and stayed.",
        "Attention logits moved first, at step 850; the gradient norm never did.",
        "last healthy checkpoint",
        "context length in tokens", "sha256:9cefb34368672bce53d3fa4f357ae45e2207323038795f5d",
        "2.14.1+cu130", "3,000 of 3,000 steps, 692,016 parameters", "collapse at step 2463",
    ):  # fmt: skip
        assert words in said, words
    assert "Not logged" not in said and "MSign applied" not in said
    titles = [panel.title for panels in plots.PANELS.values() for panel in panels] + [h.title for h in plots.HEATMAPS]
    assert all(title in said for title in titles)
    found = seen(out)
    assert found["figures"] == found["drawn"] == len(titles) and found["linked"]


def test_two_runs_that_logged_little(hostile, tmp_path):
    out = tmp_path / "page.html"
    out.write_text("an older page")
    page.write(hostile, out)
    assert "<img src=x" not in out.read_text()
    said = text_of(out)
    for words in (
        "2 runs compared", "No collapse, final loss 2.50.", "the loss is not finite", "▽ not finite",
        "resumed at step 7",
        "(2 times, the last one at step 2)", "The runs differ in",
        "norm of the Jacobian of every block; alignment with the next block of every block (measured every",
        "Not logged by MSign (attention)", "These records do not hold it.", ATTACK,
        "no fallback, no warning, nothing that could not be measured",
    ):  # fmt: skip
        assert words in said, words
    found = seen(out, width=500)
    assert found["title"] == "2 runs" and found["linked"] and found["wide"] <= 0
    # loss, gradient norm, learning rate, stable rank, log Z; and the heat map of a stable rank
    assert found["figures"] == found["drawn"] == 6
    assert 0 < found["after"] < found["before"]


def test_what_is_kept_of_a_long_curve():
    losses = load_run(RECORDED).steps["grad_norm"]
    kept = plots.thinned(losses)
    assert len(kept) <= 2 * plots.BINS and kept.index.is_monotonic_increasing
    assert (kept.max(), kept.min()) == (losses.max(), losses.min())
    assert all(losses[step] == value for step, value in kept.items())
    assert plots.thinned(losses[:900]).equals(losses[:900])


def test_blocks_of_which_one_is_not_finite(tmp_path):
    run = load_run(made_up(tmp_path / "run", [2.5] * 300, probes=probes()))
    (track,) = page.tracks([run])
    gradient = track.by_block(plots.HEATMAPS[-1])
    assert gradient.loc[0].tolist() == [5.0, 5.0, 5.0] and gradient.loc[3, 100] == float("inf")
    assert gradient.loc[3].isna().tolist() == [True, False, False]
    rank = track.by_block(plots.HEATMAPS[0])
    assert rank.to_numpy() == pytest.approx(np.outer(range(1, 5), range(1, 4)))


def test_colours_are_those_of_the_arms_and_differ(tmp_path):
    folders = [made_up(tmp_path / str(n), [2.5] * 5, seed=n, msign_period=n % 2) for n in range(8)]
    found = page.tracks([load_run(folder) for folder in folders])
    assert [track.color for track in found[:2]] == ["#d55e00", "#0072b2"]
    assert len({track.color for track in found}) == len({track.label for track in found}) == 8
    refused("scripts/page.py", *folders, folders[0], f"--out={tmp_path / 'x.html'}", says="9 runs: at most 8")
    assert not (tmp_path / "x.html").exists()
