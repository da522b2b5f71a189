# When the alarm rings on the ramp, or training has collapsed without a ring: does a run live that goes back to its last
# healthy checkpoint (one every 500 steps), and on with a remedy? The remedies: no step moves a logit by more than one
# nat; half the learning rate. table2_small.py has AdamW, which does nothing; controls.py has the same limit, QK-norm
# and smaller rates for attention from the first step. The protocol was written after one run with seed 100.

config = "configs/stress_ramp.py"
arm = {
    "goes back, and logits move ≤ 1 nat a step": {"on_alarm": "remedy", "logit_trust": 1.0},
    "goes back, and half the rate": {"on_alarm": "half_rate"},
}
seed = [0, 1, 2, 3, 4]
