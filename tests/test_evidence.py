import gzip
import json
import math

import numpy as np
import pytest

from analysis import evidence
from analysis.runs import Run, load_run, verdicts
from config import UserError
from tests.test_runs import made_up


def stamp(folder):
    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps(record | {"code": {"git": "abc", "dirty": False}}))


def grid(tmp_path, arms, seeds=range(5), steps=1000):
    """A packed grid: arm -> (final loss, configuration), each seed at its own level, with a little noise of its own."""
    runs = []
    for arm, (level, config) in arms.items():
        for seed in seeds:
            rng = np.random.default_rng([seed, int(1000 * level)])
            losses = (level + 0.05 * seed + 0.001 * rng.standard_normal() + np.linspace(1, 0, steps)).tolist()
            folder = made_up(tmp_path / f"{arm}-{seed}", losses, grad=1.23456, seed=seed, **config)
            summary = {
                "tokens_per_second": 1000.0 / (1 + 2 / config.get("msign_period", 0))
                if config.get("msign_period")
                else 1000.0
            }
            (folder / "summary.json").write_text(json.dumps(summary | {"peak_memory_gib": 0.5}))
            stamp(folder)
            runs.append(({"arm": arm, "seed": seed}, load_run(folder)))
    target = tmp_path / "grid.jsonl.gz"
    evidence.pack(runs, target)
    return target, runs


ARMS = {"AdamW": (2.5, {}), "MSign": (2.2, {"msign_period": 100}), "same": (2.5, {"msign_period": 100, "msign_targets": "mlp"}),
        "attention off": (2.4, {"msign_period": 100, "msign_map": "zero"})}  # fmt: skip


def test_a_packed_grid_is_small_and_says_the_same(tmp_path):
    target, runs = grid(tmp_path, ARMS)
    packed = evidence.unpack(target)
    assert target.stat().st_size < 0.5 * sum((r.folder / "metrics.jsonl").stat().st_size for _, r in runs)
    for (axes, run), again in zip(runs, packed, strict=True):
        assert (again.axes, again.config, again.code["git"]) == (axes, run.config, "abc")
        assert again.series("train/loss") == pytest.approx(run.series("train/loss"), rel=1e-3)
        assert again.series("grad_norm") == pytest.approx(run.series("grad_norm"), rel=1e-3)
        assert again.sparse("srank/attention") == run.sparse("srank/attention")
        assert (again.tokens_per_second, again.peak_memory_gib) == (pytest.approx(
            json.loads((run.folder / "summary.json").read_text())["tokens_per_second"], rel=1e-3), 0.5)  # fmt: skip
    assert [str(v.collapse) for v in verdicts(packed)] == [str(v.collapse) for v in verdicts([r for _, r in runs])]
    evidence.pack(runs, tmp_path / "again.gz")
    assert (tmp_path / "again.gz").read_bytes() == target.read_bytes()


def test_values_that_are_not_finite_stay_so(tmp_path):
    folder = made_up(tmp_path / "x", [2.0, None, 2.0])
    (folder / "summary.json").write_text('{"tokens_per_second": 1.0, "peak_memory_gib": 0.5}')
    stamp(folder)
    evidence.pack([({}, load_run(folder))], tmp_path / "grid.gz")
    (run,) = evidence.unpack(tmp_path / "grid.gz")
    assert run.series("train/loss") == [2.0, None, 2.0]
    assert json.loads(gzip.decompress((tmp_path / "grid.gz").read_bytes()))["every"]["train/loss"][1] is None


def test_intervals_are_students():
    mean, half = evidence.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0
    assert half == pytest.approx(2.776445 * math.sqrt(2.5) / math.sqrt(5), rel=1e-6)  # t(0.975, 4) from a table
    assert math.isnan(evidence.interval([1.0])[1])
    assert evidence.said([1.0]) == "1.00" and evidence.said([]) == "–"


def test_holms_adjustment():
    assert evidence.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert evidence.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])


def test_fishers_exact_test():
    assert evidence.fisher(0, 5, 5, 5) == pytest.approx(2 / 252)
    assert evidence.fisher(3, 3, 5, 5) == 1.0


def test_pairs_are_taken_by_seed():
    differences, p = evidence.paired({0: 1.0, 1: 2.1, 2: 3.0, 9: 0.0}, {2: 2.0, 0: 0.1, 1: 1.0, 8: 5.0})
    assert differences == pytest.approx([0.9, 1.1, 1.0])
    assert p == pytest.approx(0.00332, rel=1e-2)  # t = 17.3 at 2 degrees of freedom


