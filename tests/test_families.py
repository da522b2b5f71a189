"""msign.find in other people's models: it finds W_Q, W_K, W_V and W_O where the model's own forward pass has them.

What a model's forward pass makes of its weights is the truth here. One token at position 0 is not rotated by RoPE, so
the queries, keys and values that reach the attention function are W_Q x, W_K x and W_V x for the input x of attention.
"""

import re
from collections import defaultdict

import pytest
import timm
import torch
import transformers
from torch import nn

from msign import MSign, find, restored_sign
from tests.conftest import noisy_model

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, pad_token_id=0)
GROUPED = dict(SMALL, num_key_value_heads=2, intermediate_size=48)
NARROW = dict(GROUPED, head_dim=6)  # heads · head_dim is not the hidden size
EXPERTS = dict(num_local_experts=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20, head_dim=6)
LATENT = dict(GROUPED, num_key_value_heads=4, kv_lora_rank=12, q_lora_rank=16, qk_rope_head_dim=4, v_head_dim=8,
              qk_nope_head_dim=6, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
              moe_intermediate_size=24, first_k_dense_replace=1)  # fmt: skip
FAMILIES = {
    "gpt2": ("gpt2", dict(n_embd=32, n_layer=2, n_head=4, vocab_size=64)),
    "gpt_neox": ("gpt_neox", dict(SMALL, intermediate_size=48)),
    "llama": ("llama", GROUPED),
    "mistral": ("mistral", NARROW),
    "ministral": ("ministral", NARROW),
    "qwen2": ("qwen2", GROUPED),
    "qwen3": ("qwen3", NARROW),
    "qwen2_moe": ("qwen2_moe", dict(GROUPED, num_experts=4, moe_intermediate_size=20)),
    "qwen3_moe": ("qwen3_moe", dict(GROUPED, **EXPERTS)),
    "gemma": ("gemma", NARROW),
    "gemma2": ("gemma2", NARROW),
    "gemma3": ("gemma3_text", NARROW),
    "phi3": ("phi3", GROUPED),
    "mixtral": ("mixtral", dict(GROUPED, num_local_experts=4)),
    "falcon, one key head": ("falcon", dict(SMALL, new_decoder_architecture=False, multi_query=True)),
    "falcon, by head": ("falcon", dict(SMALL, new_decoder_architecture=False, multi_query=False)),
    "falcon, grouped": ("falcon", dict(SMALL, new_decoder_architecture=True, num_kv_heads=2)),
    "olmo": ("olmo", GROUPED),
    "olmo2": ("olmo2", GROUPED),
    "olmo3": ("olmo3", GROUPED),
    "olmoe": ("olmoe", dict(GROUPED, num_experts=4, num_experts_per_tok=2)),
    "deepseek_v2": ("deepseek_v2", dict(LATENT, q_lora_rank=None)),
    "deepseek_v3": ("deepseek_v3", LATENT),
}  # fmt: skip
ATTENTION = {"W_Q", "W_K", "W_V", "W_O"}


def language_model(family: str) -> nn.Module:
    kind, fields = FAMILIES[family]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **fields, attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0, 0.3) if p.ndim > 1 else p.fill_(0.0 if "bias" in name else 1.0)
    return model


def everything(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def parts(model: nn.Module, targets: str = "attention") -> dict[tuple[str, str], torch.Tensor]:
    """{(parameter, role): matrix} of what MSign changes, copied."""
    found = find(model, targets)
    return {(name, role): M.detach().clone() for name, target in found.items() for role, M in target.matrices().items()}


def check_one_application(model: nn.Module, targets: str = "attention"):
    """After one application every matrix found is the restored sign of what it was; nothing else has changed."""
    before, kept = parts(model, targets), everything(model)
    MSign(torch.optim.SGD(model.parameters(), lr=0.0), model, 1, targets).step()
    for key, M in parts(model, targets).items():
        torch.testing.assert_close(M, restored_sign(before[key]), rtol=1e-4, atol=1e-5)
        assert M.shape[-1] == 1 or not torch.allclose(M, before[key], rtol=1e-3)
    with torch.no_grad():  # with the old matrices put back, every bit is as before
        for name, target in find(model, targets).items():
            matrices = target.layout.split(target.parameter)
            matrices |= {role: before[name, role] for role in target.roles}
            target.parameter.copy_(target.layout.join(matrices))
    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters())


