"""Every model of Table 4 of the MSign paper (arXiv 2602.01734) in one file.

All models share their parts: pre-norm blocks, no biases, an untied head.

Shapes: B sequences, T tokens, d = d_model, h = n_head, k = d // h (width of one head), V = vocab_size,
E = n_experts, L = n_layer. H(ℓ) is the residual stream after block ℓ, (B, T, d); H(0) is the embedding.

Every weight matrix is a parameter of its own, except that E experts keep a matrix each in one parameter (E, m, n).
The names are the paper's: W_Q, W_K, W_V, W_O, W_up, W_down, and W_gate in a gated MLP. `MLA` adds W_DKV, W_UK, W_UV
and W_KR. MSign takes the matrix sign of each matrix (see `msign.py`); the sign of one fused matrix [W_Q W_K W_V] would
mix the three. `mup.py` sets the initial values.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions
from torch.utils.checkpoint import checkpoint

from config import Config

NORM_EPS = 1e-5
ROWS = 64  # queries in one chunk of chunked_attention
LOGITS = 2**24  # up to this many logits, the loss holds them all; above, it computes them in chunks
GPU_ROWS = 2048  # tokens in a chunk of the loss on a GPU; fewer would leave its matrix units idle


def uses_chunked(kernel: str, d_qk: int, device: torch.device) -> bool:
    """Whether attention runs on `chunked_attention`. "auto" chooses it where it was measured to be the fastest."""
    return kernel == "chunked" or (kernel == "auto" and device.type == "cpu" and d_qk <= 64)


class _Scores(torch.autograd.Function):
    """Attention logits S = QᵀK + bias, (B · h, M, N), of M queries Q (B · h, k, M) and N keys K (B · h, k, N).

    `_Scores` and `_Weigh` are each other's derivatives, so gradients of every order are made of three products:
    QᵀK, VPᵀ and Q dS. With k ≪ T a CPU runs them up to four times as fast as autograd's, PV and its derivatives,
    whose factors are (T, k).
    """

    @staticmethod
    def forward(ctx, Q, K, bias):
        ctx.save_for_backward(Q, K)
        return Q.mT @ K if bias is None else torch.baddbmm(bias, Q.mT, K)

    @staticmethod
    def backward(ctx, dS):
        Q, K = ctx.saved_tensors
        return _Weigh.apply(K, dS), Q @ dS, None


class _Weigh(torch.autograd.Function):
    """Weighted values Y = VPᵀ, (B · h, k, M), of values V (B · h, k, N) and attention weights P (B · h, M, N)."""

    @staticmethod
    def forward(ctx, V, P):
        ctx.save_for_backward(V, P)
        return V @ P.mT

    @staticmethod
    def backward(ctx, dY):
        V, P = ctx.saved_tensors
        return dY @ P, _Scores.apply(dY, V, None)


def chunked_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention for a CPU, (B, T, h·w'), of queries and keys (B, h, T, w) and values (B, h, T, w').

    w and w' are widths of one head. The queries are already multiplied by the scale of the logits. They are split into
    chunks of ROWS. A chunk meets only the keys that it may see, so almost half of the T × T logits are never computed.
    The attention weights are stored for the backward pass.
    """
    B, h, T, _ = q.shape
    q, k, v = (x.mT.reshape(B * h, -1, T) for x in (q, k, v))
    future = q.new_full((T, T), -math.inf).triu(1)
    chunks = []
    for start in range(0, T, ROWS):
        end = min(start + ROWS, T)
        scores = _Scores.apply(q[..., start:end], k[..., :end], future[start:end, :end])
        chunks.append(_Weigh.apply(v[..., :end], torch.softmax(scores, -1).to(v.dtype)))
    return (torch.cat(chunks, -1) if len(chunks) > 1 else chunks[0]).view(B, -1, T).mT


