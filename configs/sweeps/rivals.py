# Rival optimizers on the ramp of the stress test, three seeds an arm, 3000 steps. AdamW and MSign run again, so that
# times can be compared. attention_off.py has the floor: the loss without attention. remedies/rivals.py has each rival's
# own recipe. Learning rates, decays, β₂ = 0.999 and the clip at a gradient norm of 1 are AdamW's.

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
