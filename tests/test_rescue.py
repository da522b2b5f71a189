"""What a run does when its alarm rings (stability/rescue.py): it says so, or goes back and goes on otherwise."""

import json
import math
from types import SimpleNamespace

import pytest

import train
from config import load_config
from engine.runlog import read_metrics
from model import GPT
from stability import rescue
from stability.alarm import Alarm
from stability.collapse import Collapse, Watch
from tests.conftest import ROOT, refused

OPTIONS = ("--warmup_steps=20", "--max_steps=40", "--ckpt_every=5", "--eval_every=0", "--probe_every=0")
HEALTHY, RANG = 10, 18


@pytest.fixture
def go(config_file, monkeypatch):
    """Train the small model, whose alarm rings after step RANG of its first life: (exit code, run folder)."""

    def run(name, *options, ring=True):
        cfg = load_config([str(config_file), *OPTIONS, f"--name={name}", *options])
        rings = [Alarm(RANG, 1.0, 300.0)] * ring

        def update(self, step, values):
            return rings.pop() if rings and step == RANG else None

        monkeypatch.setattr(rescue.CollapseAlarm, "update", update)
        # the loss is up from step 13 to the ring, so that the checkpoint of step 15 is not a healthy one
        monkeypatch.setattr(Watch, "suspicious", property(lambda watch: bool(rings) and watch.step >= 13))
        return train.train(cfg), ROOT / cfg.runs_dir / name

    return run


def events(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def losses(folder):
    return [line["train/loss"] for line in read_metrics(folder)]


@pytest.mark.parametrize("how, options", [("half_rate", ()), ("remedy", ("--logit_trust=0.001",))])
def test_a_run_goes_back_to_its_last_healthy_checkpoint_and_on_otherwise(go, how, options):
    _, plain = go("plain", ring=False)
    code, folder = go("rescued", f"--on_alarm={how}", *options)
    assert code == 0
    lines, before = read_metrics(folder), read_metrics(plain)
    assert [line["iter"] for line in lines] == list(range(1, 41))
    assert losses(folder)[: HEALTHY + 1] == losses(plain)[: HEALTHY + 1]  # a remedy is off until then
    assert losses(folder)[HEALTHY + 1 :] != losses(plain)[HEALTHY + 1 :]
    rates = [line["lr"] / at["lr"] for line, at in zip(lines, before, strict=True)]
    assert rates == pytest.approx([1] * HEALTHY + [0.5 if how == "half_rate" else 1] * (40 - HEALTHY))
    cut = [json.loads(line) for line in (folder / "abandoned.jsonl").read_text().splitlines()]
    assert cut == before[HEALTHY:RANG]
    assert json.loads((folder / "rescue.json").read_text()) == {"rang": RANG, "back_to": HEALTHY}
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["rang"], summary["back_to"]) == (RANG, HEALTHY)
    assert [e["event"] for e in events(folder)] == ["alarm", "went back"]


def test_the_remedy_from_a_checkpoint_is_the_remedy_from_the_start_of_a_run(go, monkeypatch):
    """Going back at once to the checkpoint of step 0 gives the run that had the limit from its first step."""
    monkeypatch.setattr(f"{__name__}.RANG", 3)
    _, whole = go("whole", "--logit_trust=0.001", ring=False)
    _, folder = go("rescued", "--logit_trust=0.001", "--on_alarm=remedy")
    assert json.loads((folder / "rescue.json").read_text()) == {"rang": 3, "back_to": 0}
    assert (folder / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("dies", ["before rescue.json", "before a checkpoint"])
def test_a_run_that_dies_after_going_back_goes_on_as_if_it_had_not(go, monkeypatch, dies):
    options = ("--on_alarm=half_rate", "--msign_period=7")
    _, whole = go("whole", *options)

    def die(*_):
        raise KeyboardInterrupt

    target, name = (rescue.Rescue, "go_back") if dies == "before rescue.json" else (train.Run, "draw")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if name == "draw":
            draw = train.Run.draw
            patch.setattr(target, name, lambda run, step: die() if run.rescue.went else draw(run, step))
        else:
            patch.setattr(target, name, die)
        go("killed", *options)
    _, killed = go("killed", *options, "--resume", ring=dies == "before rescue.json")
    assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert json.loads((killed / "rescue.json").read_text()) == {"rang": RANG, "back_to": HEALTHY}


def test_a_weight_that_is_not_finite_brings_the_run_back_too(go, monkeypatch):
    forward, calls = GPT.forward, []

    def infinite_once(self, *batch):
        calls.append(batch)
        return forward(self, *batch) * (float("inf") if len(calls) == 14 else 1)

    monkeypatch.setattr(GPT, "forward", infinite_once)
    code, folder = go("infinite", "--on_alarm=half_rate", "--probe_every=7", "--layers_every=7", ring=False)
    rang, back_to = json.loads((folder / "rescue.json").read_text()).values()
    assert code == 0 and rang == 14 and back_to == 10  # in a step with measurements, after which nothing is updated
    measured = [line["iter"] for line in read_metrics(folder) if "update_norm/head" in line]
    assert measured == [7, 14, 21, 28, 35]
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["collapse"]) == ("finished", 40, None)


def test_told_alone_nothing_changes(go, capsys):
    _, plain = go("plain", ring=False)
    _, folder = go("told", "--on_alarm=tell")
    assert (folder / "metrics.jsonl").read_bytes() == (plain / "metrics.jsonl").read_bytes()
    assert [(e["event"], e["step"]) for e in events(folder)] == [("alarm", RANG)]
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("ALARM"))
    for part in (f"step {RANG}", "largest logit 300", "saturated since step", "try --logit_trust=1"):
        assert part in said
    assert not (folder / "rescue.json").exists() and not (folder / "abandoned.jsonl").exists()


def test_only_rank_0_measures_the_logit_and_all_hear_of_it():
    cfg, heard = SimpleNamespace(on_alarm="tell", probe_every=2), []
    alarm = rescue.Rescue(cfg, None, lambda mine: heard.append(mine) or 1e3)
    values = ({"train/loss": 2.0 + step % 2 / 100 + (step > 400)} for step in range(1, 500))
    rang = next(step for step, of in enumerate(values, 1) if alarm.ring(step, of, Watch()))
    assert 400 < rang < 440
    assert len(heard) == rang // 2 and all(map(math.isnan, heard))


def test_a_collapse_counts_as_a_ring_until_the_run_has_gone_back():
    alarm = rescue.Rescue(SimpleNamespace(on_alarm="remedy", probe_every=0), None, None)
    watch = SimpleNamespace(collapse=Collapse(5, 9, "loss rose"))
    values = {"train/loss": 1.0}
    assert [bool(alarm.ring(step, values, watch)) for step in (8, 9, 10)] == [False, True, False]
    alarm.went = {"rang": 9, "back_to": 5}
    assert alarm.ring(9, values, watch) == ""


@pytest.mark.parametrize("options, field", [
    (["--on_alarm=remedy"], "on_alarm"),
    (["--on_alarm=half_rate", "--ckpt_every=0"], "ckpt_every"),
])  # fmt: skip
def test_what_cannot_be_done_is_refused(config_file, options, field):
    refused("train.py", config_file, *options, says=f"{field} = ")
