# A limit of the attention logits from the weights alone, first part: the search, as in best_search.py and on its seed.
# Written before the runs: each of the two ways to keep the limit (remedies/clip.py) has nine trials, three rates times
# three limits. Its best setting is its run with the lowest final loss (the mean of the last 100 steps) among those that
# do not collapse. bounded.py has the ramp.

config = "configs/stress_ramp.py"
beta2 = 0.95
warmup_steps = 300
max_steps = 1500
lr_scale = [0.4, 1.2, 3.6]
arm = {
    "logits ≤ 25, clip": {"logit_clip": 25.0},
    "logits ≤ 100, clip": {"logit_clip": 100.0},
    "logits ≤ 400, clip": {"logit_clip": 400.0},
    "logits ≤ 25, scale": {"logit_clip": 25.0, "logit_clip_map": "scale"},
    "logits ≤ 100, scale": {"logit_clip": 100.0, "logit_clip_map": "scale"},
    "logits ≤ 400, scale": {"logit_clip": 400.0, "logit_clip_map": "scale"},
}
seed = [9]
