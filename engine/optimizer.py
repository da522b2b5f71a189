"""The optimizer of a run: AdamW or a rival, perhaps with a limited step, perhaps wrapped by MSign."""

from torch.optim import Optimizer

import mup
from config import Config, UserError
from model import GPT
from msign import MSign
from remedies import controls, rivals


def build_optimizer(cfg: Config, model: GPT, group=None) -> Optimizer:
    """The base optimizer, wrapped by MSign if msign_period > 0; the processes of `group` share MSign's work.

    Raises UserError if msign_targets matches no matrix.
    """
    base = rivals.build(cfg, mup.param_groups(model, cfg), model)
    if not cfg.msign_period:
        return base
    update = controls.update_of(cfg.msign_map, cfg.msign_backend, cfg.msign_below)
    try:
        return MSign(
            base, model, cfg.msign_period, cfg.msign_targets, update=update, group=group, reset=cfg.msign_reset
        )
    except ValueError as error:
        raise UserError(f"msign_targets = {cfg.msign_targets!r}: {error}") from error
