"""A grid of runs in one file: sizes × optimizers × periods × targets × learning rates × seeds.

    python scripts/sweep.py configs/sweeps/table2_small.py --dry_run     # the points, and which are done
    python scripts/sweep.py configs/sweeps/table2_small.py               # run what is missing or was interrupted
    python scripts/sweep.py configs/sweeps/table2_small.py --seed=0,1    # set a field; of an axis, keep these values
    python scripts/sweep.py configs/sweeps/table2_small.py --record=results --dry_run    # pack the runs that are done
    python scripts/sweep.py configs/sweeps/ladder.py --wandb             # register it with W&B, for many machines

A grid file is plain assignments to the names of config.py, and to `config`, the config file that the runs start from.
A name that is assigned a list is an axis. `arm` is an axis, too: a dict that maps an arm's name to a dict of fields.
Every other assignment holds for all runs. A point is one combination of the axes' values. It is one run of train.py, or
of the program that `program` names, in runs_dir/<grid>/<point>, where <point> is made of its values. Points that differ
only in a field without effect, such as msign_targets where MSign is never applied, are one point. results.csv beside
the runs has a line for each point.
Each GPU runs one point at a time. A CPU runs as many as it has cores for: cores divided by the threads of a run.

With --wandb nothing is run here. The script registers the points that are not done and prints a `wandb agent` command.
Call that command in a checkout of this repository on any machine, once for each GPU (CUDA_VISIBLE_DEVICES says which);
W&B hands it the points.
"""

import argparse
import collections
import contextlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import Number, Parser, UserError, output_folder, run_cli
from data.corpora import open_splits
from engine.grid import Point, axes_of, points, read_grid, register, run, slots, table, write_results
from engine.records import record_grid

USAGE = "sweep.py GRID.py [--dry_run] [--workers=N] [--record=FOLDER] [--wandb] [--point=NAME] [--field=value ...]"


def prepare(todo: list[Point]):
    """Write the built-in corpora that the runs need, since several runs would otherwise write them at once."""
    for cfg in {(point.cfg.dataset, point.cfg.fallback): point.cfg for point in todo}.values():
        with contextlib.suppress(UserError):  # the run will report the error
            open_splits(cfg)


def finish(grid: list[Point], todo: list[Point], workers: int | None):
    """Run the points `todo`. On Ctrl-C or SIGTERM, print how many are left."""
    if not todo:
        return
    sys.stdout.flush()
    todo[0].folder.parent.mkdir(parents=True, exist_ok=True)
    prepare(todo)
    try:
        run(todo, grid, slots(todo, workers))
    except (KeyboardInterrupt, SystemExit):
        print(f"stopped; {sum(not point.summary for point in grid)} to go with the same command", file=sys.stderr)
        raise


def record(grid: list[Point], folder: Path):
    """Pack the runs that are done into Parquet files in this folder; runs packed there before stay."""
    done = [point for point in grid if point.summary]
    if not done:
        print(f"nothing to pack into {folder}: none of {len(grid)} points is done")
        return
    held = record_grid(folder, {point.folder: point.axes for point in done})
    print(f"{len(done)} of {len(grid)} points packed into {folder}, which holds {held}")


def become(name: str, grid: list[Point], path: Path):
    """Replace this process by train.py with the point of that name; signals and exit code are then train.py's."""
    for point in grid:
        if point.name == name:
            os.execv(sys.executable, point.command)
    raise UserError(f"point = {name!r}: not in {path}, whose first is {grid[0].name}")


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=raw, allow_abbrev=False, usage=USAGE)
    parser.add_argument("grid", type=Path, help="a file of plain assignments, such as configs/sweeps/ladder.py")
    parser.add_argument("--dry_run", action="store_true", help="print the points (with --wandb: the sweep) and stop")
    parser.add_argument("--workers", type=Number(int, 1), help="runs at a time, spread over the GPUs if there are any")
    registering = "without a value: register the grid with W&B; with a value: train.py's field `wandb`"
    parser.add_argument("--wandb", nargs="?", const="register", help=registering)
    packing = "at the end, pack the runs that are done into this folder, as <grid>/*.parquet"
    parser.add_argument("--record", type=output_folder, help=packing)
    parser.add_argument("--point", help="run this point alone, in the foreground: what W&B's agents call")
    args, overrides = parser.parse_known_args()
    if args.wandb not in (None, "register"):
        overrides.append(f"--wandb={args.wandb}")
    values = read_grid(args.grid, overrides)
    grid = points(args.grid, values)
    if args.point:
        become(args.point, grid, args.grid)
    for point in grid:
        point.check()
    todo = [point for point in grid if point.state != "done"]
    if args.wandb == "register":
        if not todo:
            raise UserError(f"{args.grid}: nothing to register; all {len(grid)} points are done here")
        register(args.grid, todo, overrides, args.dry_run)
        return 0
    folder = Path(grid[0].cfg.runs_dir)
    counted = collections.Counter(point.state for point in grid)
    print(f"{len(grid)} points in {folder}: " + ", ".join(f"{count} {state}" for state, count in counted.items()))
    if args.dry_run:
        print(table(({"point": point.name, "state": point.state} for point in grid), ["point", "state"]))
    else:
        finish(grid, todo, args.workers)
        write_results(folder / "results.csv", grid, axes_of(values))
    if args.record:
        record(grid, args.record / args.grid.stem)
    if args.dry_run:
        return 0
    failed = [point.error for point in grid if point.error]
    print("\n".join([table(point.row() for point in grid), str(folder / "results.csv"), *failed]))
    return 1 if failed else 0


if __name__ == "__main__":
    run_cli(main, "sweep.py")
