# MSign when it is needed: looked at every 10 steps, applied to those of attention's matrices whose stable rank is below a threshold;
# on the ramp of the stress test, three seeds an arm, 3000 steps. Fixed periods are in table3_small, the floor in attention_off.

config = "configs/stress_ramp.py"
msign_period = 10
msign_below = [2.0, 4.0, 8.0, 16.0]
seed = [0, 1, 2]
