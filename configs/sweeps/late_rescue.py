# The same as rescue.py, where AdamW collapses late: the rate is constant at one and a half times the paper's, and there
# is no weight decay. late_seeds.py has AdamW, late_controls.py what helps from the first step. Half the rate is not yet
# recorded.

config = "configs/stress_constant.py"
beta2 = 0.95
lr_scale = 1.5
weight_decay = 0.0
max_steps = 6000
eval_every = 1000
arm = {
    "goes back, and logits move ≤ 1 nat a step": {"on_alarm": "remedy", "logit_trust": 1.0},
    "goes back, and half the rate": {"on_alarm": "half_rate"},
}
seed = [1, 2, 3, 4, 5]
