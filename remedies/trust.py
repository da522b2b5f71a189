"""A trust region for attention: one step of the weights may change no logit of an input by more than a limit.

    optimizer = LogitTrust(torch.optim.AdamW(model.parameters(), ...), model, limit=1.0)

Use it where attention logits grow until training collapses, if the model shall stay as it is (QK-norm changes it).

A head's logits are (W_Q x)ᵀ(W_K y) / √k, with W_Q and W_K its k rows of the matrices and inputs x, y of root mean
square 1, as a norm without gains returns them. (Gains g let logits move up to max g² times as far, and the inputs of a
block change too when the blocks before it learn.) With n inputs, ‖x‖ = √n. A step by ΔW_Q and ΔW_K therefore changes no
logit by more than

    n / √k · (‖ΔW_Q‖_F ‖W_K‖_F + ‖W_Q‖_F ‖ΔW_K‖_F + ‖ΔW_Q‖_F ‖ΔW_K‖_F).

Where this exceeds the limit, the step of the whole head is multiplied by limit over bound: of its rows of W_Q, W_K and
W_V and of its columns of W_O. What all heads share (W_DKV in latent attention) moves as the most limited head does; its
own effect on the logits is not in the bound. The bound grows with the weights, so a head's learning rate falls as its
logits grow.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from msign import Layout, Target, Wrapper, _local, _place, _sharded, find

# in these a head has some rows, in W_O some columns; all heads share the others
QUERIES, KEYS, VALUES = ("W_Q", "W_UQ"), ("W_K", "W_UK"), ("W_V", "W_UV")
HEADS = (*QUERIES, *KEYS, *VALUES)
Kind = TypeVar("Kind", bound=Wrapper)


class LogitTrust(Wrapper):
    """An optimizer that steps as `base` does, but changes no attention logit by more than `limit` in a step.

    base:   the optimizer that does the steps; its state is left alone.
    model:  the module whose attention is meant. `msign.find` finds its matrices and gets `split`. Weights may be fused,
            or sharded by rows (FSDP2, HSDP).
    limit:  the largest change of a logit, in nats, for inputs of root mean square 1; with math.inf every step is the
            base's. It may be changed at any time.
    power:  the logits are divided by the width k of a head's queries to this power.

    The attribute `factors` holds what every head's last step was multiplied by: {name of an attention module: (h,)}.
    The constructor raises ValueError for a limit of 0 or less, for an attention module whose number of heads is unknown
    or which lacks queries or keys, and for what `msign.find` and `msign.apply_` refuse. The state_dict is that of
    `base`.
    """

    def __init__(
        self,
        base: Optimizer,
        model: nn.Module,
        limit: float,
        power: float = 0.5,
        split: dict[str, tuple[int, ...] | Layout] | None = None,
    ):
        if not limit > 0:
            raise ValueError(f"limit = {limit!r}: must be above 0, the largest change of an attention logit in nats")
        super().__init__(base)
        self.limit, self.power = limit, power
        self.factors: dict[str, Tensor] = {}
        targets = find(model, "attention", split)
        self.targets = list(targets.values())
        self.shards = _sharded({name: target.parameter for name, target in targets.items()})[1].shards
        self.modules = modules_of(targets)

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        if self.limit == math.inf:
            return self.base.step(closure)
        before = {target: _local(target.parameter).detach().clone() for target in self.targets}
        loss = self.base.step(closure)
        with torch.no_grad():
            self._shorten(before)
        return loss

    def _shorten(self, before: dict[Target, Tensor]):
        """Shorten the step that began at `before`, this process's part of every parameter."""
        squares = {}  # of every row of queries and keys: the sum of squares of the weight, and of its change
        for target in self.targets:
            if set(target.roles) & {*QUERIES, *KEYS}:
                old, new = before[target], _local(target.parameter)
                squares[target] = torch.stack([_rows(target, W) for W in (old, new - old)])
        if self.shards:
            together = torch.cat([rows.flatten() for rows in squares.values()])
            dist.all_reduce(together, group=self.shards)
            parts = together.split([rows.numel() for rows in squares.values()])
            squares = {target: part.view(2, -1) for target, part in zip(squares, parts, strict=True)}
        for name, of in self.modules.items():
            self.factors[name] = self._factors(of, squares)
            for target in set(of.values()):
                _local(target.parameter).lerp_(before[target], 1 - _spread(target, self.factors[name]))

    def _factors(self, of: dict[str, Target], squares: dict[Target, Tensor]) -> Tensor:
        """What the step of each head of a module is multiplied by, (h,)."""
        norms, inputs = [], 1.0
        for roles in (QUERIES, KEYS):
            role = next(role for role in roles if role in of)
            target = of[role]
            rows = target.layout.split(_upright(target, squares[target]))[role]
            heads = target.heads if roles is QUERIES else target.kv_heads
            norm = rows.unflatten(-2, (heads, -1)).sum((-2, -1)).sqrt()
            norms.append(norm.repeat_interleave(target.heads // heads, -1))
            inputs *= target.parameter.shape[-2 if target.layout.transposed else -1] ** 0.5
            if roles is QUERIES:
                width = rows.shape[-2] // heads
        (W_Q, dW_Q), (W_K, dW_K) = norms
        change = inputs * width**-self.power * (dW_Q * W_K + W_Q * dW_K + dW_Q * dW_K)
        return (self.limit / change).clamp(max=1)


def modules_of(targets: dict[str, Target]) -> dict[str, dict[str, Target]]:
    """{name of an attention module: {role: target}}. Raises ValueError where the logits of a head cannot be bounded."""
    modules: defaultdict[str, dict[str, Target]] = defaultdict(dict)
    for target in targets.values():
        modules[target.module] |= dict.fromkeys(target.roles, target)
    for name, of in modules.items():
        if not all(set(roles) & set(of) for roles in (QUERIES, KEYS)) or not all(t.heads for t in of.values()):
            raise ValueError(f"{name}: must have W_Q, W_K and a known number of heads; it has {', '.join(of)}")
        if "W_KR" in of:
            raise ValueError(f"{name}: keys with a part that all heads share (W_KR) are not supported")
    return modules


def inside(optimizer: Optimizer, kind: type[Kind]) -> Kind | None:
    """The wrapper of this kind among an optimizer and those that it wraps; None if there is none."""
    while not isinstance(optimizer, kind):
        if not isinstance(optimizer, Wrapper):
            return None
        optimizer = optimizer.base
    return optimizer


def _rows(target: Target, W: Tensor) -> Tensor:
    """Sums of squares of the rows, (m,), of this process's part W of a weight; what other processes hold counts 0."""
    if target.layout.transposed:
        return W.square().sum(0)
    found = W.new_zeros(target.parameter.shape[0])
    found[_here(target)] = W.square().sum(1)
    return found


def _here(target: Target) -> slice:
    """The part of a parameter's first dimension that this process holds."""
    p = target.parameter
    rank, ranks = _place(_sharded({"": p})[1].shards)
    start = rank * -(-len(p) // ranks)  # as torch.chunk deals
    return slice(start, start + len(_local(p)))


def _upright(target: Target, rows: Tensor) -> Tensor:
    """Values of rows (..., m) in the shape of a weight with one input."""
    return rows.unsqueeze(-2 if target.layout.transposed else -1)


def _spread(target: Target, factor: Tensor) -> Tensor:
    """The factors of heads (h,) for every row, or of W_O for every column, of this process's part of a parameter."""
    layout, transposed = target.layout, target.layout.transposed
    if target.roles == ("W_O",):
        inputs = target.parameter.shape[-2 if transposed else -1]
        columns = factor.repeat_interleave(inputs // len(factor))
        return columns[_here(target), None] if transposed else columns
    rows = {}
    for role, number in layout.parts:
        number, heads = layout.groups * number, target.heads if role in QUERIES else target.kv_heads
        least = factor.view(heads if role in HEADS else 1, -1).amin(1)
        rows[role] = least.repeat_interleave(number // len(least))[:, None]
    spread = layout.join(rows)
    return spread if transposed else spread[_here(target)]
