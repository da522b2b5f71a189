# The ladder at 124m: the size of GPT-2's smallest model, and the ladder's base width. It would have 124M parameters if
# embedding and head were tied; here they are not. Only what differs from gpt_5m is here.

from configs.gpt_5m import *

# parameters: 2 x 50304 x 768 + 1024 x 768 + 12 x (12 x 768^2 + 2 x 768) + 768 = 163 007 232
n_layer = 12
d_model = 768
n_head = 12
d_ff = 3072  # 4 x 768
