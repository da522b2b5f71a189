"""scripts/plot.py as a user would call it."""

import pytest

from tests.conftest import refused, run
from tests.test_figures import probes
from tests.test_runs import made_up


@pytest.fixture
def adamw(tmp_path):
    return made_up(tmp_path / "runs/adamw", [2.5] * 300, probes=probes())


def test_it_draws_what_it_can_and_says_what_is_missing(adamw, tmp_path):
    done = run("scripts/plot.py", adamw, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "fig1: figures/fig1.png figures/fig1.svg",
        "fig2: figures/fig2.png figures/fig2.svg",
        "fig3: figures/fig3.png figures/fig3.svg",
        "fig4: needs runs with at least two different msign_period; skipped",
        "heatmaps: figures/heatmaps.png figures/heatmaps.svg",
    ]
    written = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert set(written) == {f"{stem}.{ext}" for stem in ("fig1", "fig2", "fig3", "heatmaps") for ext in ("png", "svg")}
    assert all(data.startswith(b"\x89PNG") or b"<svg" in data[:500] for data in written.values())


def test_figures_go_where_they_are_wanted(adamw, tmp_path):
    msign = made_up(tmp_path / "runs/msign", [2.1] * 300, msign_period=10)
    done = run("scripts/plot.py", adamw, msign, f"--out={tmp_path / 'a/b'}")
    assert f"fig4: {tmp_path}/a/b/fig4.png {tmp_path}/a/b/fig4.svg\n" in done.stdout
    assert (tmp_path / "a/b/fig4.svg").stat().st_size > 10_000


def test_an_offline_wandb_run_gives_the_same_figures(config_file, tmp_path):
    cadence = ["--jacobian_every=40", "--probe_every=20", "--layers_every=20", "--eval_every=0", "--ckpt_every=0"]
    done = run("train.py", config_file, "--wandb=offline", "--max_steps=120", *cadence)
    assert done.returncode == 0, done.stderr
    recorded = tmp_path / "runs/small"
    for path, out in ((recorded, "a"), (recorded / "wandb", "b")):
        done = run("scripts/plot.py", path, f"--out={tmp_path / out}")
        assert done.returncode == 0, done.stderr
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()} == drawn
    assert {"fig1.svg", "fig2.svg", "fig3.svg", "heatmaps.svg"} <= set(drawn)


def test_what_is_not_a_run_is_refused(adamw, tmp_path):
    refused(
        "scripts/plot.py", adamw, tmp_path / "nothing", says="nothing: not a run (no record.json, and no .wandb file"
    )
    refused("scripts/plot.py", says="RUN")


def test_runs_of_which_nothing_can_be_drawn_are_refused(tmp_path):
    short = made_up(tmp_path / "short", [2.0] * 3)
    refused("scripts/plot.py", short, call=run, cwd=tmp_path, says="none of the figures can be drawn from these runs")
    assert not (tmp_path / "figures").exists()
