"""Measurements of a model that never change it: the spectra of its weight matrices."""

import math
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor


@torch.no_grad()
def stable_ranks(params: Mapping[str, Tensor]) -> dict[str, float]:
    """srank(W) = ‖W‖_F² / ‖W‖₂² (Def. 3.1) of every matrix of {name: (..., m, n)}, between 1 and min(m, n).

    Exact to fp64: the trace and the largest eigenvalue of the smaller Gram matrix, batched by shape.
    NaN where it is undefined (a zero or non-finite matrix); the mean over leading dimensions if there are any.
    """
    stacks = defaultdict(dict)
    for name, W in params.items():
        stacks[W.shape, W.device][name] = W
    out = {}
    for named in stacks.values():
        W = torch.stack(list(named.values()))
        W = W.cpu().double() if W.device.type == "mps" else W.double()
        gram = W @ W.mT if W.shape[-2] < W.shape[-1] else W.mT @ W
        bad = ~torch.isfinite(gram).all(dim=(-2, -1))
        lam = torch.linalg.eigvalsh(torch.where(bad[..., None, None], 0.0, gram))
        srank = lam.clamp_min(0).sum(-1) / lam[..., -1]  # 0 / 0 is the NaN that is wanted
        out.update(zip(named, srank.flatten(1).mean(1).tolist() if srank.ndim > 1 else srank.tolist(), strict=True))
    return {name: out[name] for name in params}


def geometric_mean(values) -> float:
    """exp(mean log) of the finite positive values, NaN when there are none."""
    logs = [math.log(v) for v in values if v > 0 and math.isfinite(v)]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan
