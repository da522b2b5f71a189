"""What results/REPORT.md says in words, held against the recorded grids."""

import numpy as np
import pytest
from scipy.stats import gmean

from analysis.report import BY_NUMBER, GRIDS, by_number, finding, packed, recorded, regimes
from analysis.statistics import (
    LINKS,
    application_cost,
    arms,
    before_the_end,
    fluctuation,
    gap,
    late,
    loss,
    p_text,
    paired,
    said,
    spikes,
    srank,
)
from analysis.tables import fitted_r, ledger_table, margin_table, ranks_table, theory_table, threshold_table
from stability.collapse import CLEARLY
from tests.conftest import ROOT

# a sentence may go on in the next line
GRIDS_PAGE = " ".join((ROOT / "docs" / "grids.md").read_text().split())
REPORT = " ".join((ROOT / "results" / "REPORT.md").read_text().split())


@pytest.fixture(scope="module")
def layers():
    return {arm.name: arm for arm in finding("layers")}


def test_every_run_was_recorded_by_committed_code_and_every_arm_has_its_seeds(layers):
    for arm in layers.values():
        assert sorted(run.config["seed"] for run in arm.runs) == [0, 1, 2, 3, 4]
        assert all(run.code["dirty"] is False and run.config["max_steps"] == len(run.steps) for run in arm.runs)


def test_the_first_two_questions_take_less_than_three_hours_on_two_cores():
    """By the speeds of the recorded runs: Tables 2 and 3 in small, and their floor."""
    runs = [run for grid in ("table2_small", "attention_off", "table3_small") for run in packed(grid)]
    tokens = [len(run.steps) * run.config["batch_size"] * run.config["block_size"] for run in runs]
    seconds = sum(n / run.summary["tokens_per_second"] for n, run in zip(tokens, runs, strict=True))
    assert seconds / 2 < 3 * 3600 and len(runs) == 70


def test_attention_must_be_restored_and_of_it_w_q_and_w_k(layers):
    fell = {name: len(arm.collapsed) for name, arm in layers.items()}
    assert fell == {
        "AdamW": 5,
        "MSign (attention)": 0,
        "MSign (mlp)": 5,
        "MSign (blocks)": 0,
        "MSign (W_O)": 5,
        "MSign (W_V,W_O)": 3,
        "MSign (W_Q,W_K)": 0,
        "attention off": 0,
    }
    off = layers["attention off"].by_seed(loss)
    clearly = [name for name, arm in layers.items() if sum(paired(arm.by_seed(loss), off)[0]) / 5 < -CLEARLY]
    assert clearly == ["MSign (attention)", "MSign (W_Q,W_K)"]
    of_all = layers["MSign (attention)"].by_seed(loss)
    for name, words, text_p in (
        ("MSign (W_Q,W_K)", "0.014 ± 0.041", "0.39"),
        ("MSign (blocks)", "0.112 ± 0.046", "0.003"),
    ):
        differences, p = paired(layers[name].by_seed(loss), of_all)
        assert said(differences, 3) == words and words in REPORT
        assert p_text(p) == text_p and f"(p = {text_p})" in REPORT
    fell_at = {
        name: {run.config["seed"]: run.collapse.step for run in layers[name].runs} for name in ("AdamW", "MSign (mlp)")
    }
    assert all(step < fell_at["AdamW"][seed] for seed, step in fell_at["MSign (mlp)"].items())
    below_adamw, _ = paired(of_all, layers["AdamW"].by_seed(loss))
    assert said(below_adamw) == "-0.46 ± 0.05" and "0.46 ± 0.05 nats below AdamW's (n = 5)" in REPORT


def test_the_attention_logits_move_first_and_stay_where_w_q_and_w_k_are_restored(layers):
    def logits(*names):
        of = [run.series("attention/max_logit")[1500] for n in names for run in layers[n].runs]
        return round(min(of)), round(max(of))

    onsets = [run.onsets for run in layers["AdamW"].runs]
    assert [o.first for o in onsets] == [["attention logits"]] * 5
    assert logits("AdamW") == (904, 1351)
    assert logits("MSign (W_V,W_O)") == (589, 1116)
    assert logits("MSign (attention)", "MSign (W_Q,W_K)") == (296, 568)


