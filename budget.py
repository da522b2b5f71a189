"""What a run takes, counted before it is started: parameters, FLOPs, bytes and time, of training and of MSign."""

import math
from dataclasses import dataclass

import torch

from config import Config
from model import GPT

BF16, FP32, FP64, NVLINK, NETWORK = (
    989e12,
    67e12,
    67e12,
    450e9,
    50e9,
)  # H100 SXM: FLOP/s, bytes/s one way (NVIDIA's data sheet; 400 Gb/s)
EIGH_SHARE = 0.02  # of the fp64 peak at which eigenvectors are computed: assumed
POLAR_SHARE = 0.5  # of the fp32 peak at which products run: assumed
POLAR_STEPS = 11  # msign's "polar": 9 quintics and 2 filters for 512 ≤ n ≤ 4096


def on_meta(cfg: Config) -> GPT:
    with torch.device("meta"):
        return GPT(cfg)


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank at the largest moment of a step."""

    weights: int
    gradients: int
    moments: int
    activations: int
    gathered: int  # FSDP: the blocks that are whole at one moment

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments + self.activations + self.gathered

    @classmethod
    def of(cls, cfg: Config, ranks: int, sharded: bool) -> "Memory":
        model = on_meta(cfg)
        n = sum(p.numel() for p in model.parameters())
        share = math.ceil(n / ranks) if sharded else n
        block = sum(p.numel() for p in model.blocks[0].parameters())
        outside = n - cfg.n_layer * block
        width = 2 if cfg.dtype == "bfloat16" else 4
        # two blocks (one computes, the next arrives) and a block's gradient in fp32; embedding and read-out throughout
        gathered = 2 * width * block + 4 * block + 8 * outside if sharded else 0
        return cls(4 * share, 4 * share, 8 * share, model.activation_bytes(width), gathered)
