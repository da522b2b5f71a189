"""The rivals of MSign: optimizers that are said to keep training stable, each from a maintained library.

Every rival takes the parameter groups of `mup.param_groups`, so each parameter keeps the learning rate and the decay
that it has with AdamW. Muon and the spectral sphere orthogonalise, so they update only the blocks' 2-D weights. As in
their papers, AdamW updates all others; here these include stacks of experts. Every argument of a rival that changes the
update is given, so no library default can change a run.
"""

import math
from collections.abc import Callable

import torch
from torch.optim import Optimizer

from config import Config
from remedies.clip import LogitClip
from remedies.trust import LogitTrust, inside


def library():
    """The module pytorch_optimizer. Its import takes half a second, so it is imported only when a rival needs it."""
    import pytorch_optimizer

    return pytorch_optimizer


class Together(Optimizer):
    """Several optimizers, each with parameters of its own, that act as one."""

    def __init__(self, parts: list[Optimizer]):
        self.parts = parts
        self.__setstate__({})  # sets up an Optimizer's hooks; Optimizer.__init__ would make a second param_groups

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self):
        return {p: state for part in self.parts for p, state in part.state.items()}

    @property
    def defaults(self):
        return self.parts[0].defaults

    def step(self, closure=None):  # train.py passes no closure
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
    """Whether PyTorch has a fused AdamW for the device of these parameter groups."""
    return groups[0]["params"][0].device.type in ("cpu", "cuda")


class ZClipped(torch.optim.AdamW):
    """AdamW with ZClip before every step. ZClip's statistics are part of the state, so a resumed run keeps them."""

    STATISTICS = ("initialized", "mean", "var", "buffer")

    def __init__(self, groups: list[dict], clip, **options):
        super().__init__(groups, **options)
        self.clip = clip
        # ZClip.step takes a module and reads its parameters()
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
    """PyTorch's AdamW."""
    return torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=fused(groups))


def zclip(groups: list[dict], cfg: Config) -> Optimizer:
    """ZClip (arXiv 2504.02507) and AdamW.

    Gradient norms are clipped where they exceed their moving average by 2.5 standard deviations, and at grad_clip.
    """
    from zclip import ZClip

    clip = ZClip(
        alpha=0.97, z_thresh=2.5, max_grad_norm=cfg.grad_clip or None, eps=1e-6, warmup_steps=25, mode="zscore",
        clip_option="adaptive_scaling", clip_factor=1.0, skip_update_on_spike=False,
    )  # fmt: skip
    return ZClipped(groups, clip, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=fused(groups))


def spam(groups: list[dict], cfg: Config) -> Optimizer:
    """SPAM (arXiv 2501.06842).

    Gradient entries whose square exceeds 5000 times the second moment are clipped. The moments are reset every 500
    steps, with a warm-up of 150 steps afterwards.
    """
    return library().SPAM(
        groups, lr=cfg.peak_lr, betas=(cfg.beta1, cfg.beta2), density=1.0, weight_decay=cfg.weight_decay,
        warmup_epoch=150, threshold=5000, grad_accu_steps=20, update_proj_gap=500, eps=cfg.eps, foreach=True,
    )  # fmt: skip


def stable_spam(groups: list[dict], cfg: Config) -> Optimizer:
    """Stable-SPAM (arXiv 2502.17055): adaptive clipping of entries and of norms, moments reset every 1000 steps."""
    return library().StableSPAM(
        groups, lr=cfg.peak_lr, betas=(cfg.beta1, cfg.beta2), gamma1=0.7, gamma2=0.9, theta=0.999, t_max=None,
        weight_decay=cfg.weight_decay, update_proj_gap=1000, eps=cfg.eps, foreach=True,
    )  # fmt: skip