@pytest.fixture(scope="module")
def controls():
    return {arm.name: arm for arm in finding("controls")}


def test_the_spectral_norm_is_what_must_be_bounded_and_not_the_stable_rank(controls):
    scaled, clipped = "W scaled to MSign's spectral norm", "singular values clipped there"
    for name, words, text_p in (
        (scaled, "0.098 ± 0.071", "0.027"),
        (clipped, "0.057 ± 0.096", "0.12"),
        ("QK-norm", "-0.131 ± 0.081", "0.020"),
        ("attention's lr ÷ 4", "-0.239 ± 0.085", "0.007"),
        ("attention's lr ÷ 16", "-0.321 ± 0.085", "0.004"),
        ("MSign, moments reset", "0.029 ± 0.095", "0.32"),
        ("square-rooted singular values", "0.061 ± 0.058", "0.045"),
    ):
        assert not controls[name].collapsed and len(controls[name].runs) == 3
        differences, p = paired(controls[name].by_seed(loss), controls["MSign (attention)"].by_seed(loss))
        assert said(differences, 3) == words and words.lstrip("-") in REPORT
        assert p_text(p) == text_p and f"p = {text_p})" in REPORT
    assert all(
        len(controls[name].collapsed) == 3
        for name in ("β₂ 0.95", "weight decay × 10", "decay independent of the rate", "bf16")
    )
    assert said([run.lr_multiple() for run in controls["β₂ 0.95"].runs], 1) == "5.0 ± 0.1"
    assert controls["attention in plain math"].by_seed(loss).items() <= controls["AdamW"].by_seed(loss).items()

    def ranks(name, step=2550):
        of = [run.series("srank/attention")[step] for run in controls[name].runs]
        return round(min(of), 1), round(max(of), 1)

    assert (ranks(scaled), ranks("AdamW"), ranks("QK-norm")) == ((1.7, 1.9), (2.3, 2.6), (4.3, 4.3))
    off = controls["attention off"].by_seed(loss)
    assert not controls["random sign"].collapsed
    assert all(d > 0 for d in paired(controls["random sign"].by_seed(loss), off)[0])


def test_protection_is_lost_between_a_hundred_and_a_thousand_steps(controls):
    found = {
        arm.name: arm
        for arm in arms(packed("table3_small"), lambda run: str(run.config["msign_period"]), packed("attention_off"))
    }
    fell = {name: (len(arm.collapsed), len(arm.runs)) for name, arm in found.items()}
    assert fell == dict.fromkeys(("1", "3", "10", "30", "60", "100", "180"), (0, 3)) | {
        "300": (2, 3),
        "1000": (3, 3),
        "10000": (3, 3),
    }
    ten = found["10"].by_seed(loss)
    for other, words in (
        (found["100"], "-0.121 ± 0.035"),
        (controls["QK-norm"], "0.009 ± 0.068"),
        (controls["attention's lr ÷ 4"], "0.118 ± 0.068"),
    ):
        assert said(paired(ten, other.by_seed(loss))[0], 3) == words and words.lstrip("-") in REPORT
    assert p_text(paired(ten, found["100"].by_seed(loss))[1]) == "0.004"
    assert f"{fitted_r(packed('table3_small')):.2f}" == "0.50"


def test_how_many_matrices_are_replaced_counts_and_not_which():
    fixed, below = ({arm.name: arm for arm in by_number(*grid)} for grid in BY_NUMBER.values())
    for name, other, words, text_p in (
        ("below 8", "P = 60", "-0.024 ± 0.006", "0.003"),
        ("below 16", "P = 30", "-0.021 ± 0.103", "0.48"),
        ("below 4", "P = 180", "0.087 ± 0.037", "0.010"),
    ):
        differences, p = paired(below[name].by_seed(loss), fixed[other].by_seed(loss))
        assert said(differences, 3) == words and words.lstrip("-") in REPORT
        assert p_text(p) == text_p and f"p = {text_p})" in REPORT
        table = threshold_table(below.values(), fixed.values()).set_index("arm")
        assert table["fixed P of nearly as many"][name].startswith(f"{other}: ")
    assert {name: len(arm.collapsed) for name, arm in below.items()} == {
        "below 2": 3,
        "below 4": 0,
        "below 8": 0,
        "below 16": 0,
    }


