"""Where a run's time goes: times.jsonl, and the clock that writes it."""

import json
import time

import pytest
import torch

import train
from config import load_config
from engine import checkpoint, clock, machine
from engine.budget import GPUS, gpu_called
from engine.clock import PHASES, Clock
from tests.conftest import small

CPU = torch.device("cpu")


def lines(folder):
    return [json.loads(line) for line in (folder / "times.jsonl").read_text().splitlines()]


def test_the_phases_of_a_run_add_up_and_its_metrics_hold_no_times(config_file, tmp_path, monkeypatch):
    folder, argv = tmp_path / "runs" / "small", [str(config_file), "--msign_period=4"]
    monkeypatch.setattr(clock, "EVERY", 0.0)
    save = checkpoint.Single.save
    monkeypatch.setattr(checkpoint.Single, "save", lambda *args: time.sleep(0.02) or save(*args))
    began = time.perf_counter()
    train.train(load_config(argv))
    took = time.perf_counter() - began
    found = lines(folder)
    assert [line["iter"] for line in found] == [*range(1, 21), 20]  # the last holds the last checkpoint
    assert sum(line["time/steps"] for line in found) == 20
    whole = sum(line["time/interval"] for line in found)
    phases = {phase: sum(line[f"time/{phase}"] for line in found) for phase in PHASES}
    # both are sums of the host's times; the first interval alone begins with the set-up of the first mark
    assert sum(phases.values()) == pytest.approx(whole, rel=0.01) and whole < took
    assert min(phases.values()) > 0
    # a phase is where it belongs: MSign acts in steps 4, 8 …, whose time is booked in the next line
    assert [line["iter"] for line in found[:-1] if line["time/msign"]] == [5, 9, 13, 17]
    assert min(line["time/save"] for line in found if line["iter"] in (6, 11, 16)) >= 0.02
    assert all(
        line["time/tokens_per_second"] == pytest.approx(32 / line["time/interval"], rel=1e-4) for line in found[:-1]
    )
    assert not {"time/mfu", "memory/retries"} & set(found[0]) and 0 < found[0]["memory/now"] <= found[0]["memory/peak"]
    record = json.loads((folder / "record.json").read_text())
    assert record["machine"]["peak_flops"] == "unknown, so no MFU: engine/budget.py has no data sheet of a cpu"
    logged = []
    monkeypatch.setattr(train.RunLog, "_to_wandb", lambda self, line: logged.append(line))
    metrics, before = (folder / "metrics.jsonl").read_bytes(), (folder / "times.jsonl").read_text()
    (folder / "summary.json").unlink()
    (folder / "ckpt_0000020.pt").unlink()
    train.train(load_config([*argv, "--resume"]))
    assert (folder / "metrics.jsonl").read_bytes() == metrics
    after = (folder / "times.jsonl").read_text()
    assert after.startswith(before) and len(after.splitlines()) == 2 * len(before.splitlines())
    assert [line for line in logged if "time/data" in line] == lines(folder)[len(found) :]


def test_a_step_is_marked_a_few_times_and_a_line_is_rare(config_file, tmp_path, monkeypatch):
    marked = []
    monkeypatch.setattr(Clock, "to", lambda self, phase, to=Clock.to: marked.append(phase) or to(self, phase))
    train.train(load_config([str(config_file), "--probe_every=0", "--eval_every=0", "--msign_period=1"]))
    assert len(marked) == 2 + 10 * 20  # the first and the last, and ten in a step that MSign acts in
    assert [line["time/steps"] for line in lines(tmp_path / "runs" / "small")] == [20]
    one = Clock(CPU, 1, 1.0, None)
    seconds = min(timed(lambda: one.to("data")) for _ in range(1000))
    assert seconds < 1e-4  # some 1e-7 where nothing else runs


def timed(call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


class Event:
    """A CUDA event of a device that is ready when `now` says so."""

    now, read = 0.0, 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        self.at = Event.now

    def elapsed_time(self, end):
        Event.read += 1
        return 1e3 * (end.at - self.at)


def test_on_cuda_events_are_read_where_the_loop_waits_and_nothing_else_waits(monkeypatch):
    """With a stand-in for CUDA, which this machine may lack."""
    waited = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(machine, "memory_used", lambda device: {"retries": 1})
    device = torch.device("cuda")
    one = Clock(device, tokens=10, flops=100.0, peak=1000.0)
    for phase, seconds in (("forward_backward", 2.0), ("data", 3.0), ("optimizer", 0.5)):
        one.to(phase)
        assert Event.read == 0
        Event.now += seconds
    one.settle()
    assert not waited and (one.seconds["forward_backward"], one.seconds["data"]) == (2, 3)
    one.began = one.settled - 5.0
    line = one.line(1)
    assert line["time/mfu"] == pytest.approx(100 / 5 / 1000) and line["memory/retries"] == 1
    line = one.last_line(1)  # what was not yet done when the step was logged
    assert waited == [device] and line["time/optimizer"] == 0.5


def test_the_peak_is_that_of_the_card():
    assert gpu_called("NVIDIA H100 80GB HBM3") == gpu_called("NVIDIA H200") == GPUS["H100"]
    assert gpu_called("NVIDIA A100-SXM4-40GB") == GPUS["A100"]
    assert gpu_called("NVIDIA GeForce RTX 4090") == GPUS["RTX4090"]
    assert gpu_called("NVIDIA H100 PCIe") is gpu_called("NVIDIA GeForce RTX 4090 D") is gpu_called("cpu") is None
    assert machine.peak_flops(small(), CPU).startswith("unknown")
    assert GPUS["H100"].peak("bfloat16") > GPUS["H100"].peak("float32")
