"""scripts/sweep.py and engine/grid.py: from a grid file to points, and from points to runs."""

import csv
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from analysis.runs import load_runs
from config import UserError
from engine.grid import name_of, points, read_grid
from tests.conftest import ROOT, command, refused, run, start


@pytest.fixture
def grid(tmp_path, config_file):
    """A grid of two seeds × AdamW, and MSign every 2 steps on two targets, of the small run: 6 points."""
    path = tmp_path / "grid.py"
    path.write_text(
        f"config = {str(config_file)!r}\nmsign_period = [0, 2]\nmsign_targets = ['attention', 'mlp']\nseed = [0, 1]\n"
        f"max_steps = 10\n"
    )
    return path


NAMES = [f"period{which}-seed{seed}" for which in ("0", "2-attention", "2-mlp") for seed in (0, 1)]


def results(tmp_path) -> dict[str, dict]:
    with open(tmp_path / "runs" / "grid" / "results.csv", newline="") as f:
        return {row["point"]: row for row in csv.DictReader(f)}


def test_points_that_are_the_same_run_are_one(grid):
    found = points(grid, read_grid(grid, []))
    assert [p.name for p in found] == NAMES
    assert [p.cfg.msign_targets for p in found[2:]] == ["attention", "attention", "mlp", "mlp"]
    assert {p.cfg.max_steps for p in found} == {10}
    assert {p.cfg.wandb_group for p in found} == {"grid"}


def test_every_committed_grid_is_one(tmp_path):
    for path in (ROOT / "configs" / "sweeps").glob("*.py"):
        found = points(path, read_grid(path, [f"--runs_dir={tmp_path}"]))
        assert len({p.name for p in found}) == len(found) > 4
        assert len({p.folder for p in found}) == len(found)


def test_an_axis_is_narrowed_from_the_command_line():
    path = ROOT / "configs" / "sweeps" / "architectures.py"
    two = "configs/small_moe.py,configs/small_sigma.py"
    found = points(path, read_grid(path, [f"--config={two}", "--arm=AdamW", "--seed=1,3"]))
    names = {f"seed{seed}-small_{which}-AdamW" for seed in (1, 3) for which in ("moe", "sigma")}
    assert {p.name for p in found} == names
    with pytest.raises(UserError, match=r"config = 'configs/gpt_3b\.py': must be one of configs/small_sigma\.py, "):
        read_grid(path, ["--config=configs/gpt_3b.py"])


def test_names_are_folders_and_tell_points_apart():
    assert name_of({"config": "configs/gpt_5m.py", "lr_scale": 0.5, "seed": 3}) == "gpt_5m-lr_scale0.5-seed3"
    assert name_of({"msign_targets": "W_V,W_O"}) == "W_V+W_O"
    assert "/" not in name_of({"dataset": "../../etc"}) and not name_of({"dataset": "../x"}).startswith(".")


def test_runs_what_is_missing_resumes_what_was_cut_skips_what_is_done(grid, tmp_path):
    said = run("scripts/sweep.py", grid, "--dry_run")
    assert said.returncode == 0 and "grid: 6 missing" in said.stdout, said.stdout
    assert not (tmp_path / "runs").exists()

    done = run("scripts/sweep.py", grid, "--msign_period=0")
    assert done.returncode == 0, done.stderr
    first = results(tmp_path)
    assert list(first) == NAMES[:2]
    record = tmp_path / "runs" / "grid" / NAMES[0] / "record.json"
    before = record.stat().st_mtime_ns

    # a run that was cut after step 5, as train.py leaves it
    cut = tmp_path / "runs" / "grid" / NAMES[3]
    point = next(p for p in points(grid, read_grid(grid, [])) if p.name == NAMES[3])
    process = start(*point.command[1:], "--ckpt_every=1")
    while not list(cut.glob("ckpt_*.pt")) and process.is_alive():
        time.sleep(0.01)
    process.terminate()
    process.join()
    assert not (cut / "summary.json").exists()

    said = run("scripts/sweep.py", grid, "--dry_run", "--ckpt_every=1")
    assert "2 done, 3 missing, 1 cut" in said.stdout, said.stdout
    done = run("scripts/sweep.py", grid, "--ckpt_every=1")
    assert done.returncode == 0, done.stderr
    rows = results(tmp_path)
    assert list(rows) == NAMES
    assert {row["state"] for row in rows.values()} == {"done"}
    assert {row["steps"] for row in rows.values()} == {"10"}
    assert {n: rows[n]["msign_targets"] for n in NAMES} == dict(
        zip(NAMES, ["", "", *2 * ["attention"], *2 * ["mlp"]], strict=True)
    )
    assert record.stat().st_mtime_ns == before
    assert "resumed after step" in (cut.parent / f"{NAMES[3]}.log").read_text()
    for name in NAMES:  # one loss a step, and the table's last line is the run's
        lines = [json.loads(x) for x in (tmp_path / "runs" / "grid" / name / "metrics.jsonl").read_text().splitlines()]
        assert [line["iter"] for line in lines] == list(range(1, 11))
        assert f"{float(rows[name]['train/loss']):.3f}" in done.stdout


