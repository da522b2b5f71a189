# The paper's own failure: does AdamW collapse at the paper's own rate, or at twice that, with its β₂,
# decay and clipping, if it is given time?
#
# The protocol, written before the runs. The 24 x 48 model on bytes, 512 tokens a step; β₂ 0.95,
# decay 0.1, clip 1, warm-up of 2000 steps, then a constant rate. Every run goes on for 200 000
# steps, or until a value is not finite; after a collapse it is run on. Two regimes: the paper's rate
# and twice that. Five seeds each. Whether and at which step a run collapsed is what
# stability/collapse.py says, here and in every other grid. A run that does not collapse is reported
# with the number of its steps.
#
# Pilots of one seed went to 40 000 steps before this was written: at the paper's rate single
# gradient norms above 10 came ever more often after step 20 000 (the largest 1 699), at twice the
# rate the attention logits grew to 274 without spikes.

config = "configs/stress_constant.py"
beta2 = 0.95
warmup_steps = 2000
max_steps = 200_000
eval_every = 10_000
layers_every = 1000
jacobian_every = 5000
compile = "whole"  # an eighth faster than by block
ckpt_every = 2000
seed = [0, 1, 2, 3, 4]
arm = {
    "lr × 1": {"lr_scale": 1.0},
    "lr × 2": {"lr_scale": 2.0},
}
