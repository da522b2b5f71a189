import json

import numpy as np
import pytest

from analysis import statistics
from analysis.report import THEOREMS, onsets_table, overview_table, theory_table
from analysis.runs import frames, load_run, load_runs
from analysis.statistics import judged
from config import UserError, up_to_date
from engine.records import pack_run, record_grid
from stability import theory
from tests.conftest import ROOT
from tests.test_theory import a_model


def made_up(folder, losses, grad=1.0, spikes=(), seed=0, probes=None, **config):
    """A run folder with these losses, gradient norms of `grad` but for 50 · grad at `spikes`, and at the steps of
    `probes` ({step: {key: value}}) more keys."""
    folder.mkdir(parents=True)
    settings = {
        "name": folder.name,
        "msign_period": 0,
        "msign_map": "sign",
        "msign_targets": "attention",
        "wandb_group": "e",
        "lr": 1.0,
        "seed": seed,
        "d_model": 48,
        "n_layer": 4,
    }
    (folder / "record.json").write_text(json.dumps({"config": settings | config}))
    with open(folder / "metrics.jsonl", "w") as f:
        for i, loss in enumerate(losses, 1):
            line = {"iter": i, "train/loss": loss, "grad_norm": 50 * grad if i in spikes else grad, "lr": i / 100}
            if i % 25 == 0:
                line["srank/attention"] = 5.0
            f.write(json.dumps(line | (probes or {}).get(i, {})) + "\n")
    return folder


def logged_theory():
    """What train.py logs of the theorems, of a small model with three blocks."""
    return {f"theory/{name}": value for name, value in theory.all_theorems(*a_model()).items()}


@pytest.fixture
def arms(tmp_path):
    on = dict(msign_period=100)
    folders = [
        made_up(tmp_path / "adamw", [2.5] * 500 + [2.9] * 500),
        made_up(tmp_path / "msign", [2.1] * 1000, **on),
        made_up(tmp_path / "mlp", [2.6] * 1000, spikes=(700, 800), **on, msign_targets="mlp"),
        made_up(tmp_path / "off", [2.4] * 1000, **on, msign_map="zero"),
    ]
    return [load_run(folder) for folder in folders]


def test_verdicts(arms):
    said = judged(arms).verdict
    assert said[0].startswith("AdamW: collapsed at step 525 (5.2x): mean loss rose from 2.50")
    assert said[1] == "MSign (attention): no collapse, final loss 2.10, 0.30 below attention-off: attention lives"
    assert said[2].startswith("MSign (mlp): collapsed at step 700 (7.0x): 2 gradient norms beyond 10x")
    assert said[3] == "attention off: no collapse, final loss 2.40"


def test_surviving_without_attention_is_no_rescue(arms, tmp_path):
    harmless = load_run(made_up(tmp_path / "harmless", [2.35] * 1000, msign_period=100))
    run = judged([harmless, arms[3]]).loc[0]
    assert not run.collapsed and not run.rescued
    assert "attention is of no use" in run.verdict
    assert not judged([harmless]).rescued[0]


def test_the_floor_is_the_same_experiments_and_seeds(arms, tmp_path):
    other = load_run(made_up(tmp_path / "other", [2.6] * 1000, spikes=(700,), seed=1))
    assert not judged([*arms, other]).collapsed[4]


def test_table(arms, tmp_path):
    second = load_run(made_up(tmp_path / "adamw1", [2.5] * 600 + [2.7] * 400, seed=1))
    rows = overview_table(judged([*arms, second])).to_numpy().tolist()
    assert len(rows) == 4
    assert rows[0][:6] == ["AdamW", "2", "2 of 2", "588 [525, 650]", "5.9 [5.2, 6.5]", "2.80 [2.70, 2.90]"]
    assert rows[1] == ["MSign (attention)", "1", "0 of 1", "–", "–", "2.10", "0.30", "1.0"]


def test_values_that_are_not_finite_are_shown_as_such(tmp_path):
    run = load_run(made_up(tmp_path / "bad", [2.5] * 300 + [None], grad=2.0))
    runs = judged([run])
    assert runs.verdict[0] == "AdamW: collapsed at step 301 (3.0x): the loss is not finite"
    assert overview_table(runs)["final loss"].tolist() == ["inf"]