def test_a_point_that_fails_is_told_and_the_others_go_on(grid, tmp_path):
    (tmp_path / "runs" / "grid" / NAMES[1]).mkdir(parents=True)
    (tmp_path / "runs" / "grid" / NAMES[1] / "metrics.jsonl").write_text("not ours\n")
    said = run("scripts/sweep.py", grid, f"--record={tmp_path}/recorded", "--dry_run")
    assert said.returncode == 0 and "none of 6 points is done" in said.stdout, said.stderr
    done = run("scripts/sweep.py", grid, "--msign_period=0")
    assert done.returncode == 1, done.stderr
    assert f"{NAMES[1]}: exit code 2" in done.stdout
    assert {n: row["state"] for n, row in results(tmp_path).items()} == {NAMES[0]: "done", NAMES[1]: "failed"}


def test_ctrl_c_saves_and_the_same_command_goes_on(grid, tmp_path):
    arguments = command("scripts/sweep.py", grid, "--msign_period=0", "--seed=0", "--max_steps=400", "--ckpt_every=100")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # real processes, unlike those of the other tests
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "runs" / "grid" / NAMES[0]
    while not (folder / "metrics.jsonl").is_file() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "1 to go with the same command" in said
    assert list(folder.glob("ckpt_*.pt"))  # train.py was told, and saved
    done = run(*arguments[1:])
    assert done.returncode == 0, done.stderr
    assert results(tmp_path)[NAMES[0]]["steps"] == "400"


def test_as_a_wandb_sweep(grid):
    said = run("scripts/sweep.py", grid, "--wandb", "--dry_run")
    assert said.returncode == 0, said.stderr
    definition = json.loads(said.stdout)
    assert definition["method"] == "grid"
    assert definition["parameters"] == {"point": {"values": NAMES}}
    # an agent fills the command's variables in, and runs one point: W&B then calls exactly this
    words = [w for w in definition["command"] if w not in ("${env}", "${interpreter}", "${program}", "${args}")]
    done = run(definition["program"], *words, f"--point={NAMES[0]}", WANDB_MODE="disabled")
    assert done.returncode == 0, done.stderr
    folder = Path(points(grid, read_grid(grid, []))[0].folder)
    assert json.loads((folder / "summary.json").read_text())["steps"] == 10


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed = [0, 1]", "config: missing"),
        ("config = 'configs/stress_ramp.py'\nsead = [0]", "seed"),
        ("config = 'configs/stress_ramp.py'\nseed = []", "seed = []: must be at least one value"),
        ("config = 'configs/stress_ramp.py'\nseed = ['a']", "seed = 'a'"),
        ("config = 'configs/stress_ramp.py'\nname = 'x'", "name = 'x': is set for every point"),
        ("config = 'configs/stress_ramp.py'\nruns_dir = ['a', 'b']", "must be one value"),
        ("config = 'configs/stress_ramp.py'\nn_head = [6, 7]", "n_head"),
        ("config = 'configs/none.py'", "configs/none.py"),
        ("config = 3", "config = 3"),
        ("1/0", "ZeroDivisionError"),
    ],
)
def test_a_wrong_grid_is_refused(tmp_path, text, says):
    path = tmp_path / "grid.py"
    path.write_text(text + "\n")
    with pytest.raises(UserError, match="(?s).*" + says.replace("[", r"\[")):
        points(path, read_grid(path, []))


