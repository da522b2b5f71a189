"""What README.md, docs/grids.md and results/REPORT.md say in words, held against the recorded grids."""

import itertools
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import fisher_exact, gmean

from analysis.alarms import RULE
from analysis.report import (
    BEST,
    GRIDS,
    LINES,
    RESCUES,
    RESULTS,
    TRUST,
    alarms_block,
    all_grids,
    architectures,
    at_their_best,
    bounded,
    by_arm,
    ceilings,
    clients,
    constant_rates,
    finding,
    fitted_r,
    frame,
    large_batch,
    ledger_table,
    limits,
    logit_signals,
    margin_table,
    numbered,
    on_gpu,
    packed,
    ranks_table,
    recorded,
    regimes,
    remedies,
    rescues,
    rings,
    theory_table,
    threshold_table,
)
from analysis.runs import load_runs
from analysis.statistics import (
    LINKS,
    application_cost,
    chain,
    fluctuation,
    moved,
    p_text,
    p_value,
    said,
    spikes,
)
from engine.grid import points, read_grid
from stability.alarm import HELD, LOGIT, REST, THRESHOLD
from stability.collapse import CLEARLY, SPIKE
from tests.conftest import ROOT, here

# a sentence may go on in the next line
README, GRIDS_PAGE, REPORT = (
    " ".join((ROOT / page).read_text().split()) for page in ("README.md", "docs/grids.md", "results/REPORT.md")
)


def reported(a, b, words: str, p: str | None = None, digits: int = 3):
    """Assert that the differences a − b, paired by seed, are `words`; the report has them, and this p-value."""
    assert said(a - b, digits) == words and words.lstrip("-") in REPORT
    if p is not None:
        assert p_text(p_value(a - b)) == p and re.search(rf"p {p if p[0] == '<' else '= ' + p}(?!\d)", REPORT)


def arms(runs):
    """The runs of every arm, in a frame indexed by the seed."""
    return {name: of.set_index("seed", drop=False) for name, of in runs.groupby("arm", sort=False)}


def range_of(values, digits: int) -> str:
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def rows(first: str) -> list[list[str]]:
    """The rows of the report's table, written by hand, whose header begins with these words."""
    lines = (ROOT / "results" / "REPORT.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first}"))
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in itertools.takewhile(bool, lines[start + 2 :])
    ]


@pytest.fixture(scope="module")
def layers():
    return arms(moved(finding("layers")))


def test_every_run_was_recorded_by_committed_code_and_every_arm_has_its_seeds(layers):
    for arm in layers.values():
        assert sorted(arm.seed) == [0, 1, 2, 3, 4]
        assert all(run.code["dirty"] is False for run in arm.run) and all(arm.max_steps == arm.steps)


