"""The architectures of Table 4, each against an implementation that is not ours."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers.models.gemma2 import modeling_gemma2 as gemma2

from config import ROOT, UserError, load_config
from engine import checkpoint, exchange
from model import GPT, MLA, MoE, rotate
from tests.conftest import here, noisy_model, refused, small

ROPE = dict(norm="rmsnorm", mlp="swiglu", position="rope")
EXPERTS = dict(n_experts=4, top_k=2, d_ff=24)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same_logits(model, folder, architecture: str):
    """Export the model, assert that transformers' model of this class has its logits, and return its outputs."""
    exchange.export(model, "", folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs).__name__ == architecture
    tokens = torch.randint(256, (3, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = theirs(tokens, output_router_logits=True) if model.cfg.n_experts else theirs(tokens)
        torch.testing.assert_close(model(tokens), out.logits, rtol=1e-4, atol=1e-5)
    return out


@pytest.mark.parametrize("kernel", ["chunked", "math"])
def test_nanogpt_is_transformers_gpt2(kernel, tmp_path):
    same_logits(noisy_model(attn_kernel=kernel), tmp_path / "out", "GPT2LMHeadModel")


@pytest.mark.parametrize(
    "options", [{}, dict(n_head=4, n_kv_head=2, rope_theta=500.0), dict(attn_kernel="math", n_head=4, n_kv_head=1)]
)
def test_llama_is_transformers_llama(options, tmp_path):
    same_logits(noisy_model(**ROPE, **options), tmp_path / "out", "LlamaForCausalLM")


@pytest.mark.parametrize(
    "options, architecture", [({}, "Qwen3ForCausalLM"), (dict(EXPERTS, n_kv_head=1), "Qwen3MoeForCausalLM")]
)
def test_llama_with_normed_queries_and_keys_is_transformers_qwen3(options, architecture, tmp_path):
    same_logits(noisy_model(**ROPE, **options, qk_norm=True), tmp_path / "out", architecture)


@pytest.mark.parametrize("n_layer", [1, 3])
def test_mixture_of_experts_is_transformers_mixtral(n_layer, tmp_path):
    """Logits, and for a single layer the load-balancing loss; transformers takes this loss over all layers at once."""
    model = noisy_model(**ROPE, **EXPERTS, n_layer=n_layer)
    theirs = same_logits(model, tmp_path / "out", "MixtralForCausalLM")
    if n_layer == 1:
        balance = transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func(theirs.router_logits, 4, 2)
        torch.testing.assert_close(model.blocks[0].mlp.balance, balance, rtol=1e-5, atol=0)


def one_token_at_a_time(moe: MoE, x):
    """The mixture written as a loop over tokens."""
    out = []
    for token in x.flatten(0, 1):
        share = torch.softmax(moe.router.weight @ token, 0)
        best = share.argsort(descending=True)[: moe.top_k]
        y = 0
        for e in best:
            gate, up, down = (W.weight[e] for W in (moe.W_gate, moe.W_up, moe.W_down))
            y = y + share[e] / share[best].sum() * (down @ (F.silu(gate @ token) * (up @ token)))
        out.append(y)
    return torch.stack(out).view_as(x)


def mixture(**options) -> MoE:
    moe = MoE(small(**ROPE, **{**EXPERTS, **options})).double()
    with torch.no_grad():
        for i, p in enumerate(moe.parameters()):
            p.copy_(0.5 * randn(*p.shape, seed=i))
    return moe


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_mixture_and_its_gradients_equal_a_loop_over_tokens(top_k):
    moe, x = mixture(top_k=top_k), randn(2, 5, 16, seed=9).double().requires_grad_()
    inputs = [x, *moe.parameters()]
    y, expected = moe(x), one_token_at_a_time(moe, x)
    torch.testing.assert_close(y, expected)
    u = randn(*y.shape, seed=3).double()
    for a, b in zip(
        torch.autograd.grad(y, inputs, u, allow_unused=True),
        torch.autograd.grad(expected, inputs, u, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(
            a if a is not None else torch.zeros(1), b if b is not None else torch.zeros(1), check_dtype=False
        )


def test_no_token_is_dropped_when_all_go_to_one_expert():
    moe = mixture(top_k=1)
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[2] = 1.0
        x = randn(2, 5, 16, seed=9).double().abs()
        torch.testing.assert_close(moe(x), one_token_at_a_time(moe, x))
        assert moe.balance > 3.9 * 0.9  # E · f · P = 4 · 1 · (nearly 1); balanced would be 1


def test_in_bf16_experts_without_padding_give_the_same_to_its_rounding(monkeypatch):
    product, calls = F.grouped_mm, []
    monkeypatch.setattr(F, "grouped_mm", lambda *args, **kwargs: calls.append(args) or product(*args, **kwargs))
    moe, x = mixture(top_k=1).float(), randn(2, 8, 16, seed=9).abs()
    with torch.no_grad():
        moe.router.weight.zero_()[1] = 1.0
        moe.router.weight[3, :8] = 2.0  # no token goes to the experts 0 and 2
    results = []
    for bf16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            y = moe(x)
        assert y.dtype == (torch.bfloat16 if bf16 else torch.float32)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), list(moe.parameters())[1:])])
    assert len(calls) == 3  # W_gate, W_up, W_down in bf16
    for padded, grouped in zip(*results, strict=True):
        assert (grouped - padded).norm() < 2e-2 * padded.norm()
    for gradient in results[1][1:]:
        assert [bool(of_expert.any()) for of_expert in gradient] == [False, True, False, True]