def test_a_run_that_was_stopped_for_a_weight_has_collapsed_though_its_losses_are_finite(tmp_path):
    folder = made_up(tmp_path / "runs" / "stopped", [2.5] * 300)
    why = "blocks.0.attn.W_V.weight is not finite"
    (folder / "summary.json").write_text(json.dumps({"status": "stopped: not finite", "collapse": {"why": why}}))
    said = "AdamW: collapsed at step 300 (3.0x): {}"
    assert judged([load_run(folder)]).verdict[0] == said.format(why)
    record_grid(tmp_path / "grid", {folder: {}})  # which keeps the status, and not the reason
    assert judged(load_runs(tmp_path / "grid")).verdict[0] == said.format("a weight or a moment is not finite")


def test_a_loss_clearly_below_the_floor_is_at_least_that_much_below(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "CLEARLY", 0.125)  # a number that float arithmetic represents
    off = load_run(made_up(tmp_path / "off", [2.625] * 300, msign_period=1, msign_map="zero"))
    at, above = (load_run(made_up(tmp_path / f"{loss}", [loss] * 300)) for loss in (2.5, 2.501))
    assert judged([at, above, off]).rescued.tolist() == [True, False, False]


def test_packed_runs_read_the_same(arms, tmp_path):
    pack_run(arms[0].folder, tmp_path / "packed")
    again = load_run(tmp_path / "packed")
    assert again.steps.equals(arms[0].steps) and again.config == arms[0].config


def test_what_is_recorded_does_not_say_where(tmp_path):
    pack_run(made_up(tmp_path / "run", [1.0] * 5, runs_dir=str(tmp_path)), tmp_path / "packed")
    assert str(tmp_path) not in (tmp_path / "packed" / "record.json").read_text()
    grids = sorted({path.parent for path in ROOT.glob("results/*/runs.parquet")})
    assert grids and {run.config["runs_dir"] for grid in grids for run in load_runs(grid)} == {"runs"}
    records = [path.read_text() for path in ROOT.glob("results/*/*/record.json")]
    assert records and all('"runs_dir": "/' not in text for text in records)


def test_what_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no record\.json"):
        load_run(tmp_path)
    (made_up(tmp_path / "r", [1.0]) / "metrics.jsonl").write_text('{"iter": 1}\n{"it')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: not JSON"):
        load_run(tmp_path / "r")


def test_a_line_without_what_every_step_logs_is_refused(tmp_path):
    folder = made_up(tmp_path / "r", [1.0])
    (folder / "metrics.jsonl").write_text('{"iter": 1, "train/loss": 2.0, "lr": 0.1}\n')
    with pytest.raises(UserError, match=r"not a run of train\.py \(a line without grad_norm\)"):
        load_run(folder)
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no step was recorded"):
        load_run(folder)


def lines(*steps, loss=2.0):
    return [{"iter": step, "train/loss": loss, "grad_norm": 1.0, "lr": 0.1} for step in steps]


def offline(folder, monkeypatch, parts):
    """Empty files <part>.wandb, in which read_part is made to find the lines of {part: lines}."""
    for part in parts:
        path = folder / f"{part}.wandb"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def read_part(path):
        return {"name": path.stem, "seed": 3}, parts[path.relative_to(folder).with_suffix("").as_posix()]

    monkeypatch.setattr("engine.runlog.read_part", read_part)


def test_an_offline_wandb_run_is_a_run(tmp_path, monkeypatch):
    offline(tmp_path / "w", monkeypatch, {"a/x": lines(1, 2)})
    for path in (tmp_path / "w", tmp_path / "w/a", tmp_path / "w/a/x.wandb"):
        run = load_run(path)
        assert run.steps.equals(frames(lines(1, 2))[0])
        assert run.config == up_to_date({"name": "x", "seed": 3})


def test_the_parts_of_a_resumed_wandb_run_are_one_run(tmp_path, monkeypatch):
    offline(tmp_path, monkeypatch, {"a/x": lines(1, 2, 3), "b/x": lines(3, 4, loss=7.0)})
    assert load_run(tmp_path).steps["train/loss"].to_dict() == {1: 2.0, 2: 2.0, 3: 7.0, 4: 7.0}
    with pytest.raises(UserError, match="a part of a run cannot be judged"):
        load_run(tmp_path / "b")


