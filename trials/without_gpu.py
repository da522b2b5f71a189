"""Does a run fit into a GPU, and does it stay in bf16? Shown without one, for every configuration at its full size.

The runs use PyTorch's CUDA build on a CUDA that computes nothing (without_gpu.c; Linux and gcc). Memory, types, copies
and the number of calls are those of a GPU; losses and gradients mean nothing. Of several processes only rank 0 is
started, in a process group that sends nothing. Triton and NCCL are not run: blocks are not compiled, and a collective
costs neither memory nor time.
"""

import contextlib
import ctypes
import json
import os
import re
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import UserError, load_config
from engine.budget import ROOM

SOURCE = Path(__file__).with_suffix(".c")
COUNTERS = ("fp32", "bf16", "fp64", "pageable", "pinned", "read", "waited", "launches", "compiled")
GIB = 2**30
PLAN = 0.1  # by which share the plan may miss the peak
SIGNAL = 4  # bytes: a step copies one number from the host, whether a signal came
PROBE, APPLICATION, STEPS = 4, 5, 6  # the steps that measure, and apply MSign, and how many there are
# the operations that choose a kernel for attention, by precision, and for experts
FLASH, EFFICIENT = (f"aten::_scaled_dot_product_{kind}_attention" for kind in ("flash", "efficient"))
ATTENTION = (FLASH, EFFICIENT, "aten::_scaled_dot_product_cudnn_attention", "aten::_scaled_dot_product_attention_math")
GROUPED = "aten::_grouped_mm"
TARGET = "sm_90a"  # the H100's architecture
PLAIN = (2, 3, 6)  # steps that only train; the first one allocates the optimizer's moments
# CONFIGURATION:GPUS:PARALLEL:COMPILE, without the last ones where one GPU, its own layout, or off is meant
RUNS = ("nano_5m_msign", "sigma_40m_msign", "gpt_124m", "gpt_1b:8", "gpt_3b:8", "llama_1b_msign:8",
        *(f"{name}:{how}" for name in ("gpt_3b", "llama_1b_msign", "llama_moe_3b_msign")
          for how in ("8:fsdp", "64:fsdp", "64:hsdp", "512:fsdp", "512:hsdp")),
        *(f"{name}::blocks" if ":" in name else f"{name}:::blocks" for name in
          ("nano_5m_msign", "sigma_40m_msign", "llama_1b_msign:8", "llama_moe_3b_msign:8", "gpt_5m", "gpt_15m",
           "gpt_60m", "gpt_124m", "gpt_350m", "gpt_760m", "gpt_1b:8", "gpt_3b:8")))  # fmt: skip
# what a run adds to the configuration: few steps, two micro-batches in each, every instrument but the theorems
OPTIONS = [f"--max_steps={STEPS}", "--warmup_steps=1", f"--probe_every={PROBE}", f"--layers_every={PROBE}",
           f"--jacobian_every={PROBE}", "--theory_every=0", "--eval_every=0", "--ckpt_every=0", "--compile=off",
           "--wandb=off"]  # fmt: skip


PAGE = """# Memory and precision on an H100, without one

Every run took six steps on a CUDA that computes nothing (`scripts/without_gpu.py`), as rank 0 of its processes. Memory
is in GiB, of the 79.2 that PyTorch sees on an H100. *plan*: what the memory plan of `scripts/plan.py` counts; *peak*:
the most that a step of training alone held; *least, measuring*: what a run is refused for before it begins, the memory
that measuring takes with the Jacobians of one block at a time; more blocks are taken where there is memory. *reserved*:
the most that PyTorch's allocator had taken from the GPU after any of the six steps. *fp32 share*: the share of fp32 in
the FLOPs of matrix products of such a step. Blocks are not compiled. What NCCL and compiled kernels take is not in
these numbers.

{memory}

What rank 0 of several holds, of the weights and AdamW's moments, and what it sends, as the plan counts them over what
was seen. A collective counts as sent around a ring. A step has two micro-batches.

{spread}

Compiled by block, as far as a machine without a GPU can: PyTorch generates Triton kernels for an H100, and Triton and
NVIDIA's assembler translate them; nothing runs. The attention and the experts are products of PyTorch's own kernels.

{compiled}

A rule is broken if the allocator takes more than 85 % of the memory, if a step keeps memory, if the plan misses the
peak, or what is held or sent, by more than a tenth, or if a step of a bf16 run has products in fp32, copies from memory
that is not pinned, or waits for the GPU more than once, or if something could not be measured, for lack of memory, say.
"""


