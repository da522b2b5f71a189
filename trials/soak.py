"""A long run that measures everything and saves at every step, to see whether memory, files or time grow."""

import subprocess
import sys
import tempfile
import time

import numpy as np
import pandas as pd
import psutil

from config import ROOT, UserError
from trials.place import Place

CADENCES = ("probe_every", "layers_every", "jacobian_every", "theory_every", "eval_every", "ckpt_every", "msign_period")


def watch(place: Place, steps: int, interval: float = 0.25) -> pd.DataFrame:
    """Train for `steps` steps. Returns a row every `interval` seconds of what the run then holds.

    Columns: `step`; `seconds` since the run began; `memory` in MiB; `files`, how many are open; `log`, bytes of
    metrics.jsonl; `disk`, MiB of the run's folder without the log. Raises UserError if the run fails.
    """
    command = [sys.executable, ROOT / "train.py", place.config, "--name=soak", f"--max_steps={steps}"]
    folder, samples, step, size, began = place.of("soak"), [], 0, 0, time.time()
    log = folder / "metrics.jsonl"
    with tempfile.TemporaryFile("w+") as said:
        run = subprocess.Popen([*command, *(f"--{cadence}=1" for cadence in CADENCES)], stdout=said, stderr=said)
        process = psutil.Process(run.pid)
        while run.poll() is None:
            time.sleep(interval)
            if not log.exists():
                continue
            with log.open("rb") as stream:
                stream.seek(size)
                new = stream.read()
            step, size = step + new.count(b"\n"), size + len(new)
            try:
                memory, files = process.memory_info().rss, process.num_fds()
                disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path != log)
            except (psutil.Error, FileNotFoundError):  # the run has just ended, or removed an old checkpoint
                continue
            samples.append({"step": step, "seconds": time.time() - began, "memory": memory / 2**20,
                            "files": files, "log": size, "disk": disk / 2**20})  # fmt: skip
        if run.returncode:
            said.seek(0)
            raise UserError(f"the run failed: {said.read()[-300:].strip()}")
    return pd.DataFrame(samples)


def judge(samples: pd.DataFrame) -> tuple[str, bool]:
    """A Markdown table that compares the last tenth of the steps with the second tenth, and whether all is flat.

    Flat means that from the second tenth to the last, memory and disk grow by at most a twentieth, open files not at
    all, bytes a step by at most a tenth and seconds a step by at most a fifth. Raises UserError if the run is
    too short.
    """
    last = samples.step.iloc[-1]
    parts = [samples[samples.step.between(first * last, end * last)] for first, end in ((0.1, 0.2), (0.9, 1.0))]
    if any(len(part) < 3 or np.ptp(part.step) == 0 for part in parts):
        raise UserError(
            f"steps = {last:.0f}: must be more; a tenth of them is over before it can be looked at three times"
        )

    def held(name: str) -> list[float]:
        return [part[name].median() for part in parts]

    def a_step(name: str) -> list[float]:
        return [np.ptp(part[name]) / np.ptp(part.step) for part in parts]

    rows = []
    for what, (early, late), limit in (
        ("memory, MiB", held("memory"), 1.05),
        ("open files", held("files"), 1.0),
        ("disk without the log, MiB", held("disk"), 1.05),
        ("log, bytes a step", a_step("log"), 1.1),
        ("time, ms a step", [1000 * seconds for seconds in a_step("seconds")], 1.2),
    ):
        rows.append({"what": what, "second tenth": f"{early:.4g}", "last tenth": f"{late:.4g}",
                     "ratio": f"{late / early:.3f}", "at most": f"{limit:g}",
                     "flat": "yes" if late <= limit * early else "no"})  # fmt: skip
    table = pd.DataFrame(rows)
    about = f"{last:.0f} steps, each with all measurements, a validation and a checkpoint"
    text = f"{table.to_markdown(index=False, disable_numparse=True)}\n\n{about}; {samples.seconds.iloc[-1]:.0f} s.\n"
    return text, bool((table.flat == "yes").all())
