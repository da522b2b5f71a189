"""The GPT of the paper's NanoGPT-5M in a single file: pre-norm blocks, no biases, untied head.

Shapes: B sequences, T tokens, d = d_model, h = n_head, k = d // h, V = vocab_size. Every weight
matrix is its own `nn.Linear`, named as in the paper (W_Q, W_K, W_V, W_O, W_up, W_down): a fused qkv
matrix would change what the matrix sign does. Initialisation belongs to `mup.py`.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions

from config import Config

ROWS = 64  # queries a chunk of chunked_attention
LOGITS = 2**24  # the loss makes the logits in chunks of about this many, and never more of them at once


def uses_chunked(kernel: str, d_head: int, device: torch.device) -> bool:
    """Whether attention runs on `chunked_attention`; "auto" takes it where it was measured to be the fastest."""
    return kernel == "chunked" or (kernel == "auto" and device.type == "cpu" and d_head <= 64)


class _Scores(torch.autograd.Function):
    """A (G, k, M), B (G, k, N) -> Aᵀ B + bias, (G, M, N); and `_Weigh`, V (G, k, N), P (G, M, N) -> V Pᵀ, (G, k, M).

    Each is the other's derivative, so that gradients of every order are made of the same three products. With k ≪ T
    a CPU runs these up to four times as fast as the products that autograd would write down, P V and Pᵀ G.
    """

    @staticmethod
    def forward(ctx, A, B, bias):
        ctx.save_for_backward(A, B)
        return A.mT @ B if bias is None else torch.baddbmm(bias, A.mT, B)

    @staticmethod
    def backward(ctx, G):
        A, B = ctx.saved_tensors
        return _Weigh.apply(B, G), A @ G, None


class _Weigh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, V, P):
        ctx.save_for_backward(V, P)
        return V @ P.mT

    @staticmethod
    def backward(ctx, G):
        V, P = ctx.saved_tensors
        return G @ P, _Scores.apply(G, V, None)


def chunked_attention(qkv: Tensor) -> Tensor:
    """Causal attention that stores its weights, for a CPU: (3, B, h, T, k), queries scaled -> (B, T, d).

    Queries go in chunks of ROWS, each against the keys it can see, so that almost half of T × T is never computed.
    """
    _, B, h, T, k = qkv.shape
    q, k_, v = qkv.mT.reshape(3, B * h, k, T).unbind()
    future = q.new_full((T, T), -math.inf).triu(1)
    out = []
    for start in range(0, T, ROWS):
        end = min(start + ROWS, T)
        scores = _Scores.apply(q[..., start:end], k_[..., :end], future[start:end, :end])
        out.append(_Weigh.apply(v[..., :end], torch.softmax(scores, -1).to(v.dtype)))
    return (torch.cat(out, -1) if len(out) > 1 else out[0]).view(B, h * k, T).mT


class Attention(nn.Module):
    """Causal multi-head self-attention, (B, T, d) -> (B, T, d)."""

    def __init__(self, cfg: Config):
        super().__init__()
        d = cfg.d_model
        self.n_head = cfg.n_head
        self.kernel = cfg.attn_kernel
        self.scale = (d // cfg.n_head) ** -cfg.attn_scale_power
        self.W_Q = nn.Linear(d, d, bias=False)
        self.W_K = nn.Linear(d, d, bias=False)
        self.W_V = nn.Linear(d, d, bias=False)
        self.W_O = nn.Linear(d, d, bias=False)

    def qkv(self, x: Tensor) -> Tensor:
        """Queries, multiplied by the scale of the logits, keys and values: (3, B, h, T, k)."""
        B, T, d = x.shape
        # three parameters, one product: a third of the calls, which is what small widths pay for
        qkv = F.linear(x, torch.cat([self.W_Q.weight * self.scale, self.W_K.weight, self.W_V.weight]))
        return qkv.view(B, T, 3, self.n_head, d // self.n_head).permute(2, 0, 3, 1, 4)

    def logits(self, x: Tensor) -> Tensor:
        """What the softmax sees, (B, h, T, T), -inf above the diagonal; for measuring, `forward` never stores them."""
        q, k, _ = self.qkv(x)
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        return (q @ k.mT).masked_fill(future, -math.inf)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        if uses_chunked(self.kernel, qkv.shape[-1], x.device):
            return self.W_O(chunked_attention(qkv))
        y = F.scaled_dot_product_attention(*qkv, is_causal=True, scale=1.0)
        return self.W_O(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """W_down GELU(W_up x), (B, T, d) -> (B, T, d)."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.W_up = nn.Linear(cfg.d_model, cfg.d_ff, bias=False)
        self.W_down = nn.Linear(cfg.d_ff, cfg.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.W_down(F.gelu(self.W_up(x)))


class Block(nn.Module):
    """H(ℓ-1) -> H(ℓ), the map whose Jacobian the paper studies; (B, T, d) -> (B, T, d)."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.attn_norm = nn.LayerNorm(cfg.d_model, bias=False)
        self.attn = Attention(cfg)
        self.mlp_norm = nn.LayerNorm(cfg.d_model, bias=False)
        self.mlp = MLP(cfg)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """Token ids (B, T) -> logits (B, T, V)."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.tok_emb = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.pos_emb = nn.Embedding(cfg.block_size, cfg.d_model)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.final_norm = nn.LayerNorm(cfg.d_model, bias=False)
        self.head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        self.logit_scale = cfg.width_mult**cfg.logit_power

    def embed(self, tokens: Tensor) -> Tensor:
        """H(0), the residual stream before the first block: (B, T) -> (B, T, d)."""
        T = tokens.shape[1]
        if self.cfg.block_size < T:
            raise ValueError(f"{T} tokens: the context holds at most block_size={self.cfg.block_size}")
        return self.tok_emb(tokens) + self.pos_emb.weight[:T]

    def hidden(self, tokens: Tensor) -> Tensor:
        """H(L), the residual stream after the last block: (B, T) -> (B, T, d)."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """H(L) (B, T, d) -> logits (B, T, V)."""
        return self.head(self.final_norm(x)) * self.logit_scale

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits(self.hidden(tokens))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats; `tokens` and `targets` (B, T), targets one position ahead."""
        x = self.hidden(tokens)
        if tokens.numel() * self.cfg.vocab_size <= LOGITS:
            return F.cross_entropy(self.logits(x).flatten(0, 1).float(), targets.flatten())
        x = self.final_norm(x).flatten(0, 1) * self.logit_scale
        rows = max(1, LOGITS // self.cfg.vocab_size)
        if x.device.type == "cpu":  # a chunk's logits as large as W itself, both of which then stay in the cache
            rows = min(rows, self.cfg.d_model)
        options = LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None)
        return F.linear_cross_entropy(x, self.head.weight, targets.flatten(), options=options)

    def flops_per_token(self) -> int:
        """Forward and backward FLOPs of a token: 6 per matmul weight and 12·L·d·T for attention (PaLM, app. B)."""
        cfg = self.cfg
        matmul = sum(p.numel() for n, p in self.named_parameters() if p.ndim == 2 and "_emb" not in n)
        return 6 * matmul + 12 * cfg.n_layer * cfg.d_model * cfg.block_size

    def activation_bytes(self, bytes_per_value: int = 4) -> int:
        """Estimate of what one micro-batch keeps for its backward pass (attention scores never stored)."""
        cfg = self.cfg
        per_block = 10 * cfg.d_model + 2 * cfg.d_ff  # norms, q, k, v, attention, residuals; MLP before and after
        logits = 3 * cfg.vocab_size  # logits, log-softmax, their gradient
        tokens = cfg.micro_batch * cfg.block_size
        return tokens * (cfg.n_layer * per_block * bytes_per_value + logits * 4)
