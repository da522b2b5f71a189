# Is there a collapse like the paper's at a constant learning rate: smooth training first, collapse much later, and a
# stable rank that falls before the gradient norm rises?
#
# The protocol was written before the runs. AdamW, constant rates after 300 steps of warm-up, 6000 steps, one seed, the
# paper's β₂ = 0.95 unless an arm says otherwise. First only the rate changes. The other arms change something else, at
# twice the paper's rate unless the name gives another. An arm counts if its loss rises or is no longer finite (rules 1
# and 2 of collapse.py) after the first third of the run, and if no gradient norm in that third is ten times the run's
# median. An arm that counts is repeated with more seeds, and with MSign.
#
# None of the first sixteen arms counted. Two arms collapsed, one without decay and one with little decay, but their
# loss stalled from step 750 on, long before it rose. The four arms without decay that also name a rate were added after
# these sixteen had run. They ask whether a run without decay collapses later, after smooth training, at lower rates.

config = "configs/stress_constant.py"
beta2 = 0.95
max_steps = 6000
eval_every = 1000
arm = {
    "lr × 1": {"lr_scale": 1.0},
    "lr × 2": {},
    "lr × 3": {"lr_scale": 3.0},
    "lr × 4": {"lr_scale": 4.0},
    "lr × 1, β₂ 0.999": {"lr_scale": 1.0, "beta2": 0.999},
    "lr × 1.5, β₂ 0.999": {"lr_scale": 1.5, "beta2": 0.999},
    "batch ÷ 4": {"batch_size": 4, "micro_batch": 4},
    "context 128": {"block_size": 128, "batch_size": 4, "micro_batch": 4},
    "no decay": {"weight_decay": 0.0},
    "independent decay 1e-4": {"decay_coupling": "independent", "weight_decay": 1e-4},
    "ε 1e-15": {"eps": 1e-15},
    "gains' lr × 4, read-out's × 16": {"norm_lr": 4.0, "head_lr": 16.0},
    "gains' lr × 4, read-out's × 16, lr × 4": {"norm_lr": 4.0, "head_lr": 16.0, "lr_scale": 4.0},
    "gains' lr ÷ 16": {"norm_lr": 0.0625},
    "bf16": {"dtype": "bfloat16"},
    "no decay, lr × 1": {"weight_decay": 0.0, "lr_scale": 1.0},
    "no decay, lr × 1.5": {"weight_decay": 0.0, "lr_scale": 1.5},
    "no decay, lr × 1, β₂ 0.999": {"weight_decay": 0.0, "lr_scale": 1.0, "beta2": 0.999},
    "no decay, lr × 0.5, β₂ 0.999": {"weight_decay": 0.0, "lr_scale": 0.5, "beta2": 0.999},
    "GPT-2 tokens": {"dataset": "stdlib-gpt2", "vocab_size": 50304, "max_steps": 3000},
}
