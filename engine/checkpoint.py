"""Checkpoints: written whole or not at all, checked when read, and loaded without executing pickled code.

One process writes the file `ckpt_0000500.pt` into the run folder: the state after step 500. Several processes (ranks)
write the folder `ckpt_0000500` together. Every rank copies its share to host memory at once and writes this copy while
training goes on (torch.distributed.checkpoint). The share of a rank is its part of every sharded tensor, and some of
the tensors that all ranks hold; with HSDP, which has copies of every part, it is its part of some sharded tensors. Both
kinds can be loaded by any number of processes, sharded or not, one tensor at a time. A checkpoint is written under
another name and renamed when it is complete, so a kill or a full disk at any moment leaves the previous one whole.
"""

import hashlib
import io
import json
import os
import pickle
import shutil
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from config import FIELDS, UserError
from engine.parallel import fill

ABOUT = "checkpoint.json"  # in a checkpoint's folder: step, architecture, files and their sha256
OPTIMIZER = "optimizer.pt"  # in the same folder: the optimizer's state_dict, with its tensors as shapes only


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
        remove(partial)  # of a save that was killed, perhaps of several processes
        with open(partial, "wb") as f:
            torch.save({"step": step, **state}, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # PyTorch's zip writer turns some write errors into RuntimeError
        remove(partial)
        kept = [p.name for p in checkpoints(folder)]
        raise UserError(
            f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}); free some space and go on "
            f"with --resume from {kept[-1] if kept else 'the start'}"
        ) from error
    return path


def prune(folder: Path, keep: set[int]):
    """Delete all checkpoints but those of the steps in `keep`, and the remains of writes that were killed."""
    for path in folder.glob("ckpt_*.partial"):
        remove(path)
    for path in checkpoints(folder):
        if step_of(path) not in keep:
            remove(path.rename(path.with_suffix(".partial")))  # a kill must not leave a part of it under its name


def remove(path: Path):
    """Delete a checkpoint, file or folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def load(path: Path, architecture: dict, model: torch.nn.Module, optimizer: Optimizer) -> dict:
    """Load weights and moments into model and optimizer; returns the other entries (step, metrics_bytes …).

    All ranks call this. Raises UserError if the checkpoint is damaged or of another architecture; model and optimizer
    are then unchanged.
    """
    content = _open(path, architecture)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    targets = _weights(model)

    def target(key: str, value: Tensor) -> Tensor:
        if isinstance(parameters[0], DTensor) and value.ndim:
            targets[key] = torch.empty_like(parameters[int(key.split(".")[2])])  # optimizer.state.<number>.<moment>
        else:  # load_state_dict takes step counts, which have no dimension, to their device
            targets[key] = torch.empty_like(value, device=parameters[0].device if value.ndim else "cpu")
        return targets[key]

    state = each_tensor(content["optimizer"], target, "optimizer")
    _read(path, content, targets)
    optimizer.load_state_dict(state)
    return {key: value for key, value in content.items() if key not in ("model", "optimizer")}


def load_weights(path: Path, architecture: dict, model: torch.nn.Module):
    """Put the checkpoint's weights into model. Raises UserError as `load` does."""
    _read(path, _open(path, architecture), _weights(model))


