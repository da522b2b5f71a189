"""Does this machine compute what it should? Every path against fp32 on a CPU, then speed and memory against the plan.

A *path* is one way to compute the same thing: a device, a precision, an attention kernel, a kind of compilation, a way
to take the matrix sign, a number of processes. A path that does not exist on the machine is listed as not run.
"""

import contextlib
import gc
import io
import json
import math
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import pandas as pd
import torch
from torch import Tensor

import msign
import mup
import train
from config import ROOT, Config, UserError, load_config
from engine import budget, clock, machine
from engine.plan import Plan
from engine.runlog import first_line
from model import GPT, Stack
from trials.bench import matrices
from trials.faults import Kills
from trials.place import Place, output

CPU = torch.device("cpu")
SMALL = Config(n_layer=2, d_model=128, n_head=2, d_ff=256, vocab_size=512, block_size=128, batch_size=4, micro_batch=4)
LLAMA = replace(SMALL, norm="rmsnorm", mlp="swiglu", position="rope", n_kv_head=1)
MODELS = {
    "GPT": SMALL,
    "LLaMA": LLAMA,
    "MLA": replace(LLAMA, attention="mla", mla_rank=32, mla_rope_dim=16),
    "experts": replace(LLAMA, n_experts=8, top_k=2),
}
# the largest relative deviation of a gradient, ‖g − g'‖ / ‖g'‖. Rounding sends some tokens to other experts.
GRADIENT = {"float32": 1e-4, "bfloat16": 0.03, "experts in bfloat16": 0.3}
# ‖S − S'‖_F / ‖S'‖_F of a matrix sign, with the smallest singular value at the smallest that counts and elsewhere
SIGN = {"at the cut-off": 1e-3, "elsewhere": 1e-4}
SHAPES = ((48, 48), (192, 48), (512, 512))  # of matrices on every device; a GPU gets larger ones, too
LOSS = 1e-4  # relative deviation of a training loss in fp32
WAYS = ("ddp", "fsdp")  # of spreading a model over processes
FULL_SIZE = (  # configurations whose speed is measured on one GPU, with options that make them fit into 80 GB
    ("nano_5m_adamw",),
    ("nano_5m_adamw", "--micro_batch=240"),
    ("sigma_40m_adamw",),
    ("gpt_124m",),
    ("llama_1b_adamw",),
    ("gpt_3b", "--recompute=32"),
    ("llama_moe_3b_adamw", "--recompute=4"),
)
STEPS = 12  # of each
LAUNCHES = 0.05  # seconds: shorter applications are not held against the plan
PLAN = 1.1  # memory, and MSign's time, may be this many times the plan


@dataclass(frozen=True)
class Row:
    """One check: what was computed, the number that came out, the largest one that is accepted, and whether it held.

    held is None for what was not run, and for a number that nothing limits.
    """

    part: str
    path: str
    found: str
    limit: str = ""
    held: bool | None = None


class NotHere(Exception):
    """This machine cannot run a path; the message says why."""


def checked(part: str, path: str, limit: float, deviation: Callable[[], float]) -> Row:
    """The Row of a path whose deviation may not be above the limit. An exception means that it did not hold."""
    try:
        found = deviation()
    except NotHere as reason:
        return Row(part, path, f"not run: {reason}")
    except Exception as error:  # whatever a path raises is an outcome of this trial
        return Row(part, path, f"{type(error).__name__}: {first_line(error)[:200]}", f"{limit:g}", False)
    return Row(part, path, f"{found:.2g}", f"{limit:g}", found <= limit)