def run_captured(model: nn.Module, monkeypatch, tokens) -> dict[str, torch.Tensor]:
    """Queries, keys and values of the last block, (B, heads, T, width), as its attention function gets them, and the
    input and the output of its attention module, x and y, (B, T, d)."""
    seen = {}
    attention = [m for name, m in model.named_modules() if name.split(".")[-1] in ("attn", "attention", "self_attn",
                                                                                 "self_attention")][-1]  # fmt: skip
    module = __import__(type(attention).__module__, fromlist=["x"])
    if hasattr(module, "eager_attention_forward"):
        plain = module.eager_attention_forward

        def spy(of, query, key, value, *args, **kwargs):
            seen.update({"W_Q": query, "W_K": key, "W_V": value})
            return plain(of, query, key, value, *args, **kwargs)

        monkeypatch.setattr(module, "eager_attention_forward", spy)
    attention.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(x=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    attention.register_forward_hook(lambda _, args, out: seen.update(y=out[0] if isinstance(out, tuple) else out))
    seen["attention"] = attention
    model(input_ids=tokens)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_the_found_matrices_are_those_of_the_forward_pass(family, monkeypatch):
    model = language_model(family)
    tokens = torch.arange(5)[:, None]  # five sequences of one token
    seen = run_captured(model, monkeypatch, tokens)
    if family.startswith("falcon"):  # calls no attention function; its own split of the fused product is the truth
        fused = seen["attention"].query_key_value(seen["x"])
        for role, part in zip(("W_Q", "W_K", "W_V"), seen["attention"]._split_heads(fused), strict=True):
            seen[role] = part.transpose(1, 2)
    found = {role: M for (name, role), M in parts(model).items() if ".1." in name}
    x = seen["x"][:, 0]
    if "W_DKV" in found:
        check_latent(model, seen, found, x)
    else:
        assert set(found) == ATTENTION
        for role in ("W_Q", "W_K", "W_V"):
            made = x @ found[role].T
            if hasattr(seen["attention"], "q_norm") and role != "W_V":
                made = normalised(seen["attention"], role, made)
            heads = seen[role][:, :, 0]
            if family.startswith("falcon, grouped") and role != "W_Q":  # repeated for every query head
                heads = heads[:, :: heads.shape[1] // 2]
            torch.testing.assert_close(made, heads.flatten(1), rtol=1e-4, atol=1e-4)
    # a token that attends to itself alone gets its own value, in each of the 4 heads
    value = seen["W_V"][:, :, 0]
    mixed = value.repeat_interleave(4 // value.shape[1], 1).flatten(1)
    torch.testing.assert_close(mixed @ found["W_O"].T, seen["y"][:, 0], rtol=1e-4, atol=1e-4)
    check_one_application(model, "blocks")


def normalised(attention: nn.Module, role: str, made: torch.Tensor) -> torch.Tensor:
    """Queries or keys after the model's QK-norm: of every head (Qwen 3, Gemma 3), or of all together (OLMo 2)."""
    norm = {"W_Q": attention.q_norm, "W_K": attention.k_norm}[role]
    return norm(made.unflatten(-1, (-1, norm.weight.shape[0]))).flatten(1)


def check_latent(model, seen, found, x):
    """DeepSeek: content parts of queries and keys, values, and the rotary key that all heads share."""
    attention, heads = seen["attention"], 4
    latent = attention.kv_a_layernorm(x @ found["W_DKV"].T)
    query = x @ found["W_Q"].T if "W_Q" in found else attention.q_a_layernorm(x @ found["W_DQ"].T) @ found["W_UQ"].T
    made = {"W_Q": query, "W_UK": latent @ found["W_UK"].T, "W_UV": latent @ found["W_UV"].T}
    query, key, value = (seen[role][:, :, 0] for role in ("W_Q", "W_K", "W_V"))
    torch.testing.assert_close(made["W_Q"].unflatten(-1, (heads, -1))[..., :6], query[..., :6], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made["W_UK"].unflatten(-1, (heads, -1)), key[..., :6], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made["W_UV"].unflatten(-1, (heads, -1)), value[..., :8], rtol=1e-4, atol=1e-4)
    rotary = (x @ found["W_KR"].T)[:, None].expand(-1, heads, -1).sort().values  # DeepSeek reorders its rotary part
    torch.testing.assert_close(rotary, key[..., 6:].sort().values, rtol=1e-4, atol=1e-4)


GPT2 = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=64)
MLPS = {  # the activation function of a family's MLP
    "gpt2": (GPT2, "gelu_new"), "gpt_bigcode": (GPT2, "gelu_pytorch_tanh"), "gpt_neox": (SMALL, "gelu"),
    "falcon": (SMALL, "gelu"), "phi3": (GROUPED, "silu"),
    "gemma3_text": (NARROW, "gelu_pytorch_tanh"), "mixtral": (dict(GROUPED, **EXPERTS), "silu"),
    "qwen3_moe": (dict(GROUPED, **EXPERTS), "silu"), "gpt_oss": (dict(GROUPED, **EXPERTS), "quick_gelu"),
    "deepseek_v3": (LATENT, "silu"),
}  # fmt: skip


@pytest.mark.parametrize("family", MLPS)
def test_the_found_mlp_matrices_are_those_of_the_forward_pass(family):
    """GPT-OSS stores a row of W_gate, a row of W_up, and so on, transposed, and adds 1 to W_up x."""
    torch.manual_seed(0)
    fields, activation = MLPS[family]
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **fields)).eval()
    for name, p in model.named_parameters():
        nn.init.zeros_(p) if "bias" in name else nn.init.normal_(p, std=0.2)
    mlps, x, act = defaultdict(dict), torch.randn(5, 32), transformers.activations.ACT2FN[activation]
    for name, target in find(model, "mlp").items():
        mlps[re.sub(r"\.[^.]+(\.weight)?$", "", name)] |= target.matrices()
    assert len(mlps) >= 2
    for name, stacks in mlps.items():
        mlp = model.get_submodule(name)
        for expert in range(len(stacks["W_up"])) if stacks["W_up"].ndim == 3 else [None]:
            W = stacks if expert is None else {role: stack[expert] for role, stack in stacks.items()}
            up = x @ W["W_up"].T + (family == "gpt_oss")
            hidden = act(x @ W["W_gate"].T) * up if "W_gate" in W else act(up)
            everyone = torch.full((5, 1), expert or 0), torch.ones(5, 1)  # all tokens go to this expert, with weight 1
            got = mlp(x[None])[0] if expert is None else mlp(x, *everyone)
            assert got.abs().max() > 0.1
            torch.testing.assert_close(got, hidden @ W["W_down"].T, rtol=1e-4, atol=1e-5)
    check_one_application(model, "blocks")


