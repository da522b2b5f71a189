# The ladder at 15m: 12 layers of width 128, heads of 32. Only what differs from gpt_5m is here.

from configs.gpt_5m import *

# parameters: 2 x 50304 x 128 + 1024 x 128 + 12 x (12 x 128^2 + 2 x 128) + 128 = 15 371 392
n_layer = 12
d_model = 128
n_head = 4
d_ff = 512  # 4 x 128
