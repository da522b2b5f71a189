# What else prevents the late collapse of late_seeds.py? Its five seeds, 6000 steps, no weight decay, one and a half
# times the paper's rate. late_seeds.py has AdamW and MSign. The first arm is the floor: the loss without
# attention.

_every = {"msign_period": 100}
config = "configs/stress_constant.py"
beta2 = 0.95
lr_scale = 1.5
weight_decay = 0.0
max_steps = 6000
eval_every = 1000
arm = {
    "attention off": {**_every, "msign_map": "zero"},
    "W scaled to MSign's spectral norm": {**_every, "msign_map": "scale"},
    "attention's lr ÷ 16": {"attn_lr": 0.0625},
    "QK-norm": {"qk_norm": True},
    "logits move ≤ 1 nat a step": {"logit_trust": 1.0},
}
seed = [1, 2, 3, 4, 5]
