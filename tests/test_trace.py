"""Steps traced by PyTorch's profiler."""

import json

import torch

import train
from config import load_config
from engine import checkpoint


def traced(path) -> int:
    """How many steps of the optimizer a trace holds."""
    events = json.loads(path.read_text())["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)
    return sum(event.get("name") == "Optimizer.step#AdamW.step" for event in events)


def test_a_trace_holds_the_steps_asked_for_and_changes_no_bit(config_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(checkpoint, "prune", lambda folder, keep: None)

    def go(name, *more):
        train.train(load_config([str(config_file), f"--name={name}", "--msign_period=4", *more]))
        folder = tmp_path / "runs" / name
        return (folder / "metrics.jsonl").read_bytes(), torch.load(folder / "ckpt_0000020.pt", weights_only=True)

    plain, state = go("plain")
    metrics, same = go("traced", "--profile=3:5")
    assert metrics == plain and all(torch.equal(W, same["model"][name]) for name, W in state["model"].items())
    folder = tmp_path / "runs" / "traced"
    assert [path.name for path in folder.glob("trace_*")] == ["trace_3-5.json"]
    assert traced(folder / "trace_3-5.json") == 3

    def resumed(profile):
        (folder / "summary.json").unlink()
        (folder / "ckpt_0000020.pt").unlink()
        assert go("traced", "--resume", f"--profile={profile}")[0] == plain

    resumed("14:20")  # from step 15, and to the end of the run
    assert traced(folder / "trace_16-20.json") == 5
    assert "no trace" not in capsys.readouterr().out
    resumed("3:4")
    assert "profile = '3:4': none of these steps was left to take" in capsys.readouterr().out
    assert len(list(folder.glob("trace_*"))) == 2
