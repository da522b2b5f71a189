"""What the tests run on several processes, as `torchrun tests/several.py FUNCTION JSON`. Rank 0 prints the result."""

import gc
import itertools
import json
import math
import os
import resource
import signal
import sys
import threading
import time
import weakref
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import filesystem
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import msign
import mup
import train
from config import Config, UserError, load_config, run_cli
from engine import budget, checkpoint, machine, parallel
from model import GPT
from remedies import rivals
from stability import metrics, probes
from stability.alarm import Alarm, CollapseAlarm


def trainings(runs: list[list[str]]) -> list[int]:
    """Train with each of these command lines, one after another; returns the exit codes.

    The alarm of a run that has one rings at step 9, on every rank that knows of the logit measured there.
    """

    def update(self, step, values):
        knows = math.isfinite(values.get("attention/max_logit", math.nan))
        return Alarm(step, 1.0, 300.0) if step == 9 and knows else None

    with mock.patch.object(CollapseAlarm, "update", update):
        return [train.train(load_config(argv)) for argv in runs]


def stopped(step: int, runs: list[list[str]]) -> list[int]:
    """As `trainings`, but rank 0 sends itself a SIGTERM when it has logged this step."""
    log = train.RunLog.log

    def log_and_stop(self, now, metrics):
        log(self, now, metrics)
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)

    train.RunLog.log = log_and_stop
    return trainings(runs)


def sleeping(step: int, seconds: float, argv: list[str]):
    """Train, but the last rank sleeps for `seconds` before its backward passes of this step."""
    forward_backward = train.forward_backward

    def sleepy(run, batch):
        if run.step == step and run.world.rank == run.world.size - 1:
            time.sleep(seconds)
        return forward_backward(run, batch)

    train.forward_backward = sleepy
    train.train(load_config(argv))


class Held:
    """The bytes of tensors that were added: of those that still exist, the most that ever did, and of all."""

    def __init__(self):
        self.now, self.most, self.added = 0, 0, 0

    def add(self, x: torch.Tensor):
        self.now += x.nbytes
        self.added += x.nbytes
        self.most = max(self.most, self.now)
        weakref.finalize(x.untyped_storage(), self.drop, x.nbytes)

    def drop(self, size: int):
        self.now -= size


class Reading(Held):
    """torch.load, which adds the tensors that it reads."""

    def __init__(self):
        super().__init__()
        self.load = torch.load

    def __call__(self, *args, **options):
        found = self.load(*args, **options)
        if torch.is_tensor(found):
            self.add(found)
        return found


def model_and(optimizer: str) -> tuple[GPT, torch.optim.Optimizer]:
    cfg = Config(n_layer=1, d_model=16, n_head=2, d_ff=64, vocab_size=64, block_size=8, optimizer=optimizer)
    model = GPT(cfg)
    mup.init_weights(model, cfg)
    return model, rivals.build(cfg, mup.param_groups(model, cfg), model)


def steps(model: GPT, optimizer: torch.optim.Optimizer, first: int, last: int):
    for step in range(first, last):
        x = torch.randint(64, (4, 8), generator=torch.Generator().manual_seed(step))
        model(x, x).backward()
        optimizer.step()
        optimizer.zero_grad()


def saved_while_training(folder: Path, number: int, name: str, writer: checkpoint.Several) -> tuple[bool, int, dict]:
    """Save, while three steps are taken, and load; whether six steps with this in between give the same as without.

    Also returns the bytes of all tensors, and what this rank counted: bytes copied, in the largest tensor, in its file,
    read, and the most that were read and held at once.
    """
    model, optimizer = model_and(name)
    steps(model, optimizer, 0, 3)
    trained, write, stage, copied = threading.Event(), filesystem._write_item, filesystem.FileSystemWriter.stage, []

    def write_late(*args):
        assert trained.wait(20)
        return write(*args)

    def stage_and_count(self, state):
        copied.extend(t.nbytes for t in state.values())
        return stage(self, state)

    filesystem._write_item, filesystem.FileSystemWriter.stage = write_late, stage_and_count
    writer.save(folder, number, model, optimizer, {"architecture": {}, "metrics_bytes": 0}, then=lambda: None)
    steps(model, optimizer, 3, 6)
    trained.set()
    writer.wait()
    filesystem._write_item, filesystem.FileSystemWriter.stage = write, stage
    path = checkpoint.checkpoints(folder)[-1]
    other, resumed = model_and(name)
    reading = torch.load = Reading()
    checkpoint.load(path, {}, other, resumed)
    torch.load = reading.load
    sizes = [t.nbytes for t in checkpoint.tensors_of(path).values()]
    counted = {"copied": sum(copied), "tensors": len(copied), "largest": max(sizes), "read": reading.added,
               "at once": reading.most, "file": (path / f"__{writer.rank}_0.distcp").stat().st_size}  # fmt: skip
    steps(other, resumed, 3, 6)
    return all(map(torch.equal, model.parameters(), other.parameters())), sum(sizes), counted


