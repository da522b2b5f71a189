"""One process or many: the process group, the model's spread over it, and what is collected from all processes.

torchrun tells every process its rank. DDP keeps the whole model on each; FSDP2 shards weights, gradients and moments by
rows. HSDP is FSDP2 within every node: the processes of a node hold one copy of the model, a *replica*. Up to rounding,
the logged values do not depend on the number of processes.
"""

import atexit
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import mup
from config import Config, UserError
from engine import budget, hang, machine
from model import GPT, Block


@dataclass(frozen=True)
class World:
    """This process among the processes of the run: its rank, how many there are, and its device.

    per_node: with HSDP, the processes of a node, over which the model is sharded; otherwise 0.
    """

    rank: int
    size: int
    device: torch.device
    per_node: int = 0

    @property
    def shards(self) -> int:
        """Over how many processes a model is spread if it is sharded."""
        return self.per_node or self.size

    @property
    def main(self) -> bool:
        """Whether this process writes the record."""
        return self.rank == 0

    @property
    def group(self):
        return dist.group.WORLD if self.size > 1 else None

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all ranks, on every rank; with several ranks `values` is overwritten."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def share(self, rows: Tensor) -> Tensor:
        """This rank's rows on its device, perhaps still being copied: every rank gets equally many of `rows`."""
        mine = rows.chunk(self.size)[self.rank].contiguous()  # with gaps, they would pass through unpinned memory
        return mine.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else mine

    def on_main(self, do: Callable, otherwise):
        """What do() returns on rank 0, `otherwise` elsewhere. A UserError of rank 0 is raised on all ranks."""
        result, error = otherwise, None
        if self.main:
            try:
                result = do()
            except UserError as caught:
                error = str(caught)
        if error := self.tell(error):
            raise UserError(error)
        return result

    def tell(self, what):
        """Rank 0's `what`, on every rank."""
        if self.size == 1:
            return what
        box = [what]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def agree(self, rows: list[str]) -> list[str]:
        """The `rows` of all ranks in one list, by rank; every rank gets it."""
        if self.size == 1:
            return rows
        all_rows = [None] * self.size
        dist.all_gather_object(all_rows, rows)
        return [row for rows in all_rows for row in rows]


def start(cfg: Config, footprint: Callable = lambda *_: ()) -> World:
    """Join the processes that torchrun started, or be the only one.

    footprint: see `machine.require`. Raises UserError before anything can wait for another rank.
    """
    given = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    try:
        rank, size, local, per_node = (int(os.environ.get(name, default)) for name, default in given.items())
    except ValueError as error:
        raise UserError(f"{', '.join(given)}: must be whole numbers, as torchrun sets them ({error})") from error
    if cfg.batch_size % (cfg.micro_batch * size):
        raise UserError(
            f"micro_batch = {cfg.micro_batch}: times WORLD_SIZE={size} must divide batch_size={cfg.batch_size}"
        )
    device = machine.pick_device(cfg.device)
    if size > 1 and device.type == "mps":
        raise UserError(f"device = {cfg.device!r}: must be cpu or cuda with WORLD_SIZE={size}")
    if size > 1 and device.type == "cuda":
        if cfg.device not in ("auto", "cuda"):
            raise UserError(f"device = {cfg.device!r}: must be auto, cuda or cpu with WORLD_SIZE={size}")
        if local >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK = {local}: there are {torch.cuda.device_count()} GPUs; start as many processes"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if cfg.parallel in ("fsdp", "hsdp") and cfg.compile == "whole":
        raise UserError(f"compile = 'whole': must be blocks or off with parallel = {cfg.parallel!r}")
    whole_nodes = 1 < per_node < size and size % per_node == 0 and rank % per_node == local
    if cfg.parallel == "hsdp" and size > 1 and not whole_nodes:
        raise UserError(
            "parallel = 'hsdp': must be ddp or fsdp unless several nodes have equally many processes, two or more, of "
            f"consecutive ranks; here RANK={rank} of WORLD_SIZE={size} is LOCAL_RANK={local} of "
            f"LOCAL_WORLD_SIZE={per_node} on its node"
        )
    machine.require(cfg, device, size, per_node, footprint)
    if size > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        hang.record_collectives(cfg)
        patience = timedelta(seconds=cfg.start_patience)
        dist.init_process_group(backend, timeout=patience, device_id=device if device.type == "cuda" else None)
    world = World(rank, size, device)
    if world.agree([] if whole_nodes else [f"rank {rank} has no place on a node like the others"]):
        return world
    on_nodes = replace(world, per_node=per_node)
    return on_nodes if choose(cfg, on_nodes)[0] == "hsdp" else world


