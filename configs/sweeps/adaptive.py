# MSign when it is needed: looked at every 10 steps, applied to the matrices of attention whose stable rank is below a threshold;
# against fixed periods. On the ramp of the stress test, three seeds an arm, 3000 steps.

config = "configs/stress_ramp.py"
arm = {
    "every 100": {"msign_period": 100},
    "every 10": {"msign_period": 10},
    "below 2": {"msign_period": 10, "msign_below": 2.0},
    "below 4": {"msign_period": 10, "msign_below": 4.0},
    "below 8": {"msign_period": 10, "msign_below": 8.0},
    "below 16": {"msign_period": 10, "msign_below": 16.0},
    "attention off": {"msign_period": 100, "msign_map": "zero"},
}
seed = [0, 1, 2]
