# The Trainer of transformers with a GPT-2 as its config class makes it, but without dropout; else as nanogpt.py.

from configs.clients.nanogpt import *

norm = "layernorm"
mlp = "gelu"
position = "learned"
