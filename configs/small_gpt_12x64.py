# NanoGPT at another shape, for configs/sweeps/architectures.py: 12 layers, hidden 64, 8 heads of 8, MLP 256.

from configs.nano_5m_adamw import *

# parameters: 2 x 256 x 64 + 32 x 64 + 12 x (4 x 64^2 + 2 x 64 x 256 + 2 x 64) + 64 = 626 240
n_layer = 12
d_model = 64
n_head = 8
d_ff = 256
lr_scale = 5.0  # the top of the ramp (architectures.py says which tops were tried); in the blocks x 768 / 64 = 12