def test_a_folder_of_two_wandb_runs_is_refused(tmp_path, monkeypatch):
    offline(tmp_path, monkeypatch, {"a/x": lines(1), "b/y": lines(1)})
    with pytest.raises(UserError, match=r"not a run \(no record\.json, and x\.wandb, y\.wandb in it\)"):
        load_run(tmp_path)


def test_by_layer_gathers_the_roles_of_a_layer(tmp_path):
    probes = {
        2: {"fro/0.W_Q": 3.0, "fro/0.W_up": 4.0, "fro/2.W_Q": 1.0, "fro/W_Q": 9.0, "before_msign/fro/1.W_Q": 9.0},
        5: {"fro/0.W_Q": None, "fro/0.W_up": 2.0, "fro/1.W_Q": 6.0, "fro/10.W_up": 8.0, "sfro/3.W_Q": 9.0},
    }
    run = load_run(made_up(tmp_path / "r", [2.0] * 6, probes=probes))
    values = run.by_layer("fro", lambda roles: (roles**2).sum(min_count=1) ** 0.5)
    assert values.columns.tolist() == [2, 5]
    assert values.shape == (11, 2)
    np.testing.assert_equal(values.loc[[0, 1, 2, 10]].to_numpy(), [[5, np.nan], [np.nan, 6], [1, np.nan], [np.nan, 8]])
    np.testing.assert_equal(run.by_layer("fro", roles="W_Q").to_numpy(), [[3, np.nan], [np.nan, 6], [1, np.nan]])
    assert run.by_layer("jacobian/sigma1").empty


def test_onsets_table(tmp_path):
    steps = range(100, 1001, 100)
    moving = {s: {"srank/attention": 8.0 if s < 500 else 3.0, "log_z": 5.0 + (s >= 400)} for s in steps}
    folder = made_up(tmp_path / "fallen", [2.5] * 900 + [3.5] * 300, probes=moving)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):
        line["grad_norm"] = 1.0 if i < 600 else 5.0
        if i + 1 not in moving:
            line.pop("srank/attention", None)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    fallen = load_run(folder)
    still = load_run(made_up(tmp_path / "still", [2.5] * 1000, probes={s: {"log_z": 5.0} for s in steps}))
    table = onsets_table(judged([fallen, still]))
    assert table.columns[:4].tolist() == ["run", "collapse", "stable rank", "Jacobian alignment"]
    no = "not logged"
    assert table.to_numpy().tolist() == [
        ["fallen", "910", "500 (+150)", no, no, "**400 (+250)**", no, no, "650"],
        ["still", "–", "–", no, no, "–", no, no, "–"],
    ]


def test_theory_table(tmp_path):
    first, last = logged_theory(), logged_theory()
    last |= {
        "theory/4.5/holds": 0.5,
        "theory/4.5/looseness": 9.0,
        "theory/4.9/log10_bound": first["theory/4.9/log10_bound"] - 1,
    }
    first |= {"jacobian/product": 1e4, "jacobian/bound_4_2": 1e-10}
    last |= {"jacobian/product": 1e4, "jacobian/bound_4_2": 1e6}
    run = load_run(made_up(tmp_path / "r", [2.0] * 120, probes={50: first, 100: last}))
    rows = {row[0]: row[2:] for row in theory_table(run).to_numpy().tolist()}
    assert rows.keys() == THEOREMS.keys()
    assert rows["4.2"] == ["50%", "6.0 [-2.0, 14.0]", "at 2 measurements of the Jacobians"]
    held, loose = first["theory/4.5/holds"], first["theory/4.5/looseness"]
    assert rows["4.5"][:2] == [f"{(held + 0.5) / 2:.0%}", f"{(loose + 9) / 2:.1f} [{loose:.1f}, 9.0]"]
    gap = first["theory/4.9/log10_measured"] - first["theory/4.9/log10_bound"]
    assert rows["4.9"][1] == f"{gap + 0.5:.1f} [{gap:.1f}, {gap + 1:.1f}]"
    assert f"falls in {first['theory/4.12/falls']:.0%} of matrices" in rows["4.12"][2]
    bare = theory_table(load_run(made_up(tmp_path / "bare", [2.0] * 120, probes={50: logged_theory()})))
    assert "4.2" not in bare["theorem"].tolist()
    with pytest.raises(UserError, match="theory_every"):
        theory_table(load_run(made_up(tmp_path / "none", [2.0] * 120)))
