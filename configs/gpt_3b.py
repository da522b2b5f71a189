# The ladder at 3b: GPT-3 2.7B, heads of 80; 2.65B if tied. Only what differs from gpt_5m is here.

from configs.gpt_5m import *

# parameters: 2 x 50304 x 2560 + 1024 x 2560 + 32 x (12 x 2560^2 + 2 x 2560) + 2560 = 2 776 926 720
n_layer = 32
d_model = 2560
n_head = 32
d_ff = 10240  # 4 x 2560
micro_batch = 8
recompute = 32  # all blocks: their activations would take more than weights and moments together
probe_every = 250
jacobian_every = 2500
