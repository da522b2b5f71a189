"""μP (maximal update parametrisation, arXiv 2203.03466) in one table, RULES.

The table has the initial standard deviation, the learning-rate multiplier and the weight decay of every role.

A role is the part of a parameter's name that says what the parameter is for: "blocks.3.attn.W_Q.weight" has the role
W_Q. A new architecture needs its roles in RULES; a parameter without a role is an error.

With m = base_width / d_model (16 for NanoGPT-5M: 768 / 48) and L = n_layer, the rules of the paper's Table 4 are

| paper                                                     | here                                   |
|-----------------------------------------------------------|----------------------------------------|
| 2-D weights inside blocks: init × 4 (= √m), lr × 16 (= m) | W_*, router: std_power 1/2, lr_power 1 |
| W_Q = 0 at init                                           | W_Q: std 0                             |
| W_O and W_down further divided by √(2L)                   | W_O, W_down: depth True                |
| embedding lr × 4 (= √m)                                   | tok_emb, pos_emb: cfg.embed_lr_power   |
| no rule for the head                                      | head: std 1, lr_power 0                |
| decay on matrices and embeddings, none on norms           | decay                                  |

Without μP (base_width = 0) m = 1. Every matrix then has the standard deviation init_std, and no rule changes its rate.
cfg.attn_lr, norm_lr and head_lr multiply rates in either case.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf, log, nan, sqrt
from statistics import linear_regression

import torch
import torch.nn as nn
from torch import Tensor

from config import Config, UserError, in_float32
from model import GPT
from msign import ATTENTION


@dataclass(frozen=True)
class Rule:
    """What μP prescribes for one role."""

    std: float  # initial standard deviation as a multiple of cfg.init_std; 0 = the matrix starts at zero
    std_power: float = 0.0  # the initial standard deviation is multiplied by m^std_power
    depth: bool = False  # the initial standard deviation is divided by √(2L)
    lr_power: float | None = 0.0  # the learning rate is multiplied by m^lr_power; None = m^cfg.embed_lr_power
    decay: bool = True  # whether weight decay applies
    ones: bool = False  # a norm's gains, which start at 1


_HIDDEN = Rule(std=1, std_power=0.5, lr_power=1)
_OUTPUT = Rule(std=1, std_power=0.5, lr_power=1, depth=True)
_EMBED = Rule(std=1, lr_power=None)
_NORM = Rule(std=0, ones=True, decay=False)
RULES = {
    "tok_emb": _EMBED,
    "pos_emb": _EMBED,
    "W_Q": Rule(std=0, lr_power=1),
    "W_K": _HIDDEN,
    "W_V": _HIDDEN,
    "W_DKV": _HIDDEN,  # MLA: W_DKV makes the latent, W_UK and W_UV the keys and values from it, W_KR the rotary key
    "W_UK": _HIDDEN,
    "W_UV": _HIDDEN,
    "W_KR": _HIDDEN,
    "kv_norm": _NORM,
    "W_O": _OUTPUT,
    "router": _HIDDEN,
    "W_up": _HIDDEN,
    "W_gate": _HIDDEN,
    "W_down": _OUTPUT,
    "q_norm": _NORM,
    "k_norm": _NORM,
    "attn_norm": _NORM,
    "mlp_norm": _NORM,
    "final_norm": _NORM,
    "head": Rule(std=1),
}

# fields that an error about a learning rate names (beta1: Adam divides the rate by 1 − β₁ in step 1)
LR_FIELDS = "lr lr_scale attn_lr norm_lr head_lr embed_lr_power base_width d_model beta1"


def role_of(name: str) -> str:
    """The role of the parameter with this dotted name. Raises ValueError unless the name contains exactly one role."""
    roles = [part for part in name.split(".") if part in RULES]
    if len(roles) != 1:
        raise ValueError(
            f"parameter {name}: {len(roles)} roles {roles}; it must have exactly one of {', '.join(RULES)}"
        )
    return roles[0]


def init_std(role: str, cfg: Config) -> float:
    """The initial standard deviation of a role's parameters. Raises UserError if float32 does not hold it."""
    if not cfg.base_width:  # without μP, as in LLaMA-1B and LLaMA-MoE-3B
        return cfg.init_std
    rule = RULES[role]
    depth = sqrt(2 * cfg.n_layer) if rule.depth else 1.0
    std = cfg.init_std * cfg.width_mult**rule.std_power / depth
    # the range is checked before the factor rule.std, which is 0 for W_Q and no error
    return rule.std * in_range(std, "init_std base_width d_model", cfg, f"a standard deviation of {role}")


def in_range(value: float, fields: str, cfg: Config, what: str) -> float:
    """`value`, if float32 holds it and it is positive. Otherwise raises UserError.

    fields: the names of the fields from which the value is computed, the one to blame first. what: the value in words.
    """
    if not in_float32(value):
        first, *others = (f"{name} = {getattr(cfg, name)}" for name in fields.split())
        raise UserError(f"{first}: must give {what} that float32 holds, not {value:g} (with {', '.join(others)})")
    return value


def lr_mult(role: str, cfg: Config) -> float:
    """The factor between cfg.lr_at(step) and the learning rate of a role's parameters."""
    if role == "head":
        scale = cfg.head_lr
    elif RULES[role].ones:
        scale = cfg.norm_lr
    else:
        scale = cfg.attn_lr if role in ATTENTION else 1.0
    power = RULES[role].lr_power
    return scale * cfg.width_mult ** (cfg.embed_lr_power if power is None else power)


