"""Prepare OpenWebText as GPT-2 tokens in nanoGPT's split: 9 035 582 198 for training, 4 434 897 for validation.

    python -m data.openwebtext [--workers=8]            # streamed from the Hugging Face Hub, 18 GB written
    python -m data.openwebtext --source=FOLDER --dataset=NAME   # local Parquet files with a column "text"

Each shard (one Parquet file) becomes one train_*.bin. An interrupted preparation goes on with the missing shards. The
validation documents are exactly nanoGPT's, those of `train_test_split(test_size=0.0005, seed=2357, shuffle=True)`.
The training documents stay in the order of the shards, where nanoGPT shuffles them; this makes no difference, because
batches are drawn at random.
"""

import math
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import run_cli
from data import shards as sharded
from data.shards import count_rows, local_shards, parser, refuse_prepared, report, token_counts

REVISION = "b4325f019c648b1641a1784748667e8b74e5e064"
SHARDS = [
    f"hf://datasets/Skylion007/openwebtext@{REVISION}/plain_text/train-{i:05}-of-00080.parquet" for i in range(80)
]
EXPECTED = {"train": 9_035_582_198, "val": 4_434_897}
VAL_SHARE, VAL_SEED = 0.0005, 2357


def val_rows(n: int) -> np.ndarray:
    """The sorted rows, of n, that `datasets`' train_test_split puts into nanoGPT's validation set."""
    return np.sort(np.random.default_rng(VAL_SEED).permutation(n)[: math.ceil(n * VAL_SHARE)])


def prepare(shards: list[str], dataset: str, workers: int) -> Path:
    """The folder of the corpus `dataset`, made of the shards at these addresses.

    An interrupted preparation goes on where it stopped. Raises UserError if the corpus exists already.
    """
    refuse_prepared(dataset)
    rows = [count_rows(url) for url in tqdm(shards, desc="counting documents", unit="shard", delay=5)]
    starts = np.cumsum([0, *rows])
    held_out = val_rows(int(starts[-1]))
    parts = np.split(held_out, np.searchsorted(held_out, starts[1:-1]))
    local = [(part - start).tolist() for part, start in zip(parts, starts[:-1], strict=True)]
    source = f"{shards[0]} … ({len(shards)} shards), {starts[-1]} documents"
    return sharded.prepare(dataset, list(zip(shards, local, strict=True)), "gpt2", workers, source)


def main() -> int:
    args = parser(__doc__, "openwebtext", ".parquet").parse_args()
    shards = local_shards(args.source, ".parquet") if args.source else SHARDS
    folder = prepare(shards, args.dataset, args.workers)
    print(report(folder))
    if not args.source and token_counts(folder) != EXPECTED:
        print(f"WARNING: expected {EXPECTED['train']:,} and {EXPECTED['val']:,} tokens, as nanoGPT counts")
    return 0


if __name__ == "__main__":
    run_cli(main, "data.openwebtext")