def adagc(groups: list[dict], cfg: Config) -> Optimizer:
    """AdaGC (arXiv 2502.11034): the gradient of every tensor is clipped at 1.05 times a moving average of its norm.

    AdaGC acts after the global clip at `grad_clip`, which its paper does not use.
    """
    return library().AdaGC(
        groups, lr=cfg.peak_lr, betas=(cfg.beta1, cfg.beta2), beta=0.98, lambda_abs=1.0, lambda_rel=1.05,
        warmup_steps=100, weight_decay=cfg.weight_decay, weight_decouple=True, fixed_decay=False, eps=cfg.eps,
        foreach=True,
    )  # fmt: skip


def muon(groups: list[dict], cfg: Config) -> Optimizer:
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), scaled as in arXiv 2502.16982.

    The update is the matrix sign of the momentum, times 0.2 · √max(m, n). The root mean square of its entries is then
    0.2, as is usual for AdamW.
    """
    return torch.optim.Muon(
        groups, lr=cfg.peak_lr, weight_decay=cfg.weight_decay, momentum=0.95, nesterov=True,
        ns_coefficients=(3.4445, -4.775, 2.0315), eps=1e-7, ns_steps=5, adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip


def spectral_sphere(groups: list[dict], cfg: Config) -> Optimizer:
    """The spectral sphere (arXiv 2601.08393): Muon's update, restricted to the tangent space of constant ‖W‖₂.

    The singular values of the update are 1; those of our Muon are 0.2 · √max(m, n). The solver bisects 20 times, not
    100 times, because it computes in bf16: more bisections change nothing, and the tolerance of 1e-8 is never met.
    """
    return library().SpectralSphere(
        groups, lr=cfg.peak_lr, momentum=0.95, weight_decay=cfg.weight_decay, weight_decouple=True, nesterov=True,
        power_iteration_steps=20, msign_steps=8, solver_tolerance_f=1e-8, solver_max_iterations=20, foreach=True,
    )  # fmt: skip


# optimizers of all parameters, and optimizers of the blocks' 2-D weights that leave the rest to AdamW
WHOLE: dict[str, Callable] = {"adamw": adamw, "spam": spam, "stable_spam": stable_spam, "adagc": adagc, "zclip": zclip}
MATRICES: dict[str, Callable] = {"muon": muon, "spectral_sphere": spectral_sphere}


def build(cfg: Config, groups: list[dict], model: torch.nn.Module) -> Optimizer:
    """The optimizer of `mup.param_groups` that cfg.optimizer names, in the wrappers that cfg asks for."""
    if cfg.optimizer in WHOLE:
        optimizer = WHOLE[cfg.optimizer](groups, cfg)
    else:
        inside = {id(p) for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2}

        def only(wanted: bool) -> list[dict]:
            """The groups with the blocks' 2-D weights alone (True) or with all other parameters (False)."""
            kept = [{**g, "params": [p for p in g["params"] if (id(p) in inside) == wanted]} for g in groups]
            return [g for g in kept if g["params"]]

        optimizer = Together([MATRICES[cfg.optimizer](only(True), cfg), adamw(only(False), cfg)])
    limit = math.inf if cfg.on_alarm == "remedy" else cfg.logit_trust  # a remedy begins when the alarm rings
    if limit:
        optimizer = LogitTrust(optimizer, model, limit, cfg.attn_scale_power)
    if cfg.logit_clip:
        how, rotated = cfg.logit_clip_map, cfg.position == "rope"
        optimizer = LogitClip(optimizer, model, cfg.logit_clip, how, cfg.attn_scale_power, rotated)
    return optimizer


def limits(optimizer: Optimizer) -> dict[str, float]:
    """{metric: value} of what LogitTrust and LogitClip multiplied heads by in the last step (docs/mechanism.md)."""
    metrics = {}
    for name, kind in (("trust", LogitTrust), ("clip", LogitClip)):
        if (limiter := inside(optimizer, kind)) and limiter.factors:
            factors = torch.cat([factor.flatten() for factor in limiter.factors.values()])
            least_and_mean = torch.stack([factors.min(), factors.mean()])
            metrics[f"{name}/least"], metrics[f"{name}/mean"] = least_and_mean.tolist()
    return metrics
