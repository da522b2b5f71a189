"""Checkpoints: written whole or not at all, checked when read, pickle-free.

`ckpt_0000500.pt` in the run folder is the state after step 500. A new one is written beside the old ones
and renamed into place, so a kill or a full disk at any moment leaves the previous one whole.
"""

import os
import zipfile
from pathlib import Path

import torch

from config import UserError


def step_of(path: Path) -> int:
    return int(path.stem.split("_")[1])


def checkpoints(folder: Path) -> list[Path]:
    """The folder's checkpoints, oldest step first."""
    return sorted(folder.glob("ckpt_*.pt"), key=step_of)


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
            path.unlink()
    for path in folder.glob("ckpt_*.partial"):
        path.unlink()


def load(path: Path, architecture: dict) -> dict:
    """The state in `path`, on the CPU. Raises UserError if it is damaged or of another architecture."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums
        if damaged:
            raise ValueError(f"checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = state["architecture"]
        state["step"], state["model"], state["optimizer"], state["metrics_bytes"]
    except Exception as error:
        what = f"missing entry {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise UserError(f"{path}: not a whole checkpoint ({what}); delete it to go on from an earlier one") from error
    differs = [f"{k} = {saved.get(k)} there, {v} here" for k, v in architecture.items() if saved.get(k) != v]
    if differs:
        raise UserError(f"{path}: checkpoint of another architecture ({'; '.join(differs)})")
    return state
