"""How a run computes on this machine: device, attention kernel, arithmetic, compilation, and its entry in the record.

The record is what `engine/runlog.py` writes about a run before its first step.
"""

import contextlib
import logging
import os
import platform
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from config import FIELDS, Config, UserError, shown
from engine import budget
from model import GPT, uses_chunked

KERNELS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
NAMED_KERNELS = ("chunked", *KERNELS)  # every value of cfg.attn_kernel but "auto"
# fields of the model's shape, of which one is named in a message about too much memory for weights
SHAPE = ("n_layer", "d_model", "d_ff", "vocab_size", "block_size", "mla_rank", "mla_rope_dim", "n_experts")
BLOCK_OBJECTS = 1e5  # bytes of one block's Python objects


def pick_device(name: str) -> torch.device:
    """The device that cfg.device names. If this machine has no such device, a UserError lists those that it has."""
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
    """The name of the processor, or of its architecture where the system does not tell the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def two_blocks(cfg: Config) -> GPT:
    """A model on the meta device whose blocks attend as the first two of cfg's do, and so as all of cfg's in turn."""
    with torch.device("meta"):
        sizes = dict(n_layer=min(cfg.n_layer, 2), n_experts=0, d_ff=1, vocab_size=2)
        return GPT(replace(cfg, **sizes, theory_every=0, recompute=0))


def attention_kernels(cfg: Config, device: torch.device) -> list[str]:
    """The attention kernels that the first blocks of the model use, as in `two_blocks`, with "auto" resolved."""
    x = torch.empty(1, cfg.block_size, cfg.d_model, device="meta")
    dtype = torch.bfloat16 if cfg.dtype == "bfloat16" else torch.float32
    names = {backend: name for name, backend in KERNELS.items()}
    found = []
    for attention in (block.attn for block in two_blocks(cfg).blocks):
        if cfg.logit_cap:
            found.append("plain")
        elif uses_chunked(cfg.attn_kernel, attention.d_qk, device):
            found.append("chunked")
        elif cfg.attn_kernel != "auto":
            found.append(cfg.attn_kernel)
        else:
            shapes = [y.shape for y in attention.qkv(x)]
            q, k, v = (torch.empty(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes)
            gqa = q.shape[1] > k.shape[1]
            chosen = SDPBackend(torch._fused_sdp_choice(q, k, v, is_causal=True, scale=1.0, enable_gqa=gqa))
            found.append(names.get(chosen, chosen.name))
    return found


def chosen_kernel(cfg: Config):
    """A context in which PyTorch's attention runs on the kernel that cfg.attn_kernel names."""
    return sdpa_kernel(KERNELS[cfg.attn_kernel]) if cfg.attn_kernel in KERNELS else contextlib.nullcontext()


