"""Measurements of any model: its weights and, by hooks, one forward pass in training. `monitor` decides when.

Results have the names of `metrics`, and qk/…. No function changes the model, its gradients or a random state.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from msign import ATTENTION, Target
from stability.probes import Jacobians, geometric_mean, jacobians, refuse_wrapped, top_triples

ELEMENTS = 2**26  # matrices of one shape are measured together up to this many elements; logits are, too
LANCZOS = 48  # products at most for a largest singular value; 12 suffice where one stands out


def _spectra(matrices: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, float, float]]:
    """(role, stable rank, σ₁) of every matrix of (role, W (..., m, n)), in no order.

    A full eigendecomposition of a matrix of width 4096 would take seconds. Lanczos iteration takes a few products; it
    finds σ₁ to 1 %, and to 3e-4 where σ₁ stands out.
    """
    stacks: dict[tuple, list[tuple[str, Tensor]]] = defaultdict(list)
    for role, W in matrices:
        for M in W.reshape(-1, *W.shape[-2:]):
            stack = stacks[M.shape, M.device]
            stack.append((role, M))
            if (len(stack) + 1) * M.numel() > ELEMENTS:
                yield from _spectra_of_stack(stack)
                stack.clear()
    for stack in filter(None, stacks.values()):
        yield from _spectra_of_stack(stack)


def _spectra_of_stack(stack: list[tuple[str, Tensor]]) -> Iterator[tuple[str, float, float]]:
    W = torch.stack([M for _, M in stack]).float()
    N, _, n = W.shape
    start = torch.randn(N, 1, n, generator=torch.Generator().manual_seed(0)).to(W.device)

    def chosen(live: list[int]) -> Tensor:
        return W if len(live) == N else W[live]

    found = top_triples(lambda v, live: v @ chosen(live).mT, lambda u, live: u @ chosen(live), start, LANCZOS)
    sigma, fro = found.sigma.double().cpu(), torch.linalg.matrix_norm(W).double().cpu()
    return zip((role for role, _ in stack), ((fro / sigma) ** 2).tolist(), sigma.tolist(), strict=True)


@torch.no_grad()
def weights(model: nn.Module, targets: Iterable[Target]) -> dict[str, float]:
    """The spectra of the targets and the largest product W_QᵀW_K of a head.

    srank/<part>, sigma1/<part>: geometric means over the matrices of a part, which is a role or "attention".
    qk/sigma1: the largest σ₁(W_QᵀW_K) · scale of a head. Attention logits grow with it if queries and keys are not
        normalised. qk/layer and qk/head are the numbers of its attention module and of the head in it, from 0.
    """
    modules: dict[str, list[Target]] = defaultdict(list)
    for target in targets:
        modules[target.module].append(target)
    grams: dict[int, Tensor] = {}  # by the number of the attention module
    parts: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for role, srank, sigma in _spectra(_by_module(model, modules, grams)):
        for part in (role, "attention") if role in ATTENTION else (role,):
            parts[part].append((srank, sigma))
    found: dict[str, float] = {}
    for part, values in parts.items():
        sranks, sigmas = zip(*values, strict=True)
        found |= {f"srank/{part}": geometric_mean(sranks), f"sigma1/{part}": geometric_mean(sigmas)}
    return found | _largest(grams)


def _by_module(
    model: nn.Module, modules: Mapping[str, list[Target]], grams: dict[int, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """(role, W) of every matrix, and into `grams` the Gram matrix of every attention module's product W_QᵀW_K.

    Weights in shards are gathered module by module, so that a process never holds a whole model.
    """
    layer = 0
    for name, targets in modules.items():
        found = {role: W for target in targets for role, W in target.matrices().items()}
        W_Q, W_K, h, kv = found.get("W_Q"), found.get("W_K"), targets[0].heads, targets[0].kv_heads
        if W_Q is not None and W_K is not None and W_Q.ndim == 2 and h and kv:
            scale = scale_of(model.get_submodule(name), len(W_Q) // h)
            grams[layer] = scale**2 * _gram_of_product(W_Q, W_K, h, kv)
        layer += bool(set(found) & set(ATTENTION))
        del W_Q, W_K
        for role in [*found]:
            yield role, found.pop(role)


def scale_of(attention: nn.Module, k: int) -> float:
    """What the logits of heads of width k are multiplied by: the module's own number, or else 1/√k."""
    values = (getattr(m, name, None) for m in attention.modules() for name in ("scaling", "scale", "softmax_scale"))
    return next((v for v in values if isinstance(v, float)), k**-0.5)


