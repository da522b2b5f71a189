from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import mup
from config import ROOT, load_config
from model import GPT, ReadOut, chunked_attention, uses_chunked
from tests.conftest import small


def built(cfg):
    model = GPT(cfg)
    mup.init_weights(model, cfg)
    return model


def test_parameter_count_is_the_papers_5m():
    cfg = load_config([f"{ROOT}/configs/nano_5m_adamw.py"])
    with torch.device("meta"):
        model = GPT(cfg)
    blocks = sum(p.numel() for n, p in model.named_parameters() if "W_" in n)
    assert blocks == 24 * 12 * 48**2
    assert sum(p.numel() for p in model.parameters()) == 2 * 50304 * 48 + 256 * 48 + blocks + 49 * 48
    assert round((blocks + 2 * 50304 * 48) / 1e6, 1) == 5.5


def reference_logits(model, tokens):
    """The same network written out in plain matrix algebra, one head at a time."""
    cfg, p = model.cfg, dict(model.named_parameters())

    def norm(x, gain):
        x = x - x.mean(-1, keepdim=True)
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-5) * gain

    T, k = tokens.shape[1], cfg.d_model // cfg.n_head
    future = torch.triu(torch.ones(T, T, dtype=torch.bool), 1)
    x = p["tok_emb.weight"][tokens] + p["pos_emb.weight"][:T]
    for i in range(cfg.n_layer):
        b = f"blocks.{i}."
        h = norm(x, p[b + "attn_norm.weight"])
        heads = []
        for head in range(cfg.n_head):
            rows = slice(head * k, (head + 1) * k)
            q, key, v = (h @ p[f"{b}attn.{w}.weight"][rows].T for w in ("W_Q", "W_K", "W_V"))
            scores = (q @ key.transpose(1, 2)) / k**cfg.attn_scale_power
            heads.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v)
        x = x + torch.cat(heads, -1) @ p[b + "attn.W_O.weight"].T
        h = norm(x, p[b + "mlp_norm.weight"])
        x = x + F.gelu(h @ p[b + "mlp.W_up.weight"].T) @ p[b + "mlp.W_down.weight"].T
    return norm(x, p["final_norm.weight"]) @ p["head.weight"].T * model.logit_scale


