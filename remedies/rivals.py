"""Optimizers that are said to keep training stable, from the libraries that keep them, every argument given.

All take the parameter groups of `mup.param_groups`, so the learning rate and the decay of every role are AdamW's. Those
that orthogonalise (Muon, the spectral sphere) see the blocks' matrices only; AdamW does the rest, as their papers have it.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from config import Config


def library():
    """pytorch-optimizer, imported when a rival is asked for: it takes half a second."""
    import pytorch_optimizer

    return pytorch_optimizer


class Together(Optimizer):
    """Several optimizers of different parameters as one."""

    def __init__(self, parts: list[Optimizer]):
        self.parts = parts
        self.__setstate__({})  # gives the hooks of an Optimizer without a second set of param_groups

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self):
        return {p: state for part in self.parts for p, state in part.state.items()}

    @property
    def defaults(self):
        return self.parts[0].defaults

    def step(self, closure=None):
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True):
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict):
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)


def fused(groups: list[dict]) -> bool:
    return groups[0]["params"][0].device.type in ("cpu", "cuda")


class ZClipped(torch.optim.AdamW):
    """AdamW behind ZClip, whose statistics are part of the state: a run that is resumed goes on with them."""

    STATISTICS = ("initialized", "mean", "var", "buffer")

    def __init__(self, groups: list[dict], clip, **options):
        super().__init__(groups, **options)
        self.clip = clip
        self.clipped = torch.nn.ParameterList(p for group in groups for p in group["params"])

    def step(self, closure=None):
        self.clip.step(self.clipped)
        return super().step(closure)

    def state_dict(self) -> dict:
        return super().state_dict() | {"zclip": {name: getattr(self.clip, name) for name in self.STATISTICS}}

    def load_state_dict(self, state_dict: dict):
        for name, value in state_dict["zclip"].items():
            setattr(self.clip, name, value)
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "zclip"})


def adamw(groups: list[dict], cfg: Config) -> Optimizer:
    return torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=fused(groups))


def zclip(groups: list[dict], cfg: Config) -> Optimizer:
    """ZClip (arXiv 2504.02507): gradient norms clipped where they are 2.5 deviations above their moving average, and at grad_clip."""
    from zclip import ZClip

    clip = ZClip(alpha=0.97, z_thresh=2.5, max_grad_norm=cfg.grad_clip or None, eps=1e-6, warmup_steps=25, mode="zscore",
                 clip_option="adaptive_scaling", clip_factor=1.0, skip_update_on_spike=False)  # fmt: skip
    return ZClipped(groups, clip, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=fused(groups))


def spam(groups: list[dict], cfg: Config) -> Optimizer:
    """SPAM (arXiv 2501.06842): spikes above 5000 times the second moment clipped, moments reset every 500 steps, warmed up for 150."""
    return library().SPAM(groups, lr=cfg.peak_lr, betas=(cfg.beta1, cfg.beta2), density=1.0, weight_decay=cfg.weight_decay, warmup_epoch=150,
                   threshold=5000, grad_accu_steps=20, update_proj_gap=500, eps=cfg.eps, foreach=True)  # fmt: skip


def stable_spam(groups: list[dict], cfg: Config) -> Optimizer:
    """Stable-SPAM (arXiv 2502.17055): adaptive clipping of elements and norms, moments reset every 1000 steps."""
    return library().StableSPAM(groups, lr=cfg.peak_lr, betas=(cfg.beta1, cfg.beta2), gamma1=0.7, gamma2=0.9, theta=0.999, t_max=None,
                         weight_decay=cfg.weight_decay, update_proj_gap=1000, eps=cfg.eps, foreach=True)  # fmt: skip


def adagc(groups: list[dict], cfg: Config) -> Optimizer:
    """AdaGC (arXiv 2502.11034): every tensor's gradient clipped at 1.05 times a moving average of its norm. It comes
    after the global clip of `grad_clip`, which its paper does without."""
    return library().AdaGC(groups, lr=cfg.peak_lr, betas=(cfg.beta1, cfg.beta2), beta=0.98, lambda_abs=1.0, lambda_rel=1.05, warmup_steps=100,
                    weight_decay=cfg.weight_decay, weight_decouple=True, fixed_decay=False, eps=cfg.eps, foreach=True)  # fmt: skip


def muon(groups: list[dict], cfg: Config) -> Optimizer:
    """Muon: the sign of the momentum is the update, of the size that AdamW's usually has (0.2 · √max(m, n) rms)."""
    return torch.optim.Muon(groups, lr=cfg.peak_lr, weight_decay=cfg.weight_decay, momentum=0.95, nesterov=True,
                            ns_coefficients=(3.4445, -4.775, 2.0315), eps=1e-7, ns_steps=5, adjust_lr_fn="match_rms_adamw")  # fmt: skip


def spectral_sphere(groups: list[dict], cfg: Config) -> Optimizer:
    """The spectral sphere (arXiv 2601.08393): Muon's update within the tangent space of constant ‖W‖₂. Its update has singular
    values of 1, where Muon's as we use it have 0.2 · √max(m, n). 20 bisections of its multiplier, not 100: it is computed
    in bf16, which tells no more apart, and the tolerance of 1e-8 is never met."""
    return library().SpectralSphere(groups, lr=cfg.peak_lr, momentum=0.95, weight_decay=cfg.weight_decay, weight_decouple=True, nesterov=True,
                             power_iteration_steps=20, msign_steps=8, solver_tolerance_f=1e-8, solver_max_iterations=20, foreach=True)  # fmt: skip


WHOLE: dict[str, Callable] = {"adamw": adamw, "spam": spam, "stable_spam": stable_spam, "adagc": adagc, "zclip": zclip}
MATRICES: dict[str, Callable] = {"muon": muon, "spectral_sphere": spectral_sphere}


def build(cfg: Config, groups: list[dict], named_params: Iterable[tuple[str, Tensor]]) -> Optimizer:
    """The optimizer that cfg.optimizer names, over the groups of mup.param_groups."""
    if cfg.optimizer in WHOLE:
        return WHOLE[cfg.optimizer](groups, cfg)
    inside = {id(p) for name, p in named_params if name.startswith("blocks.") and p.ndim == 2}

    def only(wanted: bool) -> list[dict]:
        kept = [{**g, "params": [p for p in g["params"] if (id(p) in inside) == wanted]} for g in groups]
        return [g for g in kept if g["params"]]

    return Together([MATRICES[cfg.optimizer](only(True), cfg), adamw(only(False), cfg)])