@pytest.fixture(scope="module")
def late_seeds():
    return {arm.name: arm for arm in arms(packed("late_seeds"))}


def test_one_arm_of_twenty_collapses_late_by_the_protocol():
    found = arms(packed("late_collapse"))
    assert [arm.name for arm in found if any(map(late, arm.runs))] == ["no decay, lr × 1.5"]
    assert len(found) == 20 and "Of twenty arms one counts" in REPORT


def test_without_decay_adamw_collapses_late_while_logits_grow_and_the_stable_rank_stays(late_seeds):
    adamw, msign = late_seeds["AdamW"], late_seeds["MSign (attention)"]
    assert (len(adamw.collapsed), len(msign.collapsed)) == (3, 0)
    assert all(run.collapse.step > 4000 for run in adamw.collapsed)
    assert [late(run) for run in adamw.runs].count(True) == 1
    differences, p = paired(msign.by_seed(loss), adamw.by_seed(loss))
    assert said(differences, 3) == "-0.472 ± 0.095" and p < 0.001 and "0.472 ± 0.095 below AdamW (p < 0.001)" in REPORT
    lowest = {
        run.config["seed"]: np.convolve(run.steps["train/loss"], np.full(100, 0.01), "valid").min()
        for run in adamw.runs
    }
    above, _ = paired(adamw.by_seed(loss), lowest)
    assert said(above, 3) == "0.096 ± 0.039" and "0.096 ± 0.039 above its own lowest" in REPORT

    def spread(arm, key, step, digits):
        values = [run.series(key)[step] for run in arm.runs]
        return f"{min(values):.{digits}f} to {max(values):.{digits}f}"

    for step, words in ((1000, "441 to 628"), (2000, "889 to 1100"), (4000, "1716 to 2027"), (6000, "2252 to 3394")):
        assert spread(adamw, "attention/max_logit", step, 0) == words and words in REPORT
    assert spread(msign, "attention/max_logit", 6000, 0) == "263 to 277" and "MSign runs is 263 to 277" in REPORT
    assert spread(adamw, "srank/attention", 1000, 1) == "3.1 to 3.4"
    assert all(
        spread(adamw, "srank/attention", step, 1) in ("3.3 to 3.8", "3.2 to 3.8", "3.2 to 3.7")
        for step in (2000, 3000, 4000, 5000, 6000)
    )
    norms = {arm: np.array([run.steps["grad_norm"] for run in late_seeds[arm].runs], float) for arm in late_seeds}
    grown = {arm: np.median(of[:, 5500:], 1) / np.median(of[:, 500:1000], 1) for arm, of in norms.items()}
    assert 5 < grown["AdamW"].min() < grown["AdamW"].max() < 8.5
    assert (round(grown["MSign (attention)"].min(), 1), round(grown["MSign (attention)"].max(), 1)) == (1.6, 2.0)
    largest = norms["AdamW"].max(1)
    assert f"between {largest.min():.0f} and {largest.max():.0f}" in REPORT
    third = norms["AdamW"].shape[1] // 3
    rough = (norms["AdamW"][:, 100:third] > 10 * np.median(norms["AdamW"], 1, keepdims=True)).sum(1)
    assert dict(zip([run.config["seed"] for run in adamw.runs], rough, strict=True)) == {
        1: 0,
        2: 0,
        3: 1,
        4: 1,
        5: 0,
    }
    means = [np.convolve(run.steps["train/loss"], np.full(100, 0.01), "valid") for run in adamw.runs]
    assert all(of[1901 - 1] - of[1901:].min() < 0.1 for of in means)  # the mean up to step 2000, and those after
    onsets = [run.onsets for run in adamw.runs]
    assert all(o.first == ["attention logits"] for o in onsets)
    assert sum(o.lead("attention logits") < 0 for o in onsets) == 4 and all(o.grad_norm for o in onsets)


