# NanoGPT at another shape, for configs/sweeps/architectures.py: 6 layers, hidden 96, 6 heads of 16, MLP 384.

from configs.nano_5m_adamw import *

# parameters: 2 x 256 x 96 + 32 x 96 + 6 x (4 x 96^2 + 2 x 96 x 384 + 2 x 96) + 96 = 717 024
n_layer = 6
d_model = 96
n_head = 6
d_ff = 384
lr_scale = 5.0  # the top of the ramp (architectures.py says which tops were tried); in the blocks x 768 / 96 = 8
