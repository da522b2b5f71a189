"""Where a run's time goes: seconds of each phase of the loop, tokens a second, the share of the peak, memory.

A *phase* is one of PHASES. An *interval* begins where the one before it ended and takes about EVERY seconds; it ends
with a step. Each interval is one line of times.jsonl, written by rank 0 about itself.
"""

import time
from collections.abc import Callable
from itertools import pairwise

import torch

from config import Config
from engine import machine
from engine.parallel import World
from model import GPT

EVERY = 10.0  # seconds
PHASES = {
    "data": "drawing the batch and starting its copy to the device",
    "forward_backward": "forward and backward passes, with the exchange of gradients",
    "optimizer": "clipping, waiting for the step's loss, and the optimizer's own step",
    "msign": "MSign, when it acts",
    "measure": "probes and validation",
    "log": "metrics.jsonl, W&B and the progress bar",
    "save": "checkpoints, as far as training waits for them",
}


class Clock:
    """Books time to phases, from one mark to the next, so that the phases add up to the whole.

    On CUDA a mark is an event in the stream of the device. What is booked is thus the device's time: a batch drawn
    while the device computes costs nothing, and a phase gets the time that the device waited for the host in it. Events
    are read only where the loop has just waited for the device, so no step waits more often than without a clock.
    Elsewhere a mark is a time of the host.

    device: of the run. tokens: of a step, on all ranks. flops: of a step, without recomputation. peak: FLOP/s of all
    ranks' devices together, None where it is unknown.
    """

    def __init__(self, device: torch.device, tokens: int, flops: float, peak: float | None):
        self.device, self.tokens, self.flops, self.peak = device, tokens, flops, peak
        self.seconds, self.steps, self.marks = dict.fromkeys(PHASES, 0.0), 0, []
        self.began = self.settled = time.perf_counter()
        self.to("data")

    @classmethod
    def of(cls, cfg: Config, model: GPT, world: World) -> "Clock":
        """The clock of a run."""
        peak = machine.peak_flops(cfg, world.device)
        flops = model.flops_per_token() * cfg.tokens_per_step
        return cls(world.device, cfg.tokens_per_step, flops, None if isinstance(peak, str) else peak * world.size)

    def to(self, phase: str):
        """From now on time belongs to `phase`."""
        if self.device.type == "cuda":
            mark = torch.cuda.Event(enable_timing=True)
            mark.record(torch.cuda.current_stream(self.device))
        else:
            mark = time.perf_counter()
        self.marks.append((phase, mark))

    def settle(self, steps: int = 1):
        """Book the time until the last mark; to be called where the device has just been waited for.

        steps: how many have been taken since the last call.
        """
        for (phase, mark), (_, end) in pairwise(self.marks):
            cuda = self.device.type == "cuda"
            self.seconds[phase] += mark.elapsed_time(end) / 1e3 if cuda else end - mark
        del self.marks[:-1]
        self.steps += steps
        self.settled = time.perf_counter()

    @property
    def due(self) -> bool:
        """Whether the interval is as long as it should be."""
        return self.settled - self.began >= EVERY

    def line(self, step: int) -> dict[str, float]:
        """What times.jsonl says of the interval, which ends here; the next one begins.

        iter: the last step taken. time/PHASE, time/interval: seconds; the phases add up to the interval, but for the
        time until the host notices that the device is ready. time/mfu: the share of the peak
        that the model's FLOPs take, absent where the peak is unknown (record.json says why). memory/now, memory/peak:
        GiB allocated on CUDA, of the process elsewhere. memory/retries: how often CUDA's allocator had to free its
        cache since the start; absent elsewhere.
        """
        seconds = max(self.settled - self.began, 1e-9)
        line = {"time/interval": seconds, **{f"time/{phase}": spent for phase, spent in self.seconds.items()}}
        line["time/tokens_per_second"] = self.steps * self.tokens / seconds
        if self.peak:
            line["time/mfu"] = self.steps * self.flops / seconds / self.peak
        line |= {f"memory/{what}": amount for what, amount in machine.memory_used(self.device).items()}
        line = {"iter": step, "time/steps": self.steps, **{key: float(f"{value:.6g}") for key, value in line.items()}}
        self.seconds, self.steps, self.began = dict.fromkeys(PHASES, 0.0), 0, self.settled
        return line

    def last_line(self, step: int) -> dict[str, float]:
        """As `line`, of what is left at the end of the run. Waits for the device."""
        self.to("save")
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.settle(steps=0)
        return self.line(step)

    def around_msign(self, measure: Callable[[str], None] | None) -> Callable[[str], None]:
        """What MSign shall call "before" and "after" it acts: it books the time, and calls `measure` if there is one.

        Before and after, the time is the optimizer's.
        """

        def observe(when: str):
            if measure:
                self.to("measure")
                measure(when)
            self.to("msign" if when == "before" else "optimizer")

        return observe
