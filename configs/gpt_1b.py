# The ladder at 1b: GPT-3 XL, heads of 128; 1.31B if tied. Only what differs from gpt_5m is here.

from configs.gpt_5m import *

# parameters: 2 x 50304 x 2048 + 1024 x 2048 + 24 x (12 x 2048^2 + 2 x 2048) + 2048 = 1 416 202 240
n_layer = 24
d_model = 2048
n_head = 16
d_ff = 8192  # 4 x 2048
micro_batch = 8
probe_every = 250
jacobian_every = 2500
