import math

import pytest

from stability.collapse import Watch, final_loss, find_collapse, find_onsets, onset


def curve(*pieces):
    """Losses made of (steps, value) pieces, one after the other."""
    return [value for steps, value in pieces for _ in range(steps)]


def test_a_rise_that_stays_is_dated_to_its_start():
    losses = curve((500, 2.5), (400, 2.8))
    found = find_collapse(losses, [1.0] * 900)
    # the 100-step mean is 0.1 up when a third of the window is past step 500
    assert found.step == 500 + 34
    assert found.noticed == found.step + 200
    assert "rose from 2.50" in found.why


@pytest.mark.parametrize(
    "losses",
    [
        curve((900, 2.5)),
        curve((500, 2.5), (400, 2.59)),  # not high enough
        curve((500, 2.5), (120, 2.8), (400, 2.5)),  # comes back
        curve((500, 2.5), (200, 2.8)),  # not long enough
        [5 - i / 200 for i in range(900)],
    ],
)
def test_no_collapse(losses):
    assert find_collapse(losses, [1.0] * len(losses)) is None


def test_not_finite_wins_and_is_never_healthy_again():
    watch = Watch()
    for _ in range(50):
        assert watch.add(2.0, 1.0) is None
    assert watch.add(2.0, math.inf).step == 51
    assert watch.suspicious
    assert not watch.finite
    assert watch.add(2.0, 1.0).step == 51
    assert find_collapse([1.0, None], [1.0, 1.0]).why == "the loss is not finite"
    assert str(find_collapse([1.0, 1.0], [1.0, 1.0], not_finite="W is not finite")) == (
        "collapsed at step 2: W is not finite"
    )
    rose = [2.0] * 300 + [4.0] * 400
    assert find_collapse(rose, [1.0] * 700, not_finite="W is not finite") == find_collapse(rose, [1.0] * 700)


def test_suspicious_only_while_the_loss_is_up():
    watch = Watch()
    seen = []
    for loss in curve((300, 2.5), (100, 2.8), (300, 2.5)):
        watch.add(loss, 1.0)
        seen.append(watch.suspicious)
    assert not seen[299]
    assert seen[399]
    assert not seen[-1]


def test_stalled_needs_both_a_spike_and_a_loss_above_the_floor():
    losses, calm = curve((600, 2.5)), [1.0] * 600
    spiky = list(calm)
    spiky[40] = spiky[300] = 11.0  # the first lies in warm-up and does not count
    assert find_collapse(losses, spiky, floor=2.4).step == 301
    assert "1 gradient norms beyond 10x" in find_collapse(losses, spiky, floor=2.4).why
    assert find_collapse(losses, spiky, floor=2.6) is None
    assert find_collapse(losses, spiky) is None
    assert find_collapse(losses, calm, floor=2.4) is None


def test_final_loss():
    assert final_loss(curve((500, 9.0), (100, 2.0))) == 2.0
    assert final_loss([1.0, None]) == math.inf


def made_up(n=1000, **series):
    """Metrics of n steps: gradient norm from `grad_norm(step)`, every other series at its steps {step: value}."""
    grad_norm = series.pop("grad_norm", lambda step: 1.0)
    lines = [{"iter": step, "grad_norm": grad_norm(step)} for step in range(1, n + 1)]
    for key, values in series.items():
        for step, value in values.items():
            lines[step - 1][key.replace("__", "/")] = value
    return lines


def test_what_moved_first_and_by_how_much():
    steps = range(100, 1001, 100)
    lines = made_up(
        grad_norm=lambda step: 1.0 if step <= 600 else 4.0,
        # less than half at 200 and again at 400; 200 lies in the first quarter, which does not count
        srank__attention={s: 40.0 if s < 200 else 10.0 if s < 400 else 4.0 for s in steps},
        attention__max_logit={
            s: 5.0 * 2 ** (s / 295) for s in steps
        },  # at 600 twice the first value that counts, at 300
        log_z={s: 4.0 + (s >= 800) for s in steps},
        residual__gain={s: 9.0 if s == 500 else 2.0 for s in steps},  # up once and back: has not moved
        precision__error={s: 1e-6 * 1.9 ** (s == 1000) for s in steps},  # not by a factor of two
    )
    got = find_onsets(lines)
    assert got.signals == {
        "stable rank": 400, "Jacobian alignment": None, "attention logits": 600, "log Z": 800,
        "first-block gain": None, "precision": None,
    }  # fmt: skip
    assert got.grad_norm == 650  # the median of the last 100 steps has grown
    assert got.first == ["stable rank"]
    assert [got.lead(s) for s in ("stable rank", "attention logits", "log Z", "precision")] == [250, 50, -150, None]
    assert str(got) == "stable rank moved first, at step 400; 250 steps before the gradient norm"
    before = find_onsets(lines, until=390)
    # the first quarter up to a collapse at 390 ends before 200
    assert (before.signals["stable rank"], before.grad_norm) == (200, None)
    assert str(find_onsets(made_up(n=400))) == "nothing moved"


def test_signals_that_move_together_are_both_named():
    got = find_onsets(
        made_up(srank__attention={300: 8.0, 500: 3.0, 700: 3.0}, residual__gain={300: 1.0, 500: 2.5, 700: 2.5})
    )
    assert got.first == ["stable rank", "first-block gain"]
    assert str(got) == "stable rank and first-block gain moved first, at step 500; the gradient norm never did"


def test_a_signal_counts_against_its_best_so_far():
    """A signal that improves and then falls back by half has moved, even if it ends no worse than it began."""
    worse = [0.0, -1.0, -2.0, -2.0, -1.2, -1.2]
    assert onset([100, 200, 300, 400, 500, 600], worse) == 500
    assert onset([100, 200, 300, 400, 500, 599], worse) is None  # the next measurement may tell otherwise
    assert onset([100, 200, 300, 400], [0.0, 0.6, 0.69, 0.69]) is None
    assert onset([], []) is None
