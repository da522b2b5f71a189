"""Prepare a corpus from text files of your own.

    python -m data.text notes.txt book.md --name=mine     # data/mine
    python train.py configs/stress_constant.py --dataset=mine

The last twentieth of every file is held out for validation.
"""

import argparse
from pathlib import Path

import numpy as np

from config import Parser, UserError, run_cli
from data.reader import write_corpus
from data.shards import refuse_prepared
from data.tokenizer import TOKENIZERS, get_tokenizer

HELD_OUT = 20  # one token in this many is for validation


def prepare(files: list[Path], dataset: str, tokenizer_name: str) -> Path:
    """The folder of the corpus `dataset`, made of `files`. Raises UserError for a file that is empty or not UTF-8."""
    refuse_prepared(dataset)
    tokenizer, texts = get_tokenizer(tokenizer_name), []
    for path in files:
        try:
            texts.append(path.read_text("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: byte {error.start} is not UTF-8; must be a text file") from error
        if not texts[-1].strip():
            raise UserError(f"{path}: empty; must hold text")
    whole = tokenizer.encode(texts)
    cuts = [len(tokens) - len(tokens) // HELD_OUT for tokens in whole]
    splits = {
        "train": np.concatenate([tokens[:cut] for tokens, cut in zip(whole, cuts, strict=True)]),
        "val": np.concatenate([tokens[cut:] for tokens, cut in zip(whole, cuts, strict=True)]),
    }
    folder = write_corpus(dataset, splits, tokenizer.name, tokenizer.vocab_size, ", ".join(path.name for path in files))
    counts = ", ".join(f"{len(tokens):,} {split} tokens" for split, tokens in splits.items())
    print(f"prepared {folder}: {counts}; train with --dataset={dataset} --vocab_size={tokenizer.vocab_size}")
    return folder


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="text in UTF-8")
    parser.add_argument(
        "--name", default="", help="the corpus: a folder below data/, or a path [the first file's name]"
    )
    parser.add_argument("--tokenizer", default="bytes", help=f"{', '.join(TOKENIZERS)} [bytes]")
    args = parser.parse_args()
    prepare(args.files, args.name or args.files[0].stem, args.tokenizer)


if __name__ == "__main__":
    run_cli(main, "text.py")