def test_a_layout_that_only_the_code_of_a_model_says_is_refused():
    """CodeGen's `qkv_proj` holds groups in the order Q, V, K, and no attribute of its modules says so."""
    fields = dict(n_embd=32, n_layer=1, n_head=4, vocab_size=64, rotary_dim=4)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("codegen", **fields))
    with pytest.raises(ValueError, match=r"qkv_proj.weight \(96, 32\) seems to fuse several matrices"):
        find(model)
    assert len(find(model, "mlp")) == 2


def test_biases_of_several_dimensions_stay():
    attention = nn.MultiheadAttention(16, 2, add_bias_kv=True)
    assert list(find(attention)) == ["in_proj_weight", "out_proj.weight"]
    check_one_application(attention)


def test_torchs_own_attention():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    (fused, out) = find(layer).values()
    for role, want in zip(("W_Q", "W_K", "W_V"), layer.self_attn.in_proj_weight.chunk(3), strict=True):
        torch.testing.assert_close(fused.matrices()[role], want)
    x = torch.randn(3, 1, 16)  # one token attends to itself alone, so its value is what W_O gets
    y, _ = layer.self_attn(x, x, x)
    torch.testing.assert_close(x @ fused.matrices()["W_V"].T @ out.matrices()["W_O"].T, y)
    assert set(find(layer, "mlp")) == {"linear1.weight", "linear2.weight"}
    check_one_application(layer)
    apart = nn.MultiheadAttention(16, 2, kdim=8, vdim=12)
    assert [target.roles for target in find(apart).values()] == [("W_Q",), ("W_K",), ("W_V",), ("W_O",)]
    check_one_application(apart)


def test_vision_transformer():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=32, num_heads=4, img_size=16, num_classes=3)
    attention, x, seen = model.blocks[0].attn, torch.randn(2, 5, 32), {}
    attention.fused_attn = False
    attention.q_norm.register_forward_hook(lambda _, args, y: seen.update(W_Q=args[0]))
    attention.k_norm.register_forward_hook(lambda _, args, y: seen.update(W_K=args[0]))
    nn.init.zeros_(attention.qkv.bias)
    attention(x)
    found = {role: M for (_, role), M in parts(model).items()}
    for role in ("W_Q", "W_K"):
        torch.testing.assert_close((x @ found[role].T), seen[role].transpose(1, 2).flatten(2), rtol=1e-4, atol=1e-5)
    nn.init.zeros_(attention.proj.bias)
    torch.testing.assert_close(x[:, :1] @ found["W_V"].T @ found["W_O"].T, attention(x[:, :1]), rtol=1e-4, atol=1e-5)
    check_one_application(model, "blocks")


