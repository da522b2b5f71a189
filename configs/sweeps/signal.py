# Does a bound of the attention logits that needs no data announce what the largest logit announces? The ramp, with
# AdamW, which collapses, and with a sixteenth of the rate for attention, which does not. The largest logit of the probe
# batch and the bound (probes.logit_bound) are measured every 10 steps. Written before the runs: both signals move when
# they become twice as bad for good (docs/mechanism.md), and the bound is of use if it moves no later than the logit in
# every run of AdamW. Its tightness is the largest logit over the bound.

config = "configs/stress_ramp.py"
arm = {"AdamW": {}, "attention's lr ÷ 16": {"attn_lr": 0.0625}}
probe_every = 10
seed = [0, 1, 2, 3, 4]