def refused_save(folder: Path, number: int, writer: checkpoint.Several) -> str:
    try:
        writer.save(folder, number, *model_and("adamw"), {"architecture": {}, "metrics_bytes": 0}, then=lambda: None)
        writer.wait()
    except UserError as error:
        return str(error).replace(str(folder), "")
    return "nothing"


def checkpoints(folder: str, victim: list[str]):
    """Prints what test_all_ranks_write_their_shares… expects; then rank 1 dies while the victim's second save runs."""
    rank, writer, found = dist.get_rank(), checkpoint.Several(), {"same": {}, "total": {}, "counted": {}}
    everyone = parallel.World(rank, dist.get_world_size(), torch.device("cpu")).agree
    # their states are of every kind: tensors of each parameter, numbers and truth values, the parts of two optimizers
    for number, name in enumerate(("adamw", "spam", "muon")):
        same, found["total"][name], counted = saved_while_training(Path(folder), number, name, writer)
        found["same"][name] = all(everyone([same]))
        found["counted"][name] = everyone([counted])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000 if rank else soft, hard))
    found["full disk"] = everyone([refused_save(Path(folder), 100, writer)])
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found["elsewhere"] = everyone([refused_save(Path(folder) / str(rank), 101, writer)])
    if rank == 0:
        print("RESULT " + json.dumps(found), flush=True)
    write = filesystem._write_item

    def write_half(transforms, stream, *rest):
        if rank == 1 and "ckpt_0000008" in str(stream.name) and stream.tell():
            stream.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return write(transforms, stream, *rest)

    filesystem._write_item = write_half
    train.train(load_config(victim))


SHAPES = {"a": (12, 5), "b": (12, 5), "c": (12, 5), "d": (5, 12), "few": (1, 7), "experts": (5, 6, 4), "zero": (12, 5)}


LAYOUTS = {
    "one after the other": ((13, 5), msign.Layout((("W_Q", 7), ("W_K", 3), ("W_V", 3)))),
    "by head": ((12, 5), msign.Layout((("W_Q", 2), ("W_K", 1), ("W_V", 1)), groups=3)),
    "transposed": ((5, 15), msign.Layout((("W_Q", 5), ("W_K", 5), ("W_V", 5)), transposed=True)),
}


def spread(weights: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """The weights as ranks hold them: "replicated", "sharded" over all, or "hybrid", sharded over pairs of ranks."""
    if kind == "replicated":
        return weights
    placements = [Shard(0)] if kind == "sharded" else [Replicate(), Shard(0)]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),) if kind == "sharded" else (dist.get_world_size() // 2, 2))
    return {n: distribute_tensor(W, mesh, placements) for n, W in weights.items()}


def kinds() -> list[str]:
    return ["replicated", "sharded", *(["hybrid"] if dist.get_world_size() == 4 else [])]


def fused(kind: str) -> float:
    """The largest deviation of W_Q and W_K in fused weights, updated by several ranks, from what one process gives."""
    generator = torch.Generator().manual_seed(1)
    one = {n: torch.randn(shape, generator=generator) for n, (shape, _) in LAYOUTS.items()}
    several = spread({n: W.clone() for n, W in one.items()}, kind)
    for weights, group in ((one, None), (several, dist.group.WORLD)):
        targets = {n: msign.Target(W, LAYOUTS[n][1], ("W_Q", "W_K")) for n, W in weights.items()}
        msign.apply_(targets, group=group)
    got = {n: W if kind == "replicated" else W.full_tensor() for n, W in several.items()}
    return max((got[n] - one[n]).abs().max().item() for n in one)


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(shape, generator=generator) * (n != "zero") for n, shape in SHAPES.items()}


