import contextlib
import os
import subprocess
import sys

import pytest
import torch

from engine import machine
from model import GPT
from stability import metrics, probes
from tests.conftest import ROOT, small

CPU = torch.device("cpu")


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


def test_peak_memory_is_the_processs_own():
    """On Linux, getrusage starts a child process with the peak of its parent."""
    ballast = torch.ones(150_000_000)  # 0.6 GB
    code = "import torch; from engine import machine; print(machine.peak_memory(torch.device('cpu')))"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert 5e7 < int(said) < machine.peak_memory(CPU)
    assert machine.peak_memory(CPU) > ballast.nbytes


def test_a_block_compiles_for_the_shapes_of_training_only(monkeypatch, caplog):
    """Another batch size, such as the probes', must not replace the compiled code by slower code for any batch size.

    The compiler looks for CUDA, and what it says when it finds it without a GPU is kept from the user.
    """
    cfg = small(compile="blocks")
    model = GPT(cfg)
    loss_of, record, notes = machine.compiled(cfg, model, CPU, contextlib.nullcontext())
    assert not notes
    assert record["compile"] == "blocks"
    monkeypatch.setenv("CUDA_HOME", "/usr")
    assert torch.utils.cpp_extension._find_cuda_home() == "/usr"
    assert not [record for record in caplog.records if "CUDA runtime" in record.getMessage()]
    assert all(p.grad is None for p in model.parameters())
    tokens = torch.zeros(cfg.micro_batch, cfg.block_size + 1, dtype=torch.long)
    compilations = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    loss_of(tokens[:, :-1], tokens[:, 1:]).backward()
    metrics.forward_pass(model, tokens[:2, :-1])
    probes.jacobians(model.blocks, model.embed(tokens[:2, :-1]))
    loss_of(tokens[:, :-1], tokens[:, 1:]).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compilations
