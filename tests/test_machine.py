import pytest
import torch

import machine

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def restored():
    yield
    torch.set_flush_denormal(False)
    torch.backends.mkldnn.matmul.fp32_precision = "none"


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
    """As it does on processors with matrix units."""
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
