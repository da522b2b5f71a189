# Each method at its own best setting, first part: the search. Constant rates with the paper's β₂ after 300 steps of
# warm-up, 1500 steps each, one seed that best.py does not report. Every method has nine trials: three rates times three
# values of its own knob, or nine rates where a method has no knob here (its rate is then shifted by a factor of 1.44).
# Written before the runs: a method's best setting is its run with the lowest final loss (the mean of the last 100
# steps) among those that do not collapse. best.py repeats the best settings on seeds 0 to 4.

_low, _high = 4.16e-4, 8.64e-4  # lr ÷ 1.44 and × 1.44: with lr_scale below, nine rates from 0.28 to 5.2 x the paper's
config = "configs/stress_ramp.py"
beta2 = 0.95
warmup_steps = 300
max_steps = 1500
lr_scale = [0.4, 1.2, 3.6]
arm = {
    "AdamW": {},
    "AdamW, lr ÷ 1.44": {"lr": _low},
    "AdamW, lr × 1.44": {"lr": _high},
    "attention's lr ÷ 4": {"attn_lr": 0.25},
    "attention's lr ÷ 16": {"attn_lr": 0.0625},
    "attention's lr ÷ 64": {"attn_lr": 0.015625},
    "QK-norm": {"qk_norm": True},
    "QK-norm, lr ÷ 1.44": {"qk_norm": True, "lr": _low},
    "QK-norm, lr × 1.44": {"qk_norm": True, "lr": _high},
    "MSign (attention), P 3": {"msign_period": 3},
    "MSign (attention), P 10": {"msign_period": 10},
    "MSign (attention), P 100": {"msign_period": 100},
    "MSign (W_Q,W_K), P 3": {"msign_period": 3, "msign_targets": "W_Q,W_K"},
    "MSign (W_Q,W_K), P 10": {"msign_period": 10, "msign_targets": "W_Q,W_K"},
    "MSign (W_Q,W_K), P 100": {"msign_period": 100, "msign_targets": "W_Q,W_K"},
    "logits move ≤ 0.25 nats a step": {"logit_trust": 0.25},
    "logits move ≤ 1 nat a step": {"logit_trust": 1.0},
    "logits move ≤ 4 nats a step": {"logit_trust": 4.0},
    "Muon": {"optimizer": "muon"},
    "Muon, lr ÷ 1.44": {"optimizer": "muon", "lr": _low},
    "Muon, lr × 1.44": {"optimizer": "muon", "lr": _high},
    "spectral sphere": {"optimizer": "spectral_sphere"},
    "spectral sphere, lr ÷ 1.44": {"optimizer": "spectral_sphere", "lr": _low},
    "spectral sphere, lr × 1.44": {"optimizer": "spectral_sphere", "lr": _high},
    "AdaGC": {"optimizer": "adagc"},
    "AdaGC, lr ÷ 1.44": {"optimizer": "adagc", "lr": _low},
    "AdaGC, lr × 1.44": {"optimizer": "adagc", "lr": _high},
    "Stable-SPAM": {"optimizer": "stable_spam"},
    "Stable-SPAM, lr ÷ 1.44": {"optimizer": "stable_spam", "lr": _low},
    "Stable-SPAM, lr × 1.44": {"optimizer": "stable_spam", "lr": _high},
}
seed = [9]