def test_the_late_collapse_is_prevented_at_adamws_stable_ranks_and_spectral_norms_too(late_seeds):
    found = {arm.name: arm for arm in finding("late")}
    assert {name: (len(arm.collapsed), len(arm.runs)) for name, arm in found.items()} == {
        "AdamW": (5, 5),
        "MSign (attention)": (0, 5),
    } | dict.fromkeys(("attention off", "W scaled to MSign's spectral norm", "attention's lr ÷ 16", "QK-norm"), (0, 3))
    for name, words, text_p in (
        ("QK-norm", "-0.419 ± 0.036", "< 0.001"),
        ("attention's lr ÷ 16", "-0.390 ± 0.022", "< 0.001"),
        ("W scaled to MSign's spectral norm", "0.085 ± 0.027", "0.005"),
    ):
        differences, p = paired(found[name].by_seed(loss), found["MSign (attention)"].by_seed(loss))
        assert said(differences, 3) == words and words.lstrip("-") in REPORT and p_text(p) == text_p
    off = found["attention off"].by_seed(loss)
    rescued = [name for name, arm in found.items() if name not in ("AdamW", "attention off")]
    assert all(d <= -0.18 for name in rescued for d in paired(found[name].by_seed(loss), off)[0])

    def at_the_end(name, key, digits):
        values = [run.series(key).iloc[-1] for run in found[name].runs]
        low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
        return low if low == high else f"{low} to {high}"

    for name, key, digits, words in (
        ("QK-norm", "srank/attention", 1, "4.8 to 5.1"),
        ("QK-norm", "sigma1/attention", 1, "20.8 to 21.6"),
        ("QK-norm", "attention/max_logit", 0, "8 to 9"),
        ("AdamW", "srank/attention", 1, "3.2 to 3.7"),
        ("AdamW", "sigma1/attention", 1, "24.6 to 26.2"),
        ("MSign (attention)", "srank/attention", 0, "32"),
        ("MSign (attention)", "sigma1/attention", 0, "8"),
        ("W scaled to MSign's spectral norm", "srank/attention", 1, "1.9 to 2.1"),
    ):
        assert at_the_end(name, key, digits) == words and words in REPORT
    for name, words in (
        ("MSign (attention)", "1.90 ± 0.06 against"),
        ("AdamW", "against 2.37 ± 0.07"),
        ("QK-norm", "QK-norm (1.51 ± 0.05)"),
    ):
        assert said(list(found[name].by_seed(loss).values())) in words and words in GRIDS_PAGE


def test_the_ledger_says_what_the_report_says():
    """The words beside the table of the paper's chain: every number in them is in the table, and what moved first."""
    rows = ledger_table(regimes()).to_numpy().tolist()
    cell = {
        (row[0], row[1]): dict(zip(("stable rank", "J", "alignment", "product", *LINKS), row[4:], strict=True))
        for row in rows
    }
    adamw = [cell[regime, "AdamW"] for regime in ("ramp", "constant 2 ×", "no decay")]
    assert [of["stable rank"][:3] for of in adamw] == ["3.0", "2.5", "3.4"]
    for words in (
        *(of["alignment"] for of in adamw),
        adamw[0]["J"],
        cell["ramp", "MSign (attention)"]["J"],
        adamw[2]["J"],
        cell["no decay", "MSign (attention)"]["J"],
        cell["ramp", "attention off"]["J"],
        *(of[link] for of in adamw[:2] for link in ("stable rank, ‖J‖₂", "product, gradient norm")),
        adamw[0]["alignment, product"],
    ):
        assert words in REPORT.split("| link |")[1]
    by_regime = {regime: {arm.name: arm for arm in arms(runs)} for regime, runs in regimes().items()}

    def ratios(regime, key):
        """AdamW's median over MSign's, seed by seed."""
        both = (by_regime[regime][name].runs for name in ("AdamW", "MSign (attention)"))
        return [np.divide(*(before_the_end(run, key).median() for run in pair)) for pair in zip(*both, strict=True)]

    lower = [round(gmean(ratios(regime, "jacobian/product")), 1) for regime in by_regime]
    assert lower == [3.1, 2.9, 5.8] and "by a factor of three to six" in REPORT
    assert all(1 / 3 < 1 - 1 / ratio < 1 / 2 for ratio in ratios("ramp", "jacobian/sigma1"))
    onsets = {regime: [run.onsets for run in found["AdamW"].runs] for regime, found in by_regime.items()}
    firsts = [o.first for of in onsets.values() for o in of]
    assert firsts.count(["attention logits"]) == 10 and firsts.count(["first-block gain"]) == 1 and len(firsts) == 11
    assert not any(o.grad_norm for regime in ("ramp", "constant 2 ×") for o in onsets[regime])
    assert "91.6 [48.0, 123.2]" in theory_table(recorded("ramp")[0]).to_string()


