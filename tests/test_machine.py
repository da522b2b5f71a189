import contextlib
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils import cpp_extension

import model as model_file
from engine import machine
from model import GPT, chunked_attention
from stability import metrics, probes
from tests.conftest import ROOT, small

CPU = torch.device("cpu")
MLA = dict(attention="mla", position="rope", d_model=128, mla_rank=4)  # two heads of width 64


def test_denormals_are_flushed():
    tiny = torch.tensor([1e-40])
    assert tiny * 2 != 0
    if machine.set_arithmetic(CPU, [])["denormals"] == "flushed":
        assert tiny * 2 == 0


@pytest.mark.parametrize("amd", [True, False])
def test_onednn_is_taken_on_amd_only_and_products_stay_exact(monkeypatch, amd):
    monkeypatch.setattr(machine, "processor", lambda: "AMD EPYC" if amd else "Intel(R) Xeon(R)")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    chosen = machine.set_arithmetic(CPU, [torch.empty(192, 48), torch.empty(48, 192)])
    assert (torch.backends.mkldnn.matmul.fp32_precision == "bf16") == (chosen["fp32_matmul"] == "oneDNN")
    assert amd or chosen["fp32_matmul"] == "default"
    assert machine.product_error(192, 48) < 2e-6


def test_onednn_is_refused_where_it_lowers_the_precision(monkeypatch):
    """On processors with matrix units oneDNN computes in bf16."""
    monkeypatch.setattr(machine, "processor", lambda: "AMD EPYC")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(machine, "product_error", lambda n, k: 2e-3 if n == 144 else 1e-7)
    chosen = machine.set_arithmetic(CPU, [torch.empty(48, 48), torch.empty(144, 48)])
    assert chosen["fp32_matmul"] == "default"
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


def test_product_error_sees_bf16(monkeypatch):
    exact, product = machine.product_error(96, 48), torch.Tensor.__matmul__

    def rounded(a, b):
        return product(a.bfloat16(), b.bfloat16()).float() if a.dtype == torch.float32 else product(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert exact < 2e-6 < 1e-3 < machine.product_error(96, 48)


def test_nothing_is_chosen_on_a_gpu():
    assert machine.set_arithmetic(torch.device("cuda"), []) == {}


def test_on_request_only_kernels_that_repeat_their_bits_are_allowed(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for on in (True, False):
        machine.prepare(small(deterministic=on))
        assert torch.are_deterministic_algorithms_enabled() == on
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")


def test_cuda_graphs_are_made_only_of_steps_of_one_micro_batch():
    cuda = torch.device("cuda")
    assert machine.compile_mode(cuda, accumulate=1) == "reduce-overhead"
    assert machine.compile_mode(cuda, accumulate=2) is None
    assert machine.compile_mode(CPU, accumulate=1) is None


@pytest.mark.parametrize(
    "options, kernels",
    [
        (dict(), {"chunked"}),
        (dict(n_kv_head=1, d_model=256), {"flash"}),
        (dict(MLA, mla_rope_dim=8), {"math"}),  # heads of 64 + 8; PyTorch's faster kernels want values as wide as keys
        (dict(MLA, mla_rope_dim=0), {"chunked"}),
        (dict(MLA, mla_rope_dim=8, attention="alternating"), {"chunked", "math"}),
    ],
)
def test_the_recorded_kernel_is_the_one_that_the_model_uses(monkeypatch, options, kernels):
    """The arguments of PyTorch's attention decide which of its kernels runs, so PyTorch is asked about these."""
    used, asked, choose = [], [], torch._fused_sdp_choice

    def tensors(args, named):
        return *[(x.shape, x.dtype) for x in args], named

    def chunked(q, k, v):
        used.append("chunked")
        return chunked_attention(q, k, v)

    def attend(*args, **named):
        used.append(tensors(args, named))
        return attention(*args, **named)

    def chosen(*args, **named):
        asked.append(tensors(args, named))
        return choose(*args, **named)

    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(model_file, "chunked_attention", chunked)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    monkeypatch.setattr(torch, "_fused_sdp_choice", chosen)
    cfg = small(**options)
    found = machine.attention_kernels(cfg, CPU)
    tokens = torch.zeros(1, cfg.block_size, dtype=torch.long)
    GPT(cfg)(tokens, tokens)
    assert set(found) == kernels
    assert asked == [one for one in used if one != "chunked"][: len(asked)]
    assert [one == "chunked" for one in used] == [name == "chunked" for name in found] * (cfg.n_layer // 2)
    assert machine.describe(cfg, CPU)["attention_kernel"] == ", ".join(sorted(kernels))


@pytest.mark.parametrize("attention", ["mla", "alternating"])
def test_memory_counts_the_probabilities_that_pytorchs_choice_keeps(attention):
    """`math` keeps T × T of them, `chunked` half of that, and `flash` none."""
    cfg = small(**MLA | dict(attention=attention), mla_rope_dim=8, block_size=64)
    need = {name: list(machine.needs(replace(cfg, attn_kernel=name), CPU, 1))[-1][1] for name in
            ("auto", "math", "chunked", "flash")}  # fmt: skip
    one = 4 * cfg.micro_batch * cfg.n_head * 64**2
    assert need["math"] - need["flash"] == 2 * (need["chunked"] - need["flash"]) == cfg.n_layer * one
    expected = need["math"] if attention == "mla" else (need["math"] + need["chunked"]) / 2
    assert need["auto"] == expected


def test_peak_memory_is_the_processs_own():
    """On Linux, getrusage starts a child process with the peak of its parent."""
    ballast = torch.ones(150_000_000)  # 0.6 GB
    code = "import torch; from engine import machine; print(machine.peak_memory(torch.device('cpu')))"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert 5e7 < int(said) < machine.peak_memory(CPU)
    assert machine.peak_memory(CPU) > ballast.nbytes


def test_a_block_compiles_for_the_shapes_of_training_only(monkeypatch, caplog, traced_only):
    """Another batch size, such as the probes', must not replace the compiled code by slower code for any batch size.

    The compiler looks for CUDA, and what it says when it finds it without a GPU is kept from the user.
    """
    cfg = small(compile="blocks")
    model = GPT(cfg)
    loss_of, record, notes = machine.compiled(cfg, model, CPU, contextlib.nullcontext())
    assert not notes
    assert record["compile"] == "blocks"
    monkeypatch.setenv("CUDA_HOME", "/usr")
    assert cpp_extension._find_cuda_home() == "/usr"
    assert not [record for record in caplog.records if "CUDA runtime" in record.getMessage()]
    assert all(p.grad is None for p in model.parameters())
    tokens = torch.zeros(cfg.micro_batch, cfg.block_size + 1, dtype=torch.long)
    compilations = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    loss_of(tokens[:, :-1], tokens[:, 1:]).backward()
    metrics.forward_pass(model, tokens[:2, :-1])
    probes.jacobians(model.blocks, model.embed(tokens[:2, :-1]))
    loss_of(tokens[:, :-1], tokens[:, 1:]).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compilations