def symbols(libraries: list[Path], which: str) -> set[str]:
    """The names that libraries define ("--defined-only"), or need and do not define ("--undefined-only")."""
    command = ["nm", *(["-D"] if libraries[0].suffix == ".so" else []), which, *libraries]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.split()[-1].split("@")[0] for line in lines if len(line.split()) > 1}


def build(folder: Path) -> dict[str, str]:
    """Compile the CUDA that computes nothing into `folder`. Returns the environment in which PyTorch uses it.

    Raises UserError unless this is Linux with gcc and PyTorch's CUDA build.
    """
    packages = Path(sysconfig.get_path("purelib"))
    headers = [path.parent for path in packages.glob("nvidia/*/include/cuda_runtime_api.h")]
    if sys.platform != "linux" or not headers:
        raise UserError("without_gpu: needs Linux, and the build of PyTorch that brings CUDA")
    triton = packages / "triton" / "backends" / "nvidia"
    headers.append(triton / "include")  # has headers that the others include
    own, rest, library = folder / "own.o", folder / "rest.c", folder / "libcuda.so.1"
    gcc = ["gcc", "-w", "-fPIC", *(f"-I{path}" for path in headers)]
    users = [path for name in ("libtorch_*.so", "libc10_cuda.so", "libcaffe2_nvrtc.so")
             for path in packages.glob(f"torch/lib/{name}")]  # fmt: skip
    try:
        subprocess.run([*gcc, "-c", SOURCE, "-o", own], check=True)
        prefix = re.compile(r"(cu(da)?[A-Z]|__cuda[A-Z]|cublas|cusolver|nccl[A-Z]|nvrtc)\w+")
        linked = filter(prefix.match, symbols(users, "--undefined-only"))
        by_name = re.compile(rb"\0((?:cu|nvml)[A-Z]\w+)\0")
        asked_for = [name.decode() for path in users for name in by_name.findall(path.read_bytes())]
        asked_for += re.findall(r"\b(cu[A-Z]\w+)\(", (triton / "driver.c").read_text())
        missing = {*linked, *asked_for} - symbols([own], "--defined-only")
        rest.write_text("\n".join(f"int {name}() {{ return 0; }}" for name in sorted(missing)))
        subprocess.run([*gcc, "-shared", "-Wl,-soname,libcuda.so.1", rest, own, "-o", library], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"without_gpu: gcc and nm are needed: {error}") from error
    (folder / "libnvidia-ml.so.1").symlink_to(library)
    return {"LD_PRELOAD": str(library), "LD_LIBRARY_PATH": str(folder)}


# --- inside: in a process that was started with this environment ---


