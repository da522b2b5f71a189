"""trials/bench.py: the contenders compute the same, and take turns; ratios and targets are what they say."""

import json
import time
from dataclasses import replace

import pytest
import torch

import model as gpt
from tests.conftest import here, refused, small
from trials import bench


def step_of(build, cfg):
    """The loss and gradients of one contender's step, on weights that are the same for all."""
    step = build(cfg)
    with torch.no_grad():
        for i, p in enumerate(step.model.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    with step.context():
        loss = step.loss_of(step.x, step.y)
    return loss, torch.autograd.grad(loss, list(step.model.parameters()))


@pytest.mark.parametrize("cfg", [small(), small(attn_kernel="chunked")])
def test_every_contender_trains_the_same_model(cfg):
    loss, grads = step_of(bench.ours, cfg)
    others = {"plain": bench.plain, "flash": lambda c: bench.ours(replace(c, attn_kernel="flash"))}
    others |= {"defaults": lambda c: bench.ours(c, bench.defaults), "logits": lambda c: bench.ours(c, bench.all_logits)}
    for name, build in others.items():
        other, theirs = step_of(build, cfg)
        torch.testing.assert_close(other, loss, rtol=1e-5, atol=0, msg=name)
        for a, b in zip(grads, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6, msg=name)


def test_all_logits_is_the_plain_loss_and_ends(monkeypatch):
    monkeypatch.setattr(gpt, "LOGITS", 5)
    with bench.all_logits():
        assert gpt.LOGITS > 2**50
    assert gpt.LOGITS == 5


def test_a_step_is_its_micro_batches_and_one_update(monkeypatch):
    cfg = small(batch_size=8, micro_batch=2)
    step = bench.plain(cfg)
    inner, clock = step.loss_of, [0.0]

    def tick(seconds):
        clock[0] += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    step.loss_of = lambda x, y: (tick(3.0), inner(x, y))[1]
    step.optimizer.step = lambda: tick(0.5)
    assert step() == 4 * 3.0 + 0.5
    assert all(p.grad is None for p in step.model.parameters())


def test_contenders_take_turns_and_the_warm_up_is_not_counted():
    order = []
    work = {name: lambda name=name: order.append(name) or float(len(order)) for name in "ab"}
    times = bench.alternate(work, rounds=20, warm_up=1)
    turns = ["".join(order[i : i + 2]) for i in range(0, len(order), 2)]
    assert len(turns) == 21 and set(turns) == {"ab", "ba"}
    assert sorted(times["a"] + times["b"]) == list(range(3, 43))
    assert times["a"] == [float(3 + i) for i, name in enumerate(order[2:]) if name == "a"]


def test_ratios_are_taken_round_by_round_against_the_fastest_rival():
    times = {"ours": [1.0, 10.0, 1.0], "rival, slow": [9.0, 90.0, 9.0], "rival, fast": [2.0, 30.0, 4.0]}
    assert bench.best_ratio(times, "ours", "rival") == 3.0


def test_a_table_keeps_whole_numbers_where_cells_are_missing():
    said = bench.table([{"what": "one", "every": 50}, {"what": "all"}])
    assert [cell.strip() for line in said.splitlines()[2:] for cell in line.split("|")[1:-1]] == [
        "one",
        "50",
        "all",
        "",
    ]


def test_targets_say_whether_they_are_met():
    report = bench.Report()
    report.target("fast", 2.5, 2, 4, " ×")
    report.target("slow", 1.99, 2, 4, " ×")
    report.target("small", 0.4, 0.5, 0.1, " %", smaller_is_better=True)
    assert [row["met"] for row in report.targets] == ["yes", "no", "yes"]
    (slow,) = [line for line in report.markdown("here").splitlines() if "slow" in line]
    assert [cell.strip() for cell in slow.strip("|").split("|")] == ["slow", "1.99 ×", "≥ 2 ×", "≥ 4 ×", "no"]


@pytest.mark.parametrize("condition", [1e2, 1e4, None])
def test_the_matrices_have_the_spectrum_and_the_sign_they_are_said_to_have(condition):
    W, exact = bench.matrices(2, 12, 20, condition)
    s = torch.linalg.svdvals(W.double())
    if condition:
        torch.testing.assert_close(s[:, 0] / s[:, -1], torch.full((2,), condition).double(), rtol=1e-2, atol=0)
    U, s, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    torch.testing.assert_close((U * (s > 1e-6).unsqueeze(1)) @ Vh, exact, rtol=0, atol=1e-3)
    assert torch.linalg.matrix_rank(exact).tolist() == [12 if condition else 6] * 2


def test_the_arithmetic_of_the_contenders_is_put_back():
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    with bench.defaults():
        assert torch.backends.mkldnn.matmul.fp32_precision == "none"
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"


def test_every_instrument_is_held_against_a_step():
    """On two small models: the real ones take a minute."""
    of = bench.Bench(quick=True, nanogpt=None, threads=1)
    of.nano, of.stress = small(name="nano_5m_adamw"), small(name="stress_ramp")
    said = of.report.markdown(of.run(["instruments"]))
    assert [row["what"] for row in of.report.targets] == [
        f"all instruments, {cfg.name}" for cfg in (of.stress, of.nano)
    ]
    assert said.count("Jacobians (2 blocks, 2 × 8)") == 2 and "quick" in said


def test_remedies_are_raced_with_their_own_optimizers(monkeypatch):
    found = {}
    monkeypatch.setattr(bench.Bench, "race", lambda self, section, contenders, rounds: found.update(contenders))
    small = bench.Bench(quick=True, nanogpt=None, threads=1)
    small.stress = replace(small.stress, n_layer=2, compile="off")
    small.measure_remedies()
    kinds = {name: type(step.optimizer).__name__ for name, step in found.items()}
    assert kinds.pop("AdamW") == kinds.pop("QK-norm") == "AdamW" and found["QK-norm"].cfg.qk_norm
    assert kinds.pop("limit on the step") == "LogitTrust" and found["limit on the step"].optimizer.limit == 1
    assert kinds.pop("Muon") == kinds.pop("spectral sphere") == "Together" and len(kinds) == 2


def test_bench_writes_its_tables(tmp_path):
    done = here("scripts/bench.py", "--quick", "--only", "experts", f"--out={tmp_path}/bench")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "bench.json").read_text())
    assert [row["what"] for row in record["targets"]] == ["experts against a dense MLP, speed"]
    assert (tmp_path / "bench.md").read_text().strip() in done.stdout


def test_a_wrong_checkout_is_refused(tmp_path):
    refused("scripts/bench.py", f"--nanogpt={tmp_path}", says="must be a checkout of karpathy/nanoGPT")
