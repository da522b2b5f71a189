# How wide is the range of learning rates that work, and how good is the best of them? Constant rates from a quarter to
# 16 times the paper's after 300 steps of warm-up, 1500 steps each, β₂ = 0.999 as on the ramp. Three seeds.

config = "configs/stress_ramp.py"
arm = {
    "AdamW": {},
    "MSign (attention)": {"msign_period": 100},
    "QK-norm": {"qk_norm": True},
    "attention's lr ÷ 16": {"attn_lr": 0.0625},
    "logits move ≤ 1 nat a step": {"logit_trust": 1.0},
}
warmup_steps = 300
max_steps = 1500
lr_scale = [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0]
seed = [0, 1, 2]