def test_the_loss_is_the_cross_entropy_and_its_gradient_balances_the_experts():
    model = noisy_model(**ROPE, **EXPERTS)
    tokens = torch.randint(256, (3, 8), generator=torch.Generator().manual_seed(1))
    router = model.blocks[1].mlp.router.weight
    loss = model(tokens, tokens)
    assert loss.item() == pytest.approx(F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).item(), rel=1e-6)
    (with_balance,) = torch.autograd.grad(loss, router)
    model.cfg = replace(model.cfg, balance_coef=0.0)
    (without,) = torch.autograd.grad(model(tokens, tokens), router)
    model(tokens)
    (balance,) = torch.autograd.grad(sum(block.mlp.balance for block in model.blocks) / len(model.blocks), router)
    torch.testing.assert_close(with_balance - without, 0.01 * balance, rtol=1e-3, atol=1e-7)
    assert balance.norm() > 1e-4


def latent_attention(attn: MLA, x):
    """Multi-head latent attention written out for one sequence, one head at a time."""
    T, k, r = len(x), attn.d_v, attn.d_rope
    c = attn.kv_norm(x @ attn.W_DKV.weight.T)
    heads = []
    for h in range(attn.n_head):
        q = x @ attn.W_Q.weight[h * (k + r) : (h + 1) * (k + r)].T
        keys, values = (c @ W.weight[h * k : (h + 1) * k].T for W in (attn.W_UK, attn.W_UV))
        if r:
            keys = torch.cat([keys, x @ attn.W_KR.weight.T], -1)
        if hasattr(attn, "q_norm"):
            q, keys = attn.q_norm(q), attn.k_norm(keys)
        if r:
            q, keys = (torch.cat([y[:, :k], rotate(y[:, k:], attn.theta)], -1) for y in (q, keys))
        scores = (q @ keys.T / (k + r) ** 0.5).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(-1) @ values)
    return torch.cat(heads, -1) @ attn.W_O.weight.T


@pytest.mark.parametrize("kernel", ["chunked", "math"])
@pytest.mark.parametrize("rope_dim", [0, 4])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_latent_attention_equals_the_formula(kernel, rope_dim, qk_norm):
    latent = dict(attention="mla", mla_rank=6, mla_rope_dim=rope_dim, qk_norm=qk_norm)
    attn = MLA(small(**ROPE, **latent, attn_kernel=kernel)).double()
    with torch.no_grad():
        for i, p in enumerate(attn.parameters()):
            p.copy_(0.5 * randn(*p.shape, seed=i))
        x = randn(2, 8, 16).double()
        torch.testing.assert_close(attn(x), torch.stack([latent_attention(attn, s) for s in x]))


