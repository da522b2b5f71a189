import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from analysis import report, statistics
from analysis.runs import Run, frames, load_run, load_runs
from analysis.statistics import judged, said
from config import UserError
from engine.records import record_grid
from tests.conftest import ROOT
from tests.test_runs import made_up


def stamp(folder):
    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps(record | {"code": {"git": "abc", "dirty": False}}))


def grid(tmp_path, arms, seeds=range(5), steps=1000):
    """A packed grid: arm -> (final loss, configuration), each seed at its own level, with a little noise of its own."""
    runs = {}
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
            runs[folder] = {"arm": arm, "seed": seed}
    target = tmp_path / "grid"
    assert record_grid(target, runs) == len(runs)
    return target, runs


ARMS = {
    "AdamW": (2.5, {}),
    "MSign": (2.2, {"msign_period": 100}),
    "same": (2.5, {"msign_period": 100, "msign_targets": "mlp"}),
    "attention off": (2.4, {"msign_period": 100, "msign_map": "zero"}),
}


def test_a_packed_grid_is_small_and_says_the_same(tmp_path):
    target, recorded = grid(tmp_path, ARMS)
    runs, packed = [replace(load_run(folder), axes=axes) for folder, axes in recorded.items()], load_runs(target)
    size = sum(path.stat().st_size for path in target.glob("steps-*.parquet"))
    assert size < 0.5 * sum((run.folder / "metrics.jsonl").stat().st_size for run in runs)
    for run, again in zip(runs, packed, strict=True):
        assert (again.axes, again.config, again.code["git"]) == (run.axes, run.config, "abc")
        assert {key: type(value) for key, value in again.config.items()} == {k: type(v) for k, v in run.config.items()}
        for key in ("train/loss", "grad_norm", "srank/attention"):
            pd.testing.assert_series_equal(again.series(key), run.series(key), rtol=1e-3)
        assert again.summary == pytest.approx(run.summary, rel=1e-3) and again.summary["peak_memory_gib"] == 0.5
    assert judged(packed).collapse.map(str).tolist() == judged(runs).collapse.map(str).tolist()
    record_grid(tmp_path / "again", recorded)
    record_grid(tmp_path / "again", dict(reversed(recorded.items())))  # in the place of those of the same names
    for path in target.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_a_long_grid_is_several_files(tmp_path, monkeypatch):
    """Whole runs in one file, as many as fit; a later grid that is shorter leaves none of an earlier one's files."""
    monkeypatch.setattr("engine.records.ROWS", 25)
    folders = [made_up(tmp_path / f"r{n}-{i}", [2.0 + i] * n) for i, n in enumerate((10, 10, 40, 10))]
    record_grid(tmp_path / "grid", {folder: {} for folder in folders})
    rows = {path.name: len(pd.read_parquet(path)) for path in (tmp_path / "grid").glob("steps-*")}
    assert rows == {"steps-0.parquet": 20, "steps-1.parquet": 40, "steps-2.parquet": 10}
    again = load_runs(tmp_path / "grid")
    pd.testing.assert_frame_equal(*(judged(of)[["name", "loss", "steps"]] for of in (again, map(load_run, folders))))
    monkeypatch.setattr("engine.records.ROWS", 100)
    record_grid(tmp_path / "grid", {})
    assert [path.name for path in (tmp_path / "grid").glob("steps-*")] == ["steps-0.parquet"]
    assert len(load_runs(tmp_path / "grid")) == 4


def test_recorded_grids_are_small():
    files = list(ROOT.glob("results/*/*.parquet"))
    assert files and all(path.stat().st_size < 1e6 for path in files)


def test_values_that_are_not_finite_stay_so(tmp_path):
    folder = made_up(tmp_path / "x", [2.0, None, 2.0])
    (folder / "summary.json").write_text('{"tokens_per_second": 1.0, "peak_memory_gib": 0.5}')
    stamp(folder)
    record_grid(tmp_path / "grid", {folder: {}})
    (run,) = load_runs(tmp_path / "grid")
    assert run.steps["train/loss"].tolist() == [2.0, math.inf, 2.0] and run.series("train/loss").to_dict() == {
        1: 2.0,
        3: 2.0,
    }


