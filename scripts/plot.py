"""Draw the paper's Figures 1 to 4 and heat maps of layers against steps from recorded runs, and overwrite older ones.

    python scripts/plot.py results/ramp/*                                  # figures/fig1.png, fig1.svg, …
    python scripts/plot.py runs/a runs/b/wandb/offline-run-* --out=mine

fig1, fig2 and the heat maps have a column for each run. With more than four runs they show one run of each arm, the
first, and only the first four arms. (An arm is one setting of an experiment, whatever the seed.)
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis.figures import fig1, fig2, fig3, fig4, heatmaps, save
from analysis.runs import load_run
from analysis.statistics import judged
from config import Parser, UserError, run_cli


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folder, or offline W&B run (its folder or .wandb file)"
    )
    parser.add_argument("--out", type=Path, default=Path("figures"), help="folder for the figures [figures]")
    args = parser.parse_args()
    runs = judged(map(load_run, args.runs))
    drawn = False
    for draw in (fig1, fig2, fig3, fig4, heatmaps):
        try:
            fig = draw(runs)
        except UserError as error:
            print(f"{draw.__name__}: {error}; skipped")
            continue
        args.out.mkdir(parents=True, exist_ok=True)
        print(f"{draw.__name__}:", *save(fig, args.out / draw.__name__))
        drawn = True
    if not drawn:
        raise UserError("none of the figures can be drawn from these runs")
    return 0


if __name__ == "__main__":
    run_cli(main, "plot.py")
