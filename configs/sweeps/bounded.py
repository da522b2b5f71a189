# Is it enough to bound the attention logits? The ramp with three bounds. A soft cap of 50 in the forward pass (as in
# Gemma 2, arXiv 2408.00118) leaves weights and updates alone. LogitClip (remedies/clip.py) leaves the forward pass
# alone; its limit is the smallest of clip_search.py, the only one there that acts on every run. Written before the
# runs: the hypothesis that a bound of the logits prevents the collapse fails for an arm that collapses in more than
# one of five.

config = "configs/stress_ramp.py"
arm = {
    "logits capped at 50": {"logit_cap": 50.0},
    "logits ≤ 25, clip": {"logit_clip": 25.0},
    "logits ≤ 25, scale": {"logit_clip": 25.0, "logit_clip_map": "scale"},
}
seed = [0, 1, 2, 3, 4]