def test_intervals_are_students():
    mean, half = map(float, said(pd.Series([1.0, 2.0, 3.0, 4.0, 5.0]), 9).split(" ± "))
    assert mean == 3.0
    assert half == pytest.approx(2.776445 * math.sqrt(2.5) / math.sqrt(5), rel=1e-6)  # t(0.975, 4) from a table
    assert said(pd.Series([1.0])) == "1.00" and said(pd.Series([math.nan])) == "–"


def test_holms_adjustment():
    def holm(**ps):
        return statistics.holm(pd.Series(ps)).to_dict()

    assert holm(a=0.01, b=0.04, c=0.03) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm(a=0.5, b=math.nan) == pytest.approx({"a": 1.0, "b": 1.0})


def test_fishers_exact_test_counts_collapses_against_adamws():
    fell = {"AdamW": [True] * 5, "none": [False] * 5, "all": [True] * 3}
    runs = [(arm, seed, 1.0, 1.0, 1.0, of) for arm, all_of in fell.items() for seed, of in enumerate(all_of)]
    columns = ["arm", "seed", "loss", "lr_multiple", "max_grad_norm", "collapsed"]
    table = report.arms_table(pd.DataFrame(runs, columns=columns))
    assert table.collapsed.tolist() == ["5 of 5", "0 of 5 (p 0.008)", "3 of 3 (p 1.00)"]  # 2 / 252 is 0.008


def test_pairs_are_taken_by_seed():
    a, b = {0: 1.0, 1: 2.1, 2: 3.0, 9: 0.0}, {2: 2.0, 0: 0.1, 1: 1.0, 8: 5.0}
    runs = [(arm, seed, loss) for arm, of in (("a", a), ("b", b)) for seed, loss in of.items()]
    differences = statistics.differences(pd.DataFrame(runs, columns=["arm", "seed", "loss"]), "b")
    assert differences.dropna().tolist() == pytest.approx([0.9, 1.1, 1.0])
    assert statistics.p_value(differences) == pytest.approx(0.00332, rel=1e-2)  # t = 17.3 at 2 degrees of freedom


def test_an_arm_that_is_better_is_told_from_one_that_is_not(tmp_path):
    target, _ = grid(tmp_path, ARMS)
    runs = judged(load_runs(target))
    rows = report.arms_table(runs).set_index("arm").T
    against, floor = "against AdamW", "against attention off"
    assert rows["MSign"]["p"] == "< 0.001" and rows["MSign"][against].startswith("-0.30")
    assert rows["MSign"][floor].startswith("-0.20")
    assert float(rows["same"]["p"]) > 0.1 and rows["same"][against].startswith(("-0.00", "0.00"))
    assert rows["AdamW"]["p"] == rows["AdamW"][against] == "–"
    assert rows["AdamW"]["n"] == "5"
    with pytest.raises(UserError, match="Muon: no such arm"):
        statistics.differences(runs, "Muon")


def test_r_of_eq_18_is_fitted(tmp_path):
    """The runs take 1 + 2 / P of the time that none takes."""
    periods = {f"P{p}": (2.2, {"msign_period": p}) for p in (1, 10, 100, 1_000_000)}
    target, _ = grid(tmp_path, periods, seeds=range(2), steps=300)
    runs = judged(load_runs(target))
    assert report.fitted_r(runs) == pytest.approx(2.0, rel=1e-3)
    first = report.period_table(runs).iloc[0]
    assert first[["P", "n", "collapsed", "at lr multiple", "time"]].tolist() == ["1", "2", "0 of 2", "–", "3.00 ± 0.00"]


def test_no_such_grid(tmp_path):
    with pytest.raises(UserError, match=r"none: no recorded runs; scripts/sweep\.py"):
        load_runs(tmp_path / "none")


