"""Token files, and the batches that are drawn from them.

A corpus is a folder with files `*train*.bin` and, for evaluation, `*val*.bin`. A file holds tokens and nothing else,
as nanoGPT writes it, or has the header of 256 int32 that modded-nanogpt and llm.c write; the reader recognises both.
Tokens are uint16, unless a `meta.json` in the folder has `"dtype": "uint32"` or the header is llm.c's for Llama-3.
Corpora that this repository prepares have a `meta.json` with tokenizer, dtype, numbers of tokens and sha256.

A window is a run of block_size + 1 consecutive tokens of one file: block_size inputs and, one token later, as many
targets.
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
HEADERS = {20240520: "uint16", 20240801: "uint32"}  # {first int32 of a header: dtype}: GPT-2's tokens, Llama-3's
HEADER_BYTES = 1024
FULL_HASH_BYTES = 2**30  # token files of more bytes, one or all together, are not read as a whole when a run starts


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype of token files: uint16 where every token of the vocabulary fits, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def corpus_dir(dataset: str) -> Path:
    """The folder of a corpus: data/<dataset>, or `dataset` itself when it is a path."""
    if os.sep not in dataset and dataset not in (".", ".."):
        return DATA / dataset
    try:
        return Path(dataset).expanduser()
    except RuntimeError as error:
        raise UserError(f"dataset = {dataset!r}: must be a folder ({error})") from error


def is_prepared(dataset: str) -> bool:
    """Whether the corpus has token files for training."""
    return any(corpus_dir(dataset).glob("*train*.bin"))


class TokenFiles:
    """All windows of the token files of one split ("train" or "val"), numbered through; len() is the number of tokens.

    Raises UserError for a folder without such files, an unknown dtype, an empty or truncated file, a file shorter than
    one window, and a token that is not below vocab_size.
    """

    def __init__(self, dataset: str, split: str, block_size: int, vocab_size: int):
        self.folder = corpus_dir(dataset)
        self.block_size = block_size
        self.paths = sorted(self.folder.glob(f"*{split}*.bin"))
        if not self.paths:
            raise UserError(f"dataset = {dataset!r}: no *{split}*.bin in {self.folder}")
        meta_path = self.folder / "meta.json"
        self.meta = json.loads(meta_path.read_text()) if meta_path.is_file() else {}
        if self.meta.get("dtype", "uint16") not in HEADERS.values():
            raise UserError(f"{meta_path}: dtype = {self.meta['dtype']!r}: must be uint16 or uint32")
        self.arrays = [self._open(path) for path in self.paths]
        for path, tokens in zip(self.paths, self.arrays, strict=True):
            top = self._max_token(path, tokens)
            if top >= vocab_size:
                raise UserError(f"vocab_size = {vocab_size}: {path} holds token {top}; must be at least {top + 1}")
        windows = [len(tokens) - block_size for tokens in self.arrays]
        self.ends = np.cumsum(windows)  # window i lies in the first file whose end is above i

    def _open(self, path: Path) -> np.ndarray:
        """The tokens of a file, mapped into memory."""
        size = path.stat().st_size
        head = np.fromfile(path, np.int32, 3)
        header = HEADERS.get(int(head[0])) if len(head) == 3 else None
        start = HEADER_BYTES if header else 0
        dtype = np.dtype(self.meta.get("dtype") or header or "uint16")
        entry = self.meta.get("files", {}).get(path.name)
        expected = size // dtype.itemsize  # the number of tokens, unless meta.json or, before it, the header says it
        if entry:
            expected = entry["tokens"]
        if header:
            expected = int(head[2])
        needed = start + expected * dtype.itemsize
        if size != needed:
            raise UserError(
                f"{path}: {size} bytes, but {expected} tokens take {needed}: truncated or damaged {dtype} file"
            )
        if expected <= self.block_size:
            raise UserError(
                f"block_size = {self.block_size}: must be less; {path} has {expected} tokens; "
                f"one window takes block_size + 1 = {self.block_size + 1}"
            )
        return np.memmap(path, dtype, "r", offset=start, shape=(expected,))

    def _max_token(self, path: Path, tokens: np.ndarray) -> int:
        entry = self.meta.get("files", {}).get(path.name)
        if entry and tokens.nbytes > FULL_HASH_BYTES:  # too large to scan, but its preparation recorded the maximum
            return entry["max_token"]
        return max(int(tokens[i : i + 2**26].max()) for i in range(0, len(tokens), 2**26))

    def __len__(self) -> int:
        return sum(len(tokens) for tokens in self.arrays)

    def fingerprint(self) -> str:
        """A hash of the files' sizes and content.

        Up to 1 GiB in all, it covers every byte; above that, 4096 evenly spaced blocks of 4 KiB in each file.
        """
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

    def windows(self, numbers: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, each (len(numbers), block_size) int64, of the windows with these numbers."""
        files = np.searchsorted(self.ends, numbers, side="right")
        starts = numbers - np.concatenate([[0], self.ends])[files]
        rows = [self.arrays[f][s : s + self.block_size + 1] for f, s in zip(files, starts, strict=True)]
        tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
        return tokens[:, :-1], tokens[:, 1:]

    def batch(self, seed: int, step: int, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of batch_size random windows. They depend on seed and step alone, so no state is saved."""
        rng = np.random.Generator(np.random.Philox(key=[seed, step]))
        return self.windows(rng.integers(0, self.ends[-1], batch_size))

    def fixed_windows(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of `count` evenly spaced windows, the same at every call, for evaluation."""
        return self.windows(np.linspace(0, self.ends[-1] - 1, count).astype(np.int64))


def write_corpus(dataset: str, splits: dict[str, np.ndarray], tokenizer: str, vocab_size: int, source: str) -> Path:
    """The folder of the corpus `dataset`, written from {split: tokens} as <split>.bin and meta.json.

    The folder appears with all files in it or not at all.
    """
    folder = corpus_dir(dataset)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for split, tokens in splits.items():
            tokens.astype(token_dtype(vocab_size)).tofile(scratch / f"{split}.bin")
        write_meta(scratch, tokenizer, vocab_size, source)
        scratch.chmod(0o755)
        try:
            scratch.rename(folder)
        except OSError:
            if not is_prepared(dataset):  # otherwise another process has just written the same corpus
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def write_meta(folder: Path, tokenizer: str, vocab_size: int, source: str):
    """Write meta.json: {tokenizer, vocab_size, dtype, source, files: {name: {tokens, max_token, sha256}}}."""
    files, dtype = {}, token_dtype(vocab_size)
    for path in sorted(folder.glob("*.bin")):
        tokens = np.memmap(path, dtype, "r")
        digest, top = hashlib.sha256(), 0
        for i in range(0, len(tokens), 2**24):
            chunk = tokens[i : i + 2**24]
            digest.update(chunk)
            top = max(top, int(chunk.max()))
        files[path.name] = {"tokens": len(tokens), "max_token": top, "sha256": digest.hexdigest()}
    meta = {"tokenizer": tokenizer, "vocab_size": vocab_size, "dtype": str(dtype), "source": source, "files": files}
    partial = folder / "meta.json.partial"
    partial.write_text(json.dumps(meta, indent=1) + "\n")
    partial.replace(folder / "meta.json")
