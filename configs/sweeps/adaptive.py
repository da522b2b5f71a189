# MSign only when it is needed. Every 10 steps it is applied to those attention matrices whose stable rank is below a
# threshold. The ramp of the stress test, three seeds an arm, 3000 steps. table3_small.py has fixed periods,
# attention_off.py the floor: the loss without attention.

config = "configs/stress_ramp.py"
msign_period = 10
msign_below = [2.0, 4.0, 8.0, 16.0]
seed = [0, 1, 2]