@torch.no_grad()
def init_weights(model: nn.Module, cfg: Config, fill: Callable[[Tensor, Tensor], object] = Tensor.copy_):
    """Set all parameters of `model` to their initial values.

    A parameter's values depend on cfg.seed and on its name alone: not on the order of parameters, the device or the
    number of processes. `fill(p, values)` copies the values of a whole parameter into p. A process that holds only a
    part of the parameter passes a `fill` that copies this part.
    """
    for name, p in model.named_parameters():
        role = role_of(name)
        if RULES[role].ones:
            p.fill_(1.0)
            continue
        # PyTorch's CPU generator uses only the low 32 bits of a seed, so cfg.seed and the name are hashed into 32 bits
        generator = torch.Generator().manual_seed(zlib.crc32(f"{cfg.seed}/{name}".encode()))
        fill(p, torch.randn(p.shape, generator=generator) * init_std(role, cfg))


def param_groups(model: nn.Module, cfg: Config) -> list[dict]:
    """The optimizer's parameter groups, one for each pair of learning-rate multiplier and weight decay.

    A group has the keys params, lr, lr_mult, weight_decay and roles. Every parameter is in exactly one group. Raises
    ValueError for a parameter without a role, and UserError if float32 does not hold a learning rate. `lr` starts at
    the peak; the training loop sets it to cfg.lr_at(step) · lr_mult at every step.

    PyTorch's AdamW shrinks a weight by the share lr · weight_decay in each step. With cfg.decay_coupling =
    "independent" the share is cfg.weight_decay · lr/peak for every group, so the group's weight_decay is divided by
    its own peak learning rate.
    """
    groups = {}
    for name, p in model.named_parameters():
        role = role_of(name)
        mult = lr_mult(role, cfg)
        # Adam divides the rate by its bias correction, 1 − β₁ in the first step; float32 has to hold both
        for rate in (cfg.peak_lr * mult, cfg.peak_lr * mult / (1 - cfg.beta1)):
            in_range(rate, LR_FIELDS, cfg, f"a learning rate of {role}")
        decay = cfg.weight_decay if RULES[role].decay else 0.0
        if cfg.decay_coupling == "independent":
            decay /= cfg.peak_lr * mult
        new = {"params": [], "lr": cfg.peak_lr * mult, "lr_mult": mult, "weight_decay": decay, "roles": []}
        group = groups.setdefault((mult, decay), new)
        group["params"].append(p)
        if role not in group["roles"]:
            group["roles"].append(role)
    grouped = sum(len(g["params"]) for g in groups.values())
    assert grouped == len({id(p) for p in model.parameters()}), "a shared parameter is in two groups"
    return list(groups.values())


ACTIVATIONS = ("attention", "mlp", "residual", "logits")


def coordinate_check(cfg: Config, widths: list[int], steps: int = 4, seeds: int = 2) -> dict[str, list[list[float]]]:
    """How the size of activations depends on width early in training.

    Returns {activation: sizes}, where sizes[step][i] is the mean |value| at widths[i].

    At every width a model takes `steps` AdamW steps at the learning rate cfg.peak_lr on one random batch; d_head stays
    the same and d_ff = 4 · width. Sizes are means over `seeds` models. The activations are the outputs of attention
    and of the MLP and the residual stream, each averaged over blocks, and the logits. Under μP the sizes in the blocks
    do not depend on width; under the standard parameterisation they grow with width.
    """
    sizes = {kind: [[0.0] * len(widths) for _ in range(steps)] for kind in ACTIVATIONS}
    for w, width in enumerate(widths):
        at_width = replace(cfg, d_model=width, n_head=width * cfg.n_head // cfg.d_model, d_ff=4 * width)
        for seed in range(seeds):
            for step, found in enumerate(_activation_sizes(replace(at_width, seed=seed), steps)):
                for kind, size in found.items():
                    sizes[kind][step][w] += size / seeds
    return sizes


def _activation_sizes(cfg: Config, steps: int) -> list[dict[str, float]]:
    """{activation: mean |value|} in each of the first training steps of one model."""
    model = GPT(cfg)
    init_weights(model, cfg)
    blocks = model.blocks
    modules = [block.attn for block in blocks], [block.mlp for block in blocks], blocks, [model.head]
    seen = {kind: [] for kind in ACTIVATIONS}
    for kind, watched in zip(ACTIVATIONS, modules, strict=True):
        scale = model.logit_scale if kind == "logits" else 1.0
        for module in watched:
            module.register_forward_hook(
                lambda _, __, y, into=seen[kind], scale=scale: into.append(y.detach().abs().mean().item() * scale)
            )
    optimizer = torch.optim.AdamW(param_groups(model, cfg), betas=(cfg.beta1, cfg.beta2), eps=cfg.eps)
    generator = torch.Generator().manual_seed(cfg.seed)
    x = torch.randint(cfg.vocab_size, (cfg.micro_batch, cfg.block_size + 1), generator=generator)
    sizes = []
    for _ in range(steps):
        for values in seen.values():
            values.clear()
        model(x[:, :-1], x[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
        sizes.append({kind: sum(values) / len(values) for kind, values in seen.items()})
    return sizes


def width_slope(widths: list[int], sizes: list[float]) -> float:
    """Least-squares slope of log size against log width: 0 = independent of width, 1 = proportional to width.

    NaN when a size is zero or not finite.
    """
    if not all(0 < size < inf for size in sizes):
        return nan
    return linear_regression([log(width) for width in widths], [log(size) for size in sizes]).slope