def test_an_arm_that_is_better_is_told_from_one_that_is_not(tmp_path):
    target, _ = grid(tmp_path, ARMS)
    table = evidence.arms_table(evidence.arms(evidence.unpack(target)))
    rows = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in table.splitlines()}
    head = rows["arm"]
    p, against, floor = head.index("p"), head.index("against AdamW"), head.index("against attention off")
    assert rows["MSign"][p] == "< 0.001" and rows["MSign"][against].startswith("-0.30")
    assert rows["MSign"][floor].startswith("-0.20")
    assert float(rows["same"][p]) > 0.1 and rows["same"][against].startswith(("-0.00", "0.00"))
    assert rows["AdamW"][p] == rows["AdamW"][against] == "–"
    assert rows["AdamW"][head.index("n")] == "5"
    with pytest.raises(UserError, match="Muon: no such arm"):
        evidence.arms_table(evidence.arms(evidence.unpack(target)), "Muon")


def test_r_of_eq_18_is_fitted(tmp_path):
    """The runs take 1 + 2 / P of the time that none takes."""
    arms = {f"P{p}": (2.2, {"msign_period": p}) for p in (1, 10, 100, 1_000_000)}
    target, _ = grid(tmp_path, arms, seeds=range(2), steps=300)
    text = evidence.period_table(evidence.unpack(target))
    assert "r = 2.00 steps an application" in text
    assert "| 1 | 2 | 0 of 2 | – | " in text and "| 3.00 ± 0.00 |" in text


def test_no_such_grid(tmp_path):
    with pytest.raises(UserError, match="no such grid"):
        evidence.unpack(tmp_path / "none.jsonl.gz")


def test_sensitivity_is_the_mean_loss_above_the_best(tmp_path):
    """By hand: initial loss 4; at rates 1, 2, 4 seed 0 ends at 2.0, 2.5 and beyond 4, seed 1 at 2.2, 2.1 and beyond 4."""
    runs = []
    for seed, ends in enumerate(([2.0, 2.5, 9.0], [2.2, 2.1, 9.0])):
        for rate, end in zip((1.0, 2.0, 4.0), ends, strict=True):
            folder = made_up(tmp_path / f"{seed}-{rate}", [4.0, *[2.6] * 200, *[end] * 400], seed=seed, lr_scale=rate)
            (folder / "summary.json").write_text('{"tokens_per_second": 1.0, "peak_memory_gib": 0.5}')
            stamp(folder)
            runs.append(({"arm": "AdamW"}, load_run(folder)))
    evidence.pack(runs, tmp_path / "grid.gz")
    row = evidence.margin_table(evidence.arms(evidence.unpack(tmp_path / "grid.gz"))).splitlines()[2]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    mean = ((0 + 0.5 + 2.0) / 3 + (0.1 + 0 + 1.9) / 3) / 2
    assert cells[:2] == ["AdamW", "3 × 2"] and cells[2].startswith(f"{mean:.3f} ±")
    assert cells[3].startswith("2.05 ±") and cells[4:] == ["1", "2"]


def a_run(grad_norms, **more):
    lines = [{"iter": i + 1, "train/loss": 2.0, "grad_norm": g, "lr": 1.0} for i, g in enumerate(grad_norms)]
    lines[-1] |= more
    return Run("x", {"name": "x", "seed": 0}, lines)


def test_fluctuation_is_that_of_the_logarithm_within_windows():
    wave = np.exp(np.where(np.arange(4000) % 2, 0.3, -0.3))
    slow = np.repeat(10.0 ** np.arange(40), 100)  # between windows, which does not count
    assert evidence.fluctuation(a_run(list(wave * slow))) == pytest.approx(0.3 * math.sqrt(100 / 99), rel=1e-6)


def test_spikes_are_counted_against_the_thousand_before():
    norms = 1 + 0.1 * np.where(np.arange(3000) % 2, 1.0, -1.0)
    norms[[500, 1500, 2500]] = (
        50.0  # the first is before there are a thousand; the third is judged with the second in its past
    )
    assert evidence.spikes(a_run(list(norms))) == pytest.approx(2 / 2000 * 1000)
    assert evidence.spikes(a_run([*norms[:2999], None])) == pytest.approx(3 / 2000 * 1000)


def test_an_application_costs_what_the_loss_rises_by():
    losses = [2.0] * 400
    for s in (200, 300):  # at 100 it is too early to count; at 400 nothing comes after
        losses[s : s + 10] = [2.5] * 10
    run = a_run([1.0] * 400)
    run.config["msign_period"] = 0
    assert math.isnan(evidence.application_cost(run))
    run.config["msign_period"] = 100
    for line, value in zip(run.lines, losses, strict=True):
        line["train/loss"] = value
    assert evidence.application_cost(run) == pytest.approx(0.5)


def test_columns_of_ones_own(tmp_path):
    target, _ = grid(tmp_path, {"AdamW": (2.5, {}), "MSign": (2.2, {"msign_period": 100})}, seeds=range(2))
    found = evidence.arms(evidence.unpack(target))
    rows = evidence.arms_table(found, more=evidence.costs(evidence.unpack(target))).splitlines()
    assert rows[0].endswith("| p | time | peak memory, GiB |")
    assert rows[3].endswith("| 1.02 ± 0.00 | 0.50 ± 0.00 |")


