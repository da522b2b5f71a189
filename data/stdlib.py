"""Prepare the embedded corpus: the source code of Python's standard library without its tests (12 MB; no network).

    python -m data.stdlib            # data/stdlib-bytes, data/stdlib-gpt2 and data/stdlib-small

`train.py` prepares the corpus when it is first used. The text differs a little between versions of Python, so
meta.json and the record of each run name the version and the hash.
"""

import hashlib
import sys
import sysconfig
from pathlib import Path

import numpy as np

from config import UserError, run_cli
from data.reader import is_prepared, write_corpus
from data.tokenizer import get_tokenizer

# {corpus: (tokenizer, number of training tokens; None = all)}; a model memorises 8 kB within minutes
CORPORA = {"stdlib-bytes": ("bytes", None), "stdlib-gpt2": ("gpt2", None), "stdlib-small": ("bytes", 8192)}
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def source_files(root: Path) -> list[str]:
    """The corpus's files, sorted and relative to `root`: every .py file outside tests and installed packages."""
    files = (p.relative_to(root) for p in root.rglob("*.py"))
    return sorted(p.as_posix() for p in files if not LEFT_OUT & set(p.parts))


def is_val(name: str) -> bool:
    """Whether a file is for validation. The hash of its name chooses about one file in twenty."""
    return hashlib.sha256(name.encode()).digest()[0] % 20 == 0


def prepare(dataset: str, spare: str | Path | None = None) -> str:
    """Write the corpus `dataset`, a key of CORPORA, unless it exists. Returns its name.

    If data/ cannot be written and the folder `spare` is given, the corpus is written below `spare`, and its path is
    returned. Raises UserError if Python was installed without the source of its library.
    """
    if is_prepared(dataset):
        return dataset
    elsewhere = spare and str(Path(spare).absolute() / dataset)
    if elsewhere and is_prepared(elsewhere):
        return elsewhere
    tokenizer_name, size = CORPORA[dataset]
    tokenizer = get_tokenizer(tokenizer_name)
    root = Path(sysconfig.get_paths()["stdlib"])
    names = source_files(root)
    if len(names) < 100:
        raise UserError(f"dataset = {dataset!r}: {root} holds {len(names)} .py files; install Python's full library")
    splits = {"train": [], "val": []}
    for name in names:
        splits["val" if is_val(name) else "train"].append((root / name).read_text("utf-8", errors="replace"))
    tokens = {split: np.concatenate(tokenizer.encode(texts)) for split, texts in splits.items()}
    tokens["train"] = tokens["train"][:size]
    source = f"standard library of Python {sys.version.split()[0]}, {len(names)} files"
    try:
        write_corpus(dataset, tokens, tokenizer.name, tokenizer.vocab_size, source)
    except OSError:
        if not elsewhere:
            raise
        dataset = elsewhere
        write_corpus(dataset, tokens, tokenizer.name, tokenizer.vocab_size, source)
    print(f"prepared {dataset}: " + ", ".join(f"{len(t):,} {split} tokens" for split, t in tokens.items()))
    return dataset


def main():
    """Prepare all corpora."""
    for dataset in CORPORA:
        prepare(dataset)


if __name__ == "__main__":
    run_cli(main, "data.stdlib")