def _gram_of_product(W_Q: Tensor, W_K: Tensor, heads: int, kv_heads: int) -> Tensor:
    """CᵀW_K W_KᵀC per head, (heads, k, k), in fp64. With W_Q W_Qᵀ = CCᵀ its eigenvalues are the σ² of W_QᵀW_K."""
    Q, K = (W.cpu() if W.device.type == "mps" else W for W in (W_Q, W_K))
    Q, K = Q.double().unflatten(0, (heads, -1)), K.double().unflatten(0, (kv_heads, -1))
    A, B = Q @ Q.mT, (K @ K.mT).repeat_interleave(heads // kv_heads, 0)
    little = A.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-300) * 1e-12  # W_Q may be of deficient rank
    C = torch.linalg.cholesky_ex(A + torch.diag_embed(little[:, None].expand(-1, A.shape[-1])))[0]
    return C.mT @ B @ C


def _largest(grams: Mapping[int, Tensor]) -> dict[str, float]:
    """qk/… from {layer: (heads, k, k)}; all matrices of one shape are solved at once. What is not finite is NaN."""
    shapes, best = defaultdict(list), (-1.0, 0, 0)
    for layer, gram in grams.items():
        shapes[gram.shape, gram.device].append(layer)
    for layers in shapes.values():
        gram = torch.stack([grams[layer] for layer in layers])
        bad = ~gram.isfinite().all(-1).all(-1)
        lam = torch.linalg.eigvalsh(gram.masked_fill(bad[..., None, None], 0))[..., -1].clamp_min(0)
        values, heads = lam.sqrt().masked_fill(bad, math.inf).max(-1)
        best = max(best, *zip(values.tolist(), layers, heads.tolist(), strict=True))
    sigma1, layer, head = best
    sigma1 = sigma1 if sigma1 < math.inf else math.nan
    return {"qk/sigma1": sigma1, "qk/layer": layer, "qk/head": head} if grams else {}


@torch.no_grad()
def norms(
    family: str, targets: Mapping[str, Target], tensor: Callable[[str, Tensor], Tensor | None]
) -> dict[str, float]:
    """<family>/<role>: Frobenius norms over all matrices of a role, of tensor(name, parameter), one at a time."""
    found = defaultdict(list)
    for name, target in targets.items():
        x = tensor(name, target.parameter)
        for role, matrix in replace(target, parameter=x).matrices().items() if x is not None else ():
            found[role].append(matrix.float().norm())
    return {f"{family}/{role}": math.hypot(*(x.item() for x in values)) for role, values in found.items()}


def total_norm(tensors: Iterable[Tensor]) -> float:
    """The Frobenius norm of all tensors together; those in shards are gathered."""
    norms = [x.detach().norm() for x in tensors]
    return math.hypot(*(float(x.full_tensor() if hasattr(x, "full_tensor") else x) for x in norms))


def stream(args: tuple, named: Mapping[str, object]) -> Tensor | None:
    """The residual stream among what a block is given or returns: the first tensor."""
    return next((x for x in (*args, *named.values()) if isinstance(x, Tensor)), None)


class _Bound(nn.Module):
    """A block as a function of the residual stream alone; all else, but for a cache, is as in a call that was seen."""

    def __init__(self, block: nn.Module, args: tuple, named: dict):
        super().__init__()
        self.block, self.x = block, stream(args, named)
        self.args, self.named = args, {n: v for n, v in named.items() if not type(v).__name__.endswith("Cache")}

    def forward(self, h: Tensor) -> Tensor:
        args = [h if x is self.x else x for x in self.args]
        out = self.block(*args, **{name: h if x is self.x else x for name, x in self.named.items()})
        return out[0] if isinstance(out, tuple) else out


def block_jacobians(model: nn.Module, blocks: Sequence[nn.Module], inputs: tuple, named: dict) -> Jacobians:
    """`probes.jacobians` of the blocks at model(*inputs, **named), for blocks that take more than the residual stream.

    Raises TypeError for wrapped or sharded blocks, ValueError if the model does not call them one after the other.
    """
    for block in blocks:
        refuse_wrapped(block)
    calls, training = [], [module for module in model.modules() if module.training]

    def note(block, args, named):
        calls.append((block, args, named))

    hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    try:
        for module in training:
            module.training = False
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model(*inputs, **named)
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    x = stream(*calls[0][1:]) if calls else None
    if x is None or [block for block, _, _ in calls] != list(blocks):
        raise ValueError(f"{type(model).__name__}: found no blocks that it calls one after the other")
    return jacobians([_Bound(*call) for call in calls], x)