def finish():
    """Leave the process group, all ranks together: gloo may abort on a connection that another rank has closed."""
    if dist.is_initialized():
        try:
            dist.barrier()
        except RuntimeError as error:
            raise hang.lost(error) or error from error
        dist.destroy_process_group()


def leave(code: int):
    """End this process with an exit code. One of several processes ends without Python's finalisation.

    gloo's worker threads outlive `destroy_process_group`: DTensor's caches keep the device mesh, and the mesh keeps the
    group. A worker that lets go of a tensor needs the interpreter's lock. If Python is already being finalised, the
    thread is ended instead, and C++ aborts the process: "terminate called without an active exception". A rank that
    fails cannot wait for the others either, since they may be blocked in NCCL; torchrun stops them once it has gone.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def choose(cfg: Config, world: World, total_memory: int | None = None) -> tuple[str, list[str]]:
    """ "ddp", "fsdp" or "hsdp" for cfg.parallel, and lines to announce. total_memory: a GPU's, in bytes; None = ask it.

    With "auto" a world without per_node is not sharded by HSDP (see `budget.shards`). Raises UserError if the model has
    to be sharded and its optimizer cannot be.
    """
    if world.size == 1:
        asked = cfg.parallel in ("fsdp", "hsdp")
        return "ddp", [f"PARALLEL: {cfg.parallel!r} with one process: nothing is sharded"] if asked else []
    if cfg.parallel != "auto":
        return cfg.parallel, []
    if world.device.type == "cuda":
        total_memory = total_memory or machine.memory_of(world.device)
    shards = budget.shards(cfg, world.size, total_memory, world.per_node or 1)
    if shards > 1 and cfg.optimizer != "adamw":
        need = budget.Memory.of(cfg, 1).total
        raise UserError(
            f"optimizer = {cfg.optimizer!r}: must be adamw for a model that has to be sharded ({need / 1e9:.3g} GB)"
        )
    return {1: "ddp", world.per_node: "hsdp"}.get(shards, "fsdp"), []


def build(cfg: Config, world: World, sharded: bool) -> GPT:
    """The model on its device, with the same weights however many processes there are."""
    with torch.device("meta"):
        model = GPT(cfg)
    if sharded:
        shape, names = (world.size // world.shards, world.shards), ("replicate", "shard")
        first = 0 if world.per_node else 1  # FSDP2 makes HSDP of a mesh with two dimensions
        mesh = init_device_mesh(world.device.type, shape[first:], mesh_dim_names=names[first:])
        # the embedding and the head stay fp32, as under autocast; blocks leave the residual stream in fp32
        half = torch.bfloat16 if cfg.dtype == "bfloat16" else None
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh)
    model.to_empty(device=world.device)
    mup.init_weights(model, cfg, fill)
    return model


def finite(p: Tensor) -> bool:
    """Whether all values of p are finite: all of p's, or those of this rank's shard."""
    return bool(torch.isfinite(p.to_local() if isinstance(p, DTensor) else p).all())


def not_finite(model: nn.Module, optimizer: Optimizer, world: World) -> str | None:
    """Names the first parameter, or moment of one, that is not finite on some rank; None if all are finite."""
    found = []
    for name, p in model.named_parameters():
        moments = filter(torch.is_tensor, optimizer.state.get(p, {}).values())
        if not finite(p):
            found.append(name)
        if not all(map(finite, moments)):
            found.append(f"a moment of {name}")
    return next(iter(world.agree(found)), None)


def part_of(value: Tensor, p: Tensor) -> Tensor:
    """A whole parameter's values as p holds them: all of them, or this rank's shard as a DTensor."""
    if isinstance(p, DTensor):
        return distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
    return value


@torch.no_grad()
def fill(p: Tensor, value: Tensor):
    """Copy a whole parameter's values into p, or, where p is sharded, this rank's part of them."""
    p.copy_(part_of(value, p))


class Replica:
    """The loss function that a training step calls with a micro-batch; it averages gradients over the ranks.

    No rank holds a gradient twice: DDP's lie in its buckets, the buffers that ranks exchange, from the first step on,
    and FSDP2's are sharded after every micro-batch.
    """

    def __init__(self, model: GPT, world: World, sharded: bool):
        self.model, self.sharded, self.hybrid = model, sharded, sharded and world.per_node > 0
        self.run: Callable = model
        if world.size > 1 and not sharded:
            ids = [world.device.index] if world.device.type == "cuda" else None
            self.run = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
            token = torch.zeros(1, 1, dtype=torch.long, device=world.device)
            for _ in range(2):  # the first pass makes the buckets, the second one orders them by their use
                self.run(token, token).backward()
            self.zero_grad()

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return self.run(x, y)

    def accumulating(self, last: bool):
        """A context for a micro-batch's forward and backward pass. DDP averages gradients only after the `last`.

        FSDP2 averages them after every micro-batch, because until then each rank holds them whole. HSDP does so within
        a node, and averages the shards over the nodes after the last.
        """
        if self.hybrid:
            self.model.set_requires_all_reduce(last)
        return nullcontext() if last or self.run is self.model else self.run.no_sync()

    def zero_grad(self):
        """Forget the gradients. Under DDP they become zero and keep their memory, which is the buckets'."""
        self.model.zero_grad(set_to_none=self.run is self.model)

    def reshard(self):
        """Shard FSDP2's outermost parameters again, which a forward pass without a backward pass leaves whole."""
        if self.sharded:
            self.model.reshard()


