"""Checkpoints: written whole or not at all, checked when read, and loaded without executing pickled code.

The file `ckpt_0000500.pt` in the run folder is the state after step 500. A sharded model, of which every process (rank)
holds a part of each parameter, has a folder `ckpt_0000500` instead. Every rank writes its part into this folder while
training goes on (torch.distributed.checkpoint). A checkpoint is written under another name and renamed when it is
complete, so a kill or a full disk at any moment leaves the previous one whole. Both kinds can be loaded by any number
of processes, sharded or not.
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
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from config import UserError
from engine.parallel import part_of

ABOUT = "checkpoint.json"  # in a sharded checkpoint's folder: step, architecture, files and their sha256


def step_of(path: Path) -> int:
    """The step after which the checkpoint at `path` was written."""
    return int(path.stem.split("_")[1])


def checkpoints(folder: Path) -> list[Path]:
    """The folder's checkpoints, oldest step first."""
    return sorted([*folder.glob("ckpt_*.pt"), *(p.parent for p in folder.glob(f"ckpt_*[0-9]/{ABOUT}"))], key=step_of)


def save(folder: Path, step: int, state: dict) -> Path:
    """Write the checkpoint of `step` with the entries of `state`. Returns its path.

    Raises UserError if it cannot be written.
    """
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
    """Delete all checkpoints but those of the steps in `keep`, and the remains of writes that were killed."""
    for path in checkpoints(folder):
        if step_of(path) not in keep:
            remove(path)
    for path in folder.glob("ckpt_*.partial"):
        remove(path)


def remove(path: Path):
    """Delete a checkpoint, file or folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def load(path: Path, architecture: dict, model: torch.nn.Module, optimizer: Optimizer) -> dict:
    """Load weights and moments into model and optimizer; returns the other entries (step, metrics_bytes …).

    Raises UserError if the checkpoint is damaged or of another architecture; model and optimizer are then unchanged.
    """
    about = _open(path, architecture)
    if path.is_dir():
        _load_folder(path, model, optimizer, about)
    else:
        state = about.pop("optimizer")
        _fill(model, about.pop("model"))
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if any(isinstance(p, DTensor) for p in parameters):
            # state_dict numbers parameters in the order of the groups; before the first step it has moments of none
            for p, moments in zip(parameters, state["state"].values(), strict=False):
                moments |= {key: part_of(value, p) for key, value in moments.items() if value.ndim}
        optimizer.load_state_dict(state)
    return about


def load_weights(path: Path, architecture: dict, model: torch.nn.Module):
    """Put the checkpoint's weights into model. Raises UserError as `load` does."""
    about = _open(path, architecture)
    if path.is_dir():
        weights = {f"weight.{name}": p.detach() for name, p in model.named_parameters()}
        dcp.load(weights, storage_reader=_Reader(path), no_dist=not dist.is_initialized())
    else:
        _fill(model, about["model"])


def _open(path: Path, architecture: dict) -> dict:
    """The content of a checkpoint file, or of a checkpoint folder's ABOUT. Raises UserError as `load` does."""
    try:
        about = _open_folder(path) if path.is_dir() else _open_file(path)
        saved = about["architecture"]
        about["step"], about["metrics_bytes"]  # raises KeyError where one is missing
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
        p.copy_(part_of(weights[name], p))


def _open_file(path: Path) -> dict:
    """The content of a checkpoint file. Raises ValueError, KeyError or PyTorch's errors if it is damaged."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()  # torch.load does not verify the checksums
    if damaged:
        raise ValueError(f"checksum of {damaged} is wrong")
    state = torch.load(path, map_location="cpu", weights_only=True)
    state["model"], state["optimizer"]  # raises KeyError where one is missing
    return state


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal. (hashlib.file_digest needs Python 3.11.)"""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(2**24):
            digest.update(block)
    return digest.hexdigest()


def _open_folder(path: Path) -> dict:
    """The ABOUT of a sharded checkpoint whose files have the recorded checksums. Raises ValueError otherwise."""
    about = json.loads((path / ABOUT).read_text())
    for name, sha256 in about["files"].items():
        if Path(name).name != name or sha256_of(path / name) != sha256:
            raise ValueError(f"checksum of {name} is wrong")
    _Reader(path).read_metadata()
    return about


class _Unpickler(pickle.Unpickler):
    """Unpickles the .metadata of a checkpoint folder. It refuses every type and value that is not named below."""

    TYPES_FROM = ("torch.distributed.checkpoint.", "torch.serialization", "pathlib")  # any class of these modules
    EXACTLY = (
        "collections.OrderedDict", "torch.serialization._get_layout", "torch.Size", "torch.device", "torch.strided",
        "torch.contiguous_format", "torch.float16", "torch.bfloat16", "torch.float32", "torch.float64", "torch.int64",
    )  # fmt: skip

    def find_class(self, module: str, name: str):
        exactly = f"{module}.{name}" in self.EXACTLY
        if exactly or module.startswith(self.TYPES_FROM):
            found = super().find_class(module, name)
            if exactly or isinstance(found, type):
                return found
        raise pickle.UnpicklingError(f".metadata names {module}.{name}, which does not belong there")


class _Reader(dcp.FileSystemReader):
    """PyTorch's reader of a sharded checkpoint's folder, with `_Unpickler` in place of pickle.load."""

    def read_metadata(self):
        metadata = _Unpickler(io.BytesIO((Path(self.path) / ".metadata").read_bytes())).load()
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _tensors(model: torch.nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Weights and moments by name. They are tensors only, so nothing in the folder but .metadata is a pickle."""
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


class Whole:
    """Writes checkpoints of a model that every process holds whole. The main process writes; the others do nothing."""

    def __init__(self, main: bool):
        self.main = main

    def save(self, folder: Path, step: int, model, optimizer, about: dict, then):
        """Write the checkpoint of `step` and call `then`. Raises UserError if it cannot be written."""
        if self.main:
            save(folder, step, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **about})
            then()

    def wait(self):
        """Return at once, because `save` returns only when the checkpoint is written."""


class Sharded:
    """Writes sharded checkpoints while training goes on, one at a time.

    All ranks call `save`. When all have written, rank 0 adds checksums and gives the folder its final name. `wait`
    returns after that on rank 0, but perhaps before it on the others. This does no harm: the next `save`, a resumption
    and the end of the process wait for rank 0 before anything else. A failure is raised as UserError by `wait` or by
    the next `save`.
    """

    def __init__(self):
        self.group = dist.new_group(backend="gloo")  # not the default group, which training uses meanwhile
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future | None = None

    def save(self, folder: Path, step: int, model, optimizer, about: dict, then):
        """Begin to write the checkpoint of `step`; `then` is called on rank 0 when it is complete."""
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
                about["files"] = {p.name: sha256_of(p) for p in sorted(partial.iterdir())}
                (partial / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
                partial.rename(path)
                then()
        except Exception as error:
            raise UserError(
                f"{path}: cannot be written ({str(error).splitlines()[0]}); free some space and use --resume"
            ) from error

    def wait(self):
        """Wait for this rank's part of the checkpoint that is being written, if any; on rank 0, for all of it.

        Raises UserError if it could not be written.
        """
        if self.pending:
            pending, self.pending = self.pending, None
            pending.result()
