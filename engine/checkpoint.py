"""Checkpoints: written whole or not at all, checked when read, pickle-free.

`ckpt_0000500.pt` in the run folder is the state after step 500; of a sharded model it is the folder `ckpt_0000500`, which every
rank writes its part of (torch.distributed.checkpoint) while training goes on. A new one is written beside the old ones
and renamed into place, so a kill or a full disk at any moment leaves the previous one whole. Either kind can be loaded
by any number of processes, sharded or not.
"""

import hashlib
import io
import json
import os
import pickle
import shutil
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from config import UserError

ABOUT = "checkpoint.json"  # in the folder of a sharded checkpoint


def step_of(path: Path) -> int:
    return int(path.stem.split("_")[1])


def checkpoints(folder: Path) -> list[Path]:
    """The folder's checkpoints, oldest step first."""
    return sorted([*folder.glob("ckpt_*.pt"), *(p.parent for p in folder.glob(f"ckpt_*[0-9]/{ABOUT}"))], key=step_of)


def save(folder: Path, step: int, state: dict) -> Path:
    """Write `state` as the checkpoint of `step`. Raises UserError if the disk refuses; older ones survive."""
    path = folder / f"ckpt_{step:07d}.pt"
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as f:
            torch.save({"step": step, **state}, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # PyTorch's zip writer turns some write errors into RuntimeError
        partial.unlink(missing_ok=True)
        kept = [p.name for p in checkpoints(folder)]
        raise UserError(
            f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}); free some space and go on "
            f"with --resume from {kept[-1] if kept else 'the start'}"
        ) from error
    return path


def prune(folder: Path, keep: set[int]):
    """Delete every checkpoint but those of the steps in `keep`, and what a killed write left."""
    for path in checkpoints(folder):
        if step_of(path) not in keep:
            remove(path)
    for path in folder.glob("ckpt_*.partial"):
        remove(path)


