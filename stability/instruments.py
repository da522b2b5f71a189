"""Every measurement that a training run takes, at its cadence, as {name: value} for the log."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from config import Config, due
from model import GPT
from stability import metrics, theory


class Instruments:
    """The measurements of one run, on a fixed probe batch; they change no weight, no gradient, no random state.

    model: the model in training, perhaps sharded. probe: inputs and labels, each (probe_batch, block_size).
    group: the processes that share the work on spectra, None if there is one. lend: calls a function with the model, on
    the process that measures everything else, and returns the result, there; {} on the others. All processes call it
    together. With at_once=True all weights are whole at once, which gradients need. norms: turns (name, tensor) pairs
    into {name: ‖·‖_F}, over all processes. autocast: the context in which training computes. warn: is told what could
    not be measured.
    """

    def __init__(
        self,
        cfg: Config,
        model: GPT,
        probe: tuple[Tensor, Tensor],
        group,
        lend: Callable[..., dict[str, float]],
        norms: Callable[[Iterable[tuple[str, Tensor]]], Mapping[str, Tensor]],
        autocast,
        warn: Callable[[str], None],
    ):
        self.cfg, self.group, self.lend, self.norms = cfg, group, lend, norms
        self.model, self.autocast, self.warn = model, autocast, warn
        self.parameters = dict(model.named_parameters())
        self.tokens, self.labels = probe
        self.weights_before: dict[str, Tensor] = {}
        self.beside_msign: dict[str, float] = {}

    def before_step(self, step: int) -> dict[str, float]:
        """The measurements due at `step`, taken before the update, on the weights that give its loss and gradient."""
        cfg, tokens, warn = self.cfg, self.tokens, self.warn
        each_layer = due(cfg.layers_every, step)
        found, wanted = {}, []
        if due(cfg.probe_every, step):
            found = self._weights(each_layer)
            wanted.append(lambda model: metrics.activations(model, tokens, each_layer, warn, self.autocast))
        if due(cfg.jacobian_every, step):
            wanted.append(lambda model: metrics.jacobians(model, tokens, True, warn, cfg.jacobian_positions))
        found |= self._measure(wanted)
        if due(cfg.theory_every, step):
            found |= self._measure([self._theorems], at_once=True)
        return found

    def gradients(self, step: int) -> dict[str, float]:
        """The metrics grad_norm/…; call this before gradients are clipped. Also copies the weights for `updates`."""
        if not due(self.cfg.probe_every, step):
            return {}
        self.weights_before = {name: p.detach().clone() for name, p in self.parameters.items()}
        found = self.norms((name, p.grad) for name, p in self.parameters.items())
        return metrics.norms("grad_norm", found, due(self.cfg.layers_every, step))

    def updates(self, step: int) -> dict[str, float]:
        """The metrics update_norm/… of the step just taken, and what `observe_msign` measured in it."""
        found, self.beside_msign = self.beside_msign, {}
        if self.weights_before:
            # one difference at a time, and each copy is dropped: two more models would not fit beside a large one
            moved = ((name, p.detach() - self.weights_before.pop(name)) for name, p in self.parameters.items())
            found |= metrics.norms("update_norm", self.norms(moved), due(self.cfg.layers_every, step))
        return found

    def observe_msign(self, when: str):
        """Measure right "before" or "after" MSign acts; `updates` returns them as before_msign/… and after_msign/…"""
        found = self._weights(False) | self._measure([
            lambda model: metrics.activations(model, self.tokens, False, self.warn),
            lambda model: metrics.jacobians(model, self.tokens, False, self.warn),
        ])  # fmt: skip
        self.beside_msign |= {f"{when}_msign/{name}": value for name, value in found.items()}

    def _weights(self, each_layer: bool) -> dict[str, float]:
        return metrics.weights(self.model, each_layer, self.warn, self.group, self.norms)

    def _theorems(self, model: GPT) -> dict[str, float]:
        sides = theory.all_theorems(model, self.tokens, self.labels)
        return {f"theory/{name}": value for name, value in sides.items()}

    def _measure(self, wanted: list[Callable[[GPT], dict[str, float]]], at_once: bool = False) -> dict[str, float]:
        """The results of the functions `wanted`, on the process that measures; {} on the others."""

        def all_wanted(model: GPT) -> dict[str, float]:
            found = {}
            try:
                for measure in wanted:
                    found |= measure(model)
            except torch.OutOfMemoryError as error:
                self.warn(f"out of memory: {str(error).splitlines()[0]}")
            return found

        return self.lend(all_wanted, at_once) if wanted else {}
