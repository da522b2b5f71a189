"""How a run computes on this machine: device, kernels, arithmetic, compilation, and their names for the run's record."""

import contextlib
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from config import Config, UserError
from model import GPT, uses_chunked

KERNELS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def pick_device(name: str) -> torch.device:
    """The device of cfg.device. Raises UserError naming those that are there."""
    here = ["cpu"]
    if torch.cuda.is_available():
        here = [f"cuda:{i}" for i in range(torch.cuda.device_count())] + here
    if torch.backends.mps.is_available():
        here = ["mps", *here]
    if name == "auto":
        return torch.device(here[0])
    if name not in here and not (name == "cuda" and here[0].startswith("cuda")):
        raise UserError(f"device = {name!r}: not on this machine; there is {', '.join(here)}")
    return torch.device(name)


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def attention_kernel(cfg: Config, device: torch.device) -> str:
    """The name of the kernel that this model's attention runs on, "auto" resolved, for the record."""
    if uses_chunked(cfg.attn_kernel, cfg.d_model // cfg.n_head, device):
        return "chunked"
    if cfg.attn_kernel != "auto":
        return cfg.attn_kernel
    dtype = torch.bfloat16 if cfg.dtype == "bfloat16" else torch.float32
    shape = (1, cfg.n_head, cfg.block_size, cfg.d_model // cfg.n_head)
    q = torch.empty(shape, dtype=dtype, device=device, requires_grad=True)
    chosen = SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=True))
    return next((name for name, backend in KERNELS.items() if backend == chosen), chosen.name)


def chosen_kernel(cfg: Config):
    """Context in which PyTorch's attention runs on the kernel of cfg.attn_kernel."""
    return sdpa_kernel(KERNELS[cfg.attn_kernel]) if cfg.attn_kernel in KERNELS else contextlib.nullcontext()


def set_arithmetic(device: torch.device, matrices: Iterable[Tensor]) -> dict[str, str]:
    """Make the CPU's fp32 fast without making it less exact; what was chosen, for the record.

    Denormals are flushed to zero: an attention weight of 1e-40 is worth nothing and costs a hundred times what
    another does. And PyTorch gives fp32 products to MKL, which leaves half the vector width of an AMD processor
    unused. Allowed to lower the precision, PyTorch gives them to oneDNN, which does so only where the processor has
    matrix units for it: so it is allowed, and kept where products of the shapes of `matrices` are seen to be exact.
    """
    if device.type != "cpu":
        return {}
    chosen = {"denormals": "flushed" if torch.set_flush_denormal(True) else "kept", "fp32_matmul": "default"}
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    if "AMD" in processor() and torch.backends.cpu.get_cpu_capability() == "AVX512":
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        if all(product_error(*shape) < 2e-6 for shape in {W.shape for W in matrices}):  # bf16: 2e-3, fp32: 2e-7
            chosen["fp32_matmul"] = "oneDNN"
        else:
            torch.backends.mkldnn.matmul.fp32_precision = "none"
    return chosen


def product_error(n: int, k: int) -> float:
    """‖ΔY‖_F / ‖Y‖_F of Y = X Wᵀ, X (64, k) and W (n, k) Gaussian, as fp32 products are computed now."""
    generator = torch.Generator().manual_seed(0)
    X, W = torch.randn(64, k, generator=generator), torch.randn(n, k, generator=generator)
    exact = X.double() @ W.double().T
    return ((X @ W.T - exact).norm() / exact.norm()).item()


def compiled(
    cfg: Config, model: GPT, device: torch.device, autocast, run: Callable | None = None
) -> tuple[Callable, dict, list[str]]:
    """The loss function `run` (the model itself, or what spreads it over processes), compiled as cfg.compile says; what to
    record; and what has to be announced.

    It is tried on one micro-batch here, so that what cannot be compiled (PyTorch needs a C++ compiler on a CPU) runs
    uncompiled from the first step on, and compilation is not counted as a step.
    """
    loss_of = run = run or model
    if cfg.compile == "off":
        return run, {}, []
    if cfg.compile == "whole":
        mode = "reduce-overhead" if device.type == "cuda" else None
        loss_of = torch.compile(run, mode=mode, dynamic=False)
    else:
        for block in model.blocks:
            block.compile(dynamic=False)  # or the first other batch size would slow every later step down
    windows = torch.zeros(cfg.micro_batch, cfg.block_size + 1, dtype=torch.long)
    x, y = windows[:, :-1].to(device), windows[:, 1:].to(device)  # strides as the data's, or it is compiled twice
    began = time.perf_counter()
    try:
        with autocast, chosen_kernel(cfg):
            loss_of(x, y).backward()
    except torch._dynamo.exc.TorchDynamoException as error:
        for block in model.blocks:
            block._compiled_call_impl = None
        reason = str(error).strip().splitlines()[0]
        return run, {}, [f"COMPILE: {cfg.compile!r} failed, running uncompiled: {reason}"]
    finally:
        model.zero_grad(set_to_none=True)
    return loss_of, {"compile": cfg.compile, "compile_seconds": round(time.perf_counter() - began, 1)}, []


def peak_memory(device: torch.device) -> int:
    """Bytes: the device's peak on CUDA, the process's elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would begin with the peak of the process that started this one
        peak = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
        if peak:
            return int(peak.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
