"""μP: one table, role -> initial standard deviation, learning-rate multiplier, weight decay.

With m = base_width / d_model (16 for NanoGPT-5M: 768 / 48) and L = n_layer, the rules of Table 4 are

| paper                                                  | here                                 |
|--------------------------------------------------------|--------------------------------------|
| 2-D weights inside blocks: init × 4 (= √m), lr × 16 (= m) | W_*: std_power 1/2, lr_power 1    |
| W_Q = 0 at init                                        | W_Q: std 0                           |
| W_O and W_down further divided by √(2L)                | W_O, W_down: depth True              |
| embedding lr × 4 (= √m)                                | tok_emb, pos_emb: cfg.embed_lr_power |
| decay on matrices and embeddings, none on norms        | column decay                         |

Without μP (base_width = 0) every matrix has deviation init_std and multiplier 1.

A role is the component of the parameter's name that the table holds ("blocks.3.attn.W_Q.weight" ->
W_Q). Adding an architecture means adding its roles here; a parameter without a role is an error.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import sqrt

import torch
import torch.nn as nn
from torch import Tensor

from config import Config, UserError, in_float32
from model import GPT


@dataclass(frozen=True)
class Rule:
    std: float  # multiple of cfg.init_std; 0 = zeros
    std_power: float = 0.0  # init std × m^this
    depth: bool = False  # init std ÷ √(2L)
    lr_power: float | None = 0.0  # lr × m^this; None = cfg.embed_lr_power
    decay: bool = True
    ones: bool = False  # init 1 instead (gains)


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
    "W_DKV": _HIDDEN,  # MLA: to the latent, from it to keys and values, the rotary key
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

LR_FIELDS = (
    "lr lr_scale attn_lr norm_lr head_lr embed_lr_power base_width d_model beta1"  # what a learning rate is made of
)
ATTENTION = ("W_Q", "W_K", "W_V", "W_O", "W_DKV", "W_UK", "W_UV", "W_KR")


def role_of(name: str) -> str:
    """The one role that a parameter's dotted name contains. Raises ValueError naming it otherwise."""
    roles = [part for part in name.split(".") if part in RULES]
    if len(roles) != 1:
        raise ValueError(
            f"parameter {name}: {len(roles)} roles {roles}; it must have exactly one of {', '.join(RULES)}"
        )
    return roles[0]


def init_std(role: str, cfg: Config) -> float:
    if not cfg.base_width:  # LLaMA-1B and -MoE-3B: one deviation for all
        return cfg.init_std
    rule = RULES[role]
    depth = sqrt(2 * cfg.n_layer) if rule.depth else 1.0
    std = cfg.init_std * cfg.width_mult**rule.std_power / depth
    return rule.std * in_range(std, "init_std base_width d_model", cfg, f"a standard deviation of {role}")


def in_range(value: float, fields: str, cfg: Config, what: str) -> float:
    """The value, which the fields scale. Raises UserError unless it is a positive number that float32 holds."""
    if not in_float32(value):
        first, *others = (f"{name} = {getattr(cfg, name)}" for name in fields.split())
        raise UserError(f"{first}: must give {what} that float32 holds, not {value:g} (with {', '.join(others)})")
    return value


def lr_mult(role: str, cfg: Config) -> float:
    power = RULES[role].lr_power
    kind = "head" if role == "head" else "norm" if RULES[role].ones else "attn" if role in ATTENTION else None
    scale = getattr(cfg, f"{kind}_lr") if kind else 1.0
    return scale * cfg.width_mult ** (cfg.embed_lr_power if power is None else power)


@torch.no_grad()
def init_weights(model: nn.Module, cfg: Config, fill: Callable[[Tensor, Tensor], object] = Tensor.copy_):
    """Initialise in place. A parameter's values depend on (cfg.seed, its name) alone, not on order, device or shards:
    `fill` puts a whole parameter's values into it, or into what there is of it."""
    for name, p in model.named_parameters():
        role = role_of(name)
        if RULES[role].ones:
            p.fill_(1.0)
            continue
        # PyTorch's CPU generator keeps only the low 32 bits of a seed, so run seed and name are hashed into those
        generator = torch.Generator().manual_seed(zlib.crc32(f"{cfg.seed}/{name}".encode()))
        fill(p, torch.randn(p.shape, generator=generator) * init_std(role, cfg))


def param_groups(model: nn.Module, cfg: Config) -> list[dict]:
    """Optimizer groups, one per distinct (lr multiplier, decay): keys params, lr, lr_mult, weight_decay, roles.

    Every parameter is in exactly one group, or ValueError names it. `lr` is set to the peak; the
    training loop sets it to lr_at(step) · lr_mult. PyTorch's AdamW decays by lr · weight_decay, so
    independent decay (a share cfg.weight_decay · lr/peak a step, whatever the multiplier) divides the
    group's weight_decay by its peak learning rate.
    """
    groups = {}
    for name, p in model.named_parameters():
        role = role_of(name)
        mult = lr_mult(role, cfg)
        for rate in (cfg.peak_lr * mult, cfg.peak_lr * mult / (1 - cfg.beta1)):  # before and after Adam's correction
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


def coordinate_check(cfg: Config, widths: list[int], steps: int = 4, seeds: int = 2) -> dict[str, list[list[float]]]:
    """How activations scale with width while training starts: {activation: [step][width] mean |value|}.

    At every width (d_head fixed, d_ff = 4 · width) a model takes `steps` AdamW steps at cfg.peak_lr on one
    random batch; values are means over `seeds`. Under μP the blocks' outputs keep their size at every
    step, under the standard parameterisation they grow with width. The activations are each block's
    attention and MLP output (averaged over blocks), the residual stream, and the logits.
    """
    kinds = ("attention", "mlp", "residual", "logits")
    out = {kind: [[0.0] * len(widths) for _ in range(steps)] for kind in kinds}
    for w, width in enumerate(widths):
        at_width = replace(cfg, d_model=width, n_head=width * cfg.n_head // cfg.d_model, d_ff=4 * width)
        for seed in range(seeds):
            model = GPT(replace(at_width, seed=seed))
            init_weights(model, model.cfg)
            blocks = model.blocks
            watched = zip(kinds, ([b.attn for b in blocks], [b.mlp for b in blocks], blocks, [model.head]), strict=True)
            seen = {kind: [] for kind in kinds}
            for kind, modules in watched:
                scale = model.logit_scale if kind == "logits" else 1.0
                for module in modules:
                    module.register_forward_hook(
                        lambda _, __, y, into=seen[kind], scale=scale: into.append(
                            y.detach().abs().mean().item() * scale
                        )
                    )
            optimizer = torch.optim.AdamW(param_groups(model, model.cfg), betas=(cfg.beta1, cfg.beta2), eps=cfg.eps)
            generator = torch.Generator().manual_seed(seed)
            x = torch.randint(cfg.vocab_size, (cfg.micro_batch, cfg.block_size + 1), generator=generator)
            for step in range(steps):
                for values in seen.values():
                    values.clear()
                model(x[:, :-1], x[:, 1:]).backward()
                optimizer.step()
                optimizer.zero_grad()
                for kind, values in seen.items():
                    out[kind][step][w] += sum(values) / len(values) / seeds
    return out


def width_slope(widths: list[int], sizes: list[float]) -> float:
    """Least-squares slope of log size against log width: 0 = width-independent, 1 = proportional to it."""
    x, y = torch.tensor(widths).double().log(), torch.tensor(sizes).double().log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
