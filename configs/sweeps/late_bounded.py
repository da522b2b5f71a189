# The bounds of bounded.py where AdamW collapses late: no weight decay and one and a half times the paper's rate, 6000
# steps, the seeds of late_seeds.py, which has AdamW and MSign. Written before the runs; the hypothesis is that of
# bounded.py.

config = "configs/stress_constant.py"
beta2 = 0.95
lr_scale = 1.5
weight_decay = 0.0
max_steps = 6000
eval_every = 1000
seed = [1, 2, 3, 4, 5]
arm = {
    "logits capped at 50": {"logit_cap": 50.0},
    "logits ≤ 25, clip": {"logit_clip": 25.0},
}
