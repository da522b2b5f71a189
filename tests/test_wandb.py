import json
import math
import subprocess
import sys

import pytest
import wandb

from config import UserError
from engine.runlog import RunLog, read_metrics, read_wandb, wandb_payload
from tests.conftest import run, small


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The folder of a run that logged awkward values, offline."""
    runs = tmp_path_factory.mktemp("runs")
    log = RunLog(small(name="awkward", runs_dir=str(runs), wandb="offline", lr=1.0, dataset="μ.5"), {})
    log.start(0, 0)
    log.log(1, {"train/loss": 2.0, "grad_norm": 1 / 3, "tiny": 1.23456789e-300, "huge": 9.87654321e300})
    layers = {
        "srank/1.W_Q": math.nan,
        "srank/0.W_Q": 2 / 3,
        "srank/2.W_Q": 3.0,
        "srank/0.W_up": 1e-12,
        "srank/W_Q": 0.1,
    }
    layers |= {"theory/4.5/gap/0": -math.pi, "theory/4.5/gap/1": 1e20, "jacobian/sigma1/0": 7, "jacobian/sigma1": 7}
    log.log(2, {"train/loss": math.nan, "grad_norm": 3e9, "val/loss": 1.0, **layers})
    for step in range(3, 201):
        log.log(step, {"train/loss": 4.0, "grad_norm": 2e-9 / step, "val/loss": 5.0})
    log.close({"status": "finished", "val/loss": 5.0, "max_grad_norm": math.inf, "collapse": None})
    wandb.teardown()
    return log.folder


def assert_same(a, b):
    """Equal in values and in types, the keys in any order."""
    assert json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def config_of(folder):
    return json.loads((folder / "record.json").read_text())["config"]


def test_layers_become_one_chart_and_scalars_stay():
    scalars = {"iter": 3, "train/loss": None, "srank/W_Q": 1.0, "jacobian/sigma1": 9.0, "theory/4.5/gap": 1.0}
    layers = {"srank/1.W_Q": 2.0, "srank/0.W_Q": 0.5, "srank/1.W_up": 4.0}
    layers |= {f"jacobian/sigma1/{i}": float(i) if i != 3 else None for i in range(12)}
    assert wandb_payload(scalars | layers) == (scalars, {
        "layers/srank.W_Q": ([0.5, 2.0], [0, 1, 2]),
        "layers/srank.W_up": ([0.0, 4.0], [0, 1, 2]),
        "layers/jacobian/sigma1": ([0, 1, 2, 0, 4, 5, 6, 7, 8, 9, 10, 11], list(range(13))),
    })  # fmt: skip


def test_a_run_comes_back_from_its_wandb_file(config_file, tmp_path):
    done = run("train.py", config_file, "--wandb=offline", "--jacobian_every=5", "--max_steps=10")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "small"
    config, lines = read_wandb(folder)
    assert_same(config, config_of(folder))
    assert_same(lines, read_metrics(folder))
    assert {"srank/1.W_V", "jacobian/sigma1/1", "val/loss"} <= set(lines[-1])


def test_every_value_comes_back_with_its_type(recorded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = read_metrics(recorded)
    assert lines[1]["train/loss"] is None
    lines[1]["srank/1.W_Q"] = 0.0  # the documented exception: a layer's null
    (file,) = recorded.rglob("*.wandb")
    for path in (recorded, file.parent, file):
        assert_same(read_wandb(path), [config_of(recorded), lines])
    assert not list(tmp_path.iterdir())  # reading writes nothing


def test_what_wandb_shows(recorded):
    """One heatmap for each family and role, and in the table of runs extremes beside the final summary."""
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json"]
    said = subprocess.run([*inspect, *recorded.rglob("*.wandb")], capture_output=True, timeout=60).stdout
    shown = json.loads(said)["summary"]
    assert shown["layers/srank.W_Q"] == {"_type": "histogram", "values": [0.66667, 0, 3], "bins": [0, 1, 2, 3]}
    assert {key for key in shown if "srank" in key} == {"srank/W_Q", "layers/srank.W_Q", "layers/srank.W_up"}
    assert (shown["val/loss"], shown["grad_norm"], shown["jacobian/sigma1"]) == ({"min": 1}, {"max": 3e9}, {"max": 7})
    assert (shown["final"]["val/loss"], shown["final"]["status"]) == (5, "finished")


def last_record(data: bytes) -> int:
    """Where the last record of a .wandb file begins.

    The file is made of blocks of 32 KiB. A head of 7 bytes precedes every record and holds its length.
    """
    at = after = len(data) // 32768 * 32768
    while after < len(data):
        at, after = after, after + 7 + int.from_bytes(data[after + 4 : after + 6], "little")
    return at


def test_what_cannot_be_read_is_one_line(recorded, tmp_path, monkeypatch):
    (file,) = recorded.rglob("*.wandb")
    whole = file.read_bytes()
    last, inside = last_record(whole), 40_000
    assert len(whole) > 2 * 32768  # the reader skips a damaged block, and goes on to read the last one
    damage = {
        "changed": whole[:inside] + bytes([whole[inside] ^ 1]) + whole[inside + 1 :], "cut": whole[: last + 9],
        "cut between records": whole[:last], "empty": b"", "other": b"not W&B's\n" * 99,
    }  # fmt: skip

    def refused(path, says):
        with pytest.raises(UserError) as error:
            read_wandb(path)
        assert str(path) in str(error.value)
        assert says in str(error.value)
        assert "\n" not in str(error.value)

    for name, data in damage.items():
        (tmp_path / f"{name}.wandb").write_bytes(data)
        refused(tmp_path / f"{name}.wandb", "must be the whole, undamaged file of a run that has ended")
    refused(tmp_path, "changed.wandb, cut between records.wandb, cut.wandb, empty.wandb, other.wandb in it")
    for path in (tmp_path / "nowhere", recorded / "metrics.jsonl"):
        refused(path, "not a run (no record.json, and no .wandb file in it)")
    # an older wandb, whose command line has no `leet inspect`
    old = tmp_path / "old" / "wandb"
    old.mkdir(parents=True)
    (old / "__init__.py").touch()
    (old / "__main__.py").write_text("import click\nclick.Group('wandb')()\n")
    monkeypatch.setenv("PYTHONPATH", str(old.parent))
    refused(file, "read by wandb 0.31, not by the one installed here (Error: No such command 'leet'")


@pytest.mark.parametrize("dies", ["init", "log", "finish"])
def test_a_service_that_dies_is_announced_and_done_without(tmp_path, monkeypatch, capsys, dies):
    class Service:
        def __init__(self):
            self.summary = {}

        def __getattr__(self, name):
            def call(*args, **kwargs):
                if name == dies:
                    raise ConnectionResetError("Connection lost")
                return self

            return call

    monkeypatch.setattr(wandb, "init", Service().init)
    log = RunLog(small(name="x", runs_dir=str(tmp_path), wandb="offline"), {})
    log.start(0, 0)
    for step in (1, 2):
        log.log(step, {"train/loss": 2.0, "grad_norm": 1.0})
    log.close({"status": "finished"})
    assert [line["iter"] for line in read_metrics(log.folder)] == [1, 2] and (log.folder / "summary.json").exists()
    assert capsys.readouterr().out.count("W&B cannot be used (Connection lost)") == 1
    assert (log.folder / "events.jsonl").read_text().count('"wandb off"') == 1
