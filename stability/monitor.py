"""A monitor for any training loop: it says what moves before a run collapses, and it costs a bounded share of the time.

    monitor = Monitor(model)
    ...
    loss.backward()
    grad_norm = clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    report = monitor.step(loss, grad_norm)  # before the gradients are set to zero

The loss and the gradient norm are judged at every step, and everything else is measured now and then. Names and rules
are those of `collapse`. Training stays the same bit for bit. This file needs PyTorch, `stability` and `msign`.
"""

import math
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn

from msign import ATTENTION, Target, find
from stability.attached import Forward, block_jacobians, norms, total_norm, weights
from stability.collapse import SIGNALS, WINDOW, Watch, find_onsets
from stability.probes import Jacobians, geometric_mean

FEWEST = 10  # steps between measurements
WORDS = {
    "stable rank": "the stable rank of attention",
    "Jacobian alignment": "the alignment of the Jacobians",
    "attention logits": "the largest attention logit",
    "first-block gain": "the first block's gain",
    "gradient norm": "the gradient norm",
}


class Monitor:
    """Watches a model in training; `step` returns what to log, and `history` holds it, as lines of metrics.jsonl do.

    model: any module. `msign.find` finds its matrices; `split` says what is in a fused weight that it does not know.
    every: steps between measurements. None measures as often as `share` of the time allows, from step 10 on and never
           more often than every 10 steps. Weights in shards need `every`, since all processes must measure together.
    warn:  is told in a line what moved, and once what cannot be measured.

    The blocks are the longest list of modules with attention inside. Raises ValueError for values out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int | None = None,
        share: float = 0.01,
        split: dict | None = None,
        warn: Callable[[str], object] = warnings.warn,
    ):
        if every is not None and every < 1:
            raise ValueError(f"every = {every!r}: must be at least 1 step (None: as often as `share` allows)")
        if not 0 < share <= 1:
            raise ValueError(f"share = {share!r}: must be above 0 and at most 1, a part of the time")
        self.model, self.every, self.share, self.warn = model, every, share, warn
        self.watch, self.cost, self.last_cost, self.last = Watch(), 0.0, 0.0, 0
        self.history: list[dict[str, float | None]] = []
        self.onsets: dict[str, int] = {}
        self.said: set[str] = set()
        self.began: float | None = None
        self.armed = False  # whether the next step is measured
        self.forward: Forward | None = None
        self.taken: dict[str, float] = {}
        self.ratios: dict[str, float] = {}
        self.before: dict[str, Tensor] = {}
        self.targets = self._find(split)
        if every is None and any(hasattr(t.parameter, "full_tensor") for t in self.targets.values()):
            raise ValueError("every = None: weights in shards need a number of steps, the same on all processes")
        self.attention: dict[str, Target] = {}
        for target in self.targets.values():
            if set(target.roles) & set(ATTENTION):
                self.attention.setdefault(target.module, target)
        self.blocks = self._find_blocks()

    def step(self, loss: float | Tensor, grad_norm: float | Tensor) -> dict:
        """The step's line of `history`, and "events", lines about what has moved; call it after every optimizer step.

        The gradients, if they are still there, may be clipped: grad_norm, the norm before clipping, sets their scale.
        The values in a measured line are those of the weights that gave this loss, before the update.
        """
        self.began = perf_counter() if self.began is None else self.began
        self.measure()
        norm = _number(grad_norm)
        line = {"iter": self.watch.step + 1, "loss": _number(loss), "grad_norm": norm}
        collapsed = self.watch.collapse is not None
        self.watch.add(line["loss"], norm)
        step = self.watch.step
        line |= {name: _number(math.nan if norm is None else v * norm) for name, v in self.ratios.items()}
        line |= {name: _number(v) for name, v in self.taken.items()}
        self.history.append(line)
        events = []
        if self.taken:
            with self._timed():
                events = self._moved()
            line["monitor/share"] = self.cost / max(perf_counter() - self.began, self.cost)
        if self.watch.collapse is not None and not collapsed:
            events.append(f"step {step}: {self.watch.collapse}")
        for event in events:
            self.warn(event)
        self.taken, self.ratios = {}, {}
        if self._due(step + 1):
            self._arm()
        return line | {"events": events}

    def measure(self) -> None:
        """Measure gradients and updates, if due. A loop that sets gradients to zero before `step` calls this."""
        if not self.armed:
            return
        self.armed = False
        with self._timed():
            self.taken |= self._forward()
            self.taken |= norms("update_norm", self.targets, lambda name, p: p.detach() - self.before.pop(name))
            total = total_norm(p.grad for p in self.model.parameters() if p.grad is not None) or 1.0
            gradients = norms("grad_norm", self.targets, lambda name, p: p.grad)
            self.ratios = {name: norm / total for name, norm in gradients.items()}

    def jacobians(self, *inputs, **named) -> Jacobians:
        """The `probes.Jacobians` of the blocks at model(*inputs, **named), in evaluation mode and without a cache.

        The next line of `history` holds their mean alignment and ‖J(ℓ)‖₂. Raises TypeError for wrapped or sharded
        blocks, and ValueError if no blocks were found or the model does not call them one after the other.
        """
        found = block_jacobians(self.model, self.blocks, inputs, named)
        self.taken["jacobian/sigma1"] = geometric_mean(found.sigma.flatten().tolist())
        self.taken["jacobian/alignment"] = found.alignment.nanmean().item()
        return found

    def close(self) -> None:
        """Take every hook from the model. The monitor can go on with losses and gradient norms."""
        self._forget()
        self.targets, self.attention, self.blocks = {}, {}, []

    def state_dict(self) -> dict:
        """What `load_state_dict` needs to go on as if training had never stopped: numbers, words and lists of them."""
        elapsed = 0.0 if self.began is None else perf_counter() - self.began
        names = ("onsets", "cost", "last_cost", "last", "armed")
        copies = {"history": list(self.history), "said": sorted(self.said), "elapsed": elapsed}
        return {name: getattr(self, name) for name in names} | copies

    def load_state_dict(self, state: dict):
        """Restore what `state_dict` returned, after the model's own weights have been loaded."""
        self._forget()
        self.watch, self.history = Watch(), list(state["history"])
        for line in self.history:
            self.watch.add(line["loss"], line["grad_norm"])
        self.onsets, self.said = dict(state["onsets"]), set(state["said"])
        if state["armed"]:
            self._arm()
        self.cost, self.last_cost, self.last = state["cost"], state["last_cost"], state["last"]
        self.began = perf_counter() - state["elapsed"]

    def _forget(self):
        """Drop a measurement that has begun."""
        if self.forward is not None:
            self.forward.remove()
        self.armed, self.taken, self.ratios, self.before, self.forward = False, {}, {}, {}, None

    def _say(self, line: str):
        if line not in self.said:
            self.said.add(line)
            self.warn(line)

    def _find(self, split: dict | None) -> dict[str, Target]:
        for targets in ("blocks", "attention"):
            try:
                return find(self.model, targets, split)
            except ValueError as error:
                self._say(f"some matrices are not measured: {error}")
        return {}

    def _find_blocks(self) -> list[nn.Module]:
        inside = {self.model.get_submodule(name) for name in self.attention}
        longest: list[nn.Module] = []
        for module in self.model.modules():
            if isinstance(module, nn.ModuleList | nn.Sequential):
                longest = max(longest, [block for block in module if inside & {*block.modules()}], key=len)
        return longest

    def _due(self, step: int) -> bool:
        """Whether to measure at the next step, `step`. The latest cost foretells the next one."""
        if self.every is not None:
            return step % self.every == 0
        elapsed = perf_counter() - (self.began or 0.0)
        return step - self.last >= FEWEST and self.cost + self.last_cost <= self.share * elapsed

    @contextmanager
    def _timed(self):
        """Count the time inside as the cost of measuring; a GPU's as well."""
        cuda = any(p.is_cuda for p in self.model.parameters())
        wait = torch.cuda.synchronize if cuda else lambda: None
        wait()
        start = perf_counter()
        try:
            yield
        finally:
            wait()
            seconds = perf_counter() - start
            self.cost, self.last_cost = self.cost + seconds, self.last_cost + seconds

    def _arm(self):
        """Measure the weights of the next step, copy them, and hook the next forward pass."""
        self.armed, self.last, self.last_cost = True, self.watch.step + 1, 0.0
        with self._timed():
            self.taken = weights(self.model, self.targets.values())
            self.before = {name: t.parameter.detach().clone() for name, t in self.targets.items()}
        if any(getattr(m, "_compiled_call_impl", None) or hasattr(m, "_orig_mod") for m in self.model.modules()):
            self._say("the model is compiled: attention logits and the first block's gain are not measured")
            return
        heads = {self.model.get_submodule(name): target.heads for name, target in self.attention.items()}
        self.forward = Forward(heads, self.blocks[0] if self.blocks else None, self._timed)

    def _forward(self) -> dict[str, float]:
        """What the hooks have seen, and a word on what they have not."""
        found: dict[str, float] = {}
        seen, self.forward = self.forward, None
        if seen is None:
            return found
        seen.remove()
        if seen.max_logit is not None:
            found["attention/max_logit"] = seen.max_logit
        elif self.attention:
            why = (
                seen.error or "no attention of PyTorch's own was seen; the model may be compiled or use another kernel"
            )
            self._say(f"attention logits are not measured: {why}")
        if seen.gain is not None:
            found["residual/gain"] = seen.gain.item()
        elif self.blocks:
            self._say("the first block's gain is not measured: the block was not called as a module, or is compiled")
        return found

    def _moved(self) -> list[str]:
        """Lines about what has moved since the last call, by the rules of `collapse`."""
        found = find_onsets(self.history)
        now = {name: step for name, step in found.signals.items() if step is not None}
        if found.grad_norm is not None:
            now["gradient norm"] = found.grad_norm
        new, self.onsets = [name for name in now if name not in self.onsets], now
        return [self._sentence(name, now) for name in new]

    def _sentence(self, name: str, onsets: dict[str, int]) -> str:
        key, worse = SIGNALS.get(name, ("grad_norm", 1))
        values = [(step, v) for step, line in enumerate(self.history, 1) if (v := line.get(key)) is not None]
        before = [v for step, v in values if self.watch.step / 4 < step < onsets[name]]
        after = [v for step, v in values if step >= onsets[name]]
        best = median(before) if key == "grad_norm" else min(before) if worse > 0 else max(before)
        last = median(after[-WINDOW:]) if key == "grad_norm" else after[-1]
        first = min(onsets, key=lambda other: (onsets[other], other != name))
        change = f"at step {onsets[name]} ({best:.3g} → {last:.3g})"
        said = f"{WORDS.get(name, name)} moved first, {change}"
        if first != name:
            said = f"{WORDS.get(name, name)} moved {change}, {onsets[name] - onsets[first]} steps after "
            said += WORDS.get(first, first)
        return f"step {self.watch.step}: {said}" + ("" if "gradient norm" in onsets else "; the gradient norm has not")


def _number(x: float | Tensor) -> float | None:
    """x as metrics.jsonl holds it, where None stands for not finite."""
    x = float(x.detach() if isinstance(x, Tensor) else x)
    return x if math.isfinite(x) else None
