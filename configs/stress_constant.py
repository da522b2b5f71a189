# The stress test at a constant rate: the paper's 24-layer architecture and muP rules, bytes of Python's
# standard library, AdamW. scripts/reproduce.py adds the other arms. What is not set here has the default
# of config.py, which is NanoGPT-5M's.

vocab_size = 256  # bytes: 24 x (4 x 48^2 + 2 x 48 x 192 + 2 x 48) + 2 x 256 x 48 + 32 x 48 + 48 = 692 016 parameters
block_size = 32
dataset = "stdlib-bytes"
batch_size = 16  # 16 x 32 = 512 tokens a step
micro_batch = 16

schedule = "constant"
lr_scale = 2.0  # 2 x 6e-4 = 1.2e-3, in the blocks x 16
warmup_steps = 300
max_steps = 2500
beta2 = 0.999  # PyTorch's default, not the paper's 0.95; the longer memory makes training collapse sooner

eval_every = 500
eval_batches = 32  # 32 x 16 x 32 = 16 384 validation tokens
threads = 1  # scripts/reproduce.py trains one arm (setting) on each core
compile = "blocks"  # a sixth faster
