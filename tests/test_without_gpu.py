"""trials/without_gpu.py: a run's memory and precision on a GPU, on a CUDA that computes nothing."""

import copy
import re
import shutil
import sys

import pytest
import torch

from config import ROOT, UserError
from trials.without_gpu import (
    APPLICATION,
    EFFICIENT,
    FLASH,
    GROUPED,
    PROBE,
    RUNS,
    TARGET,
    broken,
    build,
    named,
    page,
    run,
    spread,
    title,
)  # fmt: skip

usable = sys.platform == "linux" and torch.version.cuda and shutil.which("gcc") and shutil.which("nm")
here = pytest.mark.skipif(not usable, reason="needs Linux, gcc, and the build of PyTorch that brings CUDA")


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    return build(tmp_path_factory.mktemp("cuda"))


@here
@pytest.mark.parametrize("which, counted", [("sigma_40m_msign", ["held"]),
                                            ("llama_moe_3b_msign:64", ["held", "sent", "msign"])])  # fmt: skip
def test_a_run_at_full_size_fits_keeps_nothing_and_stays_in_bf16(which, counted, environment, tmp_path):
    found = run(which, environment, tmp_path)
    assert broken(found) == [] and title(found) in page([found])
    assert list(spread(found)) == counted
    assert found["layout"] == ("hsdp" if ":64" in which else "ddp")  # what is chosen when nothing is said
    assert all(planned == pytest.approx(seen, rel=1e-3) for seen, planned in spread(found).values())
    steps = {line["step"]: line for line in found["steps"]}
    assert steps[PROBE]["fp64"] and steps[APPLICATION]["fp64"]  # spectra; one product of the polar iteration
    assert not steps[APPLICATION]["fp32"]
    assert steps[PROBE]["read"] > 1 and steps[1]["pageable"] > 4  # what is counted is not always zero
    assert found["measuring"] <= steps[PROBE]["peak"]


@here
def test_compiled_blocks_become_triton_kernels_for_an_h100(environment, tmp_path):
    found = run("gpt_124m:::blocks", environment, tmp_path)
    assert broken(found) == [] and len(found["triton"]) > 10 and title(found) in page([found])


@here
def test_what_does_not_fit_is_one_line(environment, tmp_path):
    with pytest.raises(UserError, match=r"^sigma_40m_msign: .*micro_batch = 256: must be less; .* takes 100 GiB"):
        run("sigma_40m_msign", environment, tmp_path, ("--micro_batch=256", "--batch_size=512"))


STEP = {
    "allocated": 2**30,
    "peak": 2**31,
    "reserved": 2**31,
    "fp32": 0.0,
    "bf16": 1e12,
    "pageable": 4.0,
    "read": 1.0,
    "sent": 2**28,
    "msign": 2**26,
}
FOUND = {"layout": "ddp", "dtype": "bfloat16", "plan": 2**31, "memory": 2**33, "missing": [],
         "kernels": [FLASH], "experts": 0, "compile": "off", "breaks": 0, "triton": [],
         "held": 2**30, "held, plan": 2**30, "sent, plan": 2**28, "msign, plan": 2**26,
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
    other_kernel = "attention or experts by another kernel than intended"
    compiled = {"compile": "blocks", "triton": [TARGET]}
    for more, rules in (
        ({"kernels": [EFFICIENT]}, [other_kernel]), ({"experts": 4}, [other_kernel]), (compiled, []),
        ({"experts": 4, "kernels": [FLASH, GROUPED]}, []), ({"breaks": 1}, ["a graph breaks"]),
        (compiled | {"triton": []}, [f"not compiled for {TARGET}"]),
        (compiled | {"triton": [TARGET, "sm_80"]}, [f"not compiled for {TARGET}"]),
        (compiled | {"plan": 1.5 * 2**31}, []), (compiled | {"plan": 0.8 * 2**31}, ["plan not within 10%"]),
    ):  # fmt: skip
        assert broken(FOUND | more) == rules
    for what in ("held", "sent", "msign"):
        off = FOUND | {f"{what}, plan": 0.89 * FOUND[f"{what}, plan"]}
        assert broken(off) == ["plan of what is held or sent not within 10%"], what


def tables(page: str) -> list[str]:
    """The Markdown tables of a page."""
    return re.findall(r"(?:^\|.*\n)+", page, re.M)


def test_the_recorded_page_shows_every_run_and_no_broken_rule():
    recorded = (ROOT / "results" / "without_gpu.md").read_text()
    of_memory, of_spread, of_compiled = (
        [line.split("|")[1:-1] for line in table.splitlines()[2:]] for table in tables(recorded)
    )
    ladder = {path.stem for path in (ROOT / "configs").glob("gpt_*.py")} | {"nano_5m_msign", "sigma_40m_msign"}
    assert {run.split(",")[0].strip() for run, *_ in of_compiled} == ladder | {"llama_1b_msign", "llama_moe_3b_msign"}
    asked = [named(which) for which in RUNS if not which.endswith("blocks")]
    assert [run.split(",")[0].strip() for run, *_ in of_memory] == [name for name, *_ in asked]
    assert all(broken.strip() == "none" for *_, broken in of_memory + of_compiled)
    assert [run.split(",")[0].strip() for run, *_ in of_spread] == [name for name, ranks, _ in asked if ranks > 1]
    ratios = [float(cell) for row in of_spread for cell in row[2::2] if cell.strip() != "–"]
    assert max(abs(ratio - 1) for ratio in ratios) < 0.01
    assert {(ranks, *options) for name, ranks, options in asked if name == "gpt_3b"} >= {
        (ranks, f"--parallel={how}") for ranks in (64, 512) for how in ("fsdp", "hsdp")
    }
    sent = {run.strip(): f"{float(gigabytes):.0f}" for run, _, _, gigabytes, *_ in of_spread}
    fsdp, hsdp = (sent[f"llama_moe_3b_msign, 64 × {layout}"] for layout in ("fsdp", "hsdp"))
    scale = " ".join((ROOT / "docs" / "scale.md").read_text().split())
    assert (
        f"LLaMA-MoE-3B with FSDP2 sends {fsdp} GB in a step of two micro-batches on 64 processes, and {hsdp} GB"
        in scale
    )


def test_bad_input_is_one_line():
    assert named("gpt_3b:8:fsdp") == ("gpt_3b", 8, ("--parallel=fsdp",)) and named("gpt_124m") == ("gpt_124m", 1, ())
    for bad in ("gpt_3b:x", "gpt_3b:0", "gpt_3b:8:tensor", "gpt_3b:8::whole"):
        with pytest.raises(UserError, match=f"only = '{bad}': must be CONFIGURATION:GPUS:PARALLEL:COMPILE or less"):
            named(bad)
