"""trials/without_gpu.py: a run's memory and precision on a GPU, on a CUDA that computes nothing."""

import copy
import shutil
import sys
from pathlib import Path

import pytest
import torch

from config import UserError
from trials.without_gpu import APPLICATION, PROBE, RUNS, broken, build, named, row, run

usable = sys.platform == "linux" and torch.version.cuda and shutil.which("gcc") and shutil.which("nm")
here = pytest.mark.skipif(not usable, reason="needs Linux, gcc, and the build of PyTorch that brings CUDA")


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    return build(tmp_path_factory.mktemp("cuda"))


@here
@pytest.mark.parametrize("name, ranks, more", [("sigma_40m_msign", 1, ()),
                                               ("llama_moe_3b_msign", 16, ("--parallel=hsdp",))])  # fmt: skip
def test_a_run_at_full_size_fits_keeps_nothing_and_stays_in_bf16(name, ranks, more, environment, tmp_path):
    found = run(name, ranks, environment, tmp_path, more)
    assert broken(found) == []
    steps = {line["step"]: line for line in found["steps"]}
    assert steps[PROBE]["fp64"] and steps[APPLICATION]["fp64"]  # spectra; one product of the polar iteration
    assert not steps[APPLICATION]["fp32"]
    assert steps[PROBE]["read"] > 1 and steps[1]["pageable"] > 4  # what is counted is not always zero
    assert found["measuring"] <= steps[PROBE]["peak"]
    assert row(name, ranks, found)["broken"] == "none"


@here
def test_what_does_not_fit_is_one_line(environment, tmp_path):
    with pytest.raises(UserError, match=r"^sigma_40m_msign on 1: .*micro_batch = 256: must be less; .* takes 100 GiB"):
        run("sigma_40m_msign", 1, environment, tmp_path, ("--micro_batch=256", "--batch_size=512"))


STEP = {"allocated": 2**30, "peak": 2**31, "reserved": 2**31, "fp32": 0.0, "bf16": 1e12, "pageable": 4.0, "read": 1.0}
FOUND = {"layout": "ddp", "dtype": "bfloat16", "plan": 2**31, "memory": 2**33, "missing": [],
         "steps": [STEP | {"step": step} for step in range(1, 7)]}  # fmt: skip


@pytest.mark.parametrize(
    "step, key, value, rule",
    [(PROBE, "reserved", 2**33, "reserves more than 85% of the GPU"),
     (6, "allocated", 2**30 + 1, "a step keeps memory"),
     (2, "peak", 2**32, "plan not within 10%"), (3, "fp32", 1.0, "fp32 products"),
     (2, "pageable", 5.0, "copies from pageable memory"), (6, "read", 2.0, "waits for the GPU more than once")],
)  # fmt: skip
def test_each_rule_is_broken_by_its_number_alone(step, key, value, rule):
    assert broken(FOUND) == []
    found = copy.deepcopy(FOUND)
    found["steps"][step - 1][key] = value
    assert broken(found) == [rule]
    assert broken(FOUND | {"missing": ["out of memory"]}) == ["could not be measured"]


def test_the_recorded_page_shows_every_run_and_no_broken_rule():
    page = (Path(__file__).parents[1] / "results" / "without_gpu.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert [line.split("|")[1].split(",")[0].strip() for line in lines] == [name for name, _ in RUNS]
    assert all(line.split("|")[-2].strip() == "none" for line in lines)


def test_bad_input_is_one_line():
    assert named("gpt_3b:8") == ("gpt_3b", 8) and named("gpt_124m") == ("gpt_124m", 1)
    with pytest.raises(UserError, match="only = 'gpt_3b:x': must be a configuration and a number of GPUs"):
        named("gpt_3b:x")
