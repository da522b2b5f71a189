"""A ceiling for attention: after every step, a bound of each head's logits that needs no data is kept below a limit.

    optimizer = LogitClip(torch.optim.AdamW(model.parameters()), model, limit=25.0)

A head's logits are (W_Q x)ᵀ(W_K y) / √k, with W_Q and W_K its k rows of the matrices and inputs x, y of root mean
square 1, as a norm without gains and biases returns them. With n inputs, ‖x‖ = √n, so that no logit exceeds the bound
n / √k · ‖W_QᵀW_K‖₂. (Gains g raise it up to max g² times.) A head whose bound exceeds the limit is brought back to it:

    "clip"   only the singular values of W_QᵀW_K that exceed the limit are brought to it. W_Q and W_K each take the
             square root of the reduction. The product's singular vectors and its other singular values stay.
    "scale"  W_Q and W_K are multiplied by √(limit / bound), as QK-clip does (arXiv 2507.20534), which takes the largest
             logit of a batch instead of the bound.

RoPE puts a rotation between W_Q and W_K, and the bound is then n / √k · ‖W_Q‖₂ ‖W_K‖₂. "clip" limits the singular
values of each matrix to √(limit / bound) times its largest one.

Where several heads of queries share one head of keys, W_K stays, and W_Q takes the whole reduction.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from msign import Layout, Target, Wrapper, _local, find
from remedies.trust import KEYS, QUERIES, _here, modules_of

MAPS = ("clip", "scale")


class _Heads(NamedTuple):
    """The queries or the keys of one attention module: their parameter, their role in it, and the number of heads."""

    target: Target
    role: str
    number: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(number, k, n): heads, a head's rows, inputs."""
        layout, p = self.target.layout, self.target.parameter
        rows = layout.groups * dict(layout.parts)[self.role]
        return self.number, rows // self.number, p.shape[-2 if layout.transposed else -1]

    def rows(self, W: Tensor) -> Tensor:
        """Every head's rows of the matrix, (number, k, n), in fp64; on the CPU if on MPS, which has none."""
        W = W.unflatten(-2, (self.number, -1))
        return (W.cpu() if W.device.type == "mps" else W).double()

    def gram(self) -> Tensor:
        """The products of every head's rows with one another, (number, k, k). Shards are gathered."""
        W = self.rows(self.target.matrices()[self.role])
        return W @ W.mT

    def multiply(self, T: Tensor, heads: Tensor):
        """Multiply the rows of N heads, which are true in `heads` (number,), by T (N, k, k) from the left."""
        p, layout = self.target.parameter, self.target.layout
        every = replace(self.target, roles=layout.roles).matrices()  # a fused weight may hold others than attention's
        W = self.rows(every[self.role])
        rows = W.index_put((heads,), T @ W[heads]).flatten(0, 1).to(p.device, p.dtype)
        _local(p).copy_(layout.join(every | {self.role: rows})[_here(self.target)])


