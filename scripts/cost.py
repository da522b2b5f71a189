"""What MSign costs on a cluster, on paper: the FLOPs and bytes of one application against those of the steps between two.

    python scripts/cost.py                    # the paper's four models on 8 H100, next to its Table 1
    python scripts/cost.py --mfu=0.3 --gpus=64

Counted for all block matrices, every 100 steps; nothing here is measured but the paper's own column. A training step is 6 FLOPs a
token and matrix entry, and 12·T·d·L for attention, as in model.GPT.flops_per_token, at --mfu of the bf16 peak. The matrices are
split over the GPUs; every GPU then receives what the others computed, in fp32, over NVLink. Their signs by msign's "eigh" run in
fp64 at --eigh of its peak: eigensolvers are far from it.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from config import Parser, UserError, run_cli

BF16, FP64, NVLINK = 989e12, 67e12, 450e9  # H100 SXM, dense FLOP/s and bytes/s one way: NVIDIA's data sheet
PERIOD = 100


@dataclass(frozen=True)
class Model:
    """A row of the paper's Table 4. attention, mlp: {(m, n): matrices a layer}; active: share of the MLP a token meets."""

    name: str
    layers: int
    d: int
    vocab: int
    tokens: int
    context: int
    attention: dict
    mlp: dict
    overhead: str  # the paper's Table 1, measured
    active: float = 1.0

    def step_flops(self) -> float:
        attention, mlp = (sum(m * n * k for (m, n), k in part.items()) for part in (self.attention, self.mlp))
        matmul = self.layers * (attention + self.active * mlp) + self.vocab * self.d
        return self.tokens * (6 * matmul + 12 * self.layers * self.d * self.context)

    def matrices(self) -> list[tuple[tuple[int, int], int]]:
        """((m, n), how many of them in the whole model), m ≥ n."""
        return [(shape, k * self.layers) for part in (self.attention, self.mlp) for shape, k in part.items()]


MODELS = [
    Model("NanoGPT-5M", 24, 48, 50_304, 480 * 256, 256, {(48, 48): 4}, {(192, 48): 2}, "−2.4 %"),
    Model("Sigma-40M", 28, 128, 128_256, 32 * 2048, 2048, {(128, 128): 4}, {(448, 128): 3}, "6.7 %"),
    Model("LLaMA-1B", 16, 2048, 128_256, 32 * 2048, 2048, {(2048, 2048): 4}, {(5440, 2048): 3}, "6.2 %"),
    Model("LLaMA-MoE-3B", 16, 2048, 128_256, 32 * 2048, 2048, {(2048, 2048): 4}, {(2048, 1360): 48}, "4.6 %", 4 / 16),
]  # fmt: skip


def eigh_flops(m: int, n: int) -> float:
    """msign's "eigh", m ≥ n: Gram matrix, eigenvectors (9 n³), V S⁻¹ Vᵀ, W times that."""
    return 2 * m * n**2 + 9 * n**3 + 2 * n**3 + 2 * m * n**2


def svd_flops(m: int, n: int) -> float:
    """A singular value decomposition as the paper's Eq 16 counts it."""
    return 2 * m * n**2 + 11 * n**3


def row(model: Model, gpus: int, mfu: float, eigh: float) -> list[str]:
    step = model.step_flops() / (gpus * BF16 * mfu)
    shapes = model.matrices()
    by_eigh, by_svd = (sum(k * flops(*shape) for shape, k in shapes) for flops in (eigh_flops, svd_flops))
    received = 4 * sum(k * m * n for (m, n), k in shapes) * (gpus - 1) / gpus
    compute, exchange = by_eigh / (gpus * FP64 * eigh), received / NVLINK
    steps = PERIOD * model.step_flops()
    return [
        model.name, f"{model.step_flops():.2g}", f"{1e3 * step:.3g}", f"{100 * by_svd / steps:.3g} %", f"{by_eigh:.2g}",
        f"{100 * by_eigh / steps:.3g} %", f"{received / 1e6:.3g}", f"{1e3 * compute:.3g} + {1e3 * exchange:.2g}",
        f"{(compute + exchange) / step:.2g}", f"{100 * (compute + exchange) / step / PERIOD:.2g} %", model.overhead,
    ]  # fmt: skip


def table(gpus: int = 8, mfu: float = 0.4, eigh: float = 0.02) -> str:
    """All models as a Markdown table."""
    names = [
        "model", "FLOPs a step", "step, ms", "SVD's share of the FLOPs (Eq 16)", "FLOPs an application", "share", "MB received by a GPU",
        "application, ms: compute + exchange", "r, steps", "share of the time", "paper, measured",
    ]  # fmt: skip
    rows = [names, ["---"] * len(names), *(row(model, gpus, mfu, eigh) for model in MODELS)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the bf16 peak at which a step runs")
    parser.add_argument(
        "--eigh", type=float, default=0.02, help="share of the fp64 peak at which eigenvectors are computed"
    )
    args = parser.parse_args()
    for name in ("gpus", "mfu", "eigh"):
        value = getattr(args, name)
        if value <= 0 or (name != "gpus" and value > 1):
            raise UserError(
                f"--{name} = {value}: must be {'at least 1' if name == 'gpus' else 'above 0 and at most 1'}"
            )
    print(table(args.gpus, args.mfu, args.eigh))
    return 0


if __name__ == "__main__":
    run_cli(main, "cost.py")