def test_wrong_options_are_refused(grid, tmp_path):
    refused(
        "scripts/sweep.py", grid, "--workers=0", says="argument --workers: '0': must be a whole number of 1 or more"
    )
    refused("scripts/sweep.py", grid, "--point=nothing", says="point = 'nothing': not in")
    refused("scripts/sweep.py", grid, "--sead=1", says="seed")
    refused("scripts/sweep.py", tmp_path / "no.py", says="no such grid file")


def test_a_grid_that_was_changed_under_its_runs_is_refused(grid):
    assert run("scripts/sweep.py", grid, "--msign_period=0", "--seed=0").returncode == 0
    refused("scripts/sweep.py", grid, "--msign_period=0", "--seed=0", "--lr=0.5", says="was started with")


def test_an_arm_is_a_set_of_fields(tmp_path, config_file):
    path = tmp_path / "grid.py"
    path.write_text(
        f"config = {str(config_file)!r}\n"
        "arm = {'AdamW': {}, 'Sign on W_V': {'msign_period': 5, 'msign_targets': 'W_V'},"
        " 'the same as AdamW': {'msign_targets': 'mlp'}}\nseed = [0, 1]\n"
    )
    found = points(path, read_grid(path, []))
    assert [p.name for p in found] == ["AdamW-seed0", "AdamW-seed1", "Sign+on+W_V-seed0", "Sign+on+W_V-seed1"]
    assert [(p.cfg.msign_period, p.cfg.seed) for p in found] == [(0, 0), (0, 1), (5, 0), (5, 1)]
    assert found[2].axes == {"arm": "Sign on W_V", "seed": 0}
    for wrong, says in (
        ("[1]", "must be a dict of dicts"),
        ("{'a': {'sead': 1}}", "sead"),
        ("{'a': {'seed': 'x'}}", "seed = 'x'"),
        ("{'a': {'name': 'x'}}", "must not be in an arm"),
    ):
        path.write_text(f"config = {str(config_file)!r}\narm = {wrong}\n")
        with pytest.raises(UserError, match=says):
            read_grid(path, [])


def test_of_an_axis_some_values(grid):
    assert [p.name for p in points(grid, read_grid(grid, ["--seed=1"]))] == [n for n in NAMES if n.endswith("1")]
    assert len(points(grid, read_grid(grid, ["--seed=0,1,2"]))) == 9
    assert len(points(grid, read_grid(grid, ["--msign_targets=W_V,W_O"]))) == 4
    with pytest.raises(UserError, match="seed = 'x'"):
        read_grid(grid, ["--seed=0,x"])


def test_what_is_done_is_packed(grid, tmp_path):
    done = run("scripts/sweep.py", grid, "--msign_period=0", "--seed=0", f"--record={tmp_path}")
    assert done.returncode == 0 and "1 of 1 points packed" in done.stdout, done.stdout
    done = run("scripts/sweep.py", grid, "--dry_run", f"--record={tmp_path}")
    assert done.returncode == 0 and "1 of 6 points packed" in done.stdout, done.stdout
    (packed,) = load_runs(tmp_path / "grid")
    assert packed.axes == {"msign_period": 0, "seed": 0} and len(packed.steps) == 10


def test_what_was_recorded_elsewhere_stays(grid, tmp_path):
    """Two machines share a grid, or an arm is added later: nothing recorded is lost, what is repeated is replaced."""
    for number, only in enumerate((["--seed=0"], ["--seed=1"], ["--seed=0", "--max_steps=12"])):
        more = ["--msign_period=0", f"--runs_dir={tmp_path}/{number}", f"--record={tmp_path}"]
        done = run("scripts/sweep.py", grid, *only, *more)
        assert done.returncode == 0, done.stderr
    found = load_runs(tmp_path / "grid")
    assert [(run.axes["seed"], len(run.steps)) for run in found] == [(0, 12), (1, 10)]
