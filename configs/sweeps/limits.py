# How sensitive is the limit on the step (remedies/trust.py) to its one number? The ramp of the stress test with limits
# from a sixteenth of a nat to sixteen; controls.py has the limit of 1 nat, table2_small.py AdamW. Written before the
# runs: the limit counts as robust within a factor of four if with 0.25 and with 4 nats no run collapses and the mean
# final loss is at most 0.05 nats above that with 1 nat. Five seeds, 3000 steps.

config = "configs/stress_ramp.py"
logit_trust = [0.0625, 0.25, 4.0, 16.0]
seed = [0, 1, 2, 3, 4]
