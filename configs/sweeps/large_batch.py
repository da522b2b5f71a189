# Is it the small batch? The ramp of the stress test with the paper's 122 880 tokens a step (480 sequences of 256 bytes)
# instead of 512 (16 of 32). Written before the runs, which need a GPU: in bf16, the whole step compiled, one seed. If
# AdamW collapses with 512 tokens and not with 122 880, the collapse is one of small batches. A last arm has 512 tokens
# in sequences of 256: what differs from the other grids is then the context, the GPU and bf16. A pass over the text
# takes 93 steps, so the training loss of late steps is that of a text that the model has seen.

config = "configs/stress_ramp.py"
block_size = 256
dtype = "bfloat16"
compile = "whole"
eval_every = 0
eval_batches = 4
seed = [0]
_paper = {"batch_size": 480, "micro_batch": 480}
arm = {
    "AdamW": _paper,
    "MSign (attention)": {"msign_period": 100, **_paper},
    "attention off": {"msign_period": 100, "msign_map": "zero", **_paper},
    "QK-norm": {"qk_norm": True, **_paper},
    "attention's lr ÷ 16": {"attn_lr": 0.0625, **_paper},
    "logits move ≤ 1 nat a step": {"logit_trust": 1.0, **_paper},
    "AdamW at 512 tokens": {"batch_size": 2, "micro_batch": 2},
}