def test_sensitivity_is_the_mean_loss_above_the_best(tmp_path):
    """By hand: initial loss 4; at rates 1, 2, 4 seed 0 ends at 2.0, 2.5, beyond 4, seed 1 at 2.2, 2.1, beyond 4."""
    runs = {}
    for seed, ends in enumerate(([2.0, 2.5, 9.0], [2.2, 2.1, 9.0])):
        for rate, end in zip((1.0, 2.0, 4.0), ends, strict=True):
            folder = made_up(tmp_path / f"{seed}-{rate}", [4.0, *[2.6] * 200, *[end] * 400], seed=seed, lr_scale=rate)
            (folder / "summary.json").write_text('{"tokens_per_second": 1.0, "peak_memory_gib": 0.5}')
            stamp(folder)
            runs[folder] = {"arm": "AdamW"}
    record_grid(tmp_path / "grid", runs)
    (cells,) = report.margin_table(judged(load_runs(tmp_path / "grid"), same="lr_scale")).to_numpy().tolist()
    mean = ((0 + 0.5 + 2.0) / 3 + (0.1 + 0 + 1.9) / 3) / 2
    assert cells[:2] == ["AdamW", "3 × 2"] and cells[2].startswith(f"{mean:.3f} ±")
    assert cells[3].startswith("2.05 ±") and cells[4:] == ["1", "2"]


def a_run(grad_norms, **more):
    lines = [{"iter": i + 1, "train/loss": 2.0, "grad_norm": g, "lr": 1.0} for i, g in enumerate(grad_norms)]
    lines[-1] |= more
    config = {
        "name": "x",
        "seed": 0,
        "msign_period": 0,
        "optimizer": "adamw",
        "wandb_group": "e",
        "lr_scale": 1.0,
        "lr": 1.0,
    }
    return Run("x", config, *frames(lines))


def test_fluctuation_is_that_of_the_logarithm_within_windows():
    wave = np.exp(np.where(np.arange(4000) % 2, 0.3, -0.3))
    slow = np.repeat(10.0 ** np.arange(40), 100)  # between windows, which does not count
    assert statistics.fluctuation(a_run(list(wave * slow))) == pytest.approx(0.3 * math.sqrt(100 / 99), rel=1e-6)


def test_spikes_are_counted_against_the_thousand_before():
    norms = 1 + 0.1 * np.where(np.arange(3000) % 2, 1.0, -1.0)
    norms[[500, 1500, 2500]] = (
        50.0  # the first is before there are a thousand; the third is judged with the second in its past
    )
    assert statistics.spikes(a_run(list(norms))) == pytest.approx(2 / 2000 * 1000)
    assert statistics.spikes(a_run([*norms[:2999], None])) == pytest.approx(3 / 2000 * 1000)


def test_an_application_costs_what_the_loss_rises_by():
    losses = [2.0] * 400
    for s in (200, 300):  # at 100 it is too early to count; at 400 nothing comes after
        losses[s : s + 10] = [2.5] * 10
    run = a_run([1.0] * 400)
    assert math.isnan(statistics.application_cost(run))
    run.config["msign_period"] = 100
    run.steps["train/loss"] = losses
    assert statistics.application_cost(run) == pytest.approx(0.5)


def test_columns_of_ones_own(tmp_path):
    target, _ = grid(tmp_path, {"AdamW": (2.5, {}), "MSign": (2.2, {"msign_period": 100})}, seeds=range(2))
    runs = judged(load_runs(target))
    table = report.arms_table(report.timed(runs, runs["wandb_group"] == "e", runs["arm"] == "AdamW"))
    assert table.columns[-3:].tolist() == ["p", "time", "peak memory, GiB"]
    assert table.iloc[1, -2:].tolist() == ["1.02 ± 0.00", "0.50 ± 0.00"]


