# LLaMA-1B in small, for configs/sweeps/architectures.py: 12 layers, hidden 64, 4 heads of 16, RoPE, RMSNorm,
# SiLU, gated MLP 170 = 64 x 5440 / 2048; no muP, as in the paper.

from configs.llama_1b_adamw import *

# parameters: 2 x 256 x 64 + 12 x (4 x 64^2 + 3 x 64 x 170 + 2 x 64) + 64 = 622 656
n_layer = 12
d_model = 64
n_head = 4
d_ff = 170
lr_scale = 20.0  # the top of the ramp (architectures.py says which tops were tried)
compile = "blocks"