@pytest.mark.parametrize("options", [{}, dict(attn_scale_power=1.0, logit_power=1.0)])
def test_logits_equal_the_formula(options):
    cfg = small(**options)
    model = built(cfg).double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):  # with W_Q = 0 and gains of 1, half of the formula would be untested
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        tokens = torch.randint(256, (3, 8), generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(model(tokens), reference_logits(model, tokens), rtol=1e-9, atol=1e-9)
        expected = F.cross_entropy(model(tokens).float().flatten(0, 1), tokens.flatten())
        assert model(tokens, tokens) == expected


@pytest.mark.parametrize("T", [1, 7, 64, 150])
def test_chunked_attention_and_its_two_derivatives_equal_pytorchs(T):
    """T below one chunk, of exactly one chunk, and of several chunks with a rest."""
    generator = torch.Generator().manual_seed(T)
    qkv, u, v = (torch.randn(3, 2, 3, T, 4, dtype=torch.float64, generator=generator) for _ in range(3))

    def derivatives(f):
        x = qkv.clone().requires_grad_()
        y = f(x)
        weights = u[0].transpose(1, 2).flatten(2).clone().requires_grad_()
        (g,) = torch.autograd.grad(y, x, weights, create_graph=True)
        return y, g, *torch.autograd.grad(g, (x, weights), v)

    def pytorchs(x):
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(*x, is_causal=True, scale=1.0).transpose(1, 2).flatten(2)

    for got, expected in zip(derivatives(lambda x: chunked_attention(*x)), derivatives(pytorchs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_chunked_attention_is_for_heads_up_to_64_on_a_cpu():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [uses_chunked("auto", d_head, cpu) for d_head in (8, 64, 128)] == [True, True, False]
    assert not uses_chunked("auto", 8, cuda)
    assert not uses_chunked("flash", 8, cpu)
    assert uses_chunked("chunked", 64, cuda)


def test_the_kernel_named_in_the_config_is_the_one_that_runs(monkeypatch):
    tokens = torch.zeros(1, 8, dtype=torch.long)
    monkeypatch.setattr("model.chunked_attention", lambda q, k, v: pytest.fail("chunked"))
    built(small(attn_kernel="flash"))(tokens)
    with pytest.raises(pytest.fail.Exception):
        built(small(attn_kernel="chunked"))(tokens)


@pytest.mark.parametrize("options", [{}, dict(logit_power=1.0)])
def test_loss_in_chunks_equals_the_plain_one(monkeypatch, options):
    model = built(small(**options)).double()
    tokens = torch.randint(256, (3, 8), generator=torch.Generator().manual_seed(1))
    plain = model(tokens, tokens)
    expected = torch.autograd.grad(plain, list(model.parameters()))
    monkeypatch.setattr("model.LOGITS", 5 * 256)  # 24 rows in chunks of 5
    largest = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: largest.append(x.numel()) or x, lambda x: x):
        loss = model(tokens, tokens)
    got = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(loss.float(), plain, rtol=1e-6, atol=0)  # the plain one casts its logits to fp32
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert max(largest) < tokens.numel() * 256


def test_no_position_sees_the_future():
    model = built(small())
    with torch.no_grad():
        model.blocks[0].attn.W_Q.weight.normal_()
        tokens = torch.arange(8)[None]
        changed = tokens.clone()
        changed[0, 5] = 99
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_context_longer_than_the_block_is_refused():
    with pytest.raises(ValueError, match="block_size=8"):
        built(small())(torch.zeros(1, 9, dtype=torch.long))


def test_flops_agree_with_pytorchs_counter():
    from torch.utils.flop_counter import FlopCounterMode

    cfg = small(n_layer=2)
    model = built(cfg)
    tokens = torch.zeros(cfg.micro_batch, cfg.block_size, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    counted = counter.get_total_flops() / tokens.numel()
    # the counter may miss the fused attention kernel, so its lower limit is that of the matrix products alone
    attention = 12 * cfg.n_layer * cfg.d_model * cfg.block_size
    assert model.flops_per_token() - attention <= counted * 1.01
    assert counted <= model.flops_per_token() * 1.25


class Products(TorchDispatchMode):
    """Counts matrix products by the dtype of their factors."""

    NAMES = ("mm", "bmm", "addmm", "baddbmm", "_grouped_mm", "linear")

    def __init__(self):
        super().__init__()
        self.dtypes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.split(".")[0] in self.NAMES:
            self.dtypes.update(x.dtype for x in args if isinstance(x, torch.Tensor))
        return func(*args, **kwargs or {})


def loss_and_gradients(model, tokens, autocast: bool):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(tokens, tokens)
    return loss, torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def test_loss_in_chunks_under_autocast_multiplies_in_bf16_and_adds_in_fp32(monkeypatch):
    model = built(small(vocab_size=5000))
    tokens = torch.randint(5000, (8, 8), generator=torch.Generator().manual_seed(1))
    exact, expected = loss_and_gradients(model, tokens, autocast=False)
    monkeypatch.setattr("model.LOGITS", 5 * 5000)
    with Products() as products:
        loss, got = loss_and_gradients(model, tokens, autocast=True)
    assert set(products.dtypes) == {torch.bfloat16}
    assert loss.dtype == torch.float32 and got.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4)  # rounded to bf16, it would be off by up to 4e-3
    assert (got - expected).norm() < 2e-2 * expected.norm()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(tokens, tokens).item() == loss.item()


def test_the_read_outs_gradient_cannot_be_taken_twice():
    x, W, labels = torch.ones(4, 2, requires_grad=True), torch.ones(3, 2), torch.arange(4) % 3
    loss = ReadOut.apply(x, W, labels, 2, torch.float32)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()
