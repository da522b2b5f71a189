# The ladder at 60m: 12 layers of width 384, heads of 64. Only what differs from gpt_5m is here.

from configs.gpt_5m import *

# parameters: 2 x 50304 x 384 + 1024 x 384 + 12 x (12 x 384^2 + 2 x 384) + 384 = 60 269 952
n_layer = 12
d_model = 384
n_head = 6
d_ff = 1536  # 4 x 384
