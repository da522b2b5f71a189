"""A trace of some steps by PyTorch's profiler, for chrome://tracing or ui.perfetto.dev."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from config import Config


class Trace:
    """A context that traces the steps of cfg.profile on rank 0, including its exchanges with other ranks.

    The trace is written to trace_FIRST-LAST.json in the run's folder, after the last of the steps or, if the run ends
    before, at its end. A resumed run traces the steps that it takes.
    """

    def __init__(self, cfg: Config, folder: Path, device: torch.device, main: bool):
        self.steps, self.folder = cfg.profiled if main else range(0), folder
        self.activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self.asked, self.profiler, self.first, self.last = cfg.profile, None, 0, 0

    def __enter__(self):
        return self

    def step(self, step: int):
        """To be called before every step, with its number."""
        if self.profiler and step not in self.steps:
            self._write()
        elif step in self.steps and not self.profiler:
            self.profiler, self.first = profile(activities=self.activities), step
            self.profiler.start()
        self.last = step

    def _write(self):
        self.profiler.stop()
        self.profiler.export_chrome_trace(str(self.folder / f"trace_{self.first}-{self.last}.json"))
        self.profiler = None

    def __exit__(self, *exc):
        if self.profiler:
            self._write()
        elif self.steps and not self.first:
            print(f"note: profile = {self.asked!r}: none of these steps was left to take, so there is no trace")
