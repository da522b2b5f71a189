# Is it the stable rank? The ramp of the stress test, on attention every 100 steps: MSign, the same done otherwise, and other ways
# to keep attention small. Three seeds an arm, runs of 3000 steps.

_every = {"msign_period": 100}
config = "configs/stress_ramp.py"
arm = {
    "AdamW": {},
    "MSign": _every,
    "attention off": {**_every, "msign_map": "zero"},
    "W scaled to MSign's spectral norm": {**_every, "msign_map": "scale"},
    "singular values clipped there": {**_every, "msign_map": "clip"},
    "random sign": {**_every, "msign_map": "random"},
    "square-rooted singular values": {**_every, "msign_map": "soft"},
    "MSign, moments reset": {**_every, "msign_reset": True},
    "attention's lr x 1/4": {"attn_lr": 0.25},
    "attention's lr x 1/16": {"attn_lr": 0.0625},
    "QK-norm": {"qk_norm": True},
    "weight decay x 10": {"weight_decay": 1.0},
    "beta2 0.95": {"beta2": 0.95},
    "attention in plain math": {"attn_kernel": "math"},
    "bf16": {"dtype": "bfloat16"},
}
seed = [0, 1, 2]