class _Logits(TorchDispatchMode):
    """Inside, `largest` becomes the largest attention logit of the first sequence.

    heads: how many a sequence has, or None. The operators that PyTorch ends up with are looked at, so it does not
    matter how the model calls them.
    """

    supports_higher_order_operators = True  # flex_attention's passes through unseen

    def __init__(self, heads: int | None, timed: Callable[[], AbstractContextManager]):
        super().__init__()
        self.heads, self.timed, self.error = heads, timed, ""
        self.largest: Tensor | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        schema = getattr(func, "_schema", None)
        name = schema.name if schema else "backward"
        if schema and "backward" not in name and (name.endswith("_softmax") or "scaled_dot_product" in name):
            try:
                with self.timed():
                    self.look({a.name: v for a, v in zip(schema.arguments, args, strict=False)} | (kwargs or {}))
            except Exception as error:  # whatever it is, training goes on
                self.error = str(error).splitlines()[0]
        return out

    def look(self, given: dict):
        if "query" in given:
            largest = largest_of_products(given["query"][0], given["key"][0], given)
        elif given["self"].ndim == 4:
            largest = given["self"][0].amax()
        elif given["self"].ndim == 3:  # (B · heads, T, T)
            largest = given["self"][: self.heads].amax()
        else:
            return
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest.to(self.largest))


def largest_of_products(q: Tensor, k: Tensor, given: dict) -> Tensor:
    """The largest logit of q (h, T, k), k (h', S, k) of one sequence, from a few rows of logits at a time.

    given: scaled_dot_product_attention's other arguments, of which "attn_mask" may be called "attn_bias".
    """
    scale = q.shape[-1] ** -0.5 if given.get("scale") is None else given["scale"]
    bias = given.get("attn_mask") if given.get("attn_mask") is not None else given.get("attn_bias")
    h, T, S = *q.shape[:2], k.shape[1]
    k = k.float().repeat_interleave(h // len(k), 0)
    if bias is not None:
        bias = (bias[0] if bias.ndim == 4 else bias).expand(h, T, S)
    rows, largest = max(1, ELEMENTS // (h * S)), []
    for start in range(0, T, rows):
        logits = q[:, start : start + rows].float() @ k.mT * scale
        if bias is not None:
            part = bias[:, start : start + rows]
            logits = logits.masked_fill(~part, -math.inf) if part.dtype == torch.bool else logits + part
        if given.get("is_causal"):
            future = torch.ones(logits.shape[1:], dtype=torch.bool, device=q.device).triu(start + 1)
            logits = logits.masked_fill(future, -math.inf)
        largest.append(logits.amax())
    return torch.stack(largest).amax()


class Forward:
    """Hooks on the next forward pass with gradients; it measures each module once, and then lets go of it.

    attention: {module: its number of heads or None}. block: the first block or None. `timed` counts the costs.
    `gain` is the root mean square after the block over that before it, or None.
    """

    def __init__(self, attention: Mapping[nn.Module, int | None], block: nn.Module | None, timed):
        self.timed, self.block = timed, block
        self.before: tuple[int, Tensor] | None = None
        self.gain: Tensor | None = None
        self.modes = {module: _Logits(heads, timed) for module, heads in attention.items()}
        self.inside: set[nn.Module] = set()
        self.handles: dict[nn.Module, tuple[RemovableHandle, ...]] = {}
        for module in {**self.modes, **({} if block is None else {block: None})}:
            self.handles[module] = (
                module.register_forward_pre_hook(self.enter, with_kwargs=True),
                module.register_forward_hook(self.leave, always_call=True),  # after an exception, too
            )

    def __deepcopy__(self, memo):
        return self  # the hooks of a copied model do nothing, because its modules are not known here

    def enter(self, module, args, named):
        compiling = torch.compiler.is_compiling()
        if compiling or not torch.is_grad_enabled() or module in self.inside or module not in self.handles:
            return
        self.inside.add(module)
        if module is self.block:
            self.before = self.size(stream(args, named))
        if module in self.modes:
            self.modes[module].__enter__()

    def leave(self, module, args, output):
        if module not in self.inside:
            return
        self.inside.remove(module)
        if module in self.modes:
            self.modes[module].__exit__(None, None, None)
        if module is self.block:
            after = self.size(stream(output if isinstance(output, tuple) else (output,), {}))
            if self.before and after and self.before[0] == after[0]:
                self.gain = after[1] / self.before[1]
        for handle in self.handles.pop(module):
            handle.remove()

    @torch.no_grad()
    def size(self, x: Tensor | None) -> tuple[int, Tensor] | None:
        """The width of x and its root mean square."""
        if x is None:
            return None
        with self.timed():
            return x.shape[-1], x.float().square().mean().sqrt()

    def remove(self):
        for module in self.inside & set(self.modes):  # left by an interrupt
            self.modes[module].__exit__(None, None, None)
        for handles in self.handles.values():
            for handle in handles:
                handle.remove()
        self.inside, self.handles = set(), {}

    @property
    def max_logit(self) -> float | None:
        """The largest logit of all modules; NaN if one is, None if none was seen."""
        found = [mode.largest.item() for mode in self.modes.values() if mode.largest is not None]
        return math.nan if any(map(math.isnan, found)) else max(found, default=None)

    @property
    def error(self) -> str:
        """Why a module's logits could not be measured, or nothing."""
        return next((mode.error for mode in self.modes.values() if mode.error), "")