def test_the_pages_tables_come_from_the_recorded_runs():
    """In this process: the other tests of this file need the same frames."""
    done = here("scripts/report.py", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_table_of_the_set_up_is_that_of_the_recorded_runs():
    """The value of a field is the one that most runs of a grid have; a rate can be a range."""
    grids = ("table2_small", "ramp", "margin", "late_collapse", "late_seeds", "texts", "large_batch", "constant",
             "small_sigma", "small_llama", "best", "clip_search")  # fmt: skip
    of_model = defaultdict(list)
    for run in packed("architectures"):
        of_model[Path(run.axes["config"]).stem].append(run)
    for (name, _, lr, *others), grid in zip(rows("training |"), grids, strict=True):
        configs = pd.DataFrame([run.config for run in of_model.get(grid) or packed(grid)])
        its_lr = 6e-4 if grid == "best" else configs["lr"]
        rates = [f"{rate:.2g}" for rate in sorted((configs["lr_scale"] * configs["lr"] / its_lr).unique())]
        assert lr == (rates[0] if len(rates) == 1 else f"{rates[0]} to {rates[-1]}"), name
        fields = ("max_steps", "beta2", "weight_decay", "probe_every", "jacobian_every")
        assert [cell.split()[0] for cell in others] == [f"{configs[field].mode()[0]:g}" for field in fields], name
        same = {"grad_clip": 1.0, "beta1": 0.9, "decay_coupling": "coupled", "eps": 1e-8}
        same |= {} if grid in of_model else {"lr": 6e-4}
        assert all(configs[field].mode()[0] == value for field, value in same.items())
        batch = (480, 480, 256) if "large batch" in name else (16, 16, 32)
        assert tuple(configs[["batch_size", "micro_batch", "block_size"]].mode().loc[0]) == batch
        assert configs["warmup_steps"].unique().tolist() == [2500 if "ramp" in name else 300]


def test_a_signal_that_moves_does_not_announce_a_collapse():
    floors = dict.fromkeys(("table2_small", "table3_small", "controls", "rivals", "adaptive"), "attention_off")
    floors["late_seeds"] = "late_controls"
    runs = pd.concat([moved(frame(grid, off=floors.get(grid, ""))) for grid in GRIDS], ignore_index=True)
    fell, survived = (Counter(runs["first"][runs.collapsed == fell].explode()) for fell in (True, False))
    assert runs.collapsed.sum() == 77 and "Of the 323 runs in the grids of sections 1 to 9, 77 collapse" in REPORT
    assert fell == {"attention logits": 66, "first-block gain": 15, "stable rank": 2, "none": 4}
    of_rank = [row for row in runs[runs.collapsed].itertuples() if "stable rank" in row.first]
    assert sorted(row.msign_period for row in of_rank) == [300, 1000]
    assert all("attention logits" in row.first for row in of_rank)
    still = survived.pop("none")
    assert 323 - 77 - still == 101 and "a signal also moves in 101 of the 246 runs" in REPORT
    assert survived.most_common(3) == [("attention logits", 49), ("first-block gain", 33), ("log Z", 19)]


def test_the_first_two_questions_take_less_than_three_hours_on_two_cores():
    """By the speeds of the recorded runs: Tables 2 and 3 in small, and their floor."""
    runs = [run for grid in ("table2_small", "attention_off", "table3_small") for run in packed(grid)]
    tokens = [len(run.steps) * run.config["batch_size"] * run.config["block_size"] for run in runs]
    seconds = sum(n / run.summary["tokens_per_second"] for n, run in zip(tokens, runs, strict=True))
    assert seconds / 2 < 3 * 3600 and len(runs) == 70


def test_attention_must_be_restored_and_of_it_w_q_and_w_k(layers):
    fell = {name: arm.collapsed.sum() for name, arm in layers.items()}
    assert fell == {
        "AdamW": 5, "MSign (attention)": 0, "MSign (mlp)": 5, "MSign (blocks)": 0, "MSign (W_O)": 5,
        "MSign (W_V,W_O)": 3, "MSign (W_Q,W_K)": 0, "attention off": 0,
    }  # fmt: skip
    off = layers["attention off"].loss
    clearly = [name for name, arm in layers.items() if (arm.loss - off).mean() <= -CLEARLY]
    assert clearly == ["MSign (attention)", "MSign (W_Q,W_K)"]
    of_all = layers["MSign (attention)"].loss
    reported(layers["MSign (W_Q,W_K)"].loss, of_all, "0.014 ± 0.041", "0.39")
    reported(layers["MSign (blocks)"].loss, of_all, "0.112 ± 0.046", "0.003")
    fell_at = {name: layers[name].end for name in ("AdamW", "MSign (mlp)")}
    assert all(step < fell_at["AdamW"][seed] for seed, step in fell_at["MSign (mlp)"].items())


def test_the_summary_says_what_the_first_finding_says(layers):
    adamw, msign = layers["AdamW"], layers["MSign (attention)"]
    differences = msign.loss - adamw.loss
    assert (
        said(differences) == "-0.46 ± 0.05" and p_text(7 * p_value(differences)) == "< 0.001"
    )  # one of seven rows; Holm's at most
    assert (adamw.collapsed.sum(), msign.collapsed.sum()) == (5, 0) and p_text(
        fisher_exact([[0, 5], [5, 0]]).pvalue
    ) == "0.008"
    summary = REPORT.split("## Terms, set-up and statistics")[0]
    assert (
        "AdamW collapses in 5 of 5 runs and MSign on attention's matrices in 0 of 5 (p = 0.008, Fisher's exact test)"
        in summary
    )
    assert "is 0.46 ± 0.05 nats below AdamW's (n = 5)" in summary


def test_the_attention_logits_move_first_and_stay_where_w_q_and_w_k_are_restored(layers):
    def logits(*names):
        return range_of([run.series("attention/max_logit")[1500] for name in names for run in layers[name].run], 0)

    assert layers["AdamW"]["first"].tolist() == [["attention logits"]] * 5
    assert logits("AdamW") == "904 to 1351"
    assert logits("MSign (W_V,W_O)") == "589 to 1116"
    assert logits("MSign (attention)", "MSign (W_Q,W_K)") == "296 to 568"
    assert logits("attention off") == "1002 to 1671"
    said_so = ("904 to 1351 with AdamW", "589 to 1116 with MSign", "296 to 568 with MSign", "they are 1002 to 1671")
    assert all(words in REPORT for words in said_so)
    firsts = {name: [of.first for of in arm.onsets] for name, arm in layers.items()}
    assert not any("stable rank" in first for of in firsts.values() for first in of)
    survived = {name for name, of in firsts.items() if any(of) and not any(layers[name].collapsed)}
    assert survived == {"attention off", "MSign (W_Q,W_K)"}
    assert all(firsts["attention off"]) and sum(map(bool, firsts["MSign (W_Q,W_K)"])) == 1


@pytest.fixture(scope="module")
def controls():
    return arms(finding("controls"))


def test_the_spectral_norm_is_what_must_be_bounded_and_not_the_stable_rank(controls):
    scaled, clipped = "W scaled to MSign's spectral norm", "singular values clipped there"
    for name, words, text_p in (
        (scaled, "0.094 ± 0.026", "< 0.001"), (clipped, "0.043 ± 0.042", "0.048"),
        ("QK-norm", "-0.143 ± 0.036", "< 0.001"),
        ("attention's lr ÷ 4", "-0.248 ± 0.034", "< 0.001"), ("attention's lr ÷ 16", "-0.334 ± 0.039", "< 0.001"),
        ("MSign, moments reset", "0.019 ± 0.047", "0.32"), ("square-rooted singular values", "0.052 ± 0.050", "0.045"),
    ):  # fmt: skip
        assert not any(controls[name].collapsed) and len(controls[name]) == 5
        reported(controls[name].loss, controls["MSign (attention)"].loss, words, text_p)
    fell = {"β₂ 0.95": 4, "weight decay × 10": 5, "decay independent of the rate": 5, "bf16": 5}
    assert {name: controls[name].collapsed.sum() for name in fell} == fell
    multiples = controls["β₂ 0.95"].lr_multiple.dropna()
    assert range_of(multiples, 2) == "4.96 to 5.00" and "4.96 to 5.00 times" in REPORT
    later = controls["attention in plain math"].loss - controls["AdamW"].loss
    assert later.round(2).tolist() == [0, 0, 0, 0.10, 0.08] and "end 0.10 and 0.08 nats higher" in REPORT

    decayed = controls["weight decay × 10"]
    assert range_of(decayed.lr_multiple, 1) == "1.3 to 4.3" and "at 1.3 to 4.3 times" in REPORT
    assert sum("attention-off" in of.why for of in decayed.collapse) == 4
    for name, words in (("β₂ 0.95", "-0.31 ± 0.03"), (scaled, "-0.37 ± 0.03")):
        reported(controls[name].loss, controls["AdamW"].loss, words, digits=2)
    off = controls["attention off"].loss
    (of,) = controls["random sign"].collapse[controls["random sign"].collapsed]
    assert of.step == 101 and "attention-off" in of.why
    assert min((controls["random sign"].loss - off).dropna()) > 0


def test_the_controls_differ_in_stable_rank_spectral_norm_and_logits_as_the_table_says(controls):
    def between(name, key, digits, step=2550):
        return range_of([run.series(key)[step] for run in controls[name].run], digits)

    keys = (("srank/attention", 1), ("sigma1/attention", 1), ("attention/max_logit", 0))
    table = rows("arm | n | stable rank | spectral norm")
    for name, n, *cells in table:
        assert n == str(len(controls[name])) and cells == [between(name, *key) for key in keys], name
    assert len(table) == 8
    assert all(controls["AdamW"].end < 2550)
    assert between("AdamW", "srank/attention", 1, 1500) == "3.0 to 3.2" and "stable ranks are 3.0 to 3.2" in REPORT


def test_protection_is_lost_between_a_hundred_and_a_thousand_steps(controls):
    runs = frame("table3_small", off="attention_off")
    found = arms(runs.assign(arm=runs.msign_period.map(str)))
    fell = {name: (arm.collapsed.sum(), len(arm)) for name, arm in found.items()}
    assert fell == dict.fromkeys(("1", "3", "10", "30", "60", "100", "180"), (0, 3)) | {
        "300": (2, 3), "1000": (3, 3), "10000": (3, 3),
    }  # fmt: skip
    ten = found["10"].loss
    reported(ten, found["100"].loss, "-0.121 ± 0.035", "0.004")
    reported(ten, controls["QK-norm"].loss, "0.009 ± 0.068")
    reported(ten, controls["attention's lr ÷ 4"].loss, "0.118 ± 0.068")
    assert f"{fitted_r(runs):.2f}" == "0.50" and "r = 0.50 steps an application" in REPORT


def test_how_many_matrices_are_replaced_counts_and_not_which():
    runs = [numbered(line) for line in LINES]
    fixed, below = map(arms, runs)
    table = threshold_table(*reversed(runs)).set_index("arm")
    for name, other, words, text_p in (
        ("below 8", "P = 60", "-0.024 ± 0.006", "0.003"), ("below 16", "P = 30", "-0.021 ± 0.103", "0.48"),
        ("below 4", "P = 180", "0.087 ± 0.037", "0.010"),
    ):  # fmt: skip
        reported(below[name].loss, fixed[other].loss, words, text_p)
        assert table["fixed P of nearly as many"][name].startswith(f"{other}: ")
    fell = {name: arm.collapsed.sum() for name, arm in below.items()}
    assert fell == {"below 2": 3, "below 4": 0, "below 8": 0, "below 16": 0}


@pytest.fixture(scope="module")
def late_seeds():
    return arms(moved(frame("late_seeds")))


def test_one_arm_of_twenty_collapses_late_by_the_protocol():
    runs = moved(frame("late_collapse"))
    assert runs.arm[runs.late].unique().tolist() == ["no decay, lr × 1.5"]
    assert runs.arm.nunique() == 20 and "One arm of twenty counts" in REPORT
    survived = runs[~runs.collapsed]
    rough = survived.early_peak[survived.early_peak >= SPIKE]
    assert (len(rough), len(survived)) == (11, 17) and "eleven of the seventeen have such gradient norms" in REPORT
    assert range_of(rough, 1) == "10.0 to 40.4" and "(10.0 to 40.4 times)" in REPORT
    assert sum(bool(of.first) for of in survived.onsets) == 6 and "although a signal moves in six" in REPORT


def test_all_rules_together_find_a_collapse_of_every_seed():
    found = arms(moved(finding("late")))
    adamw, msign = found["AdamW"], found["MSign (attention)"]
    protocol = arms(frame("late_seeds"))["AdamW"].late
    yes = {True: "yes", False: "no"}
    found = [
        [str(row.seed), str(row.end), "3" if "attention-off" in row.collapse.why else "2",
         f"{row.early_peak:.1f}", yes[row.late], yes[protocol[row.seed]]]
        for row in adamw.itertuples()
    ]  # fmt: skip
    assert found == rows("seed | collapsed at step")
    assert "between steps 2269 and 5373 of 6000" in REPORT and set(adamw.end) >= {2269, 5373}
    assert all(of.first == ["attention logits"] for arm in (adamw, msign) for of in arm.onsets)
    assert [row.seed for row in adamw.itertuples() if row.onsets.lead("attention logits") < 0] == [3, 4, 5]
    assert "before the logits in three of the five AdamW runs, seeds 3 to 5" in REPORT
    assert not any(of.grad_norm for of in msign.onsets)


def mean_losses(run):
    """The means of 100 training losses; the first ends at step 100."""
    return run.steps["train/loss"].rolling(100).mean().dropna()


def test_without_decay_adamws_loss_stalls_and_rises_late(late_seeds):
    adamw, msign = late_seeds["AdamW"], late_seeds["MSign (attention)"]
    assert (adamw.collapsed.sum(), msign.collapsed.sum()) == (3, 0)
    assert adamw.seed[adamw.collapsed].tolist() == [3, 4, 5]
    assert all(adamw.end[adamw.collapsed] > 4000)
    assert adamw.seed[adamw.late].tolist() == [5]
    reported(msign.loss, adamw.loss, "-0.472 ± 0.095", "< 0.001")
    assert "0.472 ± 0.095 nats below AdamW (p < 0.001)" in REPORT
    lowest = adamw.run.map(lambda run: mean_losses(run).min())
    assert min(adamw.loss - lowest) > 0 and "0.096 ± 0.039 nats above the lowest such mean" in REPORT
    reported(adamw.loss, lowest, "0.096 ± 0.039")
    means = [mean_losses(run) for run in adamw.run]
    assert all(of.loc[2000] - of.loc[2000:].min() < 0.1 for of in means)


def test_without_decay_logits_and_gradients_grow_and_the_stable_rank_stays(late_seeds):
    adamw, msign = late_seeds["AdamW"], late_seeds["MSign (attention)"]

    def spread(arm, key, step, digits):
        return range_of([run.series(key)[step] for run in arm.run], digits)

    for step, words in ((1000, "441 to 628"), (2000, "889 to 1100"), (4000, "1716 to 2027"), (6000, "2252 to 3394")):
        assert spread(adamw, "attention/max_logit", step, 0) == words and f"{words} at step {step}" in REPORT
    assert "largest attention logit is 441 to 628 at step 1000 and 2252 to 3394 at the end" in GRIDS_PAGE
    assert spread(msign, "attention/max_logit", 6000, 0) == "263 to 277"
    assert "largest logit of the MSign runs is 263 to 277 at step 6000" in REPORT
    assert spread(adamw, "srank/attention", 1000, 1) == "3.1 to 3.4" and "3.1 to 3.4 at step 1000" in REPORT
    later = [run.series("srank/attention")[step] for run in adamw.run for step in range(2000, 6001, 1000)]
    assert range_of(later, 1) == "3.2 to 3.8" and "3.2 to 3.8 at every thousandth step from 2000 to 6000" in REPORT
    norms = {name: np.array([run.steps["grad_norm"] for run in arm.run]) for name, arm in late_seeds.items()}
    grown = {name: np.median(of[:, 5500:], 1) / np.median(of[:, 500:1000], 1) for name, of in norms.items()}
    assert range_of(grown["AdamW"], 0) == "5 to 8" and "5 to 8 times that of steps 500 to 1000" in REPORT
    assert range_of(grown["MSign (attention)"], 1) == "1.6 to 2.0" and "with MSign 1.6 to 2.0 times" in REPORT
    largest = norms["AdamW"].max(1)
    assert f"between {largest.min():.0f} and {largest.max():.0f}" in REPORT
    third = norms["AdamW"].shape[1] // 3
    rough = (norms["AdamW"][:, 100:third] > 10 * np.median(norms["AdamW"], 1, keepdims=True)).sum(1)
    assert dict(zip(adamw.seed, rough, strict=True)) == {1: 0, 2: 0, 3: 1, 4: 1, 5: 0}
    onsets = adamw.onsets.tolist()
    assert all(o.first == ["attention logits"] for o in onsets)
    sooner = [row.seed for row in adamw.itertuples() if row.onsets.lead("attention logits") < 0]
    assert sooner == [2, 3, 4, 5] and "and in seed 2 when judged by the first two rules" in REPORT
    assert all(o.grad_norm for o in onsets)


def test_the_late_collapse_is_prevented_at_adamws_stable_ranks_and_spectral_norms_too(late_seeds):
    found = arms(finding("late"))
    controls = ("W scaled to MSign's spectral norm", "attention's lr ÷ 16", "QK-norm")
    fell = {name: (arm.collapsed.sum(), len(arm)) for name, arm in found.items()}
    assert fell == {"AdamW": (5, 5)} | dict.fromkeys(("MSign (attention)", "attention off", *controls), (0, 5))
    for name, words, text_p in (
        ("QK-norm", "-0.405 ± 0.045", "< 0.001"), ("attention's lr ÷ 16", "-0.376 ± 0.041", "< 0.001"),
        ("W scaled to MSign's spectral norm", "0.100 ± 0.035", "0.001"),
    ):  # fmt: skip
        reported(found[name].loss, found["MSign (attention)"].loss, words, text_p)
    off = found["attention off"].loss
    rescued = [name for name, arm in found.items() if name not in ("AdamW", "attention off")]
    assert all(max((found[name].loss - off).dropna()) <= -0.18 for name in rescued)
    for name, key, digits, words in (
        ("QK-norm", "srank/attention", 1, "4.8 to 5.3"), ("QK-norm", "sigma1/attention", 1, "20.6 to 21.6"),
        ("QK-norm", "attention/max_logit", 0, "8 to 9"), ("AdamW", "srank/attention", 1, "3.2 to 3.7"),
        ("AdamW", "sigma1/attention", 1, "24.6 to 26.2"), ("MSign (attention)", "srank/attention", 0, "32"),
        ("MSign (attention)", "sigma1/attention", 0, "8"),
        ("W scaled to MSign's spectral norm", "srank/attention", 1, "1.9 to 2.1"),
        ("MSign (attention)", "srank/attention", 1, "31.8 to 32.1"),
        ("MSign (attention)", "sigma1/attention", 1, "8.1 to 8.2"),
    ):  # fmt: skip
        assert range_of([run.series(key).iloc[-1] for run in found[name].run], digits) == words and words in REPORT
    for name, words in (
        ("MSign (attention)", "(0 of 5) and has a final loss of {}"), ("AdamW", "AdamW one of {}"),
        ("QK-norm", "QK-norm prevents the collapse too (0 of 5, final loss {})"),
    ):  # fmt: skip
        assert words.format(said(found[name].loss)) in GRIDS_PAGE


def test_the_ledger_says_what_the_report_says():
    """The words beside the table of the paper's chain: every number in them is in the table."""
    table = ledger_table(regimes()).set_index(["regime", "arm"])
    adamw = [table.loc[regime, "AdamW"] for regime in ("ramp", "constant 2 ×", "no decay")]
    msign = [table.loc[regime, "MSign (attention)"] for regime in ("ramp", "constant 2 ×", "no decay")]
    off = table.loc["ramp", "attention off"]
    assert [of["stable rank"][:3] for of in adamw] == [
        "3.0",
        "2.5",
        "3.4",
    ] and "medians are 3.0 on the ramp, 2.5 at the constant rate and 3.4 without decay" in REPORT
    correlations = [f"ρ({name})" for name in LINKS]
    for words in (
        *(of["alignment"] for of in adamw), *(table["‖J(ℓ)‖₂"][regime, name] for regime in ("ramp", "no decay")
                                              for name in ("AdamW", "MSign (attention)")),
        off["‖J(ℓ)‖₂"], f"({off['stable rank'][:3]} and {table['stable rank']['constant 2 ×', 'attention off'][:3]})",
        *(of[name] for of in adamw[:2] for name in (correlations[0], correlations[2])), adamw[0][correlations[1]],
    ):  # fmt: skip
        assert words in REPORT.split("link by link:")[1]
    products = [[float(of["log₁₀ product"][:3]) for of in arm] for arm in (adamw, msign)]
    decades = np.subtract(*products)
    assert all(3 <= 10**decade <= 5.1 for decade in decades)
    assert theory_table(recorded("ramp").run[0])["looseness, powers of ten"][0] == "91.6 [48.0, 123.2]"
    assert "48 to 123 decades below the product (60 measurements" in REPORT
    assert float(adamw[0]["log₁₀ product"][:3]) == 4.4 and round(24 * np.log10(float(adamw[0]["‖J(ℓ)‖₂"][:3]))) == 15
    early = [run.series("srank/attention") for run in regimes().query("arm == 'AdamW'").run]
    assert [range_of([of[step] for of in early], 1) for step in (50, 500)] == ["6.8 to 8.3", "2.3 to 3.1"]
    assert "from 6.8–8.3 at step 50 to 2.3–3.1 at step 500" in REPORT


def test_what_moved_first_and_how_much_msign_lowers_the_product_are_as_reported():
    by_regime = {regime: arms(moved(runs)) for regime, runs in regimes().groupby("regime", sort=False)}

    def ratios(regime, key):
        """AdamW's median over MSign's, seed by seed."""
        adamw, msign = (by_regime[regime][name] for name in ("AdamW", "MSign (attention)"))
        of = [pd.Series([chain(row)[key] for row in arm.itertuples()], arm.seed) for arm in (adamw, msign)]
        return of[0] / of[1]

    lower = [round(gmean(ratios(regime, "jacobian/product")), 1) for regime in by_regime]
    assert lower == [3.1, 2.9, 5.8]
    assert "factors of 3.1 on the ramp, 2.9 at the constant rate and 5.8 without decay" in REPORT
    assert range_of(100 - 100 / ratios("ramp", "jacobian/sigma1"), 0) == "37 to 46" and "by 37 to 46 %" in REPORT
    onsets = {regime: found["AdamW"].onsets.tolist() for regime, found in by_regime.items()}
    firsts = [o.first for of in onsets.values() for o in of]
    assert firsts.count(["attention logits"]) == 10 and firsts.count(["first-block gain"]) == 1 and len(firsts) == 11
    often = ("ramp", "constant 2 ×")  # the regimes whose Jacobians were measured every 50 steps
    assert not any(o.grad_norm for regime in often for o in onsets[regime])
    aligned = {
        name: [of.signals["Jacobian alignment"] for regime in often for of in by_regime[regime][name].onsets]
        for name in ("AdamW", "MSign (attention)", "attention off")
    }
    assert {name: sum(map(bool, of)) for name, of in aligned.items()} == {
        "AdamW": 1, "MSign (attention)": 3, "attention off": 2,
    }  # fmt: skip
    assert aligned["AdamW"][0] == 2350 and "(ramp, seed 0, step 2350)" in REPORT
    for row in (row for regime in often for row in by_regime[regime]["AdamW"].itertuples()):
        alignment = row.run.series("jacobian/alignment").loc[row.end // 4 + 1 : row.end]
        half = len(alignment) // 2
        assert alignment.iloc[half:].median() < alignment.iloc[:half].median()
    logits = [
        pd.concat(
            [run.series(f"{when}_msign/attention/max_logit") for run in by_regime["ramp"]["MSign (attention)"].run]
        )
        for when in ("before", "after")
    ]
    assert [f"{of.median():.0f}" for of in logits] == ["283", "44"] and len(logits[0]) == 90
    assert "from 283 to 44 (medians of 90 applications" in REPORT


def test_three_rivals_prevent_the_collapse_too(controls):
    rivals = arms(finding("rivals"))
    fell = {name: arm.collapsed.sum() for name, arm in rivals.items() if len(arm) == 3}
    assert fell == {
        "AdamW": 3, "MSign (attention)": 0, "ZClip": 3, "Muon": 0, "Stable-SPAM": 3, "AdaGC": 0, "SPAM": 3,
        "spectral sphere": 0,
    }  # fmt: skip
    losses = {name: arm.loss for name, arm in rivals.items()}
    for name, words, text_p in (
        ("Muon", "-0.240 ± 0.092", "0.008"), ("AdaGC", "-0.092 ± 0.071", "0.031"),
        ("spectral sphere", "-0.323 ± 0.094", "0.005"),
    ):  # fmt: skip
        reported(losses[name], losses["MSign (attention)"], words, text_p)
    for name, other, words, text_p in (
        ("Muon", "attention's lr ÷ 4", "-0.001 ± 0.018", "0.87"),
        ("spectral sphere", "attention's lr ÷ 16", "-0.001 ± 0.009", "0.57"),
    ):
        reported(losses[name], controls[other].loss, words)
        assert p_text(p_value(losses[name] - controls[other].loss)) == text_p
    timed = ("AdamW", "Muon", "spectral sphere")
    rate = {name: rivals[name].tokens_per_second.mean() for name in timed}
    assert 1.8 < rate["AdamW"] / rate["Muon"] < 2.2 and 7 < rate["AdamW"] / rate["spectral sphere"] < 8


def test_larger_rates_are_survivable_with_msign_and_not_better():
    found = arms(frame("margin"))
    attention = "attention's lr ÷ 16"

    def at(name, rate):
        return found[name].loss[found[name].lr_scale == rate]

    def best(name):
        return found[name].loss.groupby(level="seed").min()

    for a, b, words, text_p in (
        (at("MSign (attention)", 2), at("AdamW", 2), "-0.230 ± 0.106", "0.011"),
        (at("MSign (attention)", 4), at("AdamW", 4), "-0.327 ± 0.062", "0.002"),
        (at("MSign (attention)", 0.25), at("AdamW", 0.25), "0.063 ± 0.021", "0.006"),
        (best("MSign (attention)"), best("AdamW"), "0.014 ± 0.019", "0.085"),
        (best(attention), best("AdamW"), "-0.204 ± 0.031", "0.001"),
        (best("QK-norm"), best("AdamW"), "-0.029 ± 0.038", "0.084"),
    ):
        reported(a, b, words, text_p)
    for words in ("0.014 ± 0.019 above AdamW's best", "0.204 ± 0.031 below AdamW's best"):
        assert words in GRIDS_PAGE
    assert said(at("MSign (attention)", 16)) == "2.94 ± 0.09" and "2.94 ± 0.09" in REPORT
    means = [at(attention, rate).mean() for rate in (2, 1, 4)]
    assert max(means) - means[0] < 0.05 and means[0] == min(means)
    assert not any(found["AdamW"].collapsed[found["AdamW"].lr_scale == 2])
    fell = pd.concat(arm[arm.collapsed] for arm in found.values())
    assert sorted(fell.lr_scale) == [4, 4, 8] and set(fell.arm) == {"AdamW"}
    assert "AdamW in 2 of 3 runs at four times and in 1 of 3 at eight times the paper's rate" in GRIDS_PAGE
    twice = arms(recorded("constant"))["AdamW"]
    assert all("attention-off's" in collapse.why for collapse in twice.collapse) and len(twice) == 3
    table = margin_table(frame("margin")).set_index("arm")
    assert {name: (row["at × lr"], row["no collapse up to × lr"]) for name, row in table.iterrows()} == {
        "AdamW": ("0.5", "2"), "MSign (attention)": ("0.5", "16"), "QK-norm": ("2", "16"), attention: ("2", "16"),
    }  # fmt: skip
    for name, words in (("AdamW", "0.404"), ("MSign (attention)", "0.254"), ("QK-norm", "0.082")):
        assert table["sensitivity, nats"][name].startswith(words) and words in REPORT


def test_a_higher_stable_rank_generalises_no_better():
    runs = frame("texts")
    for text, name, words, text_p in (
        ("stdlib-bytes", "MSign (attention)", "0.003 ± 0.035", "0.72"),
        ("stdlib-small", "MSign (attention)", "0.083 ± 0.152", "0.14"),
        ("stdlib-small", "QK-norm", "0.376 ± 0.308", "0.034"),
    ):
        found = arms(runs[runs.dataset == text])
        reported(found[name].gap, found["AdamW"].gap, words, text_p)
        msign = found.pop("MSign (attention)").srank
        others = pd.concat(found.values()).srank
        assert min(msign) > 2.8 * max(others)
    after, before = (arms(frame(grid))["MSign (attention)"] for grid in ("table2_small", "rivals"))
    after, before = after[after.seed < 3], before[before.seed < 3]
    # the same runs, validated right after an application and right before it
    assert after.loss.to_dict() == before.loss.to_dict()
    for of, words in ((after, "0.099 ± 0.051"), (before, "0.006 ± 0.036")):
        assert said(of.gap, 3) == words and words in REPORT
    series = [run.series("val/loss") for run in runs.run[runs.dataset == "stdlib-small"]]
    assert all(of.index[0] == 500 and of.idxmin() == 500 for of in series)
    assert range_of([of[500] for of in series], 2) == "2.68 to 2.73" and "2.68 to 2.73" in REPORT


def test_the_page_on_grids_says_what_they_say(layers, controls):
    rivals = arms(finding("rivals"))
    periods = arms(numbered("MSign every P steps"))
    for arm, says, digits in (
        (controls["attention's lr ÷ 4"], "(`--attn_lr=0.25`) {}", 2), (controls["QK-norm"], "(`--qk_norm`) {}", 2),
        (layers["MSign (attention)"], "MSign every 100 steps has a final loss of {}", 2),
        (periods["P = 3"], "every 3 steps has {}", 2), (rivals["Muon"], "Muon ({})", 2),
        (rivals["AdaGC"], "AdaGC ({})", 2), (rivals["spectral sphere"], "spectral sphere (final loss {})", 3),
    ):  # fmt: skip
        assert says.format(said(arm.loss, digits)) in GRIDS_PAGE
    adamw = layers["AdamW"]
    ranks, ahead = range_of([run.series("srank/attention")[500] for run in adamw.run], 1), adamw.end - 500
    assert f"stable rank is {ranks} at step 500, {min(ahead)} to {max(ahead)} steps before the collapse" in GRIDS_PAGE
    for name in GRIDS:
        assert re.search(rf"\| `{name}` \| [^|]* \| {len(packed(name))} \|", GRIDS_PAGE), name


def test_gradient_norms_are_calmer(layers):
    for name, measure, words, says in (
        ("AdamW", fluctuation, "0.44 ± 0.07", "0.44 ± 0.07 with AdamW"),
        ("MSign (attention)", fluctuation, "0.17 ± 0.01", "0.17 ± 0.01 with MSign on attention"),
        ("AdamW", spikes, "6.0 ± 1.9", "AdamW 6.0 ± 1.9"),
        ("MSign (attention)", spikes, "0.8 ± 0.3", "has 0.8 ± 0.3 spikes"),
        ("MSign (attention)", application_cost, "0.045 ± 0.021", "0.045 ± 0.021"),
    ):  # fmt: skip
        digits = len(words.split(" ")[0]) - 2
        assert said(layers[name].run.map(measure), digits) == words and says in REPORT

    def after(run, first, last):
        """Mean training loss of these steps after an application above the 20 before it, as application_cost."""
        losses = run.steps["train/loss"].to_numpy()
        steps = range(1100, len(losses) - last, run.config["msign_period"])
        return np.mean([losses[s + first : s + last].mean() - losses[s - 20 : s].mean() for s in steps])

    runs = layers["MSign (attention)"].run
    raised = [said(runs.map(lambda run, at=at: after(run, at, at + 10)), 3) for at in (0, 10, 20, 30)]
    assert raised == ["0.045 ± 0.021", "0.026 ± 0.016", "0.018 ± 0.025", "0.002 ± 0.021"]
    assert all(words in REPORT for words in raised)


def test_the_pages_say_how_many_runs_and_questions_there_are():
    grids = sum(len(packed(name)) for name in GRIDS)
    others = sum(len(recorded(name)) for name in ("ramp", "constant"))
    assert f"eleven grids of sections 1 to 9 ({grids} runs, " in REPORT and len(GRIDS) == 11
    assert f"makes the {others} runs of section 10" in REPORT
    assert f"rules) {grids + others} times; sections 11 to 16 add " in REPORT
    assert f"from {grids} runs of grids and from the {others} runs" in GRIDS_PAGE
    of_grids = [run for name in GRIDS for run in load_runs(RESULTS / name)]
    assert f"and {len(of_grids) - grids} with the limit of section 13; about ten hours on two cores)" in REPORT
    tokens = [len(run.steps) * run.config["batch_size"] * run.config["block_size"] for run in of_grids]
    spent = [n / run.summary["tokens_per_second"] for n, run in zip(tokens, of_grids, strict=True)]
    assert round(sum(spent) / 2 / 3600) == 10  # two runs at a time, at the speeds that they had
    files = [ROOT / "configs" / "sweeps" / f"{name}.py" for name in GRIDS]
    assert all(len(points(path, read_grid(path, []))) == len(load_runs(RESULTS / path.stem)) for path in files)
    went_back = rescues()["rang"].count()
    table = [line.split("|")[1:-1] for line in (ROOT / "docs" / "grids.md").read_text().splitlines() if "| `" in line]
    told = {tuple(re.findall(r"`(\w+)`", names)): runs.strip() for names, *_, runs in table}
    recorded_grids = {path.parent.name for path in RESULTS.glob("*/runs.parquet")}
    held = {grids: sum(len(load_runs(RESULTS / name)) for name in recorded_grids & {*grids}) for grids in told}
    assert all(runs == str(held[grids] or "–") for grids, runs in told.items() if grids[0] not in GRIDS)
    assert {name for grids in told for name in grids} == {path.stem for path in ROOT.glob("configs/sweeps/*.py")}
    more = len(architectures()) + len(clients()) + went_back + sum(len(load_runs(RESULTS / name)) - len(packed(name))
                                                       for name in (*GRIDS, "architectures"))  # fmt: skip
    later = ("limits", "large_batch", "best", "signal", "clip_search", "bounded", "late_bounded")
    more += sum(len(load_runs(RESULTS / name)) for name in later)
    assert f"sixteen questions, answered with {grids + others + more} runs" in README and f"add {more} runs" in REPORT
    questions = re.findall(r"^### (\d+)\.", (ROOT / "results" / "REPORT.md").read_text(), re.M)
    assert questions == [str(number) for number in range(1, 17)]


def test_the_h100_did_what_the_report_says():
    page = (ROOT / "results" / "acceptance" / "h100.md").read_text()
    runs = on_gpu()
    collapsed = runs["collapse, step"] != "none"
    assert (collapsed == (runs["method"] == "AdamW")).all() and set(runs["precision"]) == {"float32", "bfloat16"}
    assert runs["first to move"][collapsed].str.startswith("attention logits moved first").all()
    held = lambda part: re.findall(rf"^\| {part} \|.*\| (yes|\*\*no\*\*) \|$", page, re.M)  # noqa: E731
    assert held("gradient") == ["yes"] * 44 and "All 44 gradients" in REPORT
    assert len(held("sign")) == 45 and held("sign").count("yes") == 41
    assert len(re.findall(r"^\| gradient .*not run", page, re.M)) == 13 and "Thirteen more were not" in REPORT

    def rate(name):
        return float(re.search(rf"\| {name}, 12 steps \| ([\d,]+) tokens", page)[1].replace(",", ""))

    thousands = {"llama_1b_adamw": 53, "gpt_3b --recompute=32": 23, "gpt_124m": 307}
    assert {name: round(rate(name) / 1e3) for name in thousands} == thousands
    assert "53 thousand tokens a second" in REPORT and "`gpt_3b`" in REPORT and "307 thousand" in REPORT
    assert f"{rate('nano_5m_adamw --micro_batch=240') / rate('nano_5m_adamw'):.1f} times as fast" in REPORT
    memory = [float(x) for x in re.findall(r"^\| speed \| (?!nano).*GiB planned \| ([\d.]+)", page, re.M)] + [0.98]
    assert (len(memory), min(memory), max(memory)) == (5, 0.91, 1.01) and "0.91 to 1.01 of the plan" in REPORT


def test_a_limit_of_any_size_prevents_the_collapse_and_the_final_loss_depends_on_it():
    runs = limits()
    table = runs.groupby("arm", sort=False).agg(n=("seed", "count"), fell=("collapsed", "sum"), above=("above", said))
    assert table.index.tolist() == ["none", "0.0625", "0.25", "1", "4", "16"] and (table.n == 5).all()
    assert table.fell.tolist() == [5, 0, 0, 0, 0, 0] and "over a factor of 256" in REPORT and 16 / 0.0625 == 256
    means = runs.groupby("arm")["loss"].mean()
    assert means.idxmin() == "1" and means["0.25"] - means["1"] <= 0.05 < means["4"] - means["1"]
    near, far = table.above["0.25"], table.above["4"]
    assert f"0.25 nats pass ({near} nats above 1 nat), and 4 nats fail ({far} above)" in REPORT
    losses = runs.pivot(index="seed", columns="arm", values="loss")
    assert f"Even 16 nats end {said(losses['none'] - losses['16'])} below AdamW" in REPORT


def test_a_step_with_the_limit_takes_as_long_as_reported():
    (rows,) = json.loads((RESULTS / "bench_remedies.json").read_text())["tables"].values()
    times = {row["implementation"]: row["time relative to ours"] for row in rows}
    shown = [times[name].split(" ")[0] for name in ("QK-norm", "Muon", "spectral sphere")]
    said_so = "With the limit it takes {} times as long as AdamW's (median and range of the rounds)"
    assert said_so.format(times["limit on the step"]) in REPORT
    assert "with QK-norm {}, with Muon {} and with the spectral sphere {} times".format(*shown) in REPORT


def test_the_bound_of_the_logits_moves_with_the_largest_logit():
    runs = logit_signals()
    of = runs[runs["arm"] == "AdamW"]
    assert of["collapsed"].all() and len(of) == 5 and "(medians of five runs)" in REPORT
    assert f"the largest attention logit is {range_of(of.tight, 2)} of a bound that needs no data" in REPORT
    apart, ahead = of["earlier"].abs().max(), (of["fell_at"] - of[["logit", "bound"]].max(axis=1)).min()
    assert f"both move within {apart:.0f} steps of each other, {ahead:.0f} or more steps before the collapse" in REPORT
    late = (of["earlier"] < 0).sum()
    assert late and f"later than the logit in {late} of 5 runs, by at most {-of['earlier'].min():.0f} steps" in REPORT
    (slow,) = runs[runs["arm"] != "AdamW"].itertuples()
    bound = slow.run.series("attention/logit_bound").iloc[-1]
    assert (
        not slow.collapsed and f"the median is {slow.tight:.2f} and the bound ends at {bound:.0f} (one run)" in REPORT
    )


def test_at_its_best_setting_msign_ends_between_adamw_and_two_simpler_remedies():
    runs = at_their_best()
    arms_of, limit, quarter = arms(runs), "logits move ≤ 0.25 nats a step", "attention's lr ÷ 4"
    of_msign = "MSign (attention), P 3"
    assert list(arms_of) == list(read_grid(ROOT / "configs" / "sweeps" / "best.py", [])["arm"])
    assert not runs["collapsed"].any() and 9 not in set(runs["seed"])
    assert all(len(arms_of[arm]) == 5 for arm in ("AdamW", quarter, "QK-norm", of_msign, limit))
    below = {name: said(of["against AdamW"]).removeprefix("-") for name, of in arms_of.items()}
    in_time = {name: said(of["in_time"]) for name, of in arms_of.items()}
    first = f"MSign every 3 steps ends {below[of_msign]} nats below AdamW, the limit on the step {below[limit]}, and a"
    assert f"{first} quarter of the rate for attention {below[quarter]} (n = 5)" in REPORT
    assert (
        f"* *At equal steps* Muon ends lowest, {below['Muon']} nats below AdamW (n = {len(arms_of['Muon'])})" in REPORT
    )
    assert (
        f"attention ({below[quarter]}), the limit ({below[limit]}) and MSign on attention ({below[of_msign]};" in REPORT
    )
    assert (
        f"Muon, another optimizer, ends {below['Muon']} below AdamW (n = 3), with steps that take twice the time"
        in REPORT
    )
    means = runs.groupby("arm")["loss"].mean()
    assert means.sort_values().index[:4].tolist() == ["Muon", quarter, limit, of_msign]
    losses = runs.pivot(index="seed", columns="arm", values="loss")[[of_msign, "QK-norm", quarter, limit]]
    for other in ("QK-norm", quarter, limit):
        difference = (losses[of_msign] - losses[other]).dropna()
        words = said(difference, 3).removeprefix("-")
        p = p_text(p_value(difference))
        says = f"{words} nats below QK-norm" if other == "QK-norm" else f"{words} above the "
        assert f"{says}" in REPORT and re.search(rf"{re.escape(words)}[^()]*\(p (= )?{p}\)", REPORT), (other, words, p)
    ps = by_arm(runs, BEST).set_index("arm")
    for arm in ("MSign (W_Q,W_K), P 3", "QK-norm", "AdaGC", "Stable-SPAM"):
        assert float(ps.loc[arm, "p"].removeprefix("< ")) > 0.05
    for arm in (of_msign, "Muon"):
        assert float(ps.loc[arm, "p at equal time"]) > 0.05 and f"AdamW ({in_time[arm]})" in REPORT
    for arm in (quarter, limit):
        assert arms_of[arm]["in_time"].max() < 0 and p_value(arms_of[arm]["in_time"]) < 0.05
    still = [in_time[arm].removeprefix("-") for arm in (quarter, limit)]
    assert "remains {} nats below AdamW, the limit {}.".format(*still) in REPORT
    above = [in_time[arm] for arm in ("QK-norm", "Stable-SPAM")]
    assert "QK-norm and Stable-SPAM end above AdamW ({} and {}).".format(*above) in REPORT
    assert all(float(ps.loc[arm, "p at equal time"]) < 0.05 for arm in ("QK-norm", "Stable-SPAM"))
    of_time = arms_of[of_msign]["time"].iloc[0]
    assert round(of_time / (of_time - 1)) == 7 and "its applications take a seventh" in REPORT
    fastest = [max(run.summary["tokens_per_second"] for run in arms_of[arm].run) for arm in ("AdamW", "Muon")]
    assert "read {:.0f} tokens a second and Muon's {:.0f}".format(*fastest) in REPORT
    tried = read_grid(ROOT / "configs" / "sweeps" / "best_search.py", [])["arm"]
    periods, limits_tried, factors = (
        {fields[key] for fields in tried.values() if key in fields}
        for key in ("msign_period", "logit_trust", "attn_lr")
    )
    assert (min(periods), min(limits_tried), max(factors)) == (3, 0.25, 0.25)


def test_bounded_logits_prevent_the_collapse_and_slow_attention_ends_lower():
    runs, sixteenth, of_msign = bounded(), "attention's lr ÷ 16", "MSign (attention)"
    cap, clip, scale = read_grid(ROOT / "configs" / "sweeps" / "bounded.py", [])["arm"]
    of = runs[runs["arm"].isin([cap, clip, scale])]
    assert of.groupby(["regime", "arm"]).size().to_dict() == {("no decay", clip): 3, ("no decay", cap): 3} | {
        ("ramp", arm): 5 for arm in (cap, clip, scale)
    }
    assert not of["collapsed"].any() and f"none of {len(of)} runs collapses" in REPORT
    ramp = runs[runs["regime"] == "ramp"]
    by_regime = {name: runs.pivot(index="seed", columns="arm", values="loss") for name, runs in runs.groupby("regime")}
    losses = by_regime["ramp"]

    def apart(lower: str, higher: str, regime: str = "ramp") -> str:
        difference = (by_regime[regime][higher] - by_regime[regime][lower]).dropna()
        p = p_text(p_value(difference))
        assert difference.mean() > 0 and len(difference) == (5 if regime == "ramp" else 3)
        return f"{said(difference)} {{}} (p {'' if p.startswith('<') else '= '}{p})"

    assert f'"clip" ends {apart(clip, of_msign).format("nats below MSign")}' in REPORT
    assert f"and {apart('QK-norm', clip).format('above QK-norm')}." in REPORT
    assert f"It ends {apart(clip, scale)}".format('below "scale"') in REPORT
    assert f"The cap ends {apart(of_msign, cap)}".format("above MSign") in REPORT
    assert f"and {apart(cap, 'AdamW').format('below AdamW')}." in REPORT
    assert f"rate for attention ends {apart(sixteenth, clip)}".format('below "clip"') in REPORT
    gaps = [said(losses[clip] - losses[other]) for other in ("QK-norm", sixteenth)]
    first = (
        "On the ramp the better limit ends {} nats above QK-norm, and {} above a sixteenth of the rate for attention"
    )
    assert first.format(*gaps) in REPORT
    logit = ramp.groupby("arm")["logit"]
    assert logit.min()[sixteenth] > logit.max()[clip] and "with larger logits" in REPORT
    ends = [range_of(ramp.loc[ramp["arm"] == arm, "srank"], 1) for arm in (scale, "AdamW")]
    assert "it ends at {} on the ramp, where AdamW's ends at {}.".format(*ends) in REPORT
    assert "collapses there (0 of 3 each; AdamW 5 of 5)" in REPORT
    assert runs.query("regime == 'no decay' and arm == 'AdamW'")["collapsed"].tolist() == [True] * 5
    assert f'"clip" ends {apart(clip, of_msign, "no decay").format("nats below MSign")}' in REPORT
    assert apart("QK-norm", clip, "no decay").format("above QK-norm") in REPORT
    assert apart(sixteenth, clip, "no decay").format("above the sixteenth of the rate").removesuffix(")") in REPORT
    assert f"The cap ends {apart(clip, cap, 'no decay')}".format('above "clip"') in REPORT


def test_where_nothing_collapses_a_limit_of_the_logits_gains_nothing():
    judged = frame("clip_search")
    runs = judged["run"].tolist()
    assert not judged["collapsed"].any() and len(runs) == 18 and {run.config["seed"] for run in runs} == {9}
    table = ceilings().set_index(["logit_clip_map", "logit_clip"])
    lowest = table.astype(float).min().min()
    assert f"The lowest loss, {lowest:.3f}, is that of four trials with the same numbers, at 0.4 times" in REPORT
    slow = [run for run in runs if run.config["lr_scale"] == 0.4 and run.config["logit_clip"] > 25]
    same = {tuple(run.series("train/loss")) for run in slow}
    assert len(slow) == 4 and len(same) == 1 and table["0.4 × lr"].astype(float).min() == lowest
    allowed = max(run.series("attention/logit_bound").max() for run in slow)
    assert f"allow a logit above {allowed:.0f} there" in REPORT and allowed < 100
    assert f"where a limit of 25 ends at {table['1.2 × lr']['clip', '25']}" in REPORT
    for way, of in table.astype(float).groupby("logit_clip_map"):
        assert of["3.6 × lr"].is_monotonic_increasing, way
    best = at_their_best().groupby("arm")["loss"].mean()
    ends = [best[arm] for arm in ("logits move ≤ 0.25 nats a step", "attention's lr ÷ 4")]
    assert "attention end at {:.2f} and {:.2f} (section 15, other seeds)".format(*ends) in REPORT


def test_with_the_papers_batch_the_collapse_is_another_one():
    runs = large_batch()
    large = runs[runs.batch_size == 480].set_index("arm")
    assert (runs.batch_size * runs.block_size).unique().tolist() == [122_880, 512]
    calm = ["attention's lr ÷ 16", TRUST]
    assert large.index[~large.collapsed].tolist() == calm and len(large) == 6 and set(runs.seed) == {0}
    assert (large.steps["QK-norm"], large.steps[TRUST]) == (2793, 2769)
    assert "QK-norm had done 2793 of 3000 steps and the limit 2769" in REPORT
    fell = [int(large.fell_at[arm]) for arm in ("AdamW", "QK-norm")]
    assert fell == [1597, 2102] and all(f"at step {step}" in REPORT for step in fell)
    adamw, small = large.run["AdamW"], runs.set_index("batch_size").loc[2]
    logit, srank, norm, growth = map(
        adamw.series, ("attention/max_logit", "srank/attention", "sigma1/attention", "residual/gain")
    )
    assert f"largest logit is {range_of(logit.loc[1200:1597], 0)} at every measurement from step 1200" in REPORT
    assert f"tokens it reaches {small.logit:.0f}, as on the other" in REPORT and small.collapsed
    assert large.logit["QK-norm"] <= 20
    assert srank.loc[300:].idxmax() == 1550 and (f"{srank[1550]:.1f}", f"{srank[1650]:.1f}") == ("8.0", "5.3")
    assert "8.0 at step 1550 is its highest value after step 300. By step 1650 it has fallen to 5.3" in REPORT
    grow = (
        "attention grow from {:.1f} to {:.1f}, and the growth of activations in the first block from {:.0f} to {:.0f}"
    )
    assert grow.format(norm[1550], norm[1650], growth[1550], growth[1650]) in REPORT
    assert adamw.steps["grad_norm"].max() < 8.4 and "does not exceed 8.4" in REPORT
    of_msign, off = large.loc["MSign (attention)"], large.loc["attention off"]
    assert "rose from 1.38 to 1.50" in of_msign.collapse.why and "mean loss rises from 1.38 to 1.50)" in REPORT
    assert "rose from 2.03 to 2.15" in off.collapse.why and "attention off has (from 2.03 to 2.15)" in REPORT
    cost = f"{application_cost(of_msign.run):.2f}"
    assert f"is {cost} nats above that of the twenty steps" in REPORT and f"raises the loss by {cost} nats" in REPORT
    losses = of_msign.run.steps["train/loss"].to_numpy()
    before = [f"{losses[step - 20 : step].mean():.2f}" for step in (1400, 3000)]
    assert "Before applications it is {} at step 1400 and {} at the end".format(*before) in REPORT
    assert f"ends {of_msign.loss - large.loss['AdamW']:.2f} nats above AdamW, which has collapsed" in REPORT
    assert f"MSign ends {of_msign.loss - large.loss['AdamW']:.2f} nats above AdamW, mostly" in REPORT
    assert [f"{loss:.2f}" for loss in large.loss[calm]] == ["0.92", "0.92"]
    assert f"{large.lowest.drop(calm).min():.2f}" == "1.00" and "below the lowest mean loss that any other" in REPORT
    moved_first = moved(runs).onsets.map(str)
    assert moved_first.iloc[-1].startswith("attention logits moved first")


def test_a_high_stable_rank_goes_with_low_losses_in_as_many_grids_as_reported():
    table = ranks_table(all_grids())
    *_, rho_gap, p_gap, rho_loss, p_loss = (table.iloc[:, column] for column in range(table.shape[1]))

    def significant(rho, p):
        return rho.astype(float)[p.str.lstrip("< ").astype(float) < 0.05]

    assert len(table) == 11 and (rho_loss.astype(float) < 0).sum() == 10 and len(significant(rho_loss, p_loss)) == 9
    assert len(significant(rho_gap, p_gap)) == 4 and significant(rho_gap, p_gap).min() > 0
    assert "in ten of eleven rows (nine with p < 0.05)" in REPORT and "In four rows ρ with the difference has" in REPORT


def test_the_alarm_is_the_one_that_was_chosen_and_announces_as_many_collapses_as_reported():
    found = rings()
    others = found[found.regime != "built on"]

    def announced(rule, limit) -> int:
        return (others[(others.rule == rule) & (others.limit == limit)].lead >= 200).sum()

    ours = found[(found.rule == RULE) & (found.limit == 10_000)]
    assert round(ours.threshold.iloc[0], 2) == THRESHOLD and (LOGIT, HELD, REST) == (200, 300, 200)
    judged = ours[ours.regime != "built on"]
    for of, words in (
        (ours[ours.regime == "built on"], "on 104 runs with 34 collapses and 292 313 healthy"),
        (judged, "on 272 other runs with 66 collapses and 553 458 healthy"),
    ):
        counts = [int(number.replace(" ", "")) for number in re.findall(r"\d[\d ]*\d", words)]
        assert [len(of), of.lead.count(), of.healthy.sum()] == counts and words in REPORT
    without, norm, logit = "the loss no longer falls", "gradient norm ÷ its median", "largest attention logit"
    assert (announced(RULE, 10_000), announced(without, 10_000)) == (20, 19)
    assert max(announced(rule, 10_000) for rule in set(found.rule) - {RULE}) == 19
    assert (announced(norm, 1000), announced(logit, 1000)) == (40, 39) and "(40 and 39 of 66)" in REPORT
    assert f"{1e4 * judged.false.sum() / judged.healthy.sum():.1f}" == "1.0"
    assert "announces 20 of 66 collapses 200 steps ahead or more, with 1.0 false alarms in 10 000" in REPORT
    first_page = "announces 20 of these 66 at least 200 steps ahead, with 1.0 false alarms in 10 000 steps of runs"
    assert f"judged on others that have 66 collapses, {first_page}" in REPORT
    table = alarms_block("rule").set_index(["rule", "chosen for a false alarm in"])
    for rule, limit, share, chance, rate in (
        (RULE, "10 000 steps", "30%", "6%", "1.0"), (without, "10 000 steps", "29%", "6%", "1.0"),
        ("fall of the stable rank", "1 000 steps", "67%", "57%", "14.5"), (norm, "1 000 steps", "61%", "31%", "6.1"),
        (logit, "1 000 steps", "59%", "32%", "6.4"), ("Jacobian alignment", "10 000 steps", "9%", "1%", "0.1"),
    ):  # fmt: skip
        cells = table.loc[(rule, limit)].map(lambda cell: cell.split(" ")[0])
        assert cells[["share", "share by chance", "false alarms in 10 000 healthy steps"]].tolist() == [
            share,
            chance,
            rate,
        ]
    assert "announces 67 % at 14.5 false alarms in 10 000 steps, where chance announces 57 %" in REPORT
    ahead = (ours.lead >= 200).groupby(ours.regime).sum()
    assert (ahead["ramp, new seeds"], ahead["built on"]) == (
        16,
        21,
    ) and "16 of 32 collapses, against 21 of 34" in REPORT
    programs = others[(others.regime == "other programs") & others.rule.isin([RULE, without])]
    assert programs[programs.rule == RULE].groupby("limit").lead.count().tolist() == [20] * 3
    assert programs.lead.max() < 200
    ends = programs.end[programs.lead.notna()]
    assert (ends.min(), ends.max()) == (388, 890) and "between steps 388 and 890" in REPORT


def test_the_alarm_fails_where_the_report_says():
    found = rings()
    judged = found[(found.rule == RULE) & (found.limit == 10_000) & (found.regime != "built on")]
    stalled = judged[[bool(of) and "attention-off" in of.why for of in judged.collapse]]
    assert len(stalled) == 11 and stalled.lead.max() < 200 and "none of the eleven collapses" in REPORT
    assert ((judged.lead > 0) & (judged.lead < 200)).sum() == 14 and "Fourteen collapses are announced" in REPORT
    high = judged[(judged.wandb_group == "margin") & (judged.lr_scale >= 8)]
    later = judged[judged.lead.notna()]
    assert [of.false.sum() for of in (judged, high, later)] == [56, 20, 9]
    assert "Of its 56 false alarms 20 are in" in REPORT and "9 are in runs that collapse" in REPORT


BACK, HALF = "goes back, and logits move ≤ 1 nat a step", "goes back, and half the rate"


@pytest.fixture(scope="module")
def gone_back():
    """By regime, the arms of runs that go back when the alarm rings and of those that they are compared with."""
    return {regime: arms(of) for regime, of in rescues().groupby("regime", sort=False)}


def test_going_back_saves_the_run_and_not_its_attention(gone_back):
    ramp, none = gone_back.values()
    fell = [{name: of[name].collapsed.sum() for name in ("AdamW", BACK, HALF) if name in of} for of in (ramp, none)]
    assert fell == [{"AdamW": 5, BACK: 0, HALF: 1}, {"AdamW": 5, BACK: 0}]
    assert "ramp or without weight decay (0 of 5 each)" in REPORT
    assert "against 5 of 5 of AdamW (p = 0.008 in each regime" in REPORT
    assert all(len(of[name]) == 5 for of in (ramp, none) for name in of)
    assert "collapses after all (p = 0.048 against AdamW), by the third rule" in REPORT
    assert p_text(fisher_exact([[1, 4], [5, 0]]).pvalue) == "0.048"
    assert "attention-off" in ramp[HALF].collapse[2].why
    for a, b, words, text_p in (
        (ramp[BACK], ramp["AdamW"], "-0.397 ± 0.069", "< 0.001"),
        (none[BACK], none["AdamW"], "-0.238 ± 0.070", "< 0.001"),
        (ramp[BACK], ramp["MSign (attention)"], "0.062 ± 0.040", "0.013"),
        (none[BACK], none["MSign (attention)"], "0.234 ± 0.091", "0.002"),
        (ramp[HALF], ramp[BACK], "0.090 ± 0.064", "0.018"),
    ):  # fmt: skip
        reported(a.loss, b.loss, words, text_p)
    above = [said(of[BACK].above) for of in (ramp, none)]
    below = [said(of[name].below_floor) for name in (BACK, TRUST) for of in (ramp, none)]
    assert "But it ends {} and {} nats above a run with the limit from the first step".format(*above) in REPORT
    assert f"(0 of 5 on the ramp), but ends {above[0]} nats above a run with that limit" in REPORT
    words = (
        "only {} and {} below that of the model without attention; with the limit from the first step it is {} and {}"
    )
    assert words.format(*below) in REPORT and f"({said(ramp[HALF].below_floor)} below)" in REPORT
    means = "{:.2f} (on the ramp) and {:.2f} nats (without weight decay) above those".format(
        *(of[BACK].above.mean() for of in (ramp, none))
    )
    means = f"(0 of {len(ramp[BACK]) + len(none[BACK])}), but these runs ended {means}"
    assert means in " ".join((ROOT / "docs" / "scale.md").read_text().split())


def test_every_run_went_back_to_a_saturated_model(gone_back):
    ramp, none = gone_back.values()
    went = {name: (of, of[arm]) for name, of, arm in (("ramp", ramp, BACK), ("half", ramp, HALF), ("none", none, BACK))}
    early = pd.concat(ramp["AdamW"].end - ramp[name].rang for name in (BACK, HALF))
    assert range_of(early, 0) == "104 to 491" and "104 to 491 steps before AdamW collapses with the same seed" in REPORT
    logits, since = {}, []
    for name, (of, runs) in went.items():
        assert runs.rang.notna().all() and (runs.lost == runs.rang - runs.back_to).all()
        steps = runs.back_to.astype(int)
        series, limited = ([run.series("attention/max_logit") for run in arm.run] for arm in (runs, of[TRUST]))
        at = [[one[step] for one, step in zip(each, steps, strict=True)] for each in (series, limited)]
        logits[name] = [range_of(values, 0) for values in (*at, [one.iloc[-1] for one in series])]
        before = [one.loc[:step] for one, step in zip(series, steps, strict=True)]
        since += [one[one <= LOGIT].index.max() + 50 for one in before]
    assert range_of(since, 0) == "450 to 550" and "stays above 200 from steps 450 to 550 on" in REPORT
    assert [range_of(went[name][1].back_to, 0) for name in went] == ["1000 to 1500"] * 2 + ["2000 to 3500"]
    assert "checkpoints are those of steps 1000 to 1500 on the ramp and 2000 to 3500 without decay" in REPORT
    assert logits["ramp"][:2] == logits["half"][:2] == ["762 to 1271", "32 to 52"]
    assert logits["none"][:2] == ["951 to 1688", "42 to 55"]
    assert "largest logit is 762 to 1271 and 951 to 1688" in REPORT and "32 to 52 and 42 to 55 at the same" in REPORT
    ends = "616 to 1073", "392 to 1015", "780 to 1543"
    assert tuple(of[2] for of in logits.values()) == ends
    assert "is {0} on the ramp and {2} without decay, with half the rate {1}".format(*ends) in REPORT


def test_every_grid_of_runs_that_go_back_is_a_file_of_the_repository():
    for *_, grid in RESCUES.values():
        axes = read_grid(ROOT / "configs" / "sweeps" / f"{grid}.py", [])
        assert {run.arm for run in packed(grid)} <= set(axes["arm"])
        assert sorted({run.config["seed"] for run in packed(grid)}) == axes["seed"]
        assert all(run.config["on_alarm"] in ("remedy", "half_rate") for run in packed(grid))
        assert all(run.code["dirty"] is False and len(run.steps) == run.config["max_steps"] for run in packed(grid))


# in the final loss against MSign, with its p-value; the range of stable ranks at the end
SIGMA = {
    "MSign (attention)": ("", None, "3.2 to 3.7"),
    "QK-norm": ("-0.509 ± 0.024", "< 0.001", "2.7 to 3.1"),
    "attention's lr ÷ 16": ("-0.666 ± 0.011", "< 0.001", "2.2 to 2.3"),
}
LLAMA = {
    "MSign (attention)": ("", None, "13.3 to 14.2"),
    "QK-norm": ("-0.189 ± 0.018", "< 0.001", "6.3 to 6.5"),
    "attention's lr ÷ 16": ("-0.183 ± 0.013", "< 0.001", "5.3 to 5.5"),
}
MSIGN_ADAMW = {"Sigma": ("-0.241 ± 0.056", "< 0.001"), "LLaMA": ("-0.090 ± 0.272", "0.41")}


@pytest.fixture(scope="module")
def models():
    return dict(iter(architectures().groupby("model", sort=False)))


def test_sigma_collapses_unless_logits_are_bounded_and_llama_in_two_of_five(models):
    fell = {}
    for name, of in models.items():
        fell[name] = of.groupby("arm", sort=False)["collapsed"].agg(["sum", "count"]).T.to_dict("list")
    quiet = {"QK-norm": [0, 5], "attention's lr ÷ 16": [0, 5]}
    assert fell == {
        "Sigma": {"AdamW": [5, 5], "MSign (attention)": [1, 5], "attention off": [2, 5], **quiet},
        "LLaMA": {"AdamW": [2, 5], "MSign (attention)": [0, 5], "attention off": [0, 5], **quiet},
    }
    chance = [p_text(fisher_exact([[a, 5 - a], [b, 5 - b]]).pvalue) for a, b in ((5, 0), (5, 1), (2, 0))]
    assert chance == ["0.008", "0.048", "0.44"]
    assert "for attention in 0 of 5 (p = 0.008, Fisher's exact test), MSign in 1 of 5 (p = 0.048)" in REPORT
    assert (
        "in 2 of 5 runs and every other arm in 0 of 5, a difference that chance explains as well (p = 0.44)" in REPORT
    )
    assert "AdamW collapses in 5 of 5 runs of Sigma and in 2 of 5 of LLaMA" in REPORT
    ramps = remedies().query("regime != 'no decay'")
    shares = (ramps.lr_multiple / ramps.lr_scale)[ramps.collapsed]
    assert range_of(shares[ramps.arm == "AdamW"], 2) == "0.55 to 1.00" and "crosses lie at 0.55 to 1." in REPORT
    assert shares[ramps.arm != "AdamW"].tolist() == [1.0] and ramps.lr_scale.unique().tolist() == [5, 20]
    sigma, llama = (arms(of) for of in models.values())
    at_top = pd.concat(sigma[arm].query("collapsed") for arm in ("MSign (attention)", "attention off"))
    assert at_top.lr_multiple.tolist() == [5.0] * 3 and "MSign's collapse comes at the top of the ramp" in REPORT
    rises = [" ".join(of.why.split(" ")[3:7]) for of in at_top.collapse]
    assert "rises {} and {} at the top of the ramp".format(*rises[1:]) in REPORT
    above = llama["MSign (attention)"].loss - llama["AdamW"].loss
    fallen = llama["AdamW"].collapsed
    below = "{:.2f} and {:.2f} nats below the two AdamW runs that collapse".format(*-above[fallen])
    assert f"{below} and {range_of(above[~fallen], 2)} above the three that do not" in REPORT
    for name, of, words in (("Sigma", sigma, SIGMA), ("LLaMA", llama, LLAMA)):
        reported(of["MSign (attention)"].loss, of["AdamW"].loss, *MSIGN_ADAMW[name])
        for arm, (difference, p, srank) in words.items():
            if difference:
                reported(of[arm].loss, of["MSign (attention)"].loss, difference, p)
            assert range_of(of[arm].srank, 1) == srank and srank in REPORT


def test_the_stable_rank_does_not_move_in_other_architectures_either(models):
    runs = pd.concat(models.values())
    moved_at_all = runs[[of.signals["stable rank"] is not None for of in runs.onsets]]
    assert set(moved_at_all.model + moved_at_all.arm) == {"Sigmaattention's lr ÷ 16"} and len(moved_at_all) == 5
    assert not any("stable rank" in of.first for of in runs.onsets)
    first = Counter(name for names in runs[runs.arm == "AdamW"]["first"] for name in names)
    assert first == {"first-block gain": 6, "attention logits": 4}
    assert "first in six of AdamW's ten runs, the attention logits in four" in REPORT
    logits = [of.signals["attention logits"] for of in runs[runs.arm == "AdamW"].onsets]
    assert (min(logits), max(logits)) == (650, 2200) and "between steps 650 and 2200" in REPORT


def test_a_limited_step_ends_lowest_on_the_ramps_and_not_without_decay():
    runs = remedies()
    others = [arm for arm in runs["arm"].unique() if arm != TRUST]
    for regime, of in runs.groupby("regime", sort=False):
        assert (of["arm"] == TRUST).sum() == 5 and not of.loc[of["arm"] == TRUST, "collapsed"].any()
        for arm in others:
            above = of.loc[of["arm"] == arm, "above"].dropna()
            assert (above > 0).all() if regime != "no decay" or arm == "AdamW" else True, (regime, arm)
    assert (
        REPORT.count("(0 of 5 on each)") == 2 and REPORT.count("too (0 of 5), but QK-norm ends 0.04 ± 0.02 nats") == 1
    )
    above = {of: said(runs["above"]) for of, runs in runs.groupby(["regime", "arm"])}
    ramps = ("ramp", "Sigma, ramp", "LLaMA, ramp")
    sixteenth, qk_norm = ([above[ramp, arm] for ramp in ramps] for arm in ("attention's lr ÷ 16", "QK-norm"))
    assert "ends {} (NanoGPT), {} (Sigma) and {} nats (LLaMA) above".format(*sixteenth) in REPORT
    assert "QK-norm {}, {} and {}. **Without weight decay".format(*qk_norm) in REPORT
    none = [above["no decay", arm].removeprefix("-") for arm in ("QK-norm", "attention's lr ÷ 16")]
    assert "QK-norm ends {} nats below it and the sixteenth of the rate {}.".format(*none) in REPORT
    of_msign = above["ramp", "MSign (attention)"]
    assert f"in NanoGPT {of_msign} nats below MSign and {qk_norm[0]} below QK-norm (n = 5)" in REPORT
    ramp = [frame(grid, off="attention_off") for grid in GRIDS if grid not in ("margin", "late_seeds", "late_controls")]
    lowest = pd.concat([of[(of["lr_scale"] == 5) & (of["max_steps"] == 3000)] for of in ramp]).groupby("arm")["loss"]
    assert lowest.mean().min() > runs.query("regime == 'ramp' and arm == @TRUST")["loss"].mean()


def test_a_limited_step_costs_nothing_at_constant_rates():
    runs, sixteenth = constant_rates(), "attention's lr ÷ 16"
    table = margin_table(runs).set_index("arm")
    assert (table["n"] == "7 × 3").all() and table.loc[TRUST, "no collapse up to × lr"] == "16"
    assert f"The limit's best loss, at {table.loc[TRUST, 'at × lr']} times the paper's rate" in REPORT
    losses = runs.pivot(index="seed", columns=["arm", "lr_scale"], values="loss")
    best = losses.T.groupby(level="arm").min().T
    for arm, words, text_p in (
        ("AdamW", "-0.208 ± 0.068", "0.006"), ("QK-norm", "-0.179 ± 0.060", "0.006"),
        (sixteenth, "-0.003 ± 0.041", "0.77"),
    ):  # fmt: skip
        reported(best[TRUST], best[arm], words, text_p)
    for rate, arm, words, text_p in (
        (0.25, "AdamW", "-0.017 ± 0.007", "0.008"), (4, sixteenth, "0.008 ± 0.030", "0.35"),
        (16, sixteenth, "-0.073 ± 0.037", "0.014"), (16, "QK-norm", "-0.201 ± 0.042", "0.002"),
    ):  # fmt: skip
        reported(losses[TRUST, rate], losses[arm, rate], words, text_p)
    lowest = losses.mean().unstack("arm").idxmin(axis=1)
    assert lowest.pop(4) == sixteenth and (lowest == TRUST).all() and len(lowest) == 6
    sensitivity = table["sensitivity, nats"].map(lambda cell: cell.split(" ")[0])
    assert sensitivity.astype(float).idxmin() == "QK-norm"
    assert f"({sensitivity['QK-norm']} nats against the limit's {sensitivity[TRUST]}; three seeds do" in REPORT