def rotate(x: Tensor, theta: float) -> Tensor:
    """RoPE (arXiv 2104.09864) of x (..., T, w), in the same shape.

    At position t the pair of components (i, i + w/2) is rotated by the angle t · theta^(−2i/w).
    """
    T, w = x.shape[-2:]
    frequency = theta ** (-torch.arange(0, w, 2, dtype=torch.float32, device=x.device) / w)
    angle = torch.arange(T, device=x.device)[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention, (B, T, d) -> (B, T, d). Keys and values have n_kv_head heads, by default n_head."""

    def __init__(self, cfg: Config):
        super().__init__()
        d, self.n_head = cfg.d_model, cfg.n_head
        self.n_kv_head = cfg.n_kv_head or cfg.n_head
        self.d_v = d // cfg.n_head
        self.theta = cfg.rope_theta if cfg.position == "rope" else None
        self.kernel, self.cap = cfg.attn_kernel, cfg.logit_cap
        self.make_qkv(cfg)
        self.W_O = nn.Linear(d, d, bias=False)
        self.scale = self.d_qk**-cfg.attn_scale_power
        if cfg.qk_norm:
            self.q_norm, self.k_norm = norm(cfg, self.d_qk), norm(cfg, self.d_qk)

    def make_qkv(self, cfg: Config):
        """Create the matrices for queries, keys and values. Set d_qk, the width of one head's queries and keys."""
        self.d_qk = self.d_v
        self.W_Q = nn.Linear(cfg.d_model, self.n_head * self.d_qk, bias=False)
        self.W_K = nn.Linear(cfg.d_model, self.n_kv_head * self.d_qk, bias=False)
        self.W_V = nn.Linear(cfg.d_model, self.n_kv_head * self.d_v, bias=False)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, heads, T, width of a head). The scale of the logits is in the queries."""
        # one product for all three: in a small model the number of calls takes the time, not the arithmetic
        normed = hasattr(self, "q_norm")
        # W_Q has fewer entries than the queries, so scaling it is cheaper; but QK-norm would undo a scale in W_Q
        W_Q = self.W_Q.weight if normed else self.W_Q.weight * self.scale
        qkv = F.linear(x, torch.cat([W_Q, self.W_K.weight, self.W_V.weight]))
        qkv = qkv.unflatten(-1, (-1, self.d_v)).transpose(1, 2)
        q, k, v = qkv.split([self.n_head, self.n_kv_head, self.n_kv_head], 1)
        if normed:
            q, k = self.q_norm(q) * self.scale, self.k_norm(k)
        if self.theta is None:
            return q, k, v
        return rotate(q, self.theta), rotate(k, self.theta), v

    def logits(self, x: Tensor) -> Tensor:
        """The attention logits that enter the softmax, (B, h, T, T), with -inf above the diagonal.

        Only measurements call this method; `forward` stores no logits but those that it caps.
        """
        q, k, _ = self.qkv(x)
        return self.scores(q, k)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """As `logits`, of queries and keys (B, heads, T, w)."""
        scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
        if self.cap:
            scores = self.cap * torch.tanh(scores / self.cap)
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        return scores.masked_fill(future, -math.inf)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        groups = q.shape[1] // k.shape[1]
        if self.cap:
            y = torch.softmax(self.scores(q, k), -1).to(v.dtype) @ v.repeat_interleave(groups, 1)
            return self.W_O(y.transpose(1, 2).flatten(2))
        if uses_chunked(self.kernel, self.d_qk, x.device):
            if groups > 1:
                k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            return self.W_O(chunked_attention(q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0, enable_gqa=groups > 1)
        return self.W_O(y.transpose(1, 2).flatten(2))


class MLA(Attention):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), (B, T, d) -> (B, T, d).

    Keys and values are made from one latent vector of mla_rank dimensions: W_UK n(W_DKV x) and W_UV n(W_DKV x), where
    n is a norm. Every query has mla_rope_dim further dimensions that carry its position. All heads share one such part
    of the key, W_KR x. With mla_rope_dim = 0 MLA itself adds no positions. Queries are not compressed. The MSign paper
    states neither mla_rank nor mla_rope_dim; both are our choice. With cfg.qk_norm all d_qk dimensions of a head's
    queries, and of its keys after W_UK, are normalised before the rotation.
    """

    def make_qkv(self, cfg: Config):
        d = cfg.d_model
        self.d_rope = cfg.mla_rope_dim if self.theta is not None else 0
        self.d_qk = self.d_v + self.d_rope
        self.W_Q = nn.Linear(d, self.n_head * self.d_qk, bias=False)
        self.W_DKV = nn.Linear(d, cfg.mla_rank, bias=False)
        self.kv_norm = norm(cfg, cfg.mla_rank)
        self.W_UK = nn.Linear(cfg.mla_rank, d, bias=False)
        self.W_UV = nn.Linear(cfg.mla_rank, d, bias=False)
        if self.d_rope:
            self.W_KR = nn.Linear(d, self.d_rope, bias=False)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = self.kv_norm(self.W_DKV(x))
        q, k, v = (
            y.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for y in (self.W_Q(x), self.W_UK(c), self.W_UV(c))
        )
        if self.d_rope:
            shared = self.W_KR(x)[:, None].expand(-1, self.n_head, -1, -1)
            k = torch.cat([k, shared], -1)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        if self.d_rope:
            q, k = (self.rotate_last(y) for y in (q, k))
        return q * self.scale, k, v

    def rotate_last(self, y: Tensor) -> Tensor:
        """y (B, h, T, d_qk) with RoPE on the last mla_rope_dim dimensions."""
        content, position = y.split([self.d_v, self.d_rope], -1)
        return torch.cat([content, rotate(position, self.theta)], -1)


