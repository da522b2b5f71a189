"""What else could be done to a weight matrix every P steps: the controls of MSign.

Each takes a stack (..., m, n), returns one of the same shape and dtype, and can replace `msign.restored_sign` as MSign's
update. With r = min(m, n), MSign makes every singular value of a matrix of full rank ‖W‖_F / √r.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import msign


def zero(W: Tensor) -> Tensor:
    """0: the attention-off control, which shows what a rescue is worth."""
    return torch.zeros_like(W)


def scaled(W: Tensor) -> Tensor:
    """W itself, with the spectral norm that MSign would give it: ‖W‖₂ = ‖W‖_F / √r. Its stable rank stays."""
    s = torch.linalg.svdvals(W.float())
    norm, largest = torch.linalg.vector_norm(s, dim=-1), s[..., 0]
    ratio = norm / math.sqrt(s.shape[-1]) / largest.clamp_min(torch.finfo(s.dtype).tiny)
    return (W * ratio[..., None, None]).to(W.dtype)


def _with_spectrum(W: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    U, s, Vh = torch.linalg.svd(W.float(), full_matrices=False)
    return ((U * change(s).unsqueeze(-2)) @ Vh).to(W.dtype)


def clipped(W: Tensor) -> Tensor:
    """Singular values above ‖W‖_F / √r are set to it, the others stay: MSign's spectral norm, W's directions and small values."""
    return _with_spectrum(W, lambda s: s.clamp(max=s.square().mean(-1, keepdim=True).sqrt()))


def softened(W: Tensor) -> Tensor:
    """Singular values s -> √s, scaled to keep ‖W‖_F: half of the way, on a log scale, to MSign's."""
    return _with_spectrum(
        W, lambda s: s.sqrt() * (s.square().sum(-1, keepdim=True) / s.sum(-1, keepdim=True).clamp_min(1e-30)).sqrt()
    )


def random(W: Tensor) -> Tensor:
    """‖W‖_F / √r · a random matrix with orthonormal rows or columns: MSign's spectrum, with nothing kept of what W has learnt.

    W itself is the seed, so that a run which is resumed draws the same.
    """
    out = torch.empty_like(W)
    for M, new in zip(W.reshape(-1, *W.shape[-2:]), out.view(-1, *W.shape[-2:]), strict=True):
        seed = int(M.detach().cpu().float().contiguous().view(torch.int32).long().sum()) % 2**32
        noise = torch.randn(M.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        new.copy_(msign.msign(noise) * (torch.linalg.matrix_norm(M.detach().cpu().double()) / math.sqrt(min(M.shape))))
    return out


def below(threshold: float, update: Callable[[Tensor], Tensor], W: Tensor) -> Tensor:
    """`update` of the matrices whose stable rank is below the threshold, the others as they are."""
    s = torch.linalg.svdvals(W.float())
    ranks = s.square().sum(-1) / s[..., 0].square().clamp_min(torch.finfo(s.dtype).tiny)
    low = ranks < threshold
    out = W.clone()
    if low.any():
        out[low] = update(W[low])
    return out


MAPS = {"zero": zero, "scale": scaled, "clip": clipped, "soft": softened, "random": random}


def update_of(map: str, backend: str, threshold: float) -> Callable[[Tensor], Tensor]:
    """MSign's update for a configuration's msign_map, msign_backend and msign_below."""
    update = MAPS[map] if map in MAPS else partial(msign.restored_sign, backend=backend)
    return partial(below, threshold, update) if threshold else update
