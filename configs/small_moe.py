# LLaMA-MoE-3B in small, for configs/sweeps/architectures.py: 6 layers, hidden 64, 4 heads of 16, RoPE,
# RMSNorm, SiLU; 16 experts of width 43 = 64 x 1360 / 2048 (rounded), 4 for each token; no muP, as in the paper.

from configs.llama_moe_3b_adamw import *

# parameters: 2 x 256 x 64 + 6 x (4 x 64^2 + 16 x 3 x 64 x 43 + 16 x 64 + 2 x 64) + 64 = 930 624
n_layer = 6
d_model = 64
n_head = 4
d_ff = 43
lr_scale = 20.0  # the top of the ramp (architectures.py says which tops were tried)