# --- one model, one step ---
def gradient(cfg: Config, device: torch.device) -> Tensor:
    """The gradient of a fixed loss on a fixed batch, of all parameters in one vector, fp32 on the CPU.

    It is that of the second of two passes, which with CUDA graphs is the first that is replayed.
    """
    model = GPT(cfg)
    mup.init_weights(model, cfg)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):  # no matrix is zero, so that every gradient counts
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    model.to(device)
    shape, generator = (2, cfg.micro_batch, cfg.block_size), torch.Generator().manual_seed(0)
    x, y = torch.randint(cfg.vocab_size, shape, generator=generator).to(device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")
    loss_of, _, notes = machine.compiled(cfg, model, device, autocast)
    if notes:
        raise NotHere(notes[0])
    for _ in range(2):
        model.zero_grad()
        with autocast, machine.chosen_kernel(cfg):
            loss = loss_of(x, y)
        loss.backward()
    return torch.cat([p.grad.flatten().float().cpu() for p in model.parameters()])


def step_of(cfg: Config, device: torch.device, exact: Tensor) -> float:
    """The relative deviation of the gradient from the exact one. Raises NotHere for a kernel that does not run."""
    if cfg.attn_kernel != "auto" and not machine.kernel_runs(cfg, device):
        raise NotHere(f"the kernel does not compute this attention on {device.type} in {cfg.dtype}")
    return ((gradient(cfg, device) - exact).norm() / exact.norm()).item()


def steps(device: torch.device) -> Iterable[Row]:
    """Every model in both precisions on every attention kernel, and compiled: by block in fp32, whole in bf16."""
    for name, cfg in MODELS.items():
        exact = gradient(replace(cfg, attn_kernel="math"), CPU)
        kernels = [{"attn_kernel": kernel} for kernel in ("auto", *machine.NAMED_KERNELS)]
        for dtype, how in (("float32", "blocks"), ("bfloat16", "whole")):
            limit = GRADIENT["experts in bfloat16" if cfg.n_experts and dtype == "bfloat16" else dtype]
            for way in (*kernels, {"compile": how}):
                path = f"{name}, {dtype}, {', '.join(f'{key} = {value}' for key, value in way.items())}"
                here = replace(cfg, dtype=dtype, **way)
                yield checked("gradient", path, limit, lambda here=here, exact=exact: step_of(here, device, exact))
    yield checked("gradient", "experts with unequal and with no tokens, bfloat16", 0.02, lambda: grouped(device))


def grouped(device: torch.device) -> float:
    """The relative deviation of the product that serves all experts, in bf16, from one expert after the other."""
    generator, sizes = torch.Generator().manual_seed(0), [5, 0, 40, 0, 1, 18]
    stack, x = Stack(len(sizes), 64, 32), torch.randn(sum(sizes), 64, generator=generator)
    with torch.no_grad():
        stack.weight.normal_(generator=generator)
        exact = torch.cat([part @ W.T for part, W in zip(x.split(sizes), stack.weight, strict=True)])
        ends = torch.tensor(sizes).cumsum(0).int().to(device)
        found = stack.to(device)(x.to(device, torch.bfloat16), ends).float().cpu()
    return ((found - exact).norm() / exact.norm()).item()


# --- the matrix sign ---
def signs(device: torch.device) -> Iterable[Row]:
    """Every backend on shapes of the paper's models, with hard spectra, against the sign in fp64."""
    shapes = list(SHAPES)
    if device.type == "cuda":
        shapes += [(2048, 2048), (5461, 2048)]
    for m, n in shapes:
        # the smallest singular value that counts as not zero is rank_cutoff times the largest
        for condition in (10, 0.5 / msign.rank_cutoff(m, n), None):
            W, exact = matrices(1, m, n, condition)
            limit = SIGN["at the cut-off" if condition and condition > 10 else "elsewhere"]
            if condition:
                U, _, Vh = torch.linalg.svd(W.double(), full_matrices=False)
                exact = U @ Vh
            words = f"condition {condition:.0g}" if condition else "rank deficient"
            for backend in ("polar", "eigh", "svd"):

                def deviation(W=W, exact=exact, backend=backend):
                    return ((msign.msign(W.to(device), backend).cpu() - exact).norm() / exact.norm()).item()

                yield checked("sign", f"{backend}, {m} × {n}, {words}", limit, deviation)


# --- whole runs ---
def losses(place: Place, name: str) -> Tensor:
    lines = (place.of(name) / "metrics.jsonl").read_text().splitlines()
    return torch.tensor([json.loads(line)["train/loss"] for line in lines])


def same_run(place: Place, name: str, reference: str) -> float:
    """The largest relative deviation of a training loss of a run from that of the reference."""
    found, exact = losses(place, name), losses(place, reference)
    return ((found - exact).abs() / exact).max().item() if len(found) == len(exact) else math.inf


def trained(place: Place, name: str, *options: str, processes: int = 1, nodes: int = 1) -> None:
    """Train, in new processes. Raises UserError with what was said if the run failed.

    nodes: calls of torchrun that stand for so many machines, with `processes` and GPUs of its own each.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1] if nodes > 1 else 0
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(nodes * processes)))).split(",")
    started = []
    for first in range(0, nodes * processes, processes):
        own = {"CUDA_VISIBLE_DEVICES": ",".join(gpus[first : first + processes])} if nodes > 1 else {}
        how = {"processes": processes, "nodes": nodes, "port": port, **own}
        started.append(place.start(f"--name={name}", *options, **how))
    for process, said in [(process, output(process)) for process in started]:
        if said is None or process.returncode:
            raise UserError(f"{name}: {last_error(said[1]) if said else 'hangs'}")


def last_error(stderr: str) -> str:
    """The last line that names an error, without torchrun's frame around it; '' if nothing was said."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"(\w+(Error|Exception)|train\.py: error): ", line)]
    return [*lines[-1:], *named[-1:]][-1] if lines else ""


def runs(device: torch.device, place: Place) -> Iterable[Row]:
    """A run on this device against the CPU's, on several processes against one, and killed against undisturbed."""

    def on_cpu() -> float:
        place.here("--name=cpu", "--device=cpu")
        return same_run(place, "whole", "cpu")

    yield checked("run", f"{place.steps('whole')} steps on {device.type}, against the CPU", LOSS, on_cpu)
    count = torch.cuda.device_count() if device.type == "cuda" else 2
    for way in WAYS:

        def spread(way=way) -> float:
            if count < 2:
                raise NotHere("there is one GPU")
            trained(place, way, f"--parallel={way}", "--micro_batch=1", processes=min(count, 4))
            return same_run(place, way, "whole")

        yield checked("run", f"{way} on {min(count, 4)} processes, against one", LOSS, spread)

    def hybrid() -> float:
        if device.type == "cuda" and count < 4:
            raise NotHere(f"there are {count} GPUs, and it takes 4")
        trained(place, "hsdp", "--parallel=hsdp", "--micro_batch=1", processes=2, nodes=2)
        return same_run(place, "hsdp", "whole")

    yield checked("run", "hsdp on 2 × 2 processes that stand for two nodes, against one", LOSS, hybrid)

    def killed() -> float:
        return float(sum(outcome is not None for outcome in Kills(place, 3, 1, 0).outcomes("killed", "whole")))

    yield checked("run", "3 kills: runs that did not end with the same bits", 0, killed)

    def moved() -> float:
        if count < 2:
            raise NotHere("there is one GPU")
        fifth = ("before the old one goes", 5)  # checkpoint, after which the main process kills itself
        output(place.start("--name=moved", "--parallel=fsdp", "--micro_batch=1", victim=fifth, processes=2))
        if place.saved("moved") in (None, place.saved("whole")):
            raise UserError("moved: did not end in the middle")
        trained(place, "moved", "--micro_batch=1", "--resume")
        return same_run(place, "moved", "whole")

    yield checked("run", "killed on 2 processes, gone on with on 1", LOSS, moved)


# --- speed and memory ---
def measured_run(name: str, options: list[str], device: torch.device, place: Place) -> tuple[Config, pd.DataFrame]:
    """Train a configuration for STEPS steps of two micro-batches; its settings, and a line of times.jsonl a step.

    MSign acts on all block matrices at every fourth step, and the last step is followed by a probe. Raises UserError,
    among others for a model that does not fit into the device's memory.
    """
    micro = load_config([str(ROOT / "configs" / f"{name}.py"), *options]).micro_batch
    run = "_".join(["speed", name, *options]).replace("--", "").replace("=", "_")
    options = [*options, f"--device={device}", f"--dataset={place.corpus}", f"--runs_dir={place.runs}",
               f"--name={run}", f"--batch_size={2 * micro}", "--wandb=off", "--eval_every=0", "--warmup_steps=1",
               f"--max_steps={STEPS}", "--msign_period=4", "--msign_targets=blocks", f"--probe_every={STEPS}",
               "--layers_every=0", "--jacobian_every=0", "--ckpt_every=0"]  # fmt: skip
    cfg = load_config([str(ROOT / "configs" / f"{name}.py"), *options])
    gc.collect()  # what is left of the last model
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with (
        mock.patch.object(clock, "EVERY", 0.0),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        try:
            train.train(cfg)
            times = pd.read_json(place.of(run) / "times.jsonl", lines=True)
        finally:  # a checkpoint takes up to 33 GB
            shutil.rmtree(place.of(run), ignore_errors=True)
    return cfg, times


def speed(device: torch.device, place: Place) -> Iterable[Row]:
    """Tokens a second, memory and MSign's time of the paper's configurations and others, against the plan."""
    sheet = budget.gpu_called(gpu_name(device))
    for name, *options in FULL_SIZE if device.type == "cuda" else (("stress_ramp",),):
        words, began = " ".join([name, *options]), time.perf_counter()
        try:
            cfg, times = measured_run(name, options, device, place)
        except UserError as error:
            yield Row("speed", words, f"not run: {error}")
            continue
        except Exception as error:  # whatever a run raises is an outcome of this trial
            yield Row("speed", words, f"{type(error).__name__}: {first_line(error)[:200]}", "", False)
            continue
        plain = times[(times["time/msign"] == 0) & times.iter.between(2, STEPS - 1)]
        rate = float((cfg.tokens_per_step / plain["time/interval"]).median())
        msign_seconds = float(times[times["time/msign"] > 0]["time/msign"].median())
        found = f"{rate:,.0f} tokens/s; in all {time.perf_counter() - began:.0f} s"
        yield Row("speed", f"{words}, {STEPS} steps", found)
        yield Row("speed", f"{words}, a probe", f"{times['time/measure'].max():.3g} s")
        if sheet is None:
            yield Row("speed", f"{words}, MSign on all block matrices", f"{1e3 * msign_seconds:.3g} ms")
            missing = f"not run: no data sheet of {gpu_name(device)}"
            yield Row("speed", "MFU, memory and MSign's time against the plan", missing)
            continue
        flops = budget.on_meta(cfg).flops_per_token() * rate
        yield Row("speed", f"{words}, share of the peak (MFU)", f"{flops / sheet.bf16:.1%}")
        planned = budget.Memory.of(cfg, 1).total / 2**30
        ratio = float(plain["memory/peak"].max()) / planned
        yield Row("speed", f"{words}, memory, of {planned:.3g} GiB planned", f"{ratio:.2f}", f"{PLAN:g}", ratio <= PLAN)
        planned = Plan(cfg, 1, 1, sheet, 0.4, "blocks").application_seconds("polar")[0]
        ratio = msign_seconds / planned
        path = f"{words}, MSign on all block matrices, of {1e3 * planned:.3g} ms planned"
        # the plan counts what the GPU does; for less than that, starting its kernels takes longer
        limited = planned > LAUNCHES
        yield Row("speed", path, f"{ratio:.2f}", f"{PLAN:g}" * limited, ratio <= PLAN if limited else None)


def gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else machine.processor()


# --- all of it ---
PARTS = ("gradient", "sign", "run", "speed")


def rows(parts: Iterable[str], device: torch.device, folder: Path) -> Iterable[Row]:
    """The checks of these parts, each as soon as it is done. They train in `folder`."""
    place = Place(folder, f"deterministic = True\ndevice = {device.type!r}") if {"run", "speed"} & {*parts} else None
    for part in parts:
        if part == "gradient":
            yield from steps(device)
        elif part == "sign":
            yield from signs(device)
        elif part == "run":
            yield from runs(device, place)
        else:
            yield from speed(device, place)


def page(found: list[Row], device: torch.device) -> str:
    """The table of all checks and, above it, what to believe."""
    failed, missing = [row for row in found if row.held is False], [row for row in found if "not run" in row.found]
    held = sum(row.held is True for row in found)
    words = {True: "yes", False: "**no**", None: ""}
    table = pd.DataFrame({
        "part": row.part, "path": row.path, "found": row.found, "at most": row.limit, "held": words[row.held],
    } for row in found)  # fmt: skip
    verdict = "Believe what ran" if not failed else f"Do not trust the {len(failed)} paths marked **no**"
    return (
        f"# Acceptance on {gpu_name(device)}\n\n"
        f"{verdict}: {held} of {held + len(failed)} checks held, {len(missing)} paths were not run.\n"
        f"PyTorch {torch.__version__}, {device.type}; made by `python scripts/acceptance.py`.\n\n"
        f"{table.to_markdown(index=False, disable_numparse=True)}\n"
    )