def signs() -> dict:
    """MSign of the kinds of weights that `spread` makes, compared with MSign by one process.

    Returns for each: the largest deviation, and by rank the matrices computed, the bytes sent, as counted and as
    `budget.msign_bytes` expects, and the names of the weights that it would write into a checkpoint.
    """
    alone = weights()
    msign.apply_(msign.find(alone.items(), "*"))
    out = {}
    for kind in kinds():
        several = spread(weights(), kind)
        msign.counts.clear()
        msign.apply_(msign.find(several.items(), "*"), group=dist.group.WORLD)
        got = {n: W if kind == "replicated" else W.full_tensor() for n, W in several.items()}
        counted = [None] * dist.get_world_size()
        written = list(checkpoint.share(several, dist.get_rank(), dist.get_world_size()))
        dist.all_gather_object(counted, (msign.counts["matrices"], msign.counts["bytes"], written))
        error = max((got[n] - alone[n]).abs().max().item() for n in got)
        shapes = list(SHAPES.values())
        shards = {"replicated": 1, "sharded": dist.get_world_size(), "hybrid": 2}[kind]
        expected = budget.msign_bytes(shapes, dist.get_world_size(), shards)
        out[kind] = {
            "expected": list(map(sum, expected)),
            "error": max(error, fused(kind)),
            "matrices": [c[0] for c in counted],
            "bytes": [c[1] for c in counted],
            "written": [c[2] for c in counted],
        }
    return out


def spectra() -> dict:
    """Spectra of the kinds of weights that `spread` makes, compared with those that one process measures.

    Returns for each: whether they are the same, and by rank the matrices that it measured and the most elements that it
    had at once of matrices gathered from rows.
    """
    alone, measure, out = metrics.spectra(weights(), None, print), probes.spectra, {}
    msign.STACK_ELEMENTS = 60  # elements of one of the larger matrices
    for kind in kinds():
        several, shares = spread(weights(), kind), []
        held = {msign._local(W).untyped_storage().data_ptr() for W in several.values()}

        def noted(share, shares=shares, held=held):
            shares.append([0 if W.untyped_storage().data_ptr() in held else W.numel() for W in share.values()])
            return measure(share)

        probes.spectra = noted
        found = metrics.spectra(several, dist.group.WORLD, print)
        counted = [None] * dist.get_world_size()
        dist.all_gather_object(counted, (sum(map(len, shares)), max(map(sum, shares))))
        same = torch.allclose(torch.tensor(list(found.values())), torch.tensor(list(alone.values())), equal_nan=True)
        out[kind] = {"same": same, "matrices": [c[0] for c in counted], "at once": [c[1] for c in counted]}
    return out


def lent() -> dict:
    """What rank 0 holds of whole weights while it measures a sharded model, at most and at the end, in bytes.

    Returns it for activations, Jacobians one block at a time, and all weights at once; the bytes of a block and of the
    rest of the model; and whether the Jacobians are those of a model that was never sharded.
    """
    cfg = Config(n_layer=6, d_model=16, n_head=2, d_ff=64, vocab_size=64, block_size=8)
    world = parallel.World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    models = [parallel.build(cfg, world, sharded) for sharded in (True, False)]
    gather, held, tokens = parallel._gather, Held(), torch.arange(16).view(2, 8)

    def counted(*args):
        found = gather(*args)
        for whole in found.values():
            held.add(whole)
        return found

    parallel._gather = counted
    measured = {
        "activations": lambda model: metrics.activations(model, tokens, True, print, nullcontext()),
        "jacobians": lambda model: {"found": probes.jacobians(model.blocks, model.embed(tokens).detach(), together=1)},
        "at once": lambda model: {"loss": model(tokens, tokens).backward()},
    }
    out = {}
    for name, measure in measured.items():
        held.most = 0
        found = parallel.lend(models[0], world, measure, at_once=name == "at once")
        assert bool(found) == world.main
        if name == "jacobians" and world.main:
            alone = measure(models[1])["found"]
            out["same"] = all(
                torch.allclose(getattr(found["found"], n), getattr(alone, n)) for n in ("sigma", "product")
            )
        del found
        gc.collect()
        out[name] = held.most, held.now
    out["block"] = sum(p.nbytes for p in models[1].blocks[0].parameters())
    out["rest"] = sum(p.nbytes for p in models[1].parameters()) - cfg.n_layer * out["block"]
    return out