def each_tensor(value, do: Callable[[str, Tensor], object], key: str):
    """`value`, a nest of dicts, lists and tuples, with do(key, tensor) in place of every tensor.

    key: the name of `value`. That of a tensor inside is `key` and the keys and indices that lead to it, with dots.
    """
    if torch.is_tensor(value):
        return do(key, value)
    if isinstance(value, dict):
        return {k: each_tensor(inner, do, f"{key}.{k}") for k, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(each_tensor(inner, do, f"{key}.{i}") for i, inner in enumerate(value))
    return value


def tensors_of(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, in memory, by their names. It is not checked for damage."""
    if not path.is_dir():
        return _by_name(torch.load(path, map_location="cpu", weights_only=True))
    named = _Reader(path).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(about.size, dtype=about.properties.dtype) for name, about in named.items()}
    _read(path, {}, tensors)
    return tensors


def _by_name(content: dict) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for part in ("model", "optimizer"):
        each_tensor(content[part], found.setdefault, part)
    return found


def _weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {f"model.{name}": p.detach() for name, p in model.named_parameters()}


def _read(path: Path, content: dict, targets: dict[str, Tensor]):
    """Copy the tensors that `targets` names from the checkpoint into them, one after another."""
    if path.is_dir():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it is in one process
            dcp.load(targets, storage_reader=_Reader(path), no_dist=not dist.is_initialized())
    else:
        saved = _by_name(content)
        for name, target in targets.items():
            fill(target, saved[name])


def _open(path: Path, architecture: dict) -> dict:
    """The content of a checkpoint: its numbers, and its tensors as shapes (folder) or on the disk (file).

    Raises UserError as `load` does.
    """
    try:
        content = _open_folder(path) if path.is_dir() else _open_file(path)
        saved = content["architecture"]
        content["step"], content["metrics_bytes"], content["optimizer"]  # raises KeyError where one is missing
    except UserError:
        raise
    except Exception as error:
        what = f"missing entry {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise UserError(f"{path}: not a whole checkpoint ({what}); delete it to go on from an earlier one") from error
    there = {k: saved.get(k, FIELDS[k].default) for k in architecture}  # fields that it does not know are not in use
    differs = [f"{k} = {there[k]} there, {v} here" for k, v in architecture.items() if there[k] != v]
    if differs:
        raise UserError(f"{path}: checkpoint of another architecture ({'; '.join(differs)})")
    return content


def _open_file(path: Path) -> dict:
    """The content of a checkpoint file. Raises ValueError, KeyError or PyTorch's errors if it is damaged."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()  # torch.load does not verify the checksums
    if damaged:
        raise ValueError(f"checksum of {damaged} is wrong")
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # the tensors stay on the disk
    content["model"]  # raises KeyError where it is missing
    return content


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal. (hashlib.file_digest needs Python 3.11.)"""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(2**24):
            digest.update(block)
    return digest.hexdigest()


def _open_folder(path: Path) -> dict:
    """The ABOUT of a checkpoint's folder, and "optimizer". Raises ValueError if a file is damaged or missing.

    Each rank reads its share of the files; all learn what was found.
    """
    content = json.loads((path / ABOUT).read_text())
    if "adam" in content:
        raise UserError(
            f"{path}: has the form that sharded checkpoints had until 2026-11-24; only the code that wrote it can read "
            "it (record.json names the revision)"
        )
    files, several = sorted(content["files"]), dist.is_initialized()
    rank, size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    damaged = [name for name in files[rank::size] if not _whole(path, name, content["files"][name])]
    if several:
        found: list = [None] * size
        dist.all_gather_object(found, damaged)
        damaged = sorted(name for names in found for name in names)
    if damaged:
        raise ValueError(f"checksum of {damaged[0]} is wrong")
    _Reader(path).read_metadata()
    return content | {"optimizer": torch.load(path / OPTIMIZER, weights_only=True)}


def _whole(path: Path, name: str, sha256: str) -> bool:
    """Whether the folder `path` has a file of this name and of this checksum."""
    try:
        return Path(name).name == name and sha256_of(path / name) == sha256
    except OSError:
        return False


# all that a .metadata needs, but dtypes
METADATA = {
    "collections.OrderedDict", "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath", "torch.Size", "torch.contiguous_format", "torch.device", "torch.strided",
    "torch.serialization._get_layout", "torch.distributed.checkpoint.filesystem._StorageInfo",
    *(f"torch.distributed.checkpoint.metadata.{name}" for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING")),
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    """Unpickles the .metadata of a checkpoint folder: only PyTorch's dtypes and what METADATA names."""

    def find_class(self, module: str, name: str):
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or f"{module}.{name}" in METADATA:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f".metadata names {module}.{name}, which does not belong there")


class _Reader(dcp.FileSystemReader):
    """PyTorch's reader of a sharded checkpoint's folder, with `_Unpickler` in place of pickle.load."""

    def read_metadata(self):
        metadata = _Unpickler(io.BytesIO((Path(self.path) / ".metadata").read_bytes())).load()
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def share(tensors: dict[str, Tensor], rank: int, size: int) -> dict[str, Tensor]:
    """Those tensors of which `rank` writes what it holds.

    Of a tensor, or a part of one, that several ranks hold, one of them writes it, such that they all have about as many
    bytes to write: none has more than the mean plus one tensor.
    """
    mine, bytes_by_copies = {}, defaultdict(lambda: defaultdict(int))
    for key, tensor in sorted(tensors.items(), key=lambda item: -item[1].nbytes):
        copy, copies = rank, size
        if isinstance(tensor, DTensor):  # FSDP2 has one copy of every part, HSDP one in each replica
            mesh = tensor.device_mesh
            copy, copies = (mesh.get_local_rank(0), mesh.size(0)) if mesh.ndim > 1 else (0, 1)
        bytes_of = bytes_by_copies[copies]
        least = min(range(copies), key=bytes_of.__getitem__)
        bytes_of[least] += tensor.nbytes
        if least == copy:
            mine[key] = tensor
    return mine


class Single:
    """Writes the checkpoints of a run of one process."""

    def save(self, folder: Path, step: int, model, optimizer, about: dict, then: Callable):
        """Write the checkpoint of `step` and call `then`. Raises UserError if it cannot be written."""
        save(folder, step, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **about})
        then()

    def wait(self):
        """Return at once, because `save` returns only when the checkpoint is written."""

    def back_to(self, folder: Path, step: int):
        """Delete all checkpoints but that of `step`."""
        prune(folder, {step})


