"""Reproduce the headline result: train the arms side by side, then print a table and a verdict for each arm.

    python scripts/reproduce.py                                   # what `make reproduce` runs
    python scripts/reproduce.py --experiment=constant --seeds 0 1 2
    python scripts/reproduce.py --record=results                  # measure more, and pack the logs into results/

An arm is one setting of the experiment: AdamW, MSign on attention, MSign on the MLP, or attention set to zero. A
verdict says whether its run collapsed. Figure and table go to runs/, as <experiment>.png, .svg and .md, and a page to
zoom into, of the first seed, as <experiment>.html. A run that has finished before is not trained again; an interrupted
one goes on from its checkpoint.
"""

import argparse
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tqdm import tqdm

from analysis import page
from analysis.figures import overview, save
from analysis.report import markdown, overview_table
from analysis.runs import load_run
from analysis.statistics import judged
from config import Number, Parser, UserError, output_folder, read_config_file, run_cli
from data import stdlib
from engine.pool import Job, Pool
from engine.records import pack_run

PERIOD = 100
ARMS = {
    "adamw": [],
    "msign": [f"--msign_period={PERIOD}", "--msign_targets=attention"],
    "msign-mlp": [f"--msign_period={PERIOD}", "--msign_targets=mlp"],
    "attention-off": [f"--msign_period={PERIOD}", "--msign_targets=attention", "--msign_map=zero"],
}
# with --record more is measured; training stays the same to the bit (tests/test_train.py)
MEASURE_MORE = ["--probe_every=25", "--layers_every=100", "--jacobian_every=50", "--theory_every=500"]


class Arm(Job):
    """One arm of an experiment, with one seed."""

    def __init__(self, args, arm: str, seed: int):
        self.arm = arm
        name = f"{args.experiment}-{arm}-seed{seed}"
        command = [
            sys.executable, str(ROOT / "train.py"), str(ROOT / "configs" / f"stress_{args.experiment}.py"), *ARMS[arm],
            f"--name={name}", f"--seed={seed}", f"--runs_dir={args.runs_dir}", f"--wandb={args.wandb}", "--resume",
        ]  # fmt: skip
        if args.record:
            command += MEASURE_MORE + (["--msign_probe"] if arm == "msign" else [])
        if args.max_steps:
            command.append(f"--max_steps={args.max_steps}")
        super().__init__(name, Path(args.runs_dir) / name, command)


def run_all(arms: list[Arm], workers: int, max_steps: int):
    """Run the arms, `workers` at a time, under one progress bar. Raises UserError with the output of a failed one."""
    done = 0
    bar = tqdm(total=len(arms) * max_steps, unit="step", dynamic_ncols=True, file=sys.stderr,
               mininterval=0.5 if sys.stderr.isatty() else 30)  # fmt: skip
    with Pool(arms, [{}] * workers) as pool, bar:
        for ended in pool:
            lines = {arm: arm.follow() for arm in pool.running}
            shown = (f"{arm.arm} {line['train/loss']:.2f}" for arm, line in lines.items() if line.get("train/loss"))
            bar.set_postfix_str("loss: " + ", ".join(shown), refresh=False)
            bar.update(done + sum(line.get("iter", 0) for line in lines.values()) - bar.n)
            for arm in ended:
                done += max_steps
                if arm.failure:
                    raise UserError(arm.failure)


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--experiment", choices=["ramp", "constant"], default="ramp", help="the stress test to run [%(default)s]"
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="the arms to train [all]")
    seeds = "each arm is trained once for each of these seeds %(default)s"
    parser.add_argument("--seeds", nargs="+", type=Number(int, 0), default=[0], help=seeds)
    parser.add_argument("--max_steps", type=Number(int, 1), help="steps of each run [those of the experiment]")
    parser.add_argument("--runs_dir", type=output_folder, default="runs", help="where run folders go [%(default)s]")
    parser.add_argument("--workers", type=Number(int, 1), default=os.cpu_count(), help="arms at a time [%(default)s]")
    parser.add_argument(
        "--wandb", choices=["auto", "online", "offline", "off"], default="off", help="train.py's field [%(default)s]"
    )
    parser.add_argument("--record", type=output_folder, help="also pack the small logs into this folder")
    args = parser.parse_args()
    stdlib.prepare("stdlib-bytes")
    jobs = [Arm(args, arm, seed) for seed in args.seeds for arm in args.arms]
    max_steps = args.max_steps or read_config_file(ROOT / "configs" / f"stress_{args.experiment}.py")["max_steps"]
    size = f"{len(jobs)} runs of {max_steps} steps, {args.workers} at a time"
    print(f"{args.experiment}: {size}, recorded in {args.runs_dir}/")
    began = time.perf_counter()
    run_all(jobs, args.workers, max_steps)
    runs = judged(load_run(job.folder) for job in jobs)
    if args.record:
        for job in jobs:
            pack_run(job.folder, args.record / args.experiment / job.name)
    stem = args.runs_dir / args.experiment
    figures = save(overview(runs), stem)
    page.write(runs["run"][: len(args.arms)], stem.with_suffix(".html"))
    table = markdown(overview_table(runs))
    stem.with_suffix(".md").write_text(table)
    print(f"\n{table}\n" + "\n".join(runs["verdict"]))
    written = [*figures, stem.with_suffix(".md"), stem.with_suffix(".html")]
    print(f"\n{time.perf_counter() - began:.0f} s; {', '.join(map(str, written))}")
    return 0


if __name__ == "__main__":
    run_cli(main, "reproduce.py")