def test_texts_are_told_apart_and_ranks_correlated(tmp_path):
    """Within the small text the gap falls with the stable rank, within the large one it rises."""
    runs = []
    for text, slope in (("small", -1.0), ("large", 1.0)):
        for seed in range(5):
            folder = made_up(tmp_path / f"{text}-{seed}", [2.0] * 300, seed=seed, dataset=text)
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            lines[-1] |= {"val/loss": 3.0 + slope * seed / 10, "srank/attention": 2.0 + seed}
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            (folder / "summary.json").write_text('{"tokens_per_second": 1.0, "peak_memory_gib": 0.5}')
            stamp(folder)
            runs.append(({"arm": "AdamW"}, load_run(folder)))
    evidence.pack(runs, tmp_path / "grid.gz")
    table = evidence.texts_table(evidence.unpack(tmp_path / "grid.gz"))
    assert "| small | AdamW | 5 | 2.00 ± 0.00 | 2.80 ± 0.20 | 0.80 ± 0.20 | 4.0 ± 2.0 |" in table
    table = evidence.ranks_table({"grid": evidence.unpack(tmp_path / "grid.gz")})
    assert "| grid | small | 5 | -1.00 | < 0.001 | -1.00 | < 0.001 |" in table
    assert "| grid | large | 5 | 1.00 | < 0.001 | 1.00 | < 0.001 |" in table


def test_thresholds_are_held_against_the_period_that_replaces_as_many():
    def arm(name, loss, replaced, every):
        runs = []
        for seed in range(3):
            run = a_run([1.0] * 1000)
            run.config.update(
                seed=seed,
                wandb_group="e",
                msign_period=every,
                optimizer="adamw",
                msign_map="sign",
                msign_targets="attention",
            )
            for line in run.lines:
                line["train/loss"] = loss + seed / 10 + seed * every / 1e5
                if line["iter"] % every == 0:
                    line["msign/matrices"] = replaced
            runs.append(run)
        return evidence.Arm(name, verdicts(runs))

    periods = [arm("P = 10", 2.0, 8, 10), arm("P = 100", 2.5, 8, 100), arm("never", 3.0, 0, 100)]
    table = evidence.threshold_table([arm("below 4", 2.25, 1, 10), arm("below 1", 3.0, 0, 10)], periods)
    assert "| below 4 | 3 | 100 ± 0 | 0 of 3 | 2.35 ± 0.25 | P = 100: 80 | 0 of 3 | -0.25 ± 0.00 |" in table
    assert "| below 1 | 3 | 0 ± 0 | 0 of 3 | 3.10 ± 0.25 | never: 0 | 0 of 3 |" in table


def test_the_floor_may_come_from_another_grid(tmp_path):
    """A run with a spike and a final loss above the floor has collapsed, by rule 3; without a floor nobody can tell."""
    target, _ = grid(tmp_path / "a", {"AdamW": (2.5, {})}, seeds=[0])
    off, _ = grid(tmp_path / "b", {"off": (2.4, {"msign_period": 100, "msign_map": "zero"})}, seeds=[0])
    (run,), off = evidence.unpack(target), evidence.unpack(off)
    run.lines[500]["grad_norm"] = 50.0
    (alone,), (held,) = evidence.arms([run]), evidence.arms([run], off=off)
    assert (len(alone.collapsed), len(held.collapsed)) == (0, 1)


def test_a_late_collapse_is_smooth_first():
    def verdict(rises_at, spike_at=None):
        run = a_run([1.0] * 3000)
        for line in run.lines[rises_at:]:
            line["train/loss"] = 3.0
        if spike_at:
            run.lines[spike_at]["grad_norm"] = 20.0
        return verdicts(
            [Run("x", {"wandb_group": "e", "msign_period": 0, "optimizer": "adamw"} | run.config, run.lines)]
        )[0]

    assert evidence.late(verdict(2000)) and evidence.late(verdict(2000, 1500))
    assert (
        not evidence.late(verdict(500)) and not evidence.late(verdict(2000, 900)) and not evidence.late(verdict(3000))
    )
    row = evidence.late_table([evidence.Arm("a", [verdict(2000)])]).splitlines()[2]
    assert row.startswith("| a | 0 | 3000 | 3.00 | 20") and row.endswith("| 1.0 | nothing moved | yes |")


def test_gap_is_validation_minus_training():
    assert evidence.gap(a_run([1.0] * 200, **{"val/loss": 2.25})) == pytest.approx(0.25)


def test_a_link_is_a_rank_correlation_after_the_first_quarter():
    run = a_run([1.0] * 1000)
    for line in run.lines[49::50]:
        step = line["iter"]
        line |= {"jacobian/alignment": step if step > 250 else -step, "jacobian/product": 1 / step}
    verdict = evidence.Verdict(run, None, None)
    assert evidence.link(verdict, "jacobian/alignment", "jacobian/product") == pytest.approx(-1.0)
    assert math.isnan(evidence.link(verdict, "jacobian/alignment", "jacobian/product", least=16))