def test_three_rivals_prevent_the_collapse_too(controls):
    rivals = {arm.name: arm for arm in finding("rivals")}
    fell = {name: len(arm.collapsed) for name, arm in rivals.items() if len(arm.runs) == 3}
    assert fell == {
        "AdamW": 3,
        "MSign (attention)": 0,
        "ZClip": 3,
        "Muon": 0,
        "Stable-SPAM": 3,
        "AdaGC": 0,
        "SPAM": 3,
        "spectral sphere": 0,
    }
    for name, other, words, text_p in (
        ("Muon", rivals["MSign (attention)"], "-0.240 ± 0.092", "0.008"),
        ("AdaGC", rivals["MSign (attention)"], "-0.092 ± 0.071", "0.031"),
        ("Muon", controls["attention's lr ÷ 4"], "-0.001 ± 0.018", "0.87"),
        ("spectral sphere", rivals["MSign (attention)"], "-0.323 ± 0.094", "0.005"),
        ("spectral sphere", controls["attention's lr ÷ 16"], "-0.001 ± 0.009", "0.57"),
    ):
        differences, p = paired(rivals[name].by_seed(loss), other.by_seed(loss))
        assert said(differences, 3) == words and words.lstrip("-") in REPORT and p_text(p) == text_p
    rate = {
        name: np.mean([run.summary["tokens_per_second"] for run in rivals[name].runs])
        for name in ("AdamW", "Muon", "spectral sphere")
    }
    assert 1.8 < rate["AdamW"] / rate["Muon"] < 2.2 and 7 < rate["AdamW"] / rate["spectral sphere"] < 8


def test_larger_rates_are_survivable_with_msign_and_not_better():
    found = {arm.name: arm for arm in arms(packed("margin"))}
    attention = "attention's lr ÷ 16"

    def at(name, rate):
        return {run.config["seed"]: loss(run) for run in found[name].runs if run.config["lr_scale"] == rate}

    def best(name):
        rates = {run.config["lr_scale"] for run in found[name].runs}
        return {seed: min(at(name, rate)[seed] for rate in rates) for seed in (0, 1, 2)}

    for a, b, words, text_p in (
        (at("MSign (attention)", 2), at("AdamW", 2), "-0.230 ± 0.106", "0.011"),
        (at("MSign (attention)", 4), at("AdamW", 4), "-0.327 ± 0.062", "0.002"),
        (at("MSign (attention)", 0.25), at("AdamW", 0.25), "0.063 ± 0.021", "0.006"),
        (best("MSign (attention)"), best("AdamW"), "0.014 ± 0.019", "0.085"),
        (best(attention), best("AdamW"), "-0.204 ± 0.031", "0.001"),
        (best("QK-norm"), best("AdamW"), "-0.029 ± 0.038", "0.084"),
    ):
        differences, p = paired(a, b)
        assert said(differences, 3) == words and words.lstrip("-") in REPORT
        assert p_text(p) == text_p and f"p = {text_p}" in REPORT
    assert said(list(at("MSign (attention)", 16).values())) == "2.94 ± 0.09"
    means = [np.mean(list(at(attention, rate).values())) for rate in (2, 1, 4)]
    assert max(means) - means[0] < 0.05 and means[0] == min(means)
    twice = [run for arm in arms(recorded("constant")) if arm.name == "AdamW" for run in arm.runs]
    assert not any(run.collapse for run in found["AdamW"].runs if run.config["lr_scale"] == 2)
    assert all("attention-off's" in run.collapse.why for run in twice) and len(twice) == 3
    rows = {row[0]: row for row in margin_table(found.values()).to_numpy().tolist()}
    assert {name: row[4:] for name, row in rows.items() if name in found} == {
        "AdamW": ["0.5", "2"],
        "MSign (attention)": ["0.5", "16"],
        "QK-norm": ["2", "16"],
        attention: ["2", "16"],
    }
    for name, words in (("AdamW", "0.404"), ("MSign (attention)", "0.254"), ("QK-norm", "0.082")):
        assert rows[name][2].startswith(words) and words in REPORT


