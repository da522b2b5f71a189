import math

import pytest
import torch

from probes import geometric_mean, stable_ranks


def test_stable_rank_is_its_definition():
    g = torch.Generator().manual_seed(0)
    named = {
        f"W{i}": torch.randn(shape, generator=g) for i, shape in enumerate([(8, 8), (8, 8), (32, 8), (8, 32), (1, 5)])
    }
    named["low"] = torch.randn(8, 2, generator=g) @ torch.randn(2, 8, generator=g)
    for name, srank in stable_ranks(named).items():
        s = torch.linalg.svdvals(named[name].double())
        assert srank == pytest.approx(float((s**2).sum() / s[0] ** 2), rel=1e-9)
    assert list(stable_ranks(named)) == list(named)


def test_known_values_and_undefined_ones():
    ranks = stable_ranks({
        "identity": torch.eye(6), "rank one": torch.ones(4, 6), "zero": torch.zeros(3, 3),
        "nan": torch.full((3, 3), math.nan), "experts": torch.stack([torch.eye(4), torch.ones(4, 4)]),
    })  # fmt: skip
    assert ranks["identity"] == pytest.approx(6)
    assert ranks["rank one"] == pytest.approx(1)
    assert ranks["experts"] == pytest.approx(2.5)
    assert math.isnan(ranks["zero"])
    assert math.isnan(ranks["nan"])


def test_geometric_mean():
    assert geometric_mean([1, 4, 16]) == pytest.approx(4)
    assert geometric_mean([math.nan, 0.0, 3.0]) == pytest.approx(3)
    assert math.isnan(geometric_mean([]))