class LogitClip(Wrapper):
    """An optimizer that steps as `base` does and then brings back every head whose logits could exceed `limit`.

    base:    the optimizer that does the steps; its state is left alone.
    model:   the module whose attention is meant. `msign.find` finds its matrices; `split` tells it how weights that it
             does not know are fused. Weights may be sharded by rows (FSDP2, HSDP); then W_Q and W_K are gathered at
             every step.
    limit:   the largest logit of inputs of root mean square 1, in nats.
    how:     "clip" or "scale".
    power:   the logits are divided by the width k of a head's queries to this power.
    rotated: whether the model has RoPE.

    The attribute `factors` holds what the bounds were multiplied by after the last step, limit over bound and at most
    1: {name of an attention module: a tensor (h,) with a factor per head of queries}. A head whose weights are not
    finite is left alone, and its factor is NaN. The constructor raises ValueError for a limit of 0 or less, for another
    `how`, for an attention module whose number of heads is unknown, which lacks queries or keys, or whose keys have a
    part that all heads share, and for what `msign.find` refuses. The state_dict is that of `base`.
    """

    def __init__(
        self,
        base: Optimizer,
        model: nn.Module,
        limit: float,
        how: str = "clip",
        power: float = 0.5,
        rotated: bool = False,
        split: dict[str, tuple[int, ...] | Layout] | None = None,
    ):
        if not limit > 0:
            raise ValueError(f"limit = {limit!r}: must be above 0, the largest attention logit in nats")
        if how not in MAPS:
            raise ValueError(f"how = {how!r}: must be one of {', '.join(MAPS)}")
        super().__init__(base)
        self.limit, self.how, self.power, self.rotated = limit, how, power, rotated
        self.factors: dict[str, Tensor] = {}
        # modules whose heads have the same shapes are computed together
        self.alike: defaultdict[tuple, dict[str, tuple[_Heads, _Heads]]] = defaultdict(dict)
        for name, of in modules_of(find(model, "attention", split)).items():
            query, key = (next(role for role in roles if role in of) for roles in (QUERIES, KEYS))
            Q, K = _Heads(of[query], query, of[query].heads), _Heads(of[key], key, of[key].kv_heads)
            self.alike[Q.shape, K.shape][name] = Q, K

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        loss = self.base.step(closure)
        with torch.no_grad():
            for ((_, k, n), (_, _, m)), modules in self.alike.items():
                self._correct(modules, self.limit * k**self.power / (n * m) ** 0.5)
        return loss

    def _correct(self, modules: dict[str, tuple[_Heads, _Heads]], limit: float):
        """Bring ‖W_QᵀW_K‖₂ of every head, with RoPE ‖W_Q‖₂ ‖W_K‖₂, to at most `limit`."""
        # these products, (M, h, k, k), tell all that follows
        A, B = (torch.stack([heads.gram() for heads in alike]) for alike in zip(*modules.values(), strict=True))
        shared = A.shape[1] // B.shape[1]
        B = B.repeat_interleave(shared, 1)
        # Frobenius norms: cheaper than the spectral norms, and never below them
        traces = [M.diagonal(dim1=-2, dim2=-1).sum(-1) for M in (A, B)] if self.rotated else [(A * B).sum((-2, -1))]
        largest = torch.stack(traces).prod(0).sqrt()
        over = (largest > limit) & largest.isfinite()
        factors = torch.ones_like(largest).where(largest.isfinite(), torch.nan)
        self.factors |= zip(modules, factors, strict=True)
        if not over.any():
            return
        found, T_Q, T_K = self._contractions(A[over], B[over], limit, 1.0 if shared > 1 else 0.5)
        factors[over] = found
        numbers = (factors < 1).sum(1).tolist()
        parts = zip(T_Q[found < 1].split(numbers), T_K[found < 1].split(numbers), strict=True)
        for (Q, K), heads, (of_Q, of_K) in zip(modules.values(), factors < 1, parts, strict=True):
            if heads.any():
                Q.multiply(of_Q, heads)
                if shared == 1:
                    K.multiply(of_K, heads)

    def _contractions(self, A: Tensor, B: Tensor, limit: float, power: float) -> tuple[Tensor, Tensor, Tensor]:
        """Factors (N,) of heads, and what their W_Q and W_K are to be multiplied by from the left, each (N, k, k).

        A, B: W_QW_Qᵀ and W_KW_Kᵀ of N heads, (N, k, k). power: the share of a factor that each matrix takes.
        """
        identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        (squares_a, U), (squares_b, V) = map(torch.linalg.eigh, (A, B))
        # W_Q = U a Q and W_K = V b K, where Q and K have orthonormal rows and a and b are diagonal
        a, b = (squares.clamp_min(0).sqrt().unsqueeze(-2) for squares in (squares_a, squares_b))
        if self.rotated:
            S = a[..., -1] * b[..., -1]
        else:  # W_QᵀW_K = Qᵀ(a UᵀV b)K has the singular values of the matrix in the middle
            left, S, right = torch.linalg.svd((U * a).mT @ (V * b))
        factors = (limit / S[:, 0]).clamp(max=1)
        if self.how == "scale":
            T_Q = T_K = factors[:, None, None] ** power * identity
        elif self.rotated:
            T_Q, T_K = (
                M * (factors[:, None, None] ** power * s[..., -1:] / s).clamp(max=1) @ M.mT for M, s in ((U, a), (V, b))
            )
        else:
            # A contraction I − left·D·leftᵀ of the rows of Q becomes I − X (D / S) Yᵀ of those of W_Q, with
            # X = U a left and Y = V b right. That of the rows of W_K is the transpose
            S = S.clamp_min(limit)  # what lies below stays
            excess = (1 - (limit / S) ** power) / S
            T_Q = identity - (U * a) @ left * excess.unsqueeze(-2) @ ((V * b) @ right.mT).mT
            T_K = T_Q.mT
        return factors, T_Q, T_K
