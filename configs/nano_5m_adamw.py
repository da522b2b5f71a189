# NanoGPT-5M of the paper (Table 4), trained with AdamW: the baseline that collapses near step 30 000.

# 24 layers, hidden 48, 6 heads, MLP 192 = 4 x 48, learned positions, LayerNorm, GELU, no biases, untied head
# parameters: 2 x 50304 x 48 + 256 x 48 + 24 x (4 x 48^2 + 2 x 48 x 192 + 2 x 48) + 48 = 5 507 376
n_layer = 24
d_model = 48
n_head = 6
d_ff = 192
vocab_size = 50304  # GPT-2's 50257 padded to a multiple of 64; the paper does not state it
block_size = 256

# muP: base width 768 gives init x sqrt(768/48) = 4 and lr x 768/48 = 16 in the blocks, embeddings lr x 4
init_std = 0.02
base_width = 768

dataset = "openwebtext"
fallback = "stdlib-gpt2"
# 480 sequences x 256 tokens = 122 880 tokens a step (nanoGPT's 12 x 40 accumulation steps)
batch_size = 480
micro_batch = 12

lr = 6e-4
schedule = "linear"  # 2000 steps of warm-up, then linear decay to a tenth
warmup_steps = 2000
min_lr_ratio = 0.1
max_steps = 50_000  # the paper does not state it; its AdamW fails near 30 000
beta1 = 0.9
beta2 = 0.95
eps = 1e-8
weight_decay = 0.1
grad_clip = 1.0
compile = "blocks"  # a tenth faster on a CPU
