"""The alarm of stability/alarm.py: when it rings, when it does not, and what it forgets nothing of."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import alarms
from analysis.report import packed
from stability.alarm import HELD, LOGIT, REST, THRESHOLD, Alarm, CollapseAlarm
from stability.collapse import WINDOW


def run_of(steps=1500, falls_to=700, rises=0.002, logit=400.0, scale=1.0, shift=0.0):
    """Lines of a run whose loss falls by 0.002 a step up to step `falls_to` and then changes by `rises` a step."""
    losses = [3 - 0.002 * min(t, falls_to) + rises * max(t - falls_to, 0) + 0.25 * (t % 2) for t in range(1, steps + 1)]
    lines = [{"iter": t, "train/loss": scale * loss + shift} for t, loss in enumerate(losses, 1)]
    for line in lines[24::25]:
        line["attention/max_logit"] = logit
    return lines


def rings(lines, alarm=None):
    alarm = alarm or CollapseAlarm()
    return [ring for line in lines if (ring := alarm.update(line["iter"], line))]


def test_it_rings_soon_after_the_loss_of_a_saturated_run_turns_and_again_after_its_rest():
    first, second, *_ = rings(run_of())
    assert isinstance(first, Alarm) and 700 < first.step < 850 and second.step == first.step + REST
    assert first.rise > 0.5 and "largest logit 400" in str(first) and f"step {first.step}" in str(first)


@pytest.mark.parametrize(
    "healthy", [{"rises": -0.002}, {"rises": 0.0}, {"logit": LOGIT}, {"logit": None}, {"logit": math.inf}], ids=str
)
def test_it_does_not_ring_where_the_loss_falls_or_stands_or_attention_is_not_saturated(healthy):
    assert rings(run_of(**healthy)) == []


def test_one_measurement_of_a_small_logit_starts_the_wait_anew():
    lines = run_of()
    first = rings(lines)[0].step
    lines[first - 50 - first % 25 - 1]["attention/max_logit"] = LOGIT
    assert rings(lines)[0].step == first - 25 - first % 25 + HELD


def test_what_is_not_finite_is_skipped_as_if_it_had_not_been_logged():
    lines = run_of()
    expected = rings(lines)
    for value in (None, math.nan, math.inf):
        extra = {"iter": 10, "train/loss": value, "attention/max_logit": value}
        assert rings([line for pair in lines for line in (pair, extra | {"iter": pair["iter"]})]) == expected


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 1499), st.floats(-0.002, 0.004))
def test_a_resumed_alarm_and_a_prefix_ring_as_the_whole_does(cut, rises):
    """It looks at no later line, and its state, as JSON, is all that it remembers."""
    lines = run_of(rises=rises)
    whole = rings(lines)
    first, second = CollapseAlarm(), CollapseAlarm(threshold=9.0)
    before = rings(lines[:cut], first)
    assert before == [ring for ring in whole if ring.step <= cut]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + rings(lines[cut:], second) == whole


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([2.0**-9, 2.0, 2.0**12]), st.floats(-0.002, 0.004))
def test_the_unit_of_the_loss_does_not_matter(scale, rises):
    steps = [ring.step for ring in rings(run_of(rises=rises))]
    assert [ring.step for ring in rings(run_of(rises=rises, scale=scale))] == steps


def test_a_constant_added_to_the_loss_does_not_matter():
    steps = [ring.step for ring in rings(run_of())]
    assert steps and [ring.step for ring in rings(run_of(shift=10.0))] == steps


def test_constant_losses_do_not_ring():
    lines = [{"iter": t, "loss": 2.0, "attention/max_logit": 900.0} for t in range(1, 3 * WINDOW + HELD)]
    alarm = CollapseAlarm()
    assert rings(lines, alarm) == [] and alarm.rise == 0.0


def test_of_recorded_runs_it_rings_before_adamw_collapses_and_never_with_qk_norm():
    """Runs of the part that the rule was built on."""
    adamw, qk_norm = (
        next(run for run in packed(grid) if run.arm == arm and run.config["seed"] == 0)
        for grid, arm in (("table2_small", "AdamW"), ("controls", "QK-norm"))
    )
    logged = [run.steps.reset_index().to_dict("records") for run in (adamw, qk_norm)]
    rang, silent = map(rings, logged)
    assert 2022 - 1000 <= rang[0].step <= 2022 - 200 and silent == []


@pytest.mark.parametrize("threshold", [0.0, THRESHOLD])
def test_what_is_judged_on_recorded_runs_rings_where_the_alarm_does(threshold):
    """Of alarms.py, which calculates with arrays: on runs that collapse, and that do not, to their last steps."""
    for run in packed("table2_small") + packed("late_controls")[::4]:
        frame = pd.DataFrame([{"run": run, "collapsed": False, "end": len(run.steps)}])
        steps = [ring.step for ring in rings(run.steps.reset_index().to_dict("records"), CollapseAlarm(threshold))]
        assert alarms.Bells(frame, alarms.RULE).rung(threshold)[0] == [len(steps)]
        high = np.flatnonzero(alarms.scores(run)[alarms.RULE] > threshold) + 1
        assert set(steps) <= set(high) and (not steps or steps[0] == high[0])


def test_a_ring_is_a_false_alarm_or_has_a_lead_and_silences_no_other_run():
    """Three runs of 1500 steps: one does not collapse, one does, and one does without a ring."""
    runs = packed("table2_small")[:3]
    scores = [np.full(1500, math.nan) for _ in runs]
    scores[0][[0, 199, 200, 1499]] = 1.0  # steps 1 and 201, for 200 is silent, and the last one
    scores[1][[0, 399, 499, 599, 1450]] = 1.0  # the collapse at step 1450 is announced from step 450 on
    frame = pd.DataFrame({"run": runs, "collapsed": [False, True, True], "end": [1500, 1450, 1450]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alarms, "scores", lambda run: {"rule": scores[runs.index(run)]})
        false, leads = alarms.Bells(frame, "rule").rung(0.5)
        assert false.tolist() == [3, 2, 0] and np.array_equal(leads, [math.nan, 850, 0], equal_nan=True)
        assert alarms.Bells(frame, "rule").rung(1.0)[0].tolist() == [0, 0, 0]
