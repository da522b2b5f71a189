# The Trainer of transformers with a Llama as its config class makes it: RMSNorm, SwiGLU, RoPE, a read-out of its own.

from configs.clients.nanogpt import *

norm = "rmsnorm"
mlp = "swiglu"
position = "rope"