def test_texts_are_told_apart_and_ranks_correlated(tmp_path):
    """Within the small text the gap falls with the stable rank, within the large one it rises."""
    runs = {}
    for text, slope in (("small", -1.0), ("large", 1.0)):
        for seed in range(5):
            folder = made_up(tmp_path / f"{text}-{seed}", [2.0] * 300, seed=seed, dataset=text)
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            lines[-1] |= {"val/loss": 3.0 + slope * seed / 10, "srank/attention": 2.0 + seed}
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            (folder / "summary.json").write_text('{"tokens_per_second": 1.0, "peak_memory_gib": 0.5}')
            stamp(folder)
            runs[folder] = {"arm": "AdamW"}
    record_grid(tmp_path / "grid", runs)
    runs = judged(load_runs(tmp_path / "grid"))
    text = "small AdamW 5 2.00 ± 0.00 2.80 ± 0.20 0.80 ± 0.20 4.0 ± 2.0"
    assert " ".join(report.texts_table(runs).iloc[0]) == text
    small, large = report.ranks_table(runs).to_numpy().tolist()
    assert small == ["e", "small", "5", "-1.00", "< 0.001", "-1.00", "< 0.001"]
    assert large == ["e", "large", "5", "1.00", "< 0.001", "1.00", "< 0.001"]


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
            run.steps["train/loss"] = loss + seed / 10 + seed * every / 1e5
            run.steps["msign/matrices"] = np.where(run.steps.index % every == 0, replaced, np.nan)
            runs.append(run)
        return judged(runs).assign(arm=name)

    periods = pd.concat([arm("P = 10", 2.0, 8, 10), arm("P = 100", 2.5, 8, 100), arm("never", 3.0, 0, 100)])
    table = report.threshold_table(pd.concat([arm("below 4", 2.25, 1, 10), arm("below 1", 3.0, 0, 10)]), periods)
    four, one = (" | ".join(cells) for cells in table.to_numpy().tolist())
    assert four.startswith("below 4 | 3 | 100 ± 0 | 0 of 3 | 2.35 ± 0.25 | P = 100: 80 | 0 of 3 | -0.25 ± 0.00 |")
    assert one.startswith("below 1 | 3 | 0 ± 0 | 0 of 3 | 3.10 ± 0.25 | never: 0 | 0 of 3 |")


def test_the_floor_may_come_from_another_grid(tmp_path):
    """A run with a spike and a final loss above the floor has collapsed, by rule 3; without a floor nobody can tell."""
    target, _ = grid(tmp_path / "a", {"AdamW": (2.5, {})}, seeds=[0])
    off, _ = grid(tmp_path / "b", {"off": (2.4, {"msign_period": 100, "msign_map": "zero"})}, seeds=[0])
    (run,), off = load_runs(target), load_runs(off)
    off = [replace(other, axes={}) for other in off]
    run.steps.loc[501, "grad_norm"] = 50.0
    assert (judged([run]).collapsed[0], judged([run], off, "lr_scale").collapsed[0]) == (False, True)


def test_a_late_collapse_is_smooth_first():
    def run(rises_at, spike_at=None):
        run = a_run([1.0] * 3000)
        run.steps.loc[rises_at + 1 :, "train/loss"] = 3.0
        if spike_at:
            run.steps.loc[spike_at + 1, "grad_norm"] = 20.0
        return run

    found = judged([run(2000), run(2000, 1500), run(500), run(2000, 900), run(3000)])
    assert found.late.tolist() == [True, True, False, False, False]
    (row,) = report.late_table(found[:1].assign(arm="a")).to_numpy().tolist()
    assert (
        row[:4] == ["a", "0", "3000", "3.00"] and row[4].startswith("20") and row[5:] == ["1.0", "nothing moved", "yes"]
    )


def test_gap_is_validation_minus_training():
    assert judged([a_run([1.0] * 200, **{"val/loss": 2.25})]).gap[0] == pytest.approx(0.25)


def test_a_link_is_a_rank_correlation_after_the_first_quarter():
    run = a_run([1.0] * 1000)
    for step in range(50, 1001, 50):
        run.steps.loc[step, "jacobian/alignment"] = step if step > 250 else -step
        run.steps.loc[step, "jacobian/product"] = 1 / step
    (row,) = judged([run]).itertuples()
    assert statistics.chain(row)["alignment, product"] == pytest.approx(-1.0)
    assert math.isnan(statistics.chain(row, least=16)["alignment, product"])