class CausalSelfAttention(nn.Module):
    """Attention with nanoGPT's names: q, k, v = c_attn(x).split(n_embd, dim=2)."""

    def __init__(self):
        super().__init__()
        self.n_head, self.n_embd = 2, 16
        self.c_attn, self.c_proj = nn.Linear(16, 48, bias=False), nn.Linear(16, 16, bias=False)


def test_nanogpt_and_this_repositorys_model():
    model = nn.ModuleDict({"attn": CausalSelfAttention()})
    parts_of = find(model)["attn.c_attn.weight"].matrices()
    x = torch.randn(3, 16)
    for role, want in zip(("W_Q", "W_K", "W_V"), model["attn"].c_attn(x).split(16, dim=1), strict=True):
        torch.testing.assert_close(x @ parts_of[role].T, want)
    check_one_application(model)
    torch.testing.assert_close(x @ find(model)["attn.c_proj.weight"].matrices()["W_O"].T, model["attn"].c_proj(x))
    ours = noisy_model()
    found = {role: M for (name, role), M in parts(ours).items() if "blocks.0." in name}
    attention, x = ours.blocks[0].attn, torch.randn(3, 1, ours.cfg.d_model)
    torch.testing.assert_close(x @ found["W_V"].T @ found["W_O"].T, attention(x), rtol=1e-4, atol=1e-5)
    assert [name.split(".")[3] for name in find(ours)] == 2 * ["W_Q", "W_K", "W_V", "W_O"]
    assert all(target.alone and (target.heads, target.kv_heads) == (2, 2) for target in find(ours).values())
    check_one_application(ours, "blocks")


def test_a_role_names_its_part_of_a_fused_weight():
    model = language_model("gpt2")
    check_one_application(model, "W_Q,W_K")
    assert {role for _, role in parts(model, "W_Q,W_K")} == {"W_Q", "W_K"}
    (W,) = [M for (name, role), M in parts(model, "W_V").items() if ".1." in name]
    torch.testing.assert_close(W, model.transformer.h[1].attn.c_attn.weight[:, 64:].T)


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Module()
        self.attn.qkv = nn.Linear(16, 40, bias=False)
        self.attn.proj = nn.Linear(16, 16)


@pytest.mark.parametrize("targets", ["attention", "blocks", "W_Q", "qkv", "attn.qkv.*"])
def test_what_cannot_be_told_apart_is_refused_by_name(targets):
    with pytest.raises(
        ValueError, match=r'attn\.qkv\.weight \(40, 16\) seems to fuse several matrices; pass split=\{"qkv": '
    ):
        find(Odd(), targets)


def test_a_weight_of_queries_that_the_output_contradicts_is_refused():
    """c_attn has rows for 2 heads of width 8, and c_proj reads 12 numbers: the third of the rows is not W_Q."""
    model = nn.ModuleDict({"attn": CausalSelfAttention()})
    model["attn"].c_proj = nn.Linear(12, 16)
    with pytest.raises(ValueError, match=r"attn.c_attn.weight \(48, 16\) seems to fuse several matrices"):
        find(model)


def test_split_says_what_the_names_do_not():
    model = Odd()
    (W_Q, W_K, W_V) = find(model, split={"qkv": (16, 12, 12)})["attn.qkv.weight"].matrices().values()
    torch.testing.assert_close(torch.cat([W_Q, W_K, W_V]), model.attn.qkv.weight)
    with pytest.raises(ValueError, match=r"split of attn.qkv.weight \(40, 16\) has 28 rows; it must have 40"):
        find(model, split={"qkv": (16, 12)})
    with pytest.raises(ValueError, match=r"= \(40,\): must be rows of W_Q, W_K, W_V, or of W_K and W_V, or a Layout"):
        find(model, split={"qkv": (40,)})
    with pytest.raises(ValueError, match="split 'qkvs' matches no matrix"):
        find(model, split={"qkvs": (16, 12, 12)})
    with pytest.raises(ValueError, match="seems to fuse several"):  # how heads lie is said by the module alone
        find(language_model("gpt_neox").named_parameters())


def test_print_shows_what_will_be_done():
    model = language_model("phi3")
    said = str(MSign(torch.optim.SGD(model.parameters(), lr=0.1), model, period=7))
    assert said.splitlines() == [
        "MSign every 7 steps around SGD:",
        "  2 × model.layers.*.self_attn.o_proj.weight (32, 32): W_O",
        "  2 × model.layers.*.self_attn.qkv_proj.weight (64, 32): W_Q (32 rows), W_K (16 rows), W_V (16 rows)",
    ]
