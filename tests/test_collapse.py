import math

import pytest

from collapse import Watch, final_loss, find_collapse


def curve(*pieces):
    """Losses: (steps, value) pieces one after the other."""
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
