# The paper's Table 3 in small: how often must MSign be applied? The ramp of the stress test with periods P from 1 to
# 10 000. The last is longer than the run, so that arm is plain AdamW. Three seeds each, 30 runs of 3000 steps.

config = "configs/stress_ramp.py"
msign_period = [1, 3, 10, 30, 60, 100, 180, 300, 1000, 10_000]
seed = [0, 1, 2]
