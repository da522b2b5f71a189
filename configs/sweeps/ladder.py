# The ladder: at which learning rate does each size break, and does MSign move that rate? 4 sizes x 4 rates x AdamW and
# MSign x 2 seeds = 64 runs of 20 000 steps of half a million tokens each; --max_steps=2000 for a first look.

config = ["configs/gpt_5m.py", "configs/gpt_15m.py", "configs/gpt_60m.py", "configs/gpt_124m.py"]
lr_scale = [0.5, 1.0, 2.0, 4.0]  # x 6e-4
msign_period = [0, 100]
seed = [0, 1]
