# Rivals on the ramp of the stress test, three seeds an arm, 3000 steps; AdamW and MSign again, for times side by side; the floor is in
# attention_off. Their own recipes are in rivals.py; learning rates, decays and β₂ = 0.999 are AdamW's, and so is the clip at a norm of 1.

config = "configs/stress_ramp.py"
arm = {
    "AdamW": {},
    "MSign (attention)": {"msign_period": 100},
    "ZClip": {"optimizer": "zclip"},
    "Muon": {"optimizer": "muon"},
    "Stable-SPAM": {"optimizer": "stable_spam"},
    "AdaGC": {"optimizer": "adagc"},
    "SPAM": {"optimizer": "spam"},
    "spectral sphere": {"optimizer": "spectral_sphere"},
}
seed = [0, 1, 2]
