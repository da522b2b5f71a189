"""scripts/soak.py: a short run is watched; and it would see what grows."""

import numpy as np
import pandas as pd
import pytest

from config import UserError
from tests.conftest import refused
from tests.test_faults import FORKING
from trials.place import Place
from trials.soak import judge, watch


def flat(steps) -> pd.DataFrame:
    """Samples of a run in which nothing grows."""
    step = np.array(steps)
    return pd.DataFrame(
        {"step": step, "seconds": step / 10, "memory": 700.0, "files": 6, "log": 6000 * step, "disk": 0.2}
    )


def test_nothing_grows_in_a_short_run(tmp_path, monkeypatch):
    monkeypatch.setattr("trials.soak.subprocess", FORKING)
    samples = watch(Place(tmp_path), 60, interval=0.1)
    assert samples.step.iloc[-1] <= 60 and samples.log.iloc[-1] > 60_000
    said, _ = judge(samples.assign(seconds=samples.step / 10))  # this machine's pace is no test
    verdicts = [line.split("|")[-2].strip() for line in said.splitlines() if line.startswith("|")][2:]
    assert verdicts == ["yes"] * 5


@pytest.mark.parametrize(
    "what, value",
    [
        ("memory", lambda s: 700 + 0.06 * s.step),
        ("files", lambda s: 6 + s.step // 500),
        ("disk", lambda s: 0.2 + 0.0001 * s.step),
        ("log", lambda s: s.step**1.2),
        ("seconds", lambda s: s.step**1.3),
    ],
)
def test_what_grows_is_seen(what, value):
    samples = flat(range(1, 1000, 3))
    assert judge(samples)[1]
    said, ok = judge(samples.assign(**{what: value}))
    assert not ok and said.count("| no ") == 1


def test_too_short_to_see_is_refused(tmp_path):
    refused("scripts/soak.py", "--steps=10", says="'10': must be a whole number of 100 or more")
    with pytest.raises(UserError, match="must be more"):
        judge(flat([1, 500, 1000]))


def test_a_run_that_fails_says_why(tmp_path):
    place = Place(tmp_path)
    place.config.write_text(place.config.read_text() + "lr = -1.0\n")
    with pytest.raises(UserError, match=r"the run failed: train.py: error: lr = -1\.0"):
        watch(place, 100)