class MLP(nn.Module):
    """W_down GELU(W_up x), or with a gate W_down (SiLU(W_gate x) ∘ W_up x); (B, T, d) -> (B, T, d)."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.W_up = nn.Linear(cfg.d_model, cfg.d_ff, bias=False)
        if cfg.mlp == "swiglu":
            self.W_gate = nn.Linear(cfg.d_model, cfg.d_ff, bias=False)
        self.W_down = nn.Linear(cfg.d_ff, cfg.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "W_gate"):
            return self.W_down(F.silu(self.W_gate(x)) * self.W_up(x))
        return self.W_down(F.gelu(self.W_up(x)))


class Stack(nn.Module):
    """One matrix (m, n) for each of E experts, stored as weight (E, m, n).

    Stack(E, n, m) names the inputs n before the outputs m, as nn.Linear does.
    Inputs are sorted by expert. Padded to C inputs for every expert, they are (E, C, n) and the result is (E, C, m).
    Without padding (in bf16) all M inputs are (M, n) and the result is (M, m); `ends` (E,) then holds the
    row at which each expert's inputs end.
    """

    def __init__(self, E: int, n: int, m: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(E, m, n))

    def forward(self, x: Tensor, ends: Tensor | None) -> Tensor:
        if ends is None:
            return torch.bmm(x, self.weight.to(x.dtype).mT)
        return F.grouped_mm(x, self.weight.to(x.dtype).mT, offs=ends)


class MoE(nn.Module):
    """Mixture of experts, each of them a gated or a plain MLP; (B, T, d) -> (B, T, d).

    The router takes a softmax over all experts. A token goes to the top_k experts with the largest shares, and these
    shares are rescaled to sum to 1, as in Mixtral (arXiv 2401.04088). No token is dropped. In bf16 the experts may
    get different numbers of tokens; in fp32 each is padded to the largest number.

    `balance` is the load-balancing loss of the last forward pass, E Σₑ fₑ Pₑ (Switch, arXiv 2101.03961). fₑ is the
    fraction of tokens that go to expert e, and Pₑ is the mean over tokens of its softmax share. The loss equals top_k
    when the load is balanced.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        self.top_k = cfg.top_k
        self.router = nn.Linear(cfg.d_model, cfg.n_experts, bias=False)
        self.W_up = Stack(cfg.n_experts, cfg.d_model, cfg.d_ff)
        if cfg.mlp == "swiglu":
            self.W_gate = Stack(cfg.n_experts, cfg.d_model, cfg.d_ff)
        self.W_down = Stack(cfg.n_experts, cfg.d_ff, cfg.d_model)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The weights and indices of the experts that the tokens x (N, d) go to, each (N, top_k). Sets `balance`."""
        share = torch.softmax(self.router(x), -1, torch.promote_types(x.dtype, torch.float32))
        weight, expert = share.topk(self.top_k, -1)
        load = F.one_hot(expert, share.shape[-1]).sum(1).to(share.dtype).mean(0)
        self.balance = len(load) * (load * share.mean(0)).sum()
        return weight / weight.sum(-1, keepdim=True), expert

    def forward(self, x: Tensor) -> Tensor:
        N, E = x.shape[0] * x.shape[1], self.router.out_features
        flat = x.flatten(0, 1)
        weight, expert = self.route(flat)
        expert, order = expert.flatten().sort(stable=True)  # the N · top_k pairs of token and expert, by expert
        ends = torch.searchsorted(expert, torch.arange(E, device=x.device), right=True)
        gathered = flat.index_select(0, order // self.top_k)  # indexing with flat[…] has a slower backward pass
        if torch.is_autocast_enabled(x.device.type):
            y = self.experts(gathered.to(torch.get_autocast_dtype(x.device.type)), ends.int())
            slot = order.argsort()  # the row of y for each pair, with the pairs in the order of the tokens again
        else:
            begins = F.pad(ends, (1, -1))  # where each expert's inputs begin: `ends` shifted by one, 0 in front
            longest = int((ends - begins).max())
            # the padded row of each pair: its place among its expert's pairs, after all rows of the experts before
            slot = torch.arange(len(order), device=x.device) - begins[expert] + expert * longest
            padded = gathered.new_zeros(E * longest, x.shape[-1]).index_copy(0, slot, gathered)
            y = self.experts(padded.view(E, longest, -1), None).flatten(0, 1)
            slot = slot[order.argsort()]  # as above
        y = y.index_select(0, slot).view(N, self.top_k, -1)
        return (y * weight.unsqueeze(-1).to(y.dtype)).sum(1).view(x.shape)

    def experts(self, x: Tensor, ends: Tensor | None) -> Tensor:
        """Every expert's MLP applied to its own inputs; for x and `ends` see `Stack`."""
        if hasattr(self, "W_gate"):
            return self.W_down(F.silu(self.W_gate(x, ends)) * self.W_up(x, ends), ends)
        return self.W_down(F.gelu(self.W_up(x, ends)), ends)


