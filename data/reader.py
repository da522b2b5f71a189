"""Token files and the batches drawn from them.

A corpus is a folder with `*train*.bin` and (for evaluation) `*val*.bin`: flat uint16 tokens as nanoGPT
writes them, or shards with modded-nanogpt's 256-int32 header; both are recognised and read as they are.
A `meta.json` beside them, written by our own preparation, says tokenizer, dtype, counts and sha256.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from config import ROOT, UserError

DATA = ROOT / "data"
HEADER_MAGIC, HEADER_BYTES = 20240520, 1024
FULL_HASH_BYTES = 2**30


def corpus_dir(dataset: str) -> Path:
    """The folder of a corpus: data/<dataset>, or `dataset` itself when it is a path."""
    return Path(dataset).expanduser() if os.sep in dataset or dataset in (".", "..") else DATA / dataset


def is_prepared(dataset: str) -> bool:
    return any(corpus_dir(dataset).glob("*train*.bin"))


class TokenFiles:
    """The token files of one split as one pool of windows of block_size + 1 tokens (none crosses a file).

    Raises UserError for a folder without such files, an empty or truncated file, a file shorter than
    one window, and a token that vocab_size cannot hold.
    """

    def __init__(self, dataset: str, split: str, block_size: int, vocab_size: int):
        self.folder = corpus_dir(dataset)
        self.block_size = block_size
        self.paths = sorted(self.folder.glob(f"*{split}*.bin"))
        if not self.paths:
            raise UserError(f"dataset = {dataset!r}: no *{split}*.bin in {self.folder}")
        meta_path = self.folder / "meta.json"
        self.meta = json.loads(meta_path.read_text()) if meta_path.is_file() else {}
        self.arrays = [self._open(path) for path in self.paths]
        for path, tokens in zip(self.paths, self.arrays, strict=True):
            top = self._max_token(path, tokens)
            if top >= vocab_size:
                raise UserError(f"vocab_size = {vocab_size}: {path} holds token {top}; must be at least {top + 1}")
        windows = [len(tokens) - block_size for tokens in self.arrays]
        self.ends = np.cumsum(windows)  # window i lies in the first file whose end is above i

    def _open(self, path: Path) -> np.ndarray:
        size = path.stat().st_size
        head = np.fromfile(path, np.int32, 3)
        start = HEADER_BYTES if len(head) == 3 and head[0] == HEADER_MAGIC else 0
        entry = self.meta.get("files", {}).get(path.name)
        expected = int(head[2]) if start else entry["tokens"] if entry else (size - start) // 2
        if size != start + 2 * expected:
            raise UserError(
                f"{path}: {size} bytes, but {expected} tokens take {start + 2 * expected}: truncated or damaged"
            )
        if expected <= self.block_size:
            raise UserError(f"{path}: {expected} tokens; one window takes block_size + 1 = {self.block_size + 1}")
        return np.memmap(path, np.uint16, "r", offset=start, shape=(expected,))

    def _max_token(self, path: Path, tokens: np.ndarray) -> int:
        entry = self.meta.get("files", {}).get(path.name)
        if entry and len(tokens) * 2 > FULL_HASH_BYTES:  # our own file, too large to scan at every start
            return entry["max_token"]
        return max(int(tokens[i : i + 2**26].max()) for i in range(0, len(tokens), 2**26))

    def __len__(self) -> int:
        return sum(len(tokens) for tokens in self.arrays)

    def fingerprint(self) -> str:
        """A hash of the files: sha256 up to 1 GiB in all; above, of sizes and 4096 evenly spaced 4 KiB blocks."""
        sizes = [path.stat().st_size for path in self.paths]
        digest = hashlib.sha256(repr(sizes).encode())
        if sum(sizes) <= FULL_HASH_BYTES:
            for path in self.paths:
                with open(path, "rb") as f:
                    while block := f.read(2**24):
                        digest.update(block)
            return "sha256:" + digest.hexdigest()
        for path, size in zip(self.paths, sizes, strict=True):
            with open(path, "rb") as f:
                for offset in np.linspace(0, max(0, size - 4096), 4096, dtype=np.int64).tolist():
                    f.seek(offset)
                    digest.update(f.read(4096))
        return "sha256-sampled:" + digest.hexdigest()

    def windows(self, starts: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, each (len(starts), block_size) int64, of the windows with these indices."""
        files = np.searchsorted(self.ends, starts, side="right")
        first = np.concatenate([[0], self.ends])[files]
        rows = [self.arrays[f][s : s + self.block_size + 1] for f, s in zip(files, starts - first, strict=True)]
        tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
        return tokens[:, :-1], tokens[:, 1:]

    def batch(self, seed: int, step: int, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch of a step, a function of (seed, step) alone: a counter-based generator, no state to save."""
        rng = np.random.Generator(np.random.Philox(key=[seed, step]))
        return self.windows(rng.integers(0, self.ends[-1], batch_size))

    def fixed_windows(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same `count` evenly spaced windows at every call, for evaluation."""
        return self.windows(np.linspace(0, self.ends[-1] - 1, count).astype(np.int64))


def write_corpus(dataset: str, splits: dict[str, np.ndarray], tokenizer: str, vocab_size: int, source: str) -> Path:
    """Write {split: uint16 tokens} as <split>.bin and meta.json, the folder appearing whole or not at all."""
    folder = corpus_dir(dataset)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for split, tokens in splits.items():
            tokens.astype(np.uint16).tofile(scratch / f"{split}.bin")
        write_meta(scratch, tokenizer, vocab_size, source)
        scratch.chmod(0o755)
        try:
            scratch.rename(folder)
        except OSError:
            if not is_prepared(dataset):  # otherwise another process was faster, with the same result
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def write_meta(folder: Path, tokenizer: str, vocab_size: int, source: str):
    """meta.json: {tokenizer, vocab_size, dtype, source, files: {name: {tokens, max_token, sha256}}}."""
    files = {}
    for path in sorted(folder.glob("*.bin")):
        tokens = np.memmap(path, np.uint16, "r")
        digest, top = hashlib.sha256(), 0
        for i in range(0, len(tokens), 2**24):
            chunk = tokens[i : i + 2**24]
            digest.update(chunk)
            top = max(top, int(chunk.max()))
        files[path.name] = {"tokens": len(tokens), "max_token": top, "sha256": digest.hexdigest()}
    meta = {"tokenizer": tokenizer, "vocab_size": vocab_size, "dtype": "uint16", "source": source, "files": files}
    partial = folder / "meta.json.partial"
    partial.write_text(json.dumps(meta, indent=1) + "\n")
    partial.replace(folder / "meta.json")
