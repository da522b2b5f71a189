# The one arm of late_collapse.py that counted, repeated on five new seeds: no weight decay, one and a half times the
# paper's rate, with AdamW and with MSign on attention. 10 runs of 6000 steps.

config = "configs/stress_constant.py"
beta2 = 0.95
lr_scale = 1.5
weight_decay = 0.0
max_steps = 6000
eval_every = 1000
arm = {
    "AdamW": {},
    "MSign (attention)": {"msign_period": 100},
}
seed = [1, 2, 3, 4, 5]