class LayerNorm(nn.LayerNorm):
    """PyTorch's LayerNorm without bias; its gains are cast to the dtype of the input.

    The cast is needed because the gains of a block sharded in bf16 are bf16 while the residual stream is fp32.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), None, self.eps)


class RMSNorm(nn.RMSNorm):
    """PyTorch's RMSNorm; its gains are cast to the dtype of the input, as in `LayerNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def norm(cfg: Config, d: int) -> nn.Module:
    """The normalisation layer that cfg.norm names, over d dimensions."""
    return RMSNorm(d, eps=NORM_EPS) if cfg.norm == "rmsnorm" else LayerNorm(d, eps=NORM_EPS, bias=False)


class ReadOut(torch.autograd.Function):
    """Mean cross-entropy in nats of logits x Wᵀ, with products in `dtype` and all else in fp32.

    x (N, d), W (V, d), targets (N,). Only the logits of `rows` tokens exist at a time. Therefore the gradients are
    computed in the forward pass, and W's are summed in fp32. PyTorch's linear_cross_entropy does the same and is
    faster in fp32 on a CPU, but ignores autocast, and returns a loss rounded to bf16 for arguments in bf16.
    """

    @staticmethod
    def forward(ctx, x, W, targets, rows, dtype):
        low_W, loss = W.to(dtype), torch.zeros((), device=x.device)
        training = any(ctx.needs_input_grad)
        dx, dW = (torch.empty_like(x), torch.zeros_like(W)) if training else (None, None)
        for at in range(0, len(x), rows):
            logits = error = None  # the last chunk is gone before the next one is there
            low_x, label = x[at : at + rows].to(dtype), targets[at : at + rows, None]
            logits = (low_x @ low_W.T).float()
            logits -= logits.amax(1, keepdim=True)  # from here on in place, so that a chunk is held once in fp32
            chosen = logits.gather(1, label)
            total = logits.exp_().sum(1, keepdim=True)
            loss += (total.log() - chosen).sum()
            if training:
                error = logits.div_(total).scatter_add_(1, label, -torch.ones_like(total))
                error = error.div_(len(x)).to(dtype)
                dx[at : at + rows] = error @ low_W
                dW += error.T @ low_x
        if training:
            ctx.save_for_backward(dx, dW)
        return loss / len(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss):
        dx, dW = ctx.saved_tensors  # changed in place, so PyTorch refuses a second backward pass
        return dx.mul_(d_loss), dW.mul_(d_loss), None, None, None