def remove(path: Path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def load(path: Path, architecture: dict, model: torch.nn.Module, optimizer: Optimizer) -> dict:
    """Put the state in `path` into model and optimizer; what else it holds: step, metrics_bytes. Raises UserError, before
    anything has changed, if it is damaged or of another architecture."""
    about = _open(path, architecture)
    if path.is_dir():
        _load_folder(path, model, optimizer, about)
    else:
        state = about.pop("optimizer")
        _fill(model, about.pop("model"))
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if any(isinstance(p, DTensor) for p in parameters):
            for p, moments in zip(parameters, state["state"].values(), strict=False):
                moments |= {k: _as(v, p) for k, v in moments.items() if v.ndim}
        optimizer.load_state_dict(state)
    return about


def load_weights(path: Path, architecture: dict, model: torch.nn.Module):
    """Put the weights in `path` into model. Raises UserError as `load` does."""
    about = _open(path, architecture)
    if path.is_dir():
        weights = {f"weight.{name}": p.detach() for name, p in model.named_parameters()}
        dcp.load(weights, storage_reader=_Reader(path), no_dist=not dist.is_initialized())
    else:
        _fill(model, about["model"])


def _open(path: Path, architecture: dict) -> dict:
    try:
        about = _open_folder(path) if path.is_dir() else _open_file(path)
        saved = about["architecture"]
        about["step"], about["metrics_bytes"]
    except Exception as error:
        what = f"missing entry {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise UserError(f"{path}: not a whole checkpoint ({what}); delete it to go on from an earlier one") from error
    differs = [f"{k} = {saved.get(k)} there, {v} here" for k, v in architecture.items() if saved.get(k) != v]
    if differs:
        raise UserError(f"{path}: checkpoint of another architecture ({'; '.join(differs)})")
    return about


@torch.no_grad()
def _fill(model: torch.nn.Module, weights: dict[str, Tensor]):
    for name, p in model.named_parameters():
        p.copy_(_as(weights[name], p))


def _as(value: Tensor, p: Tensor) -> Tensor:
    """A whole parameter's values as p holds them: itself, or this rank's shard."""
    if isinstance(p, DTensor):
        return distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
    return value


def _open_file(path: Path) -> dict:
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()  # torch.load does not look at the checksums
    if damaged:
        raise ValueError(f"checksum of {damaged} is wrong")
    state = torch.load(path, map_location="cpu", weights_only=True)
    state["model"], state["optimizer"]
    return state


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _slow_sha256(f)


def _slow_sha256(f) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := f.read(2**24):
        digest.update(block)
    return digest.hexdigest()


def _open_folder(path: Path) -> dict:
    about = json.loads((path / ABOUT).read_text())
    for name, sha256 in about["files"].items():
        if Path(name).name != name or _sha256(path / name) != sha256:
            raise ValueError(f"checksum of {name} is wrong")
    _Reader(path).read_metadata()
    return about


class _Unpickler(pickle.Unpickler):
    """Of PyTorch's .metadata: nothing but the records it consists of."""

    KNOWN = ("torch.distributed.checkpoint.", "torch.serialization", "pathlib")

    def find_class(self, module: str, name: str):
        torchs = {
            "Size",
            "float32",
            "float64",
            "bfloat16",
            "float16",
            "int64",
            "strided",
            "contiguous_format",
            "device",
        }
        known = module.startswith(self.KNOWN) or (module == "torch" and name in torchs)
        if known or (module, name) in {("torch.serialization", "_get_layout"), ("collections", "OrderedDict")}:
            found = super().find_class(module, name)
            if isinstance(found, type) or (module, name) == ("torch.serialization", "_get_layout") or module == "torch":
                return found
        raise pickle.UnpicklingError(f".metadata names {module}.{name}, which does not belong there")


class _Reader(dcp.FileSystemReader):
    """PyTorch's, without its one pickle.load."""

    def read_metadata(self):
        metadata = _Unpickler(io.BytesIO((Path(self.path) / ".metadata").read_bytes())).load()
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _tensors(model: torch.nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Weights and moments by name: tensors only, so that reading them back needs no pickle."""
    state = {}
    for name, p in model.named_parameters():
        state[f"weight.{name}"] = p.detach()
        state |= {f"{key}.{name}": value for key, value in optimizer.state.get(p, {}).items()}
    return state


def _load_folder(path: Path, model: torch.nn.Module, optimizer: Optimizer, about: dict):
    if about["adam"]:
        for group in optimizer.param_groups:
            for p in group["params"]:
                step = torch.zeros((), device=p.device if group.get("fused") else "cpu")
                optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    dcp.load(_tensors(model, optimizer), storage_reader=_Reader(path), no_dist=not dist.is_initialized())
    if "msign_steps" in about:
        optimizer.steps = about["msign_steps"]


class Sharded:
    """Writes sharded checkpoints while training goes on; one at a time.

    Every rank calls `save`; the folder gets its name when all have written. `wait` returns when it has; a failure is
    raised there, or at the next `save`, as UserError.
    """

    def __init__(self):
        self.group = dist.new_group(backend="gloo")  # of its own: training goes on on the other
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future | None = None

    def save(self, folder: Path, step: int, model, optimizer, about: dict, then):
        """`then` is called on rank 0 when the checkpoint is complete."""
        self.wait()
        path = folder / f"ckpt_{step:07d}"
        partial = path.with_suffix(".partial")
        if dist.get_rank() == 0 and partial.exists():
            shutil.rmtree(partial)
        dist.barrier(self.group)
        state = _tensors(model, optimizer)
        about = {"step": step, "adam": any(k.startswith("exp_avg.") for k in state), **about}
        if hasattr(optimizer, "steps"):
            about["msign_steps"] = optimizer.steps
        writing = dcp.async_save(state, storage_writer=dcp.FileSystemWriter(partial), process_group=self.group)
        self.pending = self.thread.submit(self._finish, writing, partial, path, about, then)

    def _finish(self, writing: Future, partial: Path, path: Path, about: dict, then):
        try:
            writing.result()
            if dist.get_rank() == 0:
                about["files"] = {p.name: _sha256(p) for p in sorted(partial.iterdir())}
                (partial / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
                partial.rename(path)
                then()
        except Exception as error:
            raise UserError(
                f"{path}: cannot be written ({str(error).splitlines()[0]}); free some space and use --resume"
            ) from error

    def wait(self):
        if self.pending:
            pending, self.pending = self.pending, None
            pending.result()
