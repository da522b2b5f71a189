import json

import matplotlib.pyplot as plt
import numpy as np
import pytest

from config import UserError
from figures import load_run, overview, pack_run, peaks, smooth, table, verdicts


def made_up(folder, losses, grad=1.0, spikes=(), seed=0, **config):
    """A run folder with these losses, and gradient norms of `grad` but for 50 · grad at `spikes`."""
    folder.mkdir(parents=True)
    settings = {
        "msign_period": 0,
        "msign_map": "sign",
        "msign_targets": "attention",
        "wandb_group": "e",
        "lr": 1.0,
        "seed": seed,
        "d_model": 48,
    }
    (folder / "record.json").write_text(json.dumps({"config": settings | config}))
    with open(folder / "metrics.jsonl", "w") as f:
        for i, loss in enumerate(losses, 1):
            line = {"iter": i, "train/loss": loss, "grad_norm": 50 * grad if i in spikes else grad, "lr": i / 100}
            if i % 25 == 0:
                line["srank/attention"] = 5.0
            f.write(json.dumps(line) + "\n")
    return folder


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
    said = [str(v) for v in verdicts(arms)]
    assert said[0].startswith("AdamW: collapsed at step 525 (5.2x): mean loss rose from 2.50")
    assert said[1] == "MSign (attention): no collapse, final loss 2.10, 0.30 below attention-off: attention lives"
    assert said[2].startswith("MSign (mlp): collapsed at step 700 (7.0x): 2 gradient norms beyond 10x")
    assert said[3] == "attention off: no collapse, final loss 2.40"


def test_surviving_without_attention_is_no_rescue(arms, tmp_path):
    harmless = load_run(made_up(tmp_path / "harmless", [2.35] * 1000, msign_period=100))
    (verdict,) = verdicts([harmless, arms[3]])[:1]
    assert verdict.collapse is None
    assert not verdict.rescued
    assert "attention is of no use" in str(verdict)
    (alone,) = verdicts([harmless])
    assert not alone.rescued


def test_the_floor_is_the_same_experiments_and_seeds(arms, tmp_path):
    other = load_run(made_up(tmp_path / "other", [2.6] * 1000, spikes=(700,), seed=1))
    assert verdicts([*arms, other])[-1].collapse is None


def test_table(arms, tmp_path):
    second = load_run(made_up(tmp_path / "adamw1", [2.5] * 600 + [2.7] * 400, seed=1))
    rows = table([*arms, second]).splitlines()
    assert len(rows) == 2 + 4
    assert rows[2].startswith("| AdamW | 2 | 2 of 2 | 588 [525, 650] | 5.9 [5.2, 6.5] | 2.80 [2.70, 2.90] |")
    assert rows[3].startswith("| MSign (attention) | 1 | 0 of 1 | – | – | 2.10 | 0.30 | 1.0 |")


def test_values_that_are_not_finite_are_shown_as_such(tmp_path):
    run = load_run(made_up(tmp_path / "bad", [2.5] * 300 + [None], grad=2.0))
    (verdict,) = verdicts([run])
    assert str(verdict) == "AdamW: collapsed at step 301 (3.0x): the loss is not finite"
    assert "inf" in table([run])


def test_figure_is_drawn_and_repeatable(arms, tmp_path):
    first = [p.read_bytes() for p in overview(arms, tmp_path / "figure")]
    assert [p.read_bytes() for p in overview(arms, tmp_path / "figure")] == first
    assert first[0].startswith(b"\x89PNG")
    assert first[1].count(b"<path") > 20
    empty = plt.figure()
    empty.savefig(tmp_path / "empty.svg")
    assert len(first[1]) > 5 * (tmp_path / "empty.svg").stat().st_size


def test_packed_runs_read_the_same(arms, tmp_path):
    pack_run(arms[0].folder, tmp_path / "packed")
    again = load_run(tmp_path / "packed")
    assert (again.lines, again.config) == (arms[0].lines, arms[0].config)


def test_what_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no record\.json"):
        load_run(tmp_path)
    (made_up(tmp_path / "r", [1.0]) / "metrics.jsonl").write_text('{"iter": 1}\n{"it')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: not JSON"):
        load_run(tmp_path / "r")


def test_peaks_keep_every_spike():
    steps, largest = peaks(np.arange(1, 26), [1.0] * 7 + [90.0] + [2.0] * 16 + [None])
    assert steps.tolist() == [1, 11, 21]
    assert largest.tolist() == [90.0, 2.0, 2.0]


def test_smooth():
    assert np.isnan(smooth([1.0] * 3, 4)).all()
    assert smooth([1.0, 2.0, 3.0, None], 2)[1:3].tolist() == [1.5, 2.5]
