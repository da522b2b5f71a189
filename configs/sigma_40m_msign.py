# Sigma-40M of the paper (Table 4), trained with AdamW and MSign on attention every 100 steps.

from configs.sigma_40m_adamw import *

msign_period = 100
msign_targets = "attention"  # W_Q, W_K, W_V, W_O; in MLA layers W_Q, W_DKV, W_UK, W_UV, W_O