def stand_ins(ranks: int, even: int) -> Counter[str]:
    """Replace what needs values or other processes, or costs time on the CPU alone.

    even: how many tokens of a probe each expert gets if all get equally many. Training does not ask for the number.
    Returns a counter whose "bytes" are those that PyTorch's own parallel training has sent, counted as in the plan.
    """
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    import msign
    import mup
    from engine import parallel

    torch.set_num_threads(1)
    torch.backends.cuda.enable_cudnn_sdp(False)  # its plans are made by a library that asks the GPU
    mup.init_weights = lambda *_: None
    parallel.finite = lambda p: True
    msign._require_finite = lambda *_: None
    of_all = torch.Tensor.all  # asked whether all values are finite
    yes = torch.tensor(True)
    torch.Tensor.all = lambda x, *at, **dim: of_all(x, *at, **dim) if at or dim or not x.is_cuda else yes
    parallel.World.agree = parallel.World.tell = lambda self, what: what
    integer = torch.Tensor.__int__
    torch.Tensor.__int__ = lambda value: even if value.is_cuda else integer(value)

    def never_fails(name: str, instead):
        """A solver that returns instead(A) if its return code, whatever that memory held before, tells of a failure."""
        solver = getattr(torch.linalg, name)

        def solve(A):
            try:
                return solver(A)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                return instead(A)

        setattr(torch.linalg, name, solve)

    never_fails("eigvalsh", lambda A: A.new_zeros(A.shape[:-1]))
    never_fails("eigh", lambda A: (A.new_zeros(A.shape[:-1]), torch.zeros_like(A)))
    sent: Counter[str] = Counter()
    if ranks == 1:
        return sent
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(min(ranks, 8))}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    dist.new_group = lambda *_, **__: dist.group.WORLD
    wrapped = parallel.DistributedDataParallel

    def counted(name: str, share):
        """Count what the collective of this name sends: share(ranks of its group) times its tensor that counts."""
        collective, tensor = getattr(dist, name), 1 if name == "all_gather_single" else 0

        def call(*args, group=None, **more):
            x = args[tensor] if args else more["output"]
            sent["bytes"] += int(share(dist.get_world_size(group)) * x.nbytes)
            return collective(*args, group=group, **more)

        setattr(dist, name, call)

    counted("all_gather_single", lambda n: n - 1)  # its input, a part
    counted("reduce_scatter_single", lambda n: n - 1)  # its output, a part
    counted("all_reduce", lambda n: 2 * (n - 1) / n)

    def sends_nothing(state, bucket):
        sent["bytes"] += 2 * (ranks - 1) * bucket.buffer().nbytes // ranks
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    def data_parallel(*args, **options):
        model = wrapped(*args, init_sync=False, **options)
        model.register_comm_hook(None, sends_nothing)
        return model

    parallel.DistributedDataParallel = data_parallel
    return sent


class Counters:
    """What the library counted since the last call."""

    def __init__(self):
        library = ctypes.CDLL(None)
        self.values = (ctypes.c_double * len(COUNTERS)).in_dll(library, "counters")

    def read(self) -> dict[str, float]:
        found = dict(zip(COUNTERS, self.values, strict=True))
        ctypes.memset(self.values, 0, ctypes.sizeof(self.values))
        return found


def local_bytes(x) -> int:
    """Bytes of the part of a tensor that this process holds."""
    return getattr(x, "_local_tensor", x).nbytes


class Enough(Exception):
    """The last step was taken."""


