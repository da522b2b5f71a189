"""μP coordinate check: does the size of activations depend on width while training starts?

    python scripts/coord_check.py    # print a table of slopes, write runs/coord_check.png: a minute

The table holds the slope of log mean |activation| against log width; 0 means that the size does not depend on width.
μP is a set of rules that scale initial weights, learning rates and logits with the width. Rows of the table are the
paper's rules, the practitioner's (nanoGPT-mup's table: embeddings ×1, logits × base/width, attention 1/d_head), and
standard parameterisation, which has none.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

import mup
from config import Config, Number, Parser, output_stem, run_cli

RULES = {
    "the paper's μP": {},
    "practitioner's μP": dict(embed_lr_power=0.0, logit_power=1.0, attn_scale_power=1.0),
    "standard": dict(base_width=0),
}


def slopes(widths: list[int], sizes: dict) -> pd.DataFrame:
    """A row for every set of rules and kind of activation, a column for every step."""
    rows = []
    for label, kinds in sizes.items():
        for kind, per_step in kinds.items():
            steps = {f"step {i}": f"{mup.width_slope(widths, values):+.2f}" for i, values in enumerate(per_step, 1)}
            rows.append({"rules": label, "activation": kind, **steps})
    return pd.DataFrame(rows)


def draw(widths: list[int], sizes: dict) -> plt.Figure:
    """Mean |activation| against width, a row of panels for every set of rules, a column for every step."""
    steps = len(next(iter(next(iter(sizes.values())).values())))
    fig, axes = plt.subplots(
        len(sizes), steps, figsize=(3 * steps, 7), sharex=True, sharey="row", squeeze=False, constrained_layout=True
    )
    for row, (label, kinds) in zip(axes, sizes.items(), strict=True):
        for kind, per_step in kinds.items():
            for step, (ax, values) in enumerate(zip(row, per_step, strict=True), 1):
                ax.loglog(widths, values, "o-", ms=3, label=kind)
                ax.set_title(f"{label}, step {step}", fontsize=8)
        row[0].set_ylabel("mean |activation|")
    for ax in axes[-1]:
        ax.set_xlabel("width")
        ax.set_xticks(widths, widths)
        ax.minorticks_off()
    axes[0, 0].legend(fontsize=7, frameon=False)
    return fig


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    widths = [48, 96, 192, 384]
    parser.add_argument(
        "--widths", nargs="+", type=Number(int, 1), default=widths, help="widths of the models %(default)s"
    )
    parser.add_argument("--steps", type=Number(int, 1), default=4, help="training steps [%(default)s]")
    parser.add_argument("--seeds", type=Number(int, 1), default=3, help="models of each width [%(default)s]")
    out = "runs/coord_check.png"
    parser.add_argument("--out", type=output_stem, default=out, help="path of the figure [%(default)s]")
    args = parser.parse_args()
    cfg = Config(vocab_size=256, block_size=32, batch_size=8, micro_batch=8, n_layer=4)
    sizes = {
        label: mup.coordinate_check(replace(cfg, **changes), args.widths, args.steps, args.seeds)
        for label, changes in RULES.items()
    }
    print(slopes(args.widths, sizes).to_markdown(index=False, disable_numparse=True))
    fig = draw(args.widths, sizes)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(args.out, dpi=110)
    print(f"\n{args.out}")
    return 0


if __name__ == "__main__":
    run_cli(main, "coord_check.py")
