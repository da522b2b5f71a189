"""The controls of MSign: what else could be done to a weight matrix every P steps.

A control takes a stack of matrices W (..., m, n) and returns one of the same shape and dtype, so it can replace
`msign.restored_sign` as the update of MSign. With r = min(m, n), MSign sets every singular value of a matrix of full
rank to ‖W‖_F / √r; some controls share this value with MSign.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import msign


def zero(W: Tensor) -> Tensor:
    """Zero. On attention this is the attention-off run. Its final loss is the floor, the loss without attention."""
    return torch.zeros_like(W)


def scaled(W: Tensor) -> Tensor:
    """W times a number, such that its spectral norm is MSign's, ‖W‖_F / √r. The stable rank does not change."""
    s = torch.linalg.svdvals(W.float())
    norm, largest = torch.linalg.vector_norm(s, dim=-1), s[..., 0]
    ratio = norm / math.sqrt(s.shape[-1]) / largest.clamp_min(torch.finfo(s.dtype).tiny)
    return (W * ratio[..., None, None]).to(W.dtype)


def _with_spectrum(W: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """W with singular values change(s) in place of its own, s (..., r)."""
    U, s, Vh = torch.linalg.svd(W.float(), full_matrices=False)
    return ((U * change(s).unsqueeze(-2)) @ Vh).to(W.dtype)


def clipped(W: Tensor) -> Tensor:
    """W with its singular values limited to ‖W‖_F / √r, which is MSign's spectral norm."""
    return _with_spectrum(W, lambda s: s.clamp(max=s.square().mean(-1, keepdim=True).sqrt()))


def softened(W: Tensor) -> Tensor:
    """W with singular values √s in place of s, rescaled to keep ‖W‖_F: on a log scale, halfway to MSign's spectrum."""

    def roots(s: Tensor) -> Tensor:
        # √s has the norm √Σs, and W has √Σs²
        return s.sqrt() * (s.square().sum(-1, keepdim=True) / s.sum(-1, keepdim=True).clamp_min(1e-30)).sqrt()

    return _with_spectrum(W, roots)


def random(W: Tensor) -> Tensor:
    """A random matrix with orthonormal rows or columns, times ‖W‖_F / √r: MSign's spectrum without anything learnt.

    The seed is computed from W, so a resumed run draws the same matrix.
    """
    out = torch.empty_like(W)
    for M, new in zip(W.reshape(-1, *W.shape[-2:]), out.view(-1, *W.shape[-2:]), strict=True):
        # the sum of the bit patterns of M's entries
        seed = int(M.detach().cpu().float().contiguous().view(torch.int32).long().sum()) % 2**32
        noise = torch.randn(M.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        norm = torch.linalg.matrix_norm(M.detach().cpu().double())
        new.copy_(msign.msign(noise) * (norm / math.sqrt(min(M.shape))))
    return out


def below(threshold: float, update: Callable[[Tensor], Tensor], W: Tensor) -> Tensor:
    """W with `update` applied to those of its matrices whose stable rank is below the threshold."""
    s = torch.linalg.svdvals(W.float())
    ranks = s.square().sum(-1) / s[..., 0].square().clamp_min(torch.finfo(s.dtype).tiny)
    low = ranks < threshold
    out = W.clone()
    if low.any():
        out[low] = update(W[low])
    return out


MAPS = {"zero": zero, "scale": scaled, "clip": clipped, "soft": softened, "random": random}


def update_of(map: str, backend: str, threshold: float) -> Callable[[Tensor], Tensor]:
    """The update that MSign uses for a configuration's msign_map, msign_backend and msign_below (0 = no threshold)."""
    update = MAPS[map] if map in MAPS else partial(msign.restored_sign, backend=backend)
    return partial(below, threshold, update) if threshold else update
