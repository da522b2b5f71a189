"""The numbers that a run logs and their names: the probes of a GPT in training as {name: value}.

Every function returns summaries over the whole model. With `each_layer` it also returns the values of every layer,
named <family>/<layer> or <family>/<layer>.<role>, where a role is what a parameter is for, such as W_Q (see
`mup.RULES`). No function changes the model, its gradients or a random state.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import msign
from model import GPT, MLA, Block
from msign import ATTENTION, MLP
from mup import role_of
from stability import probes
from stability.probes import geometric_mean


def layer_of(name: str) -> int | None:
    """The index of the block that a parameter belongs to; None for the embeddings, the final norm and the head."""
    where, _, rest = name.partition(".")
    return int(rest.split(".")[0]) if where == "blocks" else None


def by_layer(family: str, values: Mapping[str, float]) -> dict[str, float]:
    """{"<family>/<layer>.<role>": value} from {parameter name: value}; parameters outside blocks are left out."""
    return {f"{family}/{layer_of(n)}.{role_of(n)}": v for n, v in values.items() if layer_of(n) is not None}


@torch.no_grad()
def spectra(parameters: Mapping[str, Tensor], group, warn: Callable[[str], None]) -> dict[str, probes.Spectrum]:
    """The Spectrum of every parameter, of a stack the mean, on every process of `group` (None: there is only this one).

    Each process measures its share of the matrices (see `msign.share_of`), and the few numbers are added up at the end.
    Memory that is lacking makes a share NaN on all processes; `warn` is told on the one that lacks it.
    """
    places = {name: place for place, name in enumerate(parameters)}
    found = torch.zeros(len(places), len(probes.Spectrum._fields), dtype=torch.float64)
    for share in msign.share_of(parameters, group):
        try:
            measured = probes.spectra({i: W for i, (_, W) in enumerate(share)}).values()
        except torch.OutOfMemoryError as error:
            warn(f"out of memory: {str(error).splitlines()[0]}")
            measured = [(math.nan,) * len(probes.Spectrum._fields)] * len(share)
        for (name, _), values in zip(share, measured, strict=True):
            found[places[name]] += torch.tensor(values, dtype=torch.float64)
    if group:
        found = found.to(next(iter(parameters.values())).device)
        dist.all_reduce(found, group=group)
    sizes = torch.tensor([[p.shape[:-2].numel()] for p in parameters.values()])  # 1, or a stack's
    return dict(zip(places, (probes.Spectrum(*row) for row in (found.cpu() / sizes).tolist()), strict=True))


def weights(
    model: GPT, each_layer: bool, warn: Callable[[str], None], group=None, norms: Callable = dict
) -> dict[str, float]:
    """Stable ranks, spectral norms and the gains of norms, on every process of `group`.

    srank/<part>, sigma1/<part>: geometric means of the stable rank ‖W‖_F² / ‖W‖₂² (Def. 3.1) and of ‖W‖₂ over the
        matrices of a part of the model, a stack counting as one by its mean. A part is a role, "attention", "mlp", or
        "early": the attention matrices in the first quarter of the blocks, as in Fig 1.
    norm_gain/<role>: root mean square of the gains.

    With each_layer also fro/<layer>.<role>, ‖W‖_F. norms: turns (name, tensor) pairs into {name: ‖·‖_F}, over all
    processes; on one process {name: tensor} will do. For `group` and `warn` see `spectra`.
    """
    matrices = {n: p for n, p in model.named_parameters() if role_of(n) in ATTENTION + MLP}
    found = spectra(matrices, group, warn)
    parts = defaultdict(list)
    for name in found:
        parts["attention" if role_of(name) in ATTENTION else "mlp"].append(name)
        parts[role_of(name)].append(name)
        if role_of(name) in ATTENTION and layer_of(name) < len(model.blocks) / 4:
            parts["early"].append(name)
    metrics = {}
    for part, names in parts.items():
        metrics[f"srank/{part}"] = geometric_mean(found[n].srank for n in names)
        metrics[f"sigma1/{part}"] = geometric_mean(found[n].sigma1 for n in names)
    gains = {n: p for n, p in model.named_parameters() if role_of(n).endswith("_norm")}
    rms = {n: norm / math.sqrt(gains[n].numel()) for n, norm in probes.norms(norms(gains.items())).items()}
    for role in dict.fromkeys(map(role_of, gains)):
        squares = [v * v for n, v in rms.items() if role_of(n) == role]
        metrics[f"norm_gain/{role}"] = math.sqrt(sum(squares) / len(squares))
    if each_layer:
        metrics |= by_layer("norm_gain", rms)
        for family in probes.Spectrum._fields:
            metrics |= by_layer(family, {n: getattr(spectrum, family) for n, spectrum in found.items()})
    return metrics


def norms(family: str, tensors: Mapping[str, Tensor], each_layer: bool) -> dict[str, float]:
    """<family>/<role>: the Frobenius norm of all tensors of a role together.

    tensors: {parameter's name: tensor, or already its norm}, such as gradients or the updates of a step.
    """
    found = probes.norms(tensors)
    squares = defaultdict(float)
    for name, norm in found.items():
        squares[role_of(name)] += norm * norm
    metrics = {f"{family}/{role}": math.sqrt(square) for role, square in squares.items()}
    return metrics | (by_layer(family, found) if each_layer else {})


class Activations(NamedTuple):
    """Values from one forward pass through L blocks; those of the blocks are on the CPU.

    residual_rms: (L + 1,), root mean squares of H(0) … H(L).
    max_logit:    (L,), the largest attention logit of each block.
    logit_bound:  (L,), the largest that any input can give (`probes.logit_bound`), whichever head is largest; NaN in
                  latent attention and with QK-norm.
    entropy:      (L,), the entropy of the attention weights in nats, mean over heads and tokens.
    log_z:        mean over tokens of log Σ exp(logits) of the output.
    hidden:       H(L), (B, T, d).
    errors:       a line for the first block whose output is not finite, if there is one.
    """

    residual_rms: Tensor
    max_logit: Tensor
    logit_bound: Tensor
    entropy: Tensor
    log_z: float
    hidden: Tensor
    errors: tuple[str, ...]


def logit_bound(block: Block) -> Tensor:
    """The bound of a block's attention logits, a number on the CPU; NaN in latent attention and with QK-norm."""
    attn = block.attn
    if isinstance(attn, MLA) or hasattr(attn, "q_norm"):
        return torch.tensor(math.nan)
    Q, K = (
        (of.weight * block.attn_norm.weight).unflatten(0, (heads, -1))
        for of, heads in ((attn.W_Q, attn.n_head), (attn.W_K, attn.n_kv_head))
    )
    K = K.repeat_interleave(attn.n_head // attn.n_kv_head, 0)
    bound = probes.logit_bound(Q, K, attn.scale, rotated=attn.theta is not None).amax()
    return attn.cap * torch.tanh(bound / attn.cap) if attn.cap else bound


@torch.no_grad()
@probes.default_products()
def forward_pass(model: GPT, tokens: Tensor) -> Activations:
    """The Activations on tokens (B, T), in the parameters' precision, attention on the math kernel.

    Raises TypeError for a wrapped model.
    """
    probes.refuse_wrapped(model)
    rms, max_logit, bounds, entropy, errors = [], [], [], [], []
    with probes.uncompiled():
        x = model.embed(tokens)
        for i, block in enumerate(model.blocks):
            rms.append(x.square().mean().sqrt())
            logits = block.attn.logits(block.attn_norm(x))
            max_logit.append(logits.amax())
            bounds.append(logit_bound(block))
            entropy.append(torch.special.entr(torch.softmax(logits, -1)).sum(-1).mean())
            before, x = x, block(x)
            if not errors and not torch.isfinite(x).all():
                errors.append(probes.not_finite(i, block, before))
        rms.append(x.square().mean().sqrt())
        log_z = model.logits(x).float().logsumexp(-1).mean().item()
    of_blocks = (torch.stack(values).cpu().double() for values in (rms, max_logit, bounds, entropy))
    return Activations(*of_blocks, log_z, x, tuple(errors))


@torch.no_grad()
def activations(
    model: GPT, tokens: Tensor, each_layer: bool, warn: Callable[[str], None], autocast=None
) -> dict[str, float]:
    """Residual stream, attention and output on the probe batch tokens (B, T), in fp32 with PyTorch's math attention.

    attention/max_logit: the largest attention logit.
    attention/logit_bound: the largest that any input could give (`probes.logit_bound`), the maximum over heads and
                         blocks; not logged for latent attention or with QK-norm.
    attention/entropy:   entropy of the attention weights in nats, mean over blocks.
    residual/rms:        root mean square of the residual stream after the last block.
    residual/gain:       root mean square after the first block over that before it.
    log_z:               mean log Σ exp(logits) of the output.
    precision/error:     ‖ΔH‖_F / ‖H‖_F, the error of the last block's output H in the run's own precision. It is
                         measured only if `autocast`, the run's context for this precision, is given.

    `warn` is called with a line for the first block whose output is not finite.
    """
    found = forward_pass(model, tokens)
    for error in found.errors:
        warn(f"activations: {error}")
    rms = found.residual_rms
    metrics = {
        "attention/max_logit": found.max_logit.max().item(),
        "attention/entropy": found.entropy.mean().item(),
        "residual/rms": rms[-1].item(),
        "residual/gain": (rms[1] / rms[0]).item(),
        "log_z": found.log_z,
    }
    if not found.logit_bound.isnan().any():
        metrics["attention/logit_bound"] = found.logit_bound.max().item()
    if autocast is not None:
        with autocast, torch.compiler.set_stance("force_eager"):  # a compilation for this batch size would not pay
            hidden = model.hidden(tokens)
        metrics["precision/error"] = ((hidden.float() - found.hidden).norm() / found.hidden.norm()).item()
    if each_layer:
        for family, values in (
            ("attention/max_logit", found.max_logit), ("attention/logit_bound", found.logit_bound),
            ("attention/entropy", found.entropy), ("residual/rms", rms[1:]),
        ):  # fmt: skip
            metrics |= {f"{family}/{i}": v for i, v in enumerate(values.tolist()) if family in metrics}
    return metrics


def jacobians(
    model: GPT, tokens: Tensor, each_layer: bool, warn: Callable[[str], None], positions: int = 0
) -> dict[str, float]:
    """Layer Jacobians J(ℓ) on the probe batch tokens (B, T), all named jacobian/…; for the terms see `probes`.

    sigma1:             ‖J(ℓ)‖₂, geometric mean over blocks and sequences.
    alignment:          mean over pairs of adjacent blocks and over sequences, as in Fig 1.
    ill_conditioned:    the number of pairs whose alignment is uncertain for at least one sequence.
    product:            ‖J(L)···J(1)‖₂, geometric mean over sequences.
    bound_4_2, bound:   the same means of the two bounds of `probes.product_bounds`; 0 if one sequence has the bound 0.
    ratio, residual:    the largest over blocks and sequences; NaN counts as 0.
    token_sigma1/mean, token_sigma1/max, token_alignment/mean, token_alignment/max:
                        for single tokens at `positions` evenly spaced places, over tokens and blocks.

    With each_layer also sigma1 of each block (mean over sequences), its largest ratio and residual, and alignment and
    ill_conditioned of each pair. `warn` is called with a line for the first block whose output is not finite.
    """
    with torch.no_grad():
        x = model.embed(tokens)
    J = probes.jacobians(model.blocks, x)
    for error in J.errors:
        warn(f"jacobians: {error}")
    stated, held = probes.product_bounds(J.sigma, J.ratio, J.alignment)
    flagged = J.flagged.any(1)
    # geometric_mean leaves zeros out, so a mean with a zero is set to 0 here
    metrics = {
        "jacobian/sigma1": geometric_mean(J.sigma.flatten().tolist()),
        "jacobian/alignment": J.alignment.nanmean().item(),
        "jacobian/ill_conditioned": flagged.sum().item(),
        "jacobian/product": geometric_mean(J.product.tolist()),
        "jacobian/bound_4_2": geometric_mean(stated.tolist()) if stated.all() else 0.0,
        "jacobian/bound": geometric_mean(held.tolist()) if held.all() else 0.0,
        "jacobian/ratio": J.ratio.nan_to_num(0).max().item(),
        "jacobian/residual": J.residual.nan_to_num(0).max().item(),
    }
    if positions:
        last = tokens.shape[1] - 1
        places = sorted({round(i * last / positions) for i in range(1, positions + 1)})
        of_tokens = probes.jacobians(model.blocks, x, places)
        for name, values in (("sigma1", of_tokens.sigma), ("alignment", of_tokens.alignment)):
            if not len(values):  # one block has no neighbour to be aligned with
                continue
            metrics[f"jacobian/token_{name}/mean"] = values.nanmean().item()
            metrics[f"jacobian/token_{name}/max"] = values.nan_to_num(0).max().item()
    if each_layer:
        for family, values in (
            ("sigma1", J.sigma.mean(1)),
            ("ratio", J.ratio.amax(1)),
            ("residual", J.residual.amax(1)),
            ("alignment", J.alignment.mean(1)),
            ("ill_conditioned", flagged),
        ):
            metrics |= {f"jacobian/{family}/{i}": float(v) for i, v in enumerate(values)}
    return metrics
