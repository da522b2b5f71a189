# Does a higher stable rank go with better generalisation? On 12 MB, of which a run of 3000 steps reads an eighth, and on 8 kB, which it
# reads 187 times; the validation text is the same, other modules of the library. The paper's rate, constant; three seeds; 18 runs.

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
