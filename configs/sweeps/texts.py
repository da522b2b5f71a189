# Does a higher stable rank go with better generalisation? One text has 12 MB, of which a run of 3000 steps reads an
# eighth. The other has 8 kB, which a run reads 187 times. The validation text is the same for both: other modules of
# the library. The paper's rate, constant. Three seeds, 18 runs.

config = "configs/stress_constant.py"
lr_scale = 1.0
max_steps = 3000
arm = {
    "AdamW": {},
    "MSign (attention)": {"msign_period": 100},
    "QK-norm": {"qk_norm": True},
}
dataset = ["stdlib-bytes", "stdlib-small"]
seed = [0, 1, 2]