class Block(nn.Module):
    """One block, H(ℓ−1) -> H(ℓ): the map whose Jacobian the paper studies; (B, T, d) -> (B, T, d)."""

    def __init__(self, cfg: Config, index: int):
        super().__init__()
        mla = cfg.attention == "mla" or (cfg.attention == "alternating" and index % 2 == 1)
        self.attn_norm = norm(cfg, cfg.d_model)
        self.attn = (MLA if mla else Attention)(cfg)
        self.mlp_norm = norm(cfg, cfg.d_model)
        self.mlp = (MoE if cfg.n_experts else MLP)(cfg)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """Token ids (B, T) -> logits (B, T, V)."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.tok_emb = nn.Embedding(cfg.vocab_size, cfg.d_model)
        if cfg.position == "learned":
            self.pos_emb = nn.Embedding(cfg.block_size, cfg.d_model)
        self.blocks = nn.ModuleList(Block(cfg, i) for i in range(cfg.n_layer))
        self.final_norm = norm(cfg, cfg.d_model)
        self.head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        self.logit_scale = cfg.width_mult**cfg.logit_power

    def embed(self, tokens: Tensor) -> Tensor:
        """H(0), the residual stream before the first block: (B, T) -> (B, T, d).

        Raises ValueError when there are more than block_size tokens.
        """
        T = tokens.shape[1]
        if self.cfg.block_size < T:
            raise ValueError(f"{T} tokens: the context holds at most block_size={self.cfg.block_size}")
        x = self.tok_emb(tokens)
        return x + self.pos_emb.weight[:T] if self.cfg.position == "learned" else x

    def hidden(self, tokens: Tensor) -> Tensor:
        """H(L), the residual stream after the last block: (B, T) -> (B, T, d).

        The blocks that are computed again in the backward pass are the first ones, which it reaches last. By then the
        activations of the other blocks are gone. Were the last block computed again instead, its activations would come
        on top of theirs.
        """
        x = self.embed(tokens)
        for i, block in enumerate(self.blocks):
            if i < self.cfg.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """H(L) (B, T, d) -> logits (B, T, V)."""
        return self.head(self.final_norm(x)) * self.logit_scale

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, V); with targets (B, T), the mean cross-entropy in nats instead.

        targets[:, t] is the token that follows tokens[:, t]. With experts, the value is still the cross-entropy alone.
        Its gradient is that of the cross-entropy plus balance_coef times the load-balancing loss, averaged over the
        blocks.
        """
        x = self.hidden(tokens)
        if targets is None:
            return self.logits(x)
        loss = self.cross_entropy(x, targets)
        if self.cfg.n_experts and torch.is_grad_enabled():
            balance = self.cfg.balance_coef * torch.stack([block.mlp.balance for block in self.blocks]).mean()
            loss = loss + (balance - balance.detach())
        return loss

    def cross_entropy(self, x: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of H(L) (B, T, d) and targets (B, T)."""
        if targets.numel() * self.cfg.vocab_size <= LOGITS:
            return F.cross_entropy(self.logits(x).flatten(0, 1).float(), targets.flatten())
        x = self.final_norm(x).flatten(0, 1) * self.logit_scale
        rows = GPU_ROWS
        if x.device.type == "cpu":  # a chunk's logits are then no larger than the head, and both stay in the cache
            rows = max(1, min(LOGITS // self.cfg.vocab_size, self.cfg.d_model))
        autocast = torch.is_autocast_enabled(x.device.type)
        if autocast or x.device.type != "cpu":
            dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
            with torch.autocast(x.device.type, enabled=False):
                return ReadOut.apply(x, self.head.weight, targets.flatten(), rows, dtype)
        # chunking_method=None: chunks have `rows` rows, not a size that PyTorch chooses
        options = LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None)
        return F.linear_cross_entropy(x, self.head.weight, targets.flatten(), options=options)

    def active(self, p: Tensor) -> int:
        """The number of entries of parameter p that one token uses; of a stack of experts it uses top_k matrices."""
        return p.numel() * self.cfg.top_k // self.cfg.n_experts if p.ndim == 3 else p.numel()

    def flops_per_token(self) -> int:
        """FLOPs per token of a forward and a backward pass (PaLM, arXiv 2204.02311, app. B).

        They are 6 for each matrix entry that the token uses, and 6 · T · h · (w + w') in each layer for attention,
        where w and w' are the widths of one head's keys and values. With w = w' = d/h the latter is 12 · T · d.
        """
        return 6 * self.head.weight.numel() + sum(map(self.block_flops, self.blocks))

    def block_flops(self, block: Block) -> int:
        """What one block contributes to `flops_per_token`; a third of it is the forward pass."""
        matmul = sum(self.active(p) for p in block.parameters() if p.ndim >= 2)
        return 6 * matmul + 6 * self.cfg.block_size * block.attn.n_head * (block.attn.d_qk + block.attn.d_v)

    def activation_bytes(self, bytes_per_value: int = 4) -> tuple[int, int]:
        """Bytes that a micro-batch keeps when its loss, and when its last block's gradient, is computed: an estimate.

        The attention weights and the padding of experts are not counted.
        """
        cfg = self.cfg
        gated = cfg.mlp == "swiglu"
        # W_up x and its GELU; or W_gate x, its SiLU, W_up x and their product; and their input, cast for each matrix
        mlp = (4 if gated else 2) * cfg.d_ff + (2 if gated else 1) * cfg.d_model
        if cfg.n_experts:  # tokens copied into the order of the experts, and the experts' outputs in that of the tokens
            mlp = cfg.top_k * (4 * cfg.d_ff + 2 * cfg.d_model) + cfg.d_model
        # values for each token, in units of d_model: attention's input (1), q, k, v (3) and output (1); RoPE: q and k
        # after the rotation (2) and another copy of the output (1)
        values = (5 + 3 * (cfg.position == "rope")) * cfg.d_model + mlp
        block = values * bytes_per_value + 2 * cfg.d_model * 4  # the inputs of both norms stay in fp32
        # a recomputed block keeps its fp32 input, and all of it in its own backward pass
        again = min(cfg.recompute, cfg.n_layer)
        kept = again * 4 * cfg.d_model + (cfg.n_layer - again) * block
        one_again = block if again == cfg.n_layer else 0
        tokens = cfg.micro_batch * cfg.block_size
        # in fp32: logits, log-softmax and their gradient of all tokens; or of a GPU's chunk the logits, next to
        # themselves in bf16, and the gradient of the head with what the chunk adds
        logits = 3 * tokens * cfg.vocab_size
        if tokens * cfg.vocab_size > LOGITS:
            chunk = max(LOGITS, min(tokens, GPU_ROWS) * cfg.vocab_size)
            logits = (1 if bytes_per_value == 4 else 1.5) * chunk + 2 * self.head.weight.numel()
        return int(tokens * kept + logits * 4), tokens * (kept + one_again)