def test_rotations_depend_on_distance_alone_and_keep_norms():
    q, k = rotate(randn(1, 8).expand(32, 8).double(), 100.0), rotate(randn(1, 8, seed=1).expand(32, 8).double(), 100.0)
    scores = q @ k.T
    for distance in (0, 3, 17):
        along = scores.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=1e-5, atol=1e-5)
    assert scores.diagonal(3)[0] != pytest.approx(scores.diagonal(0)[0].item(), rel=1e-3)
    torch.testing.assert_close(q.norm(dim=-1), randn(1, 8).double().norm().expand(32))


def test_alternating_attention_begins_with_mha():
    model = GPT(small(**ROPE, attention="alternating", mla_rank=8, n_layer=4))
    assert [isinstance(block.attn, MLA) for block in model.blocks] == [False, True, False, True]
    assert [block.attn.d_qk for block in model.blocks] == [8] * 4  # no rotary part: positions in MHA only


def test_without_positions_the_order_of_what_came_before_does_not_matter():
    """In a model of one block the last token attends to a set of tokens, whatever their order."""
    tokens = torch.randint(256, (1, 8), generator=torch.Generator().manual_seed(1))
    swapped = tokens.clone()
    swapped[0, [1, 4]] = swapped[0, [4, 1]]
    for position, same in (("none", True), ("rope", False), ("learned", False)):
        model = noisy_model(n_layer=1, position=position)
        with torch.no_grad():
            equal = torch.allclose(model(tokens)[0, -1], model(swapped)[0, -1], rtol=1e-5, atol=1e-6)
        assert equal == same, position


@pytest.mark.parametrize("options", [{}, {**ROPE, **EXPERTS}], ids=["gpt", "moe"])
def test_each_recomputed_block_changes_no_bit_and_keeps_equally_less(options):
    kept, gradients = [], []
    tokens = torch.randint(256, (3, 8), generator=torch.Generator().manual_seed(1))
    for recompute in range(5):
        model, numbers = noisy_model(n_layer=4, recompute=recompute, **options), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, into=numbers: into.append(x.numel()) or x, lambda x: x):
            loss = model(tokens, tokens)
        kept.append(sum(numbers))
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for again in gradients[1:]:
        assert all(map(torch.equal, again, gradients[0]))
    fall = (kept[0] - kept[4]) / 4
    assert 4 * fall > 0.6 * kept[0]  # the rest is the read-out
    padding = 0.02 if options else 0  # of experts, which differs from block to block
    assert kept == pytest.approx([kept[0] - n * fall for n in range(5)], rel=padding, abs=0)


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(n_experts=2, top_k=4), "n_experts = 2: must be at least top_k=4"),
        (dict(n_kv_head=3), "n_kv_head = 3: must be a divisor of n_head=2"),
        (dict(attention="mla"), "mla_rank = 0: must be above 0"),
        (dict(attention="mla", mla_rank=4, mla_rope_dim=3), "mla_rope_dim = 3: must be even"),
        (dict(position="rope", d_model=6, n_head=2), "n_head = 2: must be such that heads have an even width"),
        (dict(theory_every=5, mlp="swiglu"), "theory_every = 5: must be 0 unless"),
        (dict(theory_every=5, n_kv_head=1), "MHA, n_kv_head = n_head, no RoPE"),
    ],
)
def test_contradictions_are_refused(options, says):
    with pytest.raises(UserError) as error:
        small(**options)
    assert says in str(error.value)


def test_as_many_heads_of_keys_as_of_queries_are_the_papers_attention():
    assert small(theory_every=5, n_kv_head=2).n_kv_head == small().n_head


PAPER = {  # parameters, those that a token meets, what the paper calls it
    "nano_5m": (5_507_376, 5_507_376, 5e6),
    "sigma_40m": (39_378_944, 39_378_944, 40e6),
    "llama_1b": (1_328_613_376, 1_328_613_376, 1e9),
    "llama_moe_3b": (2_933_458_944, 1_329_137_664, 3e9),
}


