# (protocol to come)
program = "scripts/client.py"
config = ["configs/clients/nanogpt.py", "configs/clients/gpt2.py", "configs/clients/llama.py"]
arm = {
    "AdamW": {},
    "MSign (attention)": {"msign_period": 100},
    "attention off": {"msign_period": 100, "msign_map": "zero"},
}
seed = [0, 1, 2]
