# LLaMA-MoE-3B of the paper (Table 4), trained with AdamW: the baseline that collapses near step 3 000.

# 16 layers, hidden 2048, 16 heads of 128, MHA with RoPE, RMSNorm; 16 experts of width 1360 = 5440 / 4, 4 for each token
# parameters: 2 x 128256 x 2048 + 16 x (4 x 2048^2 + 16 x 3 x 2048 x 1360 + 16 x 2048 + 2 x 2048) + 2048 =
#   2 933 458 944, of which a token meets 2933458944 - 16 x 12 x 3 x 2048 x 1360 = 1 329 137 664
n_layer = 16
d_model = 2048
n_head = 16
d_ff = 1360
n_experts = 16
top_k = 4
balance_coef = 0.01  # the paper does not state it; Switch Transformer's
norm = "rmsnorm"
mlp = "swiglu"
position = "rope"
vocab_size = 128_256  # the paper does not state it; Llama-3's size fits "3B"
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
max_steps = 10_000  # the paper does not state it; its AdamW fails near 3 000
beta1 = 0.9
beta2 = 0.95
eps = 1e-8
weight_decay = 0.1
grad_clip = 1.0

dtype = "bfloat16"  # the paper does not state it
probe_every = 250  # spectra of 64 matrices of attention and 768 of experts
jacobian_every = 2500
