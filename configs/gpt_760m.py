# The ladder at 760m: GPT-3 Large, heads of 96; 757M if tied. Only what differs from gpt_5m is here.

from configs.gpt_5m import *

# parameters: 2 x 50304 x 1536 + 1024 x 1536 + 24 x (12 x 1536^2 + 2 x 1536) + 1536 = 835 659 264
n_layer = 24
d_model = 1536
n_head = 16
d_ff = 6144  # 4 x 1536
micro_batch = 8
