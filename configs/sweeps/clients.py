# Does MSign prevent a collapse in training programs that others wrote? nanoGPT's train.py, and the Trainer of
# transformers with a small GPT-2 and a small Llama, all three unmodified (clients/). The learning rate rises linearly
# from 0 in 800 steps and stays for 300. Three arms, three seeds, 27 runs.
#
#     NANOGPT=../nanoGPT python scripts/sweep.py configs/sweeps/clients.py --record=results
#
# NANOGPT is a git folder or URL of nanoGPT; without it the runs clone karpathy/nanoGPT from GitHub.
#
# The protocol was written before the runs of seeds 0 to 2. The shape, the text, the batch and the absence of weight
# decay are the same for all clients. The top of the ramp is the smallest of 0.025, 0.05 and 0.1 at which AdamW with
# seed 100 collapses by rules 1 and 2 of collapse.py, client by client; seed 100 is not reported. Pilots chose the shape
# and the decay, too: with nanoGPT's weight decay of 0.1, AdamW did not collapse on such ramps (results/LOG.md). MSign
# prevents a collapse in a client if none of its three runs collapses. It rescues attention if each also ends 0.1 nats
# below attention off.

program = "scripts/client.py"
seed = [0, 1, 2]  # first, so that a part of the grid holds every arm
config = ["configs/clients/nanogpt.py", "configs/clients/gpt2.py", "configs/clients/llama.py"]
arm = {
    "AdamW": {},
    "MSign (attention)": {"msign_period": 100},
    "attention off": {"msign_period": 100, "msign_map": "zero"},
}
