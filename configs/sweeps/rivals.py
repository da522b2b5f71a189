# Rivals on the ramp of the stress test, three seeds an arm, 3000 steps. Their own recipes are in rivals.py; learning rates and
# decays are AdamW's, beta2 0.999 as on the whole ramp, the gradient clipped at a norm of 1 before.

config = "configs/stress_ramp.py"
arm = {
    "AdamW": {},
    "MSign": {"msign_period": 100},
    "attention off": {"msign_period": 100, "msign_map": "zero"},
    "SPAM": {"optimizer": "spam"},
    "Stable-SPAM": {"optimizer": "stable_spam"},
    "AdaGC": {"optimizer": "adagc"},
    "Muon": {"optimizer": "muon"},
    "spectral sphere": {"optimizer": "spectral_sphere"},
    "QK-norm": {"qk_norm": True},
}
seed = [0, 1, 2]
