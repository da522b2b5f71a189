# LLaMA-1B of the paper (Table 4), trained with AdamW: the baseline that collapses near step 2 000.

# 16 layers, hidden 2048, 16 heads of 128, MHA with RoPE, gated MLP 5440, RMSNorm, SiLU, no biases, untied head
# parameters: 2 x 128256 x 2048 + 16 x (4 x 2048^2 + 3 x 2048 x 5440 + 2 x 2048) + 2048 = 1 328 613 376
n_layer = 16
d_model = 2048
n_head = 16
d_ff = 5440
norm = "rmsnorm"
mlp = "swiglu"
position = "rope"
vocab_size = 128_256  # the paper does not state it; Llama-3's size fits "1B"
block_size = 2048

init_std = 0.02
base_width = 0  # no muP: the paper scales NanoGPT-5M and Sigma-40M only

dataset = "nemotron-cc"
fallback = "fineweb-edu, stdlib-gpt2"
# 32 sequences x 2048 tokens = 65 536 tokens a step; on 8 GPUs, 4 sequences each
batch_size = 32
micro_batch = 4

lr = 1e-3
schedule = "linear"  # 2000 steps of warm-up, then linear decay to a tenth
warmup_steps = 2000
min_lr_ratio = 0.1
max_steps = 10_000  # the paper does not state it; its AdamW fails near 2 000
beta1 = 0.9
beta2 = 0.95
eps = 1e-8
weight_decay = 0.1
grad_clip = 1.0

dtype = "bfloat16"  # the paper does not state it
compile = "blocks"
probe_every = 250  # spectra of 112 matrices up to 2048 x 5440
jacobian_every = 2500
