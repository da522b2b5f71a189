# The paper's Table 2 in small: which matrices must MSign restore? The ramp of the stress test, five seeds an arm:
# AdamW, for which the targets do not matter, and MSign every 100 steps on each of six sets of targets. 35 runs
# of 3000 steps.

config = "configs/stress_ramp.py"
msign_period = [0, 100]
msign_targets = ["attention", "mlp", "blocks", "W_O", "W_V,W_O", "W_Q,W_K"]
seed = [0, 1, 2, 3, 4]
