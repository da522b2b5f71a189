# The ladder is a series of eight dense GPTs from 5M to 3B parameters with base width 768 and one batch size. This is
# the smallest: NanoGPT-5M's shape. --msign_period=100 adds MSign.

# parameters: 2 x 50304 x 48 + 1024 x 48 + 24 x (12 x 48^2 + 2 x 48) + 48 = 5 544 240
n_layer = 24
d_model = 48
n_head = 6
d_ff = 192
vocab_size = 50304  # GPT-2's 50257 padded to a multiple of 64
block_size = 1024

# muP: in the blocks init x sqrt(768/d) and lr x 768/d, embeddings lr x sqrt(768/d). With these rules, a
# learning rate tuned for gpt_124m (width 768) should suit every size.
init_std = 0.02
base_width = 768

dataset = "openwebtext"
fallback = "stdlib-gpt2"
# 512 sequences x 1024 tokens = 524 288 tokens a step, GPT-3's half a million
batch_size = 512
micro_batch = 16

lr = 6e-4
schedule = "linear"
warmup_steps = 2000
min_lr_ratio = 0.1
max_steps = 20_000  # 10.5e9 tokens, OpenWebText once
beta1 = 0.9
beta2 = 0.95
eps = 1e-8
weight_decay = 0.1
grad_clip = 1.0

dtype = "bfloat16"
compile = "blocks"
