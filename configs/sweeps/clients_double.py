# The runs of clients.py on ramps to twice the top. They were added because at clients.py's tops, by design the smallest
# at which a pilot collapsed, AdamW's loss turned upwards in every client but did not stay up in every run.

program = "scripts/client.py"
seed = [0, 1, 2]  # first, so that a part of the grid holds every arm
config = ["configs/clients/nanogpt.py", "configs/clients/gpt2.py", "configs/clients/llama.py"]
lr_scale = 2.0
arm = {
    "AdamW": {},
    "MSign (attention)": {"msign_period": 100},
    "attention off": {"msign_period": 100, "msign_map": "zero"},
}
