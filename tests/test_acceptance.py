"""scripts/acceptance.py: what holds is said to hold, what is broken is found, what cannot be run is named."""

import re
from dataclasses import replace

import pytest
import torch

import model
import msign
from engine.budget import GPUS
from scripts import acceptance as script
from tests.conftest import small
from tests.test_faults import FORKING
from trials import acceptance
from trials.acceptance import Row
from trials.place import CONFIG

CPU = torch.device("cpu")


def by_path(rows) -> dict[str, Row]:
    return {row.path: row for row in rows}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(acceptance, "SHAPES", ((8, 8), (24, 8)))
    monkeypatch.setattr(acceptance, "MODELS", {"GPT": replace(small(), batch_size=2, micro_batch=2)})
    monkeypatch.setattr("engine.machine.compiled", lambda cfg, model, *_: (model, {}, []))  # tested elsewhere


def test_paths_that_compute_the_same_hold_and_kernels_of_gpus_are_not_run():
    found = by_path(acceptance.steps(CPU))
    for dtype in ("float32", "bfloat16"):
        assert found[f"GPT, {dtype}, attn_kernel = chunked"].held
        missing = found[f"GPT, {dtype}, attn_kernel = cudnn"]
        assert missing.held is None and missing.found.startswith("not run: the kernel does not compute this")
    assert found["experts with unequal and with no tokens, bfloat16"].held
    assert not any(row.held is False for row in found.values())


def test_a_kernel_that_computes_something_else_is_found(monkeypatch):
    right = model.chunked_attention
    monkeypatch.setattr(model, "chunked_attention", lambda q, k, v: 2 * right(q, k, v))
    found = by_path(acceptance.steps(CPU))
    assert found["GPT, float32, attn_kernel = chunked"].held is False
    assert found["GPT, float32, attn_kernel = flash"].held


def test_a_sign_that_is_wrong_or_fails_is_found(monkeypatch):
    assert all(row.held for row in acceptance.signs(CPU))
    good = msign.msign

    def bad(W, backend):
        if backend == "svd":
            raise RuntimeError("no such solver\nat all")
        return good(W, backend) * (1.01 if backend == "polar" else 1)

    monkeypatch.setattr(msign, "msign", bad)
    for path, row in by_path(acceptance.signs(CPU)).items():
        assert row.held == path.startswith("eigh"), path
        assert not path.startswith("svd") or row.found == "RuntimeError: no such solver"


def test_runs_on_several_processes_and_killed_ones_hold(tmp_path, monkeypatch):
    monkeypatch.setattr("trials.place.subprocess", FORKING)
    monkeypatch.setattr("trials.place.CONFIG", CONFIG.replace("max_steps = 120", "max_steps = 24"))
    monkeypatch.setattr(acceptance, "WAYS", ())  # tests/test_parallel.py has both
    found = by_path(acceptance.rows(["run"], CPU, tmp_path))
    assert any(path.startswith("hsdp on 2 × 2 processes") for path in found)
    assert len(found) == 4 and all(row.held for row in found.values()), found


def test_the_page_says_what_to_believe_and_the_exit_code_agrees(monkeypatch, tmp_path, capsys):
    rows = [Row("sign", "polar", "1e-6", "1e-5", True), Row("run", "hsdp", "not run: there are 2 GPUs, and it takes 4")]
    monkeypatch.setattr(script, "rows", lambda parts, device, folder: rows)
    monkeypatch.setattr("sys.argv", ["acceptance.py", f"--out={tmp_path}/new/page", "--device=cpu"])
    assert script.main() == 0
    said = (tmp_path / "new" / "page.md").read_text()
    assert "Believe what ran: 1 of 1 checks held, 1 paths were not run." in said
    assert said in capsys.readouterr().out
    rows.append(Row("sign", "svd", "0.1", "1e-5", False))
    assert script.main() == 1
    assert "Do not trust the 1 paths marked **no**: 1 of 2 checks held" in (tmp_path / "new" / "page.md").read_text()


def test_speed_is_measured_and_what_has_no_data_sheet_is_not_compared(tmp_path):
    place = acceptance.Place(tmp_path)
    found = by_path(acceptance.speed(CPU, place))
    assert re.fullmatch(r"[\d,]+ tokens/s; in all \d+ s", found["stress_ramp, 12 steps"].found)
    assert float(found["stress_ramp, MSign on all block matrices"].found.removesuffix(" ms")) > 0
    assert float(found["stress_ramp, a probe"].found.removesuffix(" s")) > 0
    assert found["MFU, memory and MSign's time against the plan"].found.startswith("not run: no data sheet")


def test_speed_is_held_against_the_plan_of_a_known_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(acceptance.budget, "gpu_called", lambda name: GPUS["H100"])
    monkeypatch.setattr(acceptance, "LAUNCHES", 0)
    place = acceptance.Place(tmp_path)
    found = by_path(acceptance.speed(CPU, place))
    (memory,) = (row for path, row in found.items() if "memory, of" in path)
    (msign_row,) = (row for path, row in found.items() if "MSign on all block matrices" in path)
    assert memory.held is False and float(memory.found) > 1.1  # of the whole process, which holds PyTorch, too
    assert msign_row.held is False and msign_row.limit == "1.1"
    assert not place.of("speed_stress_ramp").exists()


def test_of_what_torchrun_says_the_error_is_shown():
    said = "  File x\n  ValueError: no such way\n[0]:\n  error_file: <N/A>\n============\n"
    assert acceptance.last_error(said) == "ValueError: no such way"
    assert acceptance.last_error("hm\ntrain.py: error: parallel = 'x'\n====") == "train.py: error: parallel = 'x'"
    assert acceptance.last_error("hm\n") == "hm" and acceptance.last_error("") == ""