class Several:
    """Writes the checkpoints of a run of several processes while training goes on, one at a time.

    All ranks call `save`. Each writes its share and the checksum of its file. When all have written, rank 0 gives the
    folder its final name. `wait` returns after that. A failure on any rank is raised as UserError on all of them, by
    `wait` or by the next `save`.
    """

    def __init__(self):
        self.group = dist.new_group(backend="gloo")  # not the default group, which training uses meanwhile
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future | None = None
        self.step = -1  # of the last checkpoint

    def save(self, folder: Path, step: int, model, optimizer, about: dict, then: Callable):
        """Begin to write the checkpoint of `step`; `then` is called on rank 0 when it is complete."""
        self.wait()
        if step == self.step:  # a signal stops the run after a step of which there is a checkpoint anyway
            return
        self.step = step
        path = folder / f"ckpt_{step:07d}"
        partial = path.with_suffix(".partial")
        if self.rank == 0:
            remove(partial)
        dist.barrier(self.group)
        tensors = _weights(model)

        def shape_only(key: str, value: Tensor) -> Tensor:
            tensors[key] = value
            return torch.empty(value.shape, dtype=value.dtype, device="meta")

        state = each_tensor(optimizer.state_dict(), shape_only, "optimizer")
        mine = share(tensors, self.rank, self.size)
        writing = dcp.async_save(mine, storage_writer=dcp.FileSystemWriter(partial), process_group=self.group)
        about = {"step": step, **about}
        self.pending = self.thread.submit(self._finish, writing, partial, path, state, about, then)

    def _finish(self, writing: Future, partial: Path, path: Path, state: dict, about: dict, then: Callable):
        def written() -> dict[str, str]:
            writing.result()
            own = list(partial.glob(f"__{self.rank}_*"))
            if self.rank == 0:
                torch.save(state, partial / OPTIMIZER)
                own += [partial / OPTIMIZER, partial / ".metadata"]
            return {file.name: sha256_of(file) for file in own}

        def publish():
            if self.rank == 0:
                files = {name: sha256 for of_rank in checksums for name, sha256 in of_rank.items()}
                if missing := files.keys() - {file.name for file in partial.iterdir()}:
                    raise OSError(
                        f"{min(missing)} was written elsewhere; runs_dir must be one folder for all processes"
                    )
                (partial / ABOUT).write_text(json.dumps(about | {"files": files}, indent=1) + "\n")
                partial.rename(path)
                then()

        try:
            checksums = self._on_all(written)
            self._on_all(publish)
        except Exception as error:
            raise UserError(f"{path}: cannot be written ({error}); mend this and go on with --resume") from error

    def _on_all(self, do: Callable) -> list:
        """What do() returns on each rank, by rank. If it fails on a rank, all raise OSError with that message."""
        try:
            mine = do(), None
        except (Exception, dcp.CheckpointException) as error:  # the latter is no Exception, and holds the ranks' own
            first = next(iter(error.failures.values()))[0] if isinstance(error, dcp.CheckpointException) else error
            mine = None, (str(first).splitlines() or [type(first).__name__])[0]
        found: list = [None] * self.size
        dist.all_gather_object(found, mine, group=self.group)
        if said := next((said for _, said in found if said), None):
            raise OSError(said)
        return [result for result, _ in found]

    def wait(self):
        """Wait for the checkpoint that is being written, if any. Raises UserError if it could not be written."""
        if self.pending:
            pending, self.pending = self.pending, None
            pending.result()

    def back_to(self, folder: Path, step: int):
        """Delete all checkpoints but that of `step`; later steps may then be saved again."""
        self.wait()
        self.step = step
        if self.rank == 0:
            prune(folder, {step})
        dist.barrier(self.group)
