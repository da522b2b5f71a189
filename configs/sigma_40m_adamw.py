# Sigma-40M of the paper (Table 4), trained with AdamW: the baseline that collapses near step 50 000.

# 28 layers, hidden 128, 4 heads, MHA in even and MLA in odd layers, gated MLP 448 = 3.5 x 128, RMSNorm, SiLU, no biases
# parameters: 2 x 128256 x 128 + 14 x 4 x 128^2 + 14 x (2 x 128^2 + 3 x 64 x 128 + 64) + 28 x (3 x 128 x 448 + 2 x 128)
#   + 128 = 39 378 944
n_layer = 28
d_model = 128
n_head = 4
d_ff = 448
norm = "rmsnorm"
mlp = "swiglu"
attention = "alternating"
mla_rank = 64  # the paper does not state it; half the width, so that the latent is a bottleneck
position = "rope"
mla_rope_dim = 0  # RoPE in MHA layers only
vocab_size = 128_256  # the paper does not state it; Llama-3's size fits "40M"
block_size = 2048

# muP: init x 4 = sqrt(2048/128) and lr x 16 = 2048/128 in the blocks, embeddings lr x 4, so base width 2048
init_std = 0.006
base_width = 2048

dataset = "nemotron-cc"
fallback = "fineweb-edu, stdlib-gpt2"
# 32 sequences x 2048 tokens = 65 536 tokens a step
batch_size = 32
micro_batch = 4

lr = 3.5e-4
schedule = "linear"  # 2000 steps of warm-up, then linear decay to a tenth
warmup_steps = 2000
min_lr_ratio = 0.1
max_steps = 100_000  # the paper does not state it; its AdamW fails near 50 000
beta1 = 0.9
beta2 = 0.95
eps = 1e-8
weight_decay = 0.1
grad_clip = 1.0

dtype = "bfloat16"  # the paper does not state it