def test_a_higher_stable_rank_generalises_no_better():
    runs = packed("texts")
    for text, name, words, text_p in (
        ("stdlib-bytes", "MSign (attention)", "0.003 ± 0.035", "0.72"),
        ("stdlib-small", "MSign (attention)", "0.083 ± 0.152", "0.14"),
        ("stdlib-small", "QK-norm", "0.376 ± 0.308", "0.034"),
    ):
        found = {arm.name: arm for arm in arms([run for run in runs if run.config["dataset"] == text])}
        differences, p = paired(found[name].by_seed(gap), found["AdamW"].by_seed(gap))
        assert said(differences, 3) == words and words in REPORT
        assert p_text(p) == text_p and f"p = {text_p})" in REPORT
        others = [
            rank for arm in found.values() for rank in arm.by_seed(srank).values() if arm.name != "MSign (attention)"
        ]
        assert all(rank > 2.8 * max(others) for rank in found["MSign (attention)"].by_seed(srank).values())
    series = [run.series("val/loss") for run in runs if run.config["dataset"] == "stdlib-small"]
    assert all(values.index[0] == values.idxmin() == 500 for values in series)
    assert (min(v[500] for v in series), max(v[500] for v in series)) == pytest.approx((2.68, 2.73), abs=0.005)


def test_the_page_on_grids_says_what_they_say(layers, controls):
    rivals = {arm.name: arm for arm in finding("rivals")}
    periods = {arm.name: arm for arm in arms(packed("table3_small"), lambda run: f"every {run.config['msign_period']}")}
    for arm, says in (
        (controls["attention's lr ÷ 4"], "(`--attn_lr=0.25`) ends at {}"),
        (controls["QK-norm"], "(`--qk_norm`) at {}"),
        (layers["MSign (attention)"], "MSign every 100 steps at {}"),
        (periods["every 3"], "every 3 steps at {}"),
        (rivals["Muon"], "Muon ({})"),
        (rivals["AdaGC"], "AdaGC ({})"),
        (rivals["spectral sphere"], "spectral sphere ({})"),
    ):
        assert says.format(said(list(arm.by_seed(loss).values()))) in GRIDS_PAGE
    n = sum(len(packed(name)) for name in GRIDS)
    assert f"from {n} runs" in GRIDS_PAGE and len(GRIDS) == 11


def test_gradient_norms_are_calmer(layers):
    for name, measure, words in (
        ("AdamW", fluctuation, "0.44"),
        ("MSign (attention)", fluctuation, "0.17"),
        ("AdamW", spikes, "6.0"),
        ("MSign (attention)", spikes, "0.8"),
        ("MSign (attention)", application_cost, "0.045"),
    ):
        values = list(layers[name].by_seed(measure).values())
        assert said(values, len(words) - 2).split(" ")[0] == words

    def after(run, first, last):
        """Mean loss of these steps after an application above that of the 20 before it, as application_cost."""
        losses = np.array(run.steps["train/loss"])
        steps = range(1100, len(losses) - last, run.config["msign_period"])
        return np.mean([losses[s + first : s + last].mean() - losses[s - 20 : s].mean() for s in steps])

    of_window = [
        np.mean([after(run, first, first + 10) for run in layers["MSign (attention)"].runs])
        for first in (0, 10, 20, 30)
    ]
    assert of_window[0] > of_window[1] > of_window[2] > 0.01 > abs(of_window[3])


def test_the_report_says_how_many_runs_there_are_and_in_how_many_grids_ranks_go_with_losses():
    grids = sum(len(packed(name)) for name in GRIDS)
    others = sum(len(recorded(name)) for name in ("ramp", "constant"))
    assert (
        f"({grids} runs)" in REPORT
        and f"The other {others} runs" in REPORT
        and f"rules {grids + others} times" in REPORT
    )
    rows = ranks_table({grid: packed(grid) for grid in GRIDS if grid != "attention_off"}).to_numpy().tolist()

    def significant(rho, p):
        return [float(row[rho]) for row in rows if float(row[p].lstrip("< ")) < 0.05]

    assert len(rows) == 11 and sum(float(row[5]) < 0 for row in rows) == 10 and len(significant(5, 6)) == 9
    assert len(significant(3, 4)) == 4 and min(significant(3, 4)) > 0