def inside(name: str, ranks: int, folder: Path, more: list[str]) -> dict:
    """Train a configuration as rank 0 of `ranks`. Returns the plan, and a line for each step with what it took."""
    import torch

    path = f"configs/{name}.py"
    given = load_config([path])
    sent = stand_ins(ranks, given.probe_batch * given.block_size * given.top_k // max(given.n_experts, 1))
    import msign
    import train
    from engine import budget, machine
    from stability import footprint

    for split, tokens in (("train", 400_000), ("val", 100_000)):
        np.zeros(tokens, np.uint16).tofile(folder / f"{split}.bin")
    options = [f"--batch_size={2 * given.micro_batch * ranks}", f"--dataset={folder}", f"--runs_dir={folder}"]
    options += [f"--msign_period={APPLICATION}"] if given.msign_period else []
    # gathering from so many takes much of this machine's memory; Jacobians are not measured on compiled blocks
    options += ["--jacobian_every=0"] if ranks > 64 or "--compile=blocks" in more else []
    cfg = load_config([path, *OPTIONS, *options, *more])
    counters, lines = Counters(), []
    kernels = torch.autograd.profiler.profile(use_kineto=False)  # of one step

    def after_step(log, step: int, metrics: dict):
        memory = {"allocated": torch.cuda.memory_allocated(), "peak": torch.cuda.max_memory_allocated(),
                  "reserved": torch.cuda.memory_reserved()}  # fmt: skip
        bytes_sent = {"sent": sent.pop("bytes", 0), "msign": msign.counts.pop("bytes", 0)}
        lines.append({"step": step, **memory, **bytes_sent, **counters.read()})
        torch.cuda.reset_peak_memory_stats()
        if step == PLAIN[0]:
            kernels.__exit__(None, None, None)
        if step == PLAIN[0] - 1:
            kernels.__enter__()
        if step == cfg.max_steps:
            raise Enough

    train.RunLog.log = after_step
    run = train.Run(cfg)
    shards = run.world.shards if run.sharded else 1
    plan = budget.Memory.of(cfg, shards)
    shapes = budget.matrices(cfg) if cfg.msign_period else []
    counters.read()
    missing = []
    run.not_measured = missing.append
    run.begin()
    with contextlib.suppress(Enough):
        train.loop(run, train.Signals(), beat=lambda: None)
    memory = torch.cuda.get_device_properties(0).total_memory
    held = [*run.model.parameters(), *(x for state in run.optimizer.state.values() for x in state.values() if x.dim())]
    return {
        "layout": run.layout,
        "dtype": cfg.dtype,
        "plan": plan.total,
        "ranks": ranks,
        "held": sum(map(local_bytes, held)),
        "held, plan": plan.weights + plan.moments,
        "sent, plan": sum(budget.step_bytes(cfg, ranks, shards)),
        "msign, plan": sum(budget.msign_bytes(shapes, ranks, shards)[0]),
        "measuring": max(
            need for _, need in machine.measuring(cfg, run.device, ranks, footprint.needs, run.world.per_node)
        ),
        "memory": memory,
        "steps": lines,
        "missing": missing,
        "experts": cfg.n_experts,
        "kernels": sorted({event.name for event in kernels.function_events} & {*ATTENTION, GROUPED}),
        "compile": cfg.compile,
        "breaks": sum(torch._dynamo.utils.counters["graph_break"].values()),
        "triton": [re.search(r"^\.target (\w+)", path.read_text(), re.M)[1] for path in folder.rglob("*.ptx")],
    }


# --- outside: what is asked of a run ---


def named(text: str) -> tuple[str, int, tuple[str, ...]]:
    """(configuration, number of GPUs, options) of "gpt_3b:8:fsdp:blocks"."""
    name, ranks, parallel, compiled = [*text.split(":", 3), "", "", ""][:4]
    known = parallel in ("", "ddp", "fsdp", "hsdp") and compiled in ("", "blocks")
    if not (ranks or "1").isdecimal() or int(ranks or 1) < 1 or not known:
        raise UserError(f"only = {text!r}: must be CONFIGURATION:GPUS:PARALLEL:COMPILE or less, such as gpt_3b:8:fsdp")
    options = {"parallel": parallel, "compile": compiled}
    return name, int(ranks or 1), tuple(f"--{option}={value}" for option, value in options.items() if value)


def run(which: str, environment: dict[str, str], folder: Path, more: tuple[str, ...] = ()) -> dict:
    """What `inside` returns, from a process of its own. Raises UserError with the process's last line if it failed."""
    name, ranks, options = named(which)
    out = folder / which.replace(":", "_") / "found.json"
    out.parent.mkdir()
    command = [sys.executable, __file__, name, str(ranks), str(out), *options, *more]
    # a kernel that was chosen by timing it here must not be met by a later run
    caches = {f"{library}_CACHE_DIR": str(out.parent / library) for library in ("TORCHINDUCTOR", "TRITON")}
    done = subprocess.run(command, env=os.environ | environment | caches, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"{which}: {why}")
    return json.loads(out.read_text()) | {"run": name + f", {ranks} × {{layout}}" * (ranks > 1)}


def title(found: dict) -> str:
    """The run in words, such as "gpt_3b, 8 × fsdp"."""
    return found["run"].format(layout=found["layout"])


def row(found: dict) -> dict:
    """A line of the table of memory, all in words, of what `run` found."""
    steps = {line["step"]: line for line in found["steps"]}
    plain = [steps[step] for step in PLAIN]
    peak = max(line["peak"] for line in plain)
    return {
        "run": title(found),
        "plan": f"{found['plan'] / GIB:.2f}",
        "peak": f"{peak / GIB:.2f}",
        "plan ÷ peak": f"{found['plan'] / peak:.3f}",
        "least, measuring": f"{found['measuring'] / GIB:.2f}",
        "peak, measuring": f"{steps[PROBE]['peak'] / GIB:.2f}",
        "peak, MSign": f"{steps[APPLICATION]['peak'] / GIB:.2f}" if "msign" in found["run"] else "–",
        "reserved": f"{max(line['reserved'] for line in found['steps']) / GIB:.2f}",
        "after a step": f"{plain[-1]['allocated'] / GIB:.2f}",
        "fp32 share": f"{max(line['fp32'] / (line['fp32'] + line['bf16']) for line in plain):.0%}",
        "broken": "; ".join(broken(found)) or "none",
    }


def spread(found: dict) -> dict[str, tuple[float, float]]:
    """{what rank 0 holds or sends: (bytes, the plan's bytes)}; what MSign sends only where it sends something."""
    steps = {line["step"]: line for line in found["steps"]}
    own = {"held": found["held"], "sent": steps[PLAIN[0]]["sent"], "msign": steps[APPLICATION]["msign"]}
    return {what: (own[what], found[f"{what}, plan"]) for what in own if own[what] or found[f"{what}, plan"]}


def spread_row(found: dict) -> dict:
    """A line of the table of what rank 0 holds and sends, all in words, of what `run` found."""
    cells = {"run": title(found)}
    of = spread(found)
    for what, words in (("held", "holds"), ("sent", "sends a step"), ("msign", "sends for MSign")):
        seen, planned = of.get(what, (0, 0))
        cells |= {
            f"{words}, GB": f"{seen / 1e9:.3f}",
            f"{words}: plan ÷ seen": f"{planned / seen:.3f}" if seen else "–",
        }
    return cells


def compiled_row(found: dict) -> dict:
    """A line of the table of compiled runs, all in words, of what `run` found."""
    return {
        "run": title(found),
        "Triton kernels": len(found["triton"]),
        "target": ", ".join(sorted(set(found["triton"]))),
        "graph breaks": found["breaks"],
        "attention, experts": ", ".join(name.removeprefix("aten::_") for name in found["kernels"]),
        "broken": "; ".join(broken(found)) or "none",
    }


def page(found: list[dict]) -> str:
    """The page of results/without_gpu.md."""
    eager = [run for run in found if run["compile"] == "off"]
    rows = {
        "memory": [row(run) for run in eager],
        "spread": [spread_row(run) for run in eager if run["ranks"] > 1],
        "compiled": [compiled_row(run) for run in found if run["compile"] != "off"],
    }
    tables = {name: pd.DataFrame(of).to_markdown(index=False, disable_numparse=True) for name, of in rows.items()}
    return PAGE.format(**{name: table if rows[name] else "No such run." for name, table in tables.items()})


def broken(found: dict) -> list[str]:
    """Which of the rules a run breaks."""
    steps = found["steps"]
    plain = [line for line in steps if line["step"] in PLAIN]
    peak = max(line["peak"] for line in plain)
    compiled = found["compile"] != "off"
    intended = [FLASH if found["dtype"] == "bfloat16" else EFFICIENT, *([GROUPED] if found["experts"] else [])]
    rules = {
        f"reserves more than {ROOM:.0%} of the GPU": all(line["reserved"] <= ROOM * found["memory"] for line in steps),
        "a step keeps memory": len({line["allocated"] for line in steps[1:]}) == 1,
        # compiled blocks may keep less
        f"plan not within {PLAN:.0%}": -PLAN <= found["plan"] / peak - 1 <= (1 if compiled else PLAN),
        f"plan of what is held or sent not within {PLAN:.0%}": all(
            abs(planned - seen) <= PLAN * seen for seen, planned in spread(found).values()
        ),
        "fp32 products": found["dtype"] == "float32" or not any(line["fp32"] for line in plain),
        "copies from pageable memory": all(line["pageable"] <= SIGNAL for line in plain),
        "attention or experts by another kernel than intended": sorted(found["kernels"]) == sorted(intended),
        "a graph breaks": not found["breaks"],
        f"not compiled for {TARGET}": not compiled or set(found["triton"]) == {TARGET},
        "could not be measured": not found["missing"],
        "waits for the GPU more than once": all(line["read"] <= 1 for line in plain),
    }
    return [rule for rule, held in rules.items() if not held]


def main():
    name, ranks, out, *more = sys.argv[1:]
    Path(out).write_text(json.dumps(inside(name, int(ranks), Path(out).parent, more)))
    sys.stdout.flush()
    os._exit(0)  # the library is not made to be taken down


if __name__ == "__main__":
    main()
