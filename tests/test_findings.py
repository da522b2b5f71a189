"""What results/REPORT.md says in words, held against the recorded grids."""

import pytest

from collapse import find_onsets
from evidence import fluctuation, gap, loss, paired, said, spikes
from scripts.report import finding
from tests.conftest import ROOT

REPORT = (ROOT / "results" / "REPORT.md").read_text()


@pytest.fixture(scope="module")
def layers():
    return {arm.name: arm for arm in finding("layers")}


def test_every_run_was_recorded_by_committed_code_and_every_arm_has_its_seeds(layers):
    for arm in layers.values():
        assert sorted(v.run.config["seed"] for v in arm.verdicts) == [0, 1, 2, 3, 4]
        assert all(v.run.code["dirty"] is False and v.run.config["max_steps"] == len(v.run.lines) for v in arm.verdicts)


def test_attention_must_be_restored_and_of_it_w_q_and_w_k(layers):
    fell = {name: len(arm.collapsed) for name, arm in layers.items()}
    assert fell == {
        "AdamW": 5, "MSign (attention)": 0, "MSign (mlp)": 5, "MSign (blocks)": 0, "MSign (W_O)": 4, "MSign (W_V,W_O)": 2,
        "MSign (W_Q,W_K)": 0, "attention off": 0,
    }  # fmt: skip
    of_all = layers["MSign (attention)"].by_seed(loss)
    for name, words, significant in (
        ("MSign (W_Q,W_K)", "0.014 ± 0.041", False), ("MSign (blocks)", "0.112 ± 0.046", True),
    ):  # fmt: skip
        differences, p = paired(layers[name].by_seed(loss), of_all)
        assert said(differences, 3) == words and words in REPORT
        assert (p < 0.01) == significant


def test_the_attention_logits_move_first_and_stay_where_w_q_and_w_k_are_restored(layers):
    def logits(*names):
        of = [
            dict(zip(*v.run.sparse("attention/max_logit"), strict=True))[1500]
            for n in names
            for v in layers[n].verdicts
        ]
        return round(min(of)), round(max(of))

    onsets = [find_onsets(v.run.lines, v.collapse.step) for v in layers["AdamW"].verdicts]
    assert [o.first for o in onsets] == [["attention logits"]] * 5
    assert logits("AdamW") == (904, 1351)
    assert logits("MSign (W_V,W_O)") == (589, 1116)
    assert logits("MSign (attention)", "MSign (W_Q,W_K)") == (296, 568)


def test_gradient_norms_are_calmer(layers):
    for name, measure, words in (
        ("AdamW", fluctuation, "0.44"), ("MSign (attention)", fluctuation, "0.17"), ("AdamW", spikes, "6.0"),
        ("MSign (attention)", spikes, "0.8"), ("MSign (attention)", gap, "0.11"),
    ):  # fmt: skip
        values = list(layers[name].by_seed(measure).values())
        assert said(values, len(words) - 2).split(" ")[0] == words
