# The Trainer of transformers with a Llama as its config class makes it: RMSNorm, SwiGLU, RoPE, a read-out of its own.

from configs.clients.nanogpt import *

norm = "rmsnorm"
mlp = "swiglu"
position = "rope"
lr = 0.025  # the top of the ramp: with seed 100 AdamW collapses here already (configs/sweeps/clients.py)
