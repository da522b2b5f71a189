"""What a page shows of recorded runs: its plots and heat maps, each with a sentence that says what to see in it."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.stats import gmean


class Panel(NamedTuple):
    """A plot of one logged quantity against step, a line for each run."""

    title: str
    key: str
    axis: str
    says: str  # what to see in it
    needs: str = "probe_every"  # the field that switches it on
    log: bool = False


class HeatMap(NamedTuple):
    """A plot of one quantity of every block against step, for one run."""

    title: str
    key: str
    says: str
    combine: Callable = gmean  # makes one value of a block's matrices
    roles: str = ""  # those of the block's parameters that count
    unit: bool = False  # from 0 to 1, else on a log scale
    first: int = 0  # the block from which on values set the scale of colours
    needs: str = "layers_every"


PANELS = {
    "Training": (
        Panel("Training loss", "train/loss", "nats per token", "A collapse is a loss that turns upwards and stays up.",
              ""),
        Panel("Gradient norm before clipping", "grad_norm", "‖∇‖₂", "Spikes of ten times the median and more are a "
              "warning, not a collapse by themselves.", "", True),
        Panel("Validation loss", "val/loss", "nats per token", "It should follow the training loss; a growing distance "
              "is overfitting.", "eval_every"),
        Panel("Learning rate", "lr", "before μP's multipliers", "Compare the height at which a run collapses with where"
              " the others stay.", ""),
    ),
    "Weights": (
        Panel("Stable rank of attention", "srank/attention", "‖W‖²_F / ‖W‖²₂, geometric mean", "It falls when a few "
              "directions take over; MSign lifts it to full rank at each application.", log=True),
        Panel("Stable rank of the MLP", "srank/mlp", "‖W‖²_F / ‖W‖²₂, geometric mean", "Compare it with attention's: "
              "the part that falls further is the one in danger.", log=True),
        Panel("Stable rank of early attention", "srank/early", "‖W‖²_F / ‖W‖²₂, geometric mean", "The first quarter of "
              "the blocks: does it fall before that of all blocks?", log=True),
        Panel("Spectral norm of attention", "sigma1/attention", "σ₁, geometric mean", "Growth here feeds attention "
              "logits and Jacobians.", log=True),
        Panel("Spectral norm of the MLP", "sigma1/mlp", "σ₁, geometric mean", "Growth here feeds the residual stream.",
              log=True),
        Panel("Spectral norm of early attention", "sigma1/early", "σ₁, geometric mean", "The first quarter of the "
              "blocks.", log=True),
    ),
    "Activations": (
        Panel("Largest attention logit", "attention/max_logit", "logit", "Beyond some 50 a softmax looks at one token "
              "only.", log=True),
        Panel("Entropy of attention", "attention/entropy", "nats, mean over blocks", "Towards 0 every token looks at "
              "one other token only."),
        Panel("Output normaliser log Z", "log_z", "nats, mean over tokens", "A drift of log Σ exp(logits) shows output "
              "logits that grow together."),
        Panel("Gain of the first block", "residual/gain", "rms after / rms before", "How much the first block lifts the"
              " residual stream: most of its Jacobian's norm.", log=True),
        Panel("Residual stream after the last block", "residual/rms", "rms", "A stream that keeps growing drowns what "
              "later blocks add.", log=True),
        Panel("Error of the run's precision", "precision/error", "‖ΔH‖ / ‖H‖", "The last block's output in the run's "
              "kernel and precision against fp32 math; it grows with the logits.", log=True),
    ),
    "Jacobians of the blocks": (
        Panel("Norm of a block's Jacobian", "jacobian/sigma1", "‖J(ℓ)‖₂, geometric mean", "Above 1 a block amplifies "
              "what comes in; depth multiplies it.", "jacobian_every", True),
        Panel("Alignment of adjacent Jacobians", "jacobian/alignment", "|v(ℓ+1)ᵀ u(ℓ)|, mean", "At 1 the norms of "
              "adjacent blocks multiply fully, at 0 hardly.", "jacobian_every"),
        Panel("Norm of the product of all Jacobians", "jacobian/product", "‖J(L)···J(1)‖₂", "How much a change of the "
              "embeddings grows on its way through all blocks.", "jacobian_every", True),
        Panel("Uncertain alignments", "jacobian/ill_conditioned", "pairs of blocks", "Where many pairs are "
              "ill-conditioned, the mean alignment says little.", "jacobian_every"),
    ),
}  # fmt: skip
# the first block lifts small embeddings to the scale of the stream: its Jacobian and gradient would flatten all others
HEATMAPS = (
    HeatMap("Stable rank of attention", "srank", "Dark: few directions. Do all blocks fall at once, or the early ones "
            "first? (‖W‖²_F / ‖W‖²₂, geometric mean over W_Q, W_K, W_V, W_O.)", roles="W_[QKVO]"),
    HeatMap("Norm of the block's Jacobian", "jacobian/sigma1", "Bright: the block amplifies. Blocks 2 and up set the "
            "scale (‖J(ℓ)‖₂); block 1 may lie beyond it.", first=1, needs="jacobian_every"),
    HeatMap("Alignment with the next block", "jacobian/alignment", "Bright: the norms of two adjacent blocks multiply "
            "(|v(ℓ+1)ᵀ u(ℓ)|). A dot: uncertain, ill-conditioned.", unit=True, needs="jacobian_every"),
    HeatMap("Gradient norm of the block", "grad_norm", "Bright: where the gradient is largest. Blocks 2 and up set the "
            "scale (‖∇‖₂ before clipping).", np.linalg.norm, r"\w+", first=1),
)  # fmt: skip
