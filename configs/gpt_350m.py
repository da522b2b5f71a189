# The ladder at 350m: GPT-3 Medium; 354M if tied. Only what differs from gpt_5m is here.

from configs.gpt_5m import *

# parameters: 2 x 50304 x 1024 + 1024 x 1024 + 24 x (12 x 1024^2 + 2 x 1024) + 1024 = 406 111 232
n_layer = 24
d_model = 1024
n_head = 16
d_ff = 4096  # 4 x 1024
micro_batch = 8