def gradients() -> dict[str, bool]:
    """Whether this rank holds every gradient once, at the same place after each step, with DDP, FSDP2 and HSDP.

    Six micro-batches are two steps. HSDP has no gradient before the last one, after which replicas exchange theirs.
    Asserts that the gradients are those of one process.
    """
    cfg, out = Config(n_layer=2, d_model=16, n_head=2, d_ff=32, vocab_size=64, block_size=8), {}
    rank, size, cpu = dist.get_rank(), dist.get_world_size(), torch.device("cpu")
    tokens = torch.arange(8 * size * 3).view(3, size, 1, 8) % 61  # of a micro-batch, of a rank
    alone = parallel.build(cfg, parallel.World(0, 1, cpu), sharded=False)
    sum(alone(x, x) / size for micro_batch in tokens for x in micro_batch).backward()
    for kind, per_node in (("ddp", 0), ("fsdp", 0), ("hsdp", 2)):
        world = parallel.World(rank, size, cpu, per_node)
        model = parallel.build(cfg, world, kind != "ddp")
        replica = parallel.Replica(model, world, kind != "ddp")
        parameters, places = list(model.parameters()), []
        for micro_batch in (0, 1, 2) * 2:
            with replica.accumulating(last=micro_batch == 2):
                replica(tokens[micro_batch, rank], tokens[micro_batch, rank]).backward()
            if kind == "hsdp" and micro_batch < 2:
                assert all(p.grad is None for p in parameters)
                continue
            local = [msign._local(p.grad) for p in parameters]
            places.append([grad.data_ptr() for grad in local])
            if micro_batch == 2:
                for p, expected in zip(parameters, alone.parameters(), strict=True):
                    got = p.grad if kind == "ddp" else p.grad.full_tensor()
                    torch.testing.assert_close(got, expected.grad, rtol=1e-4, atol=1e-7)
                replica.zero_grad()
        if kind == "ddp":
            buckets = {grad.untyped_storage().data_ptr() for grad in local}  # each holds several
            out[kind] = all(now == places[0] for now in places) and len(buckets) < len(parameters)
        else:  # as large as the shards
            out[kind] = [grad.numel() for grad in local] == [p.to_local().numel() for p in parameters]
    return out


def compiled() -> dict:
    """Loss and gradient norm of a model with recomputation, sharded by FSDP2 and by HSDP, each eager and compiled by
    block, and graph breaks."""
    compile_module = torch.nn.Module.compile
    # the graphs are traced and differentiated as ever; what the C++ compiler makes of them is tested on one process
    torch.nn.Module.compile = lambda self, **options: compile_module(self, **options, backend="aot_eager")
    tokens, found = torch.arange(dist.get_rank(), 16 + dist.get_rank())[None], {"fsdp": {}, "hsdp": {}}
    for way, how in itertools.product(found, ("off", "blocks")):
        world = parallel.World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), 2 * (way == "hsdp"))
        cfg = Config(n_layer=2, d_model=16, n_head=2, d_ff=32, vocab_size=64, block_size=16, micro_batch=1,
                     recompute=1, compile=how)  # fmt: skip
        model = parallel.build(cfg, world, sharded=True)
        replica = parallel.Replica(model, world, sharded=True)
        loss_of, *_ = machine.compiled(cfg, model, world.device, nullcontext(), replica)
        with replica.accumulating(last=True):
            loss = loss_of(tokens, tokens)
            loss.backward()
        found[way][how] = [loss.item(), parallel.clip_(list(model.parameters()), 1.0).item()]
    return found | {"breaks": sum(torch._dynamo.utils.counters["graph_break"].values())}


def refusals() -> dict:
    """Each rank's error message for a weight that is not finite on one rank, and for shardings that MSign refuses."""
    line, grid = (init_device_mesh("cpu", shape) for shape in ((dist.get_world_size(),), (1, dist.get_world_size())))
    out = {}
    for kind, mesh, placements in (
        ("nan", line, [Shard(0)]), ("columns", line, [Shard(1)]), ("replicated", line, [Replicate()]),
        ("twice", grid, [Shard(0), Shard(0)]), ("meshes", grid, [Replicate(), Shard(0)]),
    ):  # fmt: skip
        W = weights()
        if kind == "nan":
            W["b"][-1, 0] = float("nan")  # in the last rank's rows
        several = {n: distribute_tensor(x, mesh, placements) for n, x in W.items()}
        if kind == "meshes":
            several["b"] = distribute_tensor(W["b"], line, [Shard(0)])
        before = several["a"].to_local().clone()
        try:
            if kind == "nan":
                msign.apply_(msign.find(several.items(), "*"))
            else:
                msign.MSign(torch.optim.AdamW(several.values()), several.items(), targets="*")
            said = "nothing"
        except ValueError as error:
            said = f"{type(error).__name__}: {error}"
        assert torch.equal(several["a"].to_local(), before)
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, said)
        out[kind] = everyone
    return out


def main() -> int:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    result = globals()[sys.argv[1]](*map(json.loads, sys.argv[2:]))
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(result))
    parallel.finish()
    return 0


if __name__ == "__main__":
    run_cli(main, "several.py", parallel.leave)
