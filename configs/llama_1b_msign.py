# LLaMA-1B of the paper (Table 4), trained with AdamW and MSign on attention every 100 steps.

from configs.llama_1b_adamw import *

msign_period = 100
msign_targets = "attention"  # W_Q, W_K, W_V, W_O, each its own matrix