def memory_of(device: torch.device) -> int:
    """Bytes of memory that the device has; of a CPU, those that this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limit = Path("/sys/fs/cgroup/memory.max")  # of the container
    text = limit.read_text().strip() if limit.is_file() else ""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(installed, int(text)) if text.isdigit() else installed


def require(
    cfg: Config, device: torch.device, ranks: int = 1, local_ranks: int = 1, footprint: Callable = lambda *_: ()
):
    """Raise UserError unless the run fits into this machine's memory and its attention kernel runs on the device.

    ranks: processes of the run; local_ranks: those on this machine, over which HSDP shards the model. footprint: counts
    what measurements take beside the weights, as `stability.footprint.needs` does.
    """
    here = memory_of(device)
    share = here // local_ranks if device.type != "cuda" else here
    for name, need in chain(
        needs(cfg, device, ranks, local_ranks), measuring(cfg, device, ranks, footprint, local_ranks)
    ):
        if need > share:
            right = repr(type(getattr(cfg, name))(0)) if name.endswith(("_every", "_probe")) else "less"
            size = "more than can be counted" if need == float("inf") else f"{need / 2**30:.3g} GiB"
            of_each = f" for each of {local_ranks} processes" if share != here else ""
            raise UserError(
                f"{name} = {shown(getattr(cfg, name))}: must be {right}; with the other fields it takes {size} "
                f"of memory, and {device} has {share / 2**30:.3g} GiB{of_each}"
            )
    if cfg.attn_kernel != "auto" and not kernel_runs(cfg, device):
        others = [name for name in NAMED_KERNELS if kernel_runs(replace(cfg, attn_kernel=name), device)]
        raise UserError(
            f"attn_kernel = {cfg.attn_kernel!r}: must be one that computes this attention on {device} in {cfg.dtype}: "
            f"{', '.join(['auto', *others])}"
        )


def needs(cfg: Config, device: torch.device, ranks: int, local_ranks: int = 1) -> Iterable[tuple[str, float]]:
    """Lower bounds of the run's memory, one for each large item: (the field that contributes most, bytes).

    Counts that are quick to make come first. A dry run takes only the weights.
    """
    state = 4 if cfg.dry_run else 16  # fp32 weights, gradients and two moments
    shards = budget.shards(cfg, ranks, None, local_ranks) if cfg.parallel != "auto" else ranks
    # blame the field that exceeds its default by the largest factor
    sizes = [name for name in SHAPE if getattr(cfg, name) > FIELDS[name].default]
    largest = max(sizes or SHAPE, key=lambda name: getattr(cfg, name) / max(FIELDS[name].default, 1))
    yield largest, budget.parameters(cfg) * state / shards
    yield "n_layer", cfg.n_layer * BLOCK_OBJECTS
    if cfg.dry_run:
        return
    tokens = cfg.block_size + 1
    for name, windows in (("batch_size", cfg.batch_size), ("probe_batch", cfg.probe_batch),
                          ("eval_batches", cfg.eval_batches * cfg.micro_batch if cfg.eval_every else 0)):  # fmt: skip
        # a token as it is stored (2 bytes) and in two copies of 64 bits (16); a window's NumPy array (200)
        yield name, windows * (18 * tokens + 200)
    if cfg.compile == "off":  # a compiler may keep less than is counted here
        name = "micro_batch" if cfg.micro_batch > 1 else "block_size"
        need = budget.Memory.of(cfg, shards).total
        yield name, need
        kernels = attention_kernels(cfg, device)
        # recomputed blocks keep no probabilities, or one at a time
        kept = [kernels[i % len(kernels)] for i in range(min(cfg.recompute, cfg.n_layer - 1), cfg.n_layer)]
        probabilities = 4 * cfg.micro_batch * cfg.n_head * cfg.block_size**2  # of one block, fp32
        # the chunked kernel skips what the causal mask hides
        yield name, need + probabilities * kept.count("math") + probabilities * kept.count("chunked") // 2


def measuring(
    cfg: Config, device: torch.device, ranks: int, footprint: Callable, local_ranks: int = 1
) -> Iterable[tuple[str, float]]:
    """As `needs`, for each measurement: its own memory beside what a training step leaves on the rank that measures."""
    if cfg.dry_run:
        return
    shards = budget.shards(cfg, ranks, memory_of(device) if device.type == "cuda" else None, local_ranks)
    memory = budget.Memory.of(cfg, shards)
    kept = memory.weights + memory.moments + (memory.gradients if ranks > 1 and shards == 1 else 0)
    for name, need in footprint(cfg, device, shards > 1):
        yield name, kept + need


@contextlib.contextmanager
def _quiet():
    """A context without warnings: PyTorch would explain in several why a kernel does not run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def kernel_runs(cfg: Config, device: torch.device) -> bool:
    """Whether cfg.attn_kernel computes this attention on the device. It is tried on two blocks and one sequence."""
    model = two_blocks(cfg).to_empty(device=device)
    x = torch.zeros(1, cfg.block_size, dtype=torch.long, device=device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")
    try:
        with _quiet(), autocast, chosen_kernel(cfg):
            model(x, x).backward()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return False
    return True


def prepare(cfg: Config):
    """Set the number of threads, how CUDA's memory is allocated unless the user has set that, and which kernels are
    allowed. To be called before anything is computed.

    PyTorch reads the allocator's settings when they are first needed. With segments that can grow, memory is not lost
    to gaps between segments of fixed sizes.

    With cfg.deterministic two runs on GPUs of one kind have the same bits. Otherwise they do not, because the backward
    passes of attention and of embeddings add up in any order there. PyTorch raises RuntimeError for an operation that
    it cannot repeat.
    """
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if torch.cuda.is_available() and cfg.device != "cpu" and not allocator():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    torch.use_deterministic_algorithms(cfg.deterministic)
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when it starts
        torch.utils.deterministic.fill_uninitialized_memory = False  # no uninitialised memory is ever read


def allocator() -> str | None:
    """The environment's settings of PyTorch's allocator, under the name of PyTorch 2.9 and newer or the one before."""
    return os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")


def set_arithmetic(device: torch.device, matrices: Iterable[Tensor]) -> dict[str, str]:
    """Make fp32 arithmetic on a CPU faster and no less exact. Returns the choices, for the record; {} on other devices.

    First, denormal numbers are flushed to zero. An attention weight of 1e-40 has no effect, but arithmetic with it
    takes a hundred times as long.

    Second, AMD processors with AVX-512 compute fp32 products in oneDNN. PyTorch's default is MKL, which uses half of
    their vector width. PyTorch calls oneDNN only if it may also compute in bf16, which oneDNN does where the processor
    has matrix units for bf16. So bf16 is allowed for a trial. The permission stays only if products of the shapes of
    `matrices` turn out to be as exact as fp32.
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
    """‖ΔY‖_F / ‖Y‖_F, the error of the fp32 product Y = XWᵀ with Gaussian X (64, k) and W (n, k) against fp64."""
    generator = torch.Generator().manual_seed(0)
    X, W = torch.randn(64, k, generator=generator), torch.randn(n, k, generator=generator)
    exact = X.double() @ W.double().T
    return ((X @ W.T - exact).norm() / exact.norm()).item()


def compile_mode(device: torch.device, accumulate: int) -> str | None:
    """torch.compile's mode for the whole loss: with CUDA graphs, unless a step has several micro-batches.

    A graph writes its gradients to the same memory each time, and PyTorch may then add wrong gradients (its issues
    96693 and 169545).
    """
    return "reduce-overhead" if device.type == "cuda" and accumulate == 1 else None


def compiled(
    cfg: Config, model: GPT, device: torch.device, autocast, loss: Callable | None = None, accumulate: int = 1
) -> tuple[Callable, dict, list[str]]:
    """The loss function, compiled as cfg.compile says; what to record; and lines to announce.

    loss: the uncompiled function, such as a wrapper that spreads the model over processes; None means the model.
    accumulate: the micro-batches of a step on this process.

    The compiled function is tried on one micro-batch, so no step's time includes compilation. If compilation fails
    (on a CPU, PyTorch needs a C++ compiler), the run is uncompiled from its first step, and a line says so.
    """
    loss = loss or model
    loss_of, mode = loss, None
    if cfg.compile == "off":
        return loss, {}, []
    if not torch.cuda.is_available():  # a module that the compiler imports warns of CUDA without a GPU
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    if cfg.compile == "whole":
        mode = compile_mode(device, accumulate)
        loss_of = torch.compile(loss, mode=mode, dynamic=False)
    else:
        for block in model.blocks:
            # with dynamic=None, a second batch size would replace it by slower code that serves all sizes
            block.compile(dynamic=False)
    windows = torch.zeros(cfg.micro_batch, cfg.block_size + 1, dtype=torch.long)
    x, y = windows[:, :-1].contiguous().to(device), windows[:, 1:].contiguous().to(device)  # with a batch's strides
    began = time.perf_counter()
    try:
        with autocast, chosen_kernel(cfg):
            loss_of(x, y).backward()
    except torch._dynamo.exc.TorchDynamoException as error:
        for block in model.blocks:
            block._compiled_call_impl = None
        reason = " ".join(str(error).split("\n\n")[0].split())  # the cause may be in its second line
        return loss, {}, [f"COMPILE: {cfg.compile!r} failed, running uncompiled: {reason}"]
    finally:
        model.zero_grad(set_to_none=True)
    seconds = round(time.perf_counter() - began, 1)
    return loss_of, {"compile": cfg.compile, "compile_mode": mode, "compile_seconds": seconds}, []


def peak_memory(device: torch.device) -> int:
    """The peak memory in bytes: of the device on CUDA, elsewhere of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if peak := _status("VmHWM"):  # getrusage would count the peak of the process that started this one
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status(entry: str) -> int | None:
    """An entry of what Linux says of this process's memory, in bytes; None on other systems."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{entry}:")), None)


def memory_used(device: torch.device) -> dict[str, float]:
    """GiB of memory: "peak", and "now" where known; of the device on CUDA, else of this process. CUDA adds "retries":
    how often the allocator had to free its cache."""
    used = {"peak": peak_memory(device) / 2**30}
    if device.type == "cuda":
        retries = torch.cuda.memory_stats(device).get("num_alloc_retries", 0)
        return used | {"now": torch.cuda.memory_allocated(device) / 2**30, "retries": retries}
    now = _status("VmRSS")
    return used | ({"now": now / 2**30} if now else {})


def peak_flops(cfg: Config, device: torch.device) -> float | str:
    """FLOP/s of the device in cfg.dtype as its data sheet says, or why they are unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    gpu = budget.gpu_called(name)
    return gpu.peak(cfg.dtype) if gpu else f"unknown, so no MFU: engine/budget.py has no data sheet of a {name}"


def describe(cfg: Config, device: torch.device) -> dict:
    """What a run's record says of where it runs."""
    return {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "processor": processor(),
        "attention_kernel": ", ".join(dict.fromkeys(attention_kernels(cfg, device))),
        "dtype": cfg.dtype,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "allocator": allocator() if device.type == "cuda" else None,
        "peak_flops": peak_flops(cfg, device),
    }
