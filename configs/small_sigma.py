# Sigma-40M in small, for configs/sweeps/architectures.py: 12 layers, hidden 64, 4 heads of 16, MHA with RoPE
# in even layers, MLA without positions in odd ones, RMSNorm, SiLU, gated MLP 224 = 3.5 x 64.

from configs.sigma_40m_adamw import *

# parameters: 2 x 256 x 64 + 6 x 4 x 64^2 + 6 x (2 x 64^2 + 3 x 32 x 64 + 32) + 12 x (3 x 64 x 224 + 2 x 64) + 64 =
#   734 976
n_layer = 12
d_model = 64
n_head = 4
d_ff = 224
mla_rank = 32  # half the width, as in sigma_40m_adamw.py
lr_scale = 5.0  # the top of the ramp (architectures.py says which tops were tried); in the blocks x 2048 / 64 = 32
compile = "blocks"
