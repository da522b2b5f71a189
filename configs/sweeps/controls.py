# Is it the stable rank that matters? The ramp of the stress test with other changes to the attention matrices every 100
# steps, and with other ways to keep attention small. Five seeds an arm, 3000 steps. table2_small.py has AdamW and
# MSign, attention_off.py the floor (the loss without attention). "Clipped there" is at MSign's spectral norm.
# "Attention in plain math" changes nothing but the kernel, to PyTorch's math kernel: a check of numerics.

_every = {"msign_period": 100}
config = "configs/stress_ramp.py"
arm = {
    "W scaled to MSign's spectral norm": {**_every, "msign_map": "scale"},
    "singular values clipped there": {**_every, "msign_map": "clip"},
    "QK-norm": {"qk_norm": True},
    "random sign": {**_every, "msign_map": "random"},
    "square-rooted singular values": {**_every, "msign_map": "soft"},
    "attention's lr ÷ 4": {"attn_lr": 0.25},
    "β₂ 0.95": {"beta2": 0.95},
    "MSign, moments reset": {**_every, "msign_reset": True},
    "weight decay × 10": {"weight_decay": 1.0},
    "attention's lr ÷ 16": {"attn_lr": 0.0625},
    "attention in plain math": {"attn_kernel": "math"},
    "bf16": {"dtype": "bfloat16"},
    "decay independent of the rate": {"decay_coupling": "independent", "weight_decay": 1e-4},
    "logits move ≤ 1 nat a step": {"logit_trust": 1.0},
}
seed = [0, 1, 2, 3, 4]