@pytest.mark.parametrize("name", PAPER)
def test_parameter_counts_are_the_papers(name):
    total, active, called = PAPER[name]
    for optimizer in ("adamw", "msign"):
        cfg = load_config([f"{ROOT}/configs/{name}_{optimizer}.py"])
        with torch.device("meta"):
            model = GPT(cfg)
        assert sum(p.numel() for p in model.parameters()) == total
        assert sum(map(model.active, model.parameters())) == active
        assert 0.9 < total / called < 1.35
        text = (ROOT / "configs" / f"{name}_adamw.py").read_text()
        assert f"{total:,}".replace(",", " ") in text


def test_the_ladder_has_the_sizes_its_comments_derive_and_one_base_width():
    sizes = {}
    for path in (ROOT / "configs").glob("gpt_*.py"):
        cfg = load_config([str(path)])
        with torch.device("meta"):
            model = GPT(cfg)
        total = sum(p.numel() for p in model.parameters())
        assert f"= {total:,}".replace(",", " ") in path.read_text(), path.name
        assert cfg.base_width == 768 and cfg.batch_size % (8 * cfg.micro_batch) == 0
        sizes[path.stem] = (
            total - cfg.vocab_size * cfg.d_model
        )  # as their names count, with embedding and read-out tied
    assert sorted(sizes, key=sizes.get) == [
        "gpt_5m",
        "gpt_15m",
        "gpt_60m",
        "gpt_124m",
        "gpt_350m",
        "gpt_760m",
        "gpt_1b",
        "gpt_3b",
    ]
    assert round(sizes["gpt_124m"] / 1e6) in (124, 125)
    assert round(sizes["gpt_3b"] / 1e9, 1) in (2.6, 2.7)


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_qk_norm_is_attention_of_normalised_queries_and_keys(position):
    model = noisy_model(qk_norm=True, position=position)
    attn, x = model.blocks[0].attn, torch.randn(2, 8, 16)
    q, k = (W(x).view(2, 8, 2, 8).transpose(1, 2) for W in (attn.W_Q, attn.W_K))
    q, k = F.layer_norm(q, (8,), attn.q_norm.weight), F.layer_norm(k, (8,), attn.k_norm.weight)
    if position == "rope":
        q, k = rotate(q, 10_000.0), rotate(k, 10_000.0)
    v = attn.W_V(x).view(2, 8, 2, 8).transpose(1, 2)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attn(x), attn.W_O(y), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        attn.W_Q.weight *= 1000  # the logits do not depend on the size of W_Q
    torch.testing.assert_close(attn(x), attn.W_O(y), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{}, dict(n_head=4, n_kv_head=2, position="rope")], ids=str)
def test_capped_logits_are_gemmas(options):
    model = noisy_model(logit_cap=0.5, **options)
    attn, x = model.blocks[0].attn, torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    q, k, v = attn.qkv(x)
    module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], training=False)
    future = torch.full((8, 8), -torch.inf).triu(1)
    y, _ = gemma2.eager_attention_forward(module, q, k, v, future, scaling=1.0, softcap=0.5)
    torch.testing.assert_close(attn(x), attn.W_O(y.flatten(2)))
    with torch.no_grad():
        attn.W_Q.weight *= 1000
    seen = torch.ones(8, 8).tril() > 0
    assert 0.4 < attn.logits(x)[..., seen].abs().max() <= 0.5


def test_a_cap_is_refused_where_nothing_computes_it_and_is_new_to_old_checkpoints(config_file, tmp_path):
    says = "attn_kernel = 'flash': must be auto with logit_cap=50"
    refused("train.py", config_file, "--logit_cap=50", "--attn_kernel=flash", says=says)
    with pytest.raises(UserError, match=r"logit_cap = 50\.0: must be 0\.0, because gpt2"):
        exchange.counterpart(small(logit_cap=50.0))
    assert here("train.py", config_file, "--max_steps=2", "--name=a").returncode == 0
    (path,) = checkpoint.checkpoints(tmp_path / "runs" / "a")
    content = torch.load(path, weights_only=True)
    del content["architecture"]["logit_cap"]
    torch.save(content, path)
    cfg = small()
    checkpoint.load_weights(path, cfg.architecture, GPT(cfg))
    with pytest.raises(UserError, match=r"\(logit_cap = 0\.0 there, 50\.0 here\)"):
        checkpoint.load_weights(path, small(logit_cap=50.0).architecture, GPT(cfg))
