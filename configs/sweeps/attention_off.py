# The floor: the loss without attention, with which a run that does not collapse is compared. The ramp of the stress
# test with all attention matrices set to zero every 100 steps. Five seeds, 3000 steps.

config = "configs/stress_ramp.py"
msign_period = 100
msign_map = "zero"
seed = [0, 1, 2, 3, 4]
