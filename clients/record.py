"""A client's run: its optimizer with MSign, and its record in the form of train.py's runs."""

import math
from collections.abc import Mapping
from dataclasses import asdict

import torch

from config import Config
from data import corpora
from engine.runlog import RunLog, read_metrics
from msign import MSign
from remedies import controls
from stability.collapse import final_loss, find_collapse


def with_msign(base: torch.optim.Optimizer, model: torch.nn.Module, cfg: Config) -> torch.optim.Optimizer:
    """The client's own optimizer, wrapped by MSign, or by a control in its place, if cfg.msign_period is above 0."""
    if not cfg.msign_period:
        return base
    update = controls.update_of(cfg.msign_map, cfg.msign_backend, cfg.msign_below)
    return MSign(base, model, cfg.msign_period, cfg.msign_targets, update=update)


class Record:
    """The folder of a client's run. A run that was cut begins anew, since a client's state is not ours to save.

    about: what record.json says of the client. tokens: the training split of cfg.dataset. finished: whether the run had
    ended before. Raises UserError for what RunLog or the corpus refuses.
    """

    def __init__(self, cfg: Config, about: dict):
        self.cfg, self.steps = cfg, 0
        if cfg.threads:
            torch.set_num_threads(cfg.threads)
        self.tokens, _, notes = corpora.open_splits(cfg)
        data = {"folder": self.tokens.folder.name, "fingerprint": self.tokens.fingerprint(), "notes": notes}
        self.log = RunLog(cfg, {"data": data, "client": about})
        self.finished = self.log.finished
        if not self.finished:
            self.log.start(0, 0)

    def step(self, loss: float | None, grad_norm: float | None, lr: float, measured: Mapping[str, float | None]):
        """Log the next step; None stands for a value that is not finite. Of `measured`, names with a slash count."""
        self.steps += 1
        values = {"train/loss": loss, "grad_norm": grad_norm, "lr": lr}
        # the share of the time that measuring took would make two runs of one seed differ
        values |= {name: value for name, value in measured.items() if "/" in name and name != "monitor/share"}
        self.log.log(self.steps, {name: math.nan if value is None else value for name, value in values.items()})

    def end(self, stopped: Exception | None = None):
        """Write the summary. stopped: the error that ended the run before its last step, at a weight not finite."""
        lines = read_metrics(self.log.folder)
        losses, norms = ([line[key] for line in lines] for key in ("train/loss", "grad_norm"))
        collapse = find_collapse(losses, norms, not_finite=str(stopped) if stopped else None)
        summary = {
            "status": "stopped: not finite" if stopped else "finished",
            "steps": self.steps,
            "collapse": collapse and asdict(collapse),
            "train/loss": final_loss(losses),
            "max_grad_norm": max(math.inf if norm is None else norm for norm in norms),
            "tokens_per_second": self.log.tokens_per_second(self.steps),
        }
        self.log.close(summary)
        self.log.say(f"{self.cfg.name}: {summary['status']} after step {self.steps}; {collapse or 'no collapse'}")
