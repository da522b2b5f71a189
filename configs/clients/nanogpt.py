# nanoGPT's train.py on a ramp of its learning rate; clients/nanogpt.py makes its command line of these fields.
# AdamW, no dropout, no biases; the read-out is the embedding. nanoGPT has no μP: lr is the rate of every parameter.

n_layer = 4
d_model = 64
n_head = 4
d_ff = 256  # 4 x (4 x 64^2 + 2 x 64 x 256 + 2 x 64) + 256 x 64 + 32 x 64 + 64 = 215 616 parameters
vocab_size = 256  # bytes
block_size = 32
base_width = 0  # no μP
dataset = "stdlib-bytes"
batch_size = 16  # 16 x 32 = 512 tokens a step
micro_batch = 16

lr = 0.05  # the top of the ramp
schedule = "constant"
warmup_steps = 800  # the ramp
max_steps = 1100
beta2 = 0.999  # nanoGPT's default is 0.95, PyTorch's and the Trainer's 0.999
weight_decay = 0.0  # nanoGPT's default is 0.1, the Trainer's 0

probe_every = 25
layers_every = 0
jacobian_every = 0
eval_every = 0
threads = 1
