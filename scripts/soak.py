"""Train a tiny model for long, everything measured and saved at every step, and watch what grows that should not.

python scripts/soak.py --out=results/soak    # 6000 steps, as many as NanoGPT-5M takes in thirty hours on two cores; a quarter of an hour
python scripts/soak.py --steps=1200          # in six

The second tenth of the steps is held against the last one; exit code 1 when something grew.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pandas as pd

from analysis.tables import markdown
from config import Number, Parser, UserError, output_stem, run_cli
from scripts.faults import Place

CADENCES = ("probe_every", "layers_every", "jacobian_every", "theory_every", "eval_every", "ckpt_every", "msign_period")


class Sample(NamedTuple):
    """What a run holds after `step` steps, `seconds` since it began: MiB of memory, open files, bytes of log, MiB on the disk."""

    step: int
    seconds: float
    memory: float
    files: float
    log: float
    disk: float


def watch(place: Place, steps: int, interval: float = 0.25) -> list[Sample]:
    """Train for `steps` steps, looking every `interval` seconds. Raises UserError if the run fails."""
    command = [sys.executable, ROOT / "train.py", place.config, "--name=soak", f"--max_steps={steps}"]
    folder, samples, step, size, began = place.of("soak"), [], 0, 0, time.time()
    log = folder / "metrics.jsonl"
    with tempfile.TemporaryFile("w+") as said:
        run = subprocess.Popen([*command, *(f"--{c}=1" for c in CADENCES)], stdout=said, stderr=said)
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
            except (psutil.Error, FileNotFoundError):  # it has just ended, or removed an old checkpoint
                continue
            samples.append(Sample(step, time.time() - began, memory / 2**20, files, size, disk / 2**20))
        if run.returncode:
            said.seek(0)
            raise UserError(f"the run failed: {said.read()[-300:].strip()}")
    return samples


def judge(samples: Sequence[Sample]) -> tuple[str, bool]:
    """Markdown: what the second tenth of the steps and the last have of everything, and whether all of it is flat: memory and disk
    within a twentieth, files equal, bytes and seconds a step within a tenth and a fifth. Raises UserError if there is too little to see."""
    columns = {
        name: np.array(values, float) for name, values in zip(Sample._fields, zip(*samples, strict=True), strict=True)
    }
    step, last = columns["step"], columns["step"][-1]
    parts = [np.flatnonzero((step >= a * last) & (step <= b * last)) for a, b in ((0.1, 0.2), (0.9, 1.0))]
    if any(len(part) < 3 or step[part[-1]] == step[part[0]] for part in parts):
        raise UserError(
            f"steps = {last:.0f}: must be more; a tenth of them is over before it can be looked at three times"
        )

    def held(name: str) -> list[float]:
        return [float(np.median(columns[name][part])) for part in parts]

    def a_step(name: str) -> list[float]:
        return [float(np.ptp(columns[name][part]) / np.ptp(step[part])) for part in parts]

    rows = [["what", "second tenth", "last tenth", "ratio", "at most", "flat"], ["---"] * 6]
    flat = True
    for what, (early, late), limit in (
        ("memory, MiB", held("memory"), 1.05), ("open files", held("files"), 1.0), ("disk without the log, MiB", held("disk"), 1.05),
        ("log, bytes a step", a_step("log"), 1.1), ("time, ms a step", [1000 * s for s in a_step("seconds")], 1.2),
    ):  # fmt: skip
        ok = late <= limit * early
        flat &= ok
        rows.append([what, f"{early:.4g}", f"{late:.4g}", f"{late / early:.3f}", f"{limit:g}", "yes" if ok else "no"])
    return (
        markdown(pd.DataFrame(rows[2:], columns=rows[0]))
        + f"\n{last:.0f} steps, each with all measurements, a validation and a checkpoint; {columns['seconds'][-1]:.0f} s.\n",
        flat,
    )


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=Number(int, 100), default=6000)
    parser.add_argument("--out", type=output_stem, help="also write OUT.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        said, flat = judge(watch(Place(Path(scratch)), args.steps))
    print(said)
    if args.out:
        args.out.with_suffix(".md").write_text(said)
    return 0 if flat else 1


if __name__ == "__main__":
    run_cli(main, "soak.py")