def lend(model: GPT, world: World, measure: Callable[[GPT], dict], at_once: bool = False) -> dict:
    """What measure(model) returns on rank 0, {} on the others. All ranks call this together.

    A sharded model comes as a copy with whole weights. Each block is gathered when `measure` takes it from its `blocks`
    and freed when `measure` drops it; if `at_once`, all are gathered first. Another rank holds one whole weight at a
    time, and waits no longer than from one block to the next.
    """
    if not any(isinstance(p, DTensor) for p in model.parameters()):
        return measure(model) if world.main else {}
    if not world.main:
        while (index := world.tell(None)) is not None:
            _gather(model, world, index)
        return {}
    try:
        with torch.device("meta"):
            copy = GPT(model.cfg)
        del copy.blocks
        copy.load_state_dict(_gather(model, world, world.tell(OUTSIDE)), assign=True)
        copy.requires_grad_(at_once)  # autocast would keep the bf16 copies of weights that require gradients
        lent = Lent(model, world, range(len(model.blocks)))
        copy.blocks = nn.ModuleList(lent).requires_grad_() if at_once else lent
        return measure(copy)
    finally:
        world.tell(None)


OUTSIDE = -1  # stands for the weights outside blocks


@torch.no_grad()
def _gather(model: GPT, world: World, index: int) -> dict[str, Tensor]:
    """The whole weights of a block, or of what is OUTSIDE, by name, on rank 0; all ranks call this together."""
    module = model if index == OUTSIDE else model.blocks[index]
    found = {}
    for name, p in module.named_parameters():
        if index != OUTSIDE or not name.startswith("blocks."):
            whole = p.full_tensor()
            found |= {name: whole} if world.main else {}
    return found


class Lent(Sequence):
    """Blocks of a sharded model on rank 0, for `lend`: what is taken is a new block, with whole weights."""

    def __init__(self, model: GPT, world: World, indices: range):
        self.model, self.world, self.indices = model, world, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return Lent(self.model, self.world, self.indices[i])
        index = self.world.tell(self.indices[i])
        with torch.device("meta"):
            block = Block(self.model.cfg, index)
        block.load_state_dict(_gather(self.model, self.world, index), assign=True)
        return block.requires_grad_(False).eval()


def norms(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """{name: ‖tensor‖_F}; of a sharded tensor, the norm of the whole. Reads `tensors` one at a time, to save memory."""
    own, group = {}, None
    for name, x in tensors:
        group = x.device_mesh.get_group("shard") if isinstance(x, DTensor) else group
        own[name] = (x.to_local() if isinstance(x, DTensor) else x).norm()
    if group:
        squares = torch.stack(list(own.values())).square()
        dist.all_reduce(squares, group=group)
        own = dict(zip(own, squares.sqrt().unbind(), strict=True))
    return own


def clip_(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Clip the gradients' global norm to `limit`. Returns the norm before, the same on all ranks."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
