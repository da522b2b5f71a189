"""OpenWebText as GPT-2 tokens: 9 035 582 198 for training, 4 434 897 for validation, nanoGPT's split.

    python -m data.openwebtext [--workers=8]            # streamed from the Hub, 18 GB written
    python -m data.openwebtext --source=FOLDER --dataset=NAME   # local Parquet files with a column "text"

Each Parquet shard becomes one train_*.bin; a cut preparation goes on with the shards that are missing.
Validation holds exactly nanoGPT's documents, those of `train_test_split(test_size=0.0005, seed=2357,
shuffle=True)`; unlike nanoGPT the order of the others is the shards', which random windows do not see.
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor, wait
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
from datasets import load_dataset
from tqdm import tqdm

from config import Parser, UserError, run_cli
from data.reader import corpus_dir, is_prepared, write_meta
from data.tokenizer import get_tokenizer

REVISION = "b4325f019c648b1641a1784748667e8b74e5e064"
SHARDS = [
    f"hf://datasets/Skylion007/openwebtext@{REVISION}/plain_text/train-{i:05}-of-00080.parquet" for i in range(80)
]
EXPECTED = {"train": 9_035_582_198, "val": 4_434_897}
VAL_SHARE, VAL_SEED = 0.0005, 2357
DOCUMENTS_AT_A_TIME = 1000


def val_rows(n: int) -> np.ndarray:
    """The sorted rows, of n, that `datasets`' train_test_split puts into nanoGPT's validation set."""
    return np.sort(np.random.default_rng(VAL_SEED).permutation(n)[: math.ceil(n * VAL_SHARE)])


def count_rows(url: str) -> int:
    with fsspec.open(url, "rb") as f:
        return pq.ParquetFile(f).metadata.num_rows


def _share_counter(counter):
    global documents_done
    documents_done = counter


def tokenize_shard(url: str, first_row: int, held_out: set[int], out: Path, index: int):
    """Tokenise one shard into out/train_<index>.bin and out/val_<index>.part; the former appears last."""
    tokenizer = get_tokenizer("gpt2")
    train_path = out / f"train_{index:05}.bin"
    partial = train_path.with_suffix(".partial")
    row = first_row
    with open(partial, "wb") as train, open(out / f"val_{index:05}.part", "wb") as val:
        documents = load_dataset("parquet", data_files=[url], split="train", streaming=True)
        for batch in documents.select_columns(["text"]).iter(DOCUMENTS_AT_A_TIME):
            for tokens in tokenizer.encode(batch["text"]):
                (val if row in held_out else train).write(tokens.tobytes())
                row += 1
            with documents_done.get_lock():
                documents_done.value += len(batch["text"])
    os.replace(partial, train_path)


def prepare(shards: list[str], dataset: str, workers: int) -> Path:
    """Tokenise the shards into the corpus `dataset`. Resumable; raises UserError if it is there already."""
    folder = corpus_dir(dataset)
    if is_prepared(dataset):
        raise UserError(f"dataset = {dataset!r}: {folder} is already prepared; delete it to prepare it anew")
    out = folder.with_name(f".{folder.name}-unfinished")
    out.mkdir(parents=True, exist_ok=True)
    rows = [count_rows(url) for url in tqdm(shards, desc="counting documents", unit="shard")]
    plan = json.dumps({"shards": shards, "rows": rows})
    if not (out / "plan.json").is_file() or (out / "plan.json").read_text() != plan:
        # which documents are held out depends on the number of all, so other shards mean another start
        shutil.rmtree(out)
        out.mkdir()
        (out / "plan.json").write_text(plan)
    starts = np.cumsum([0, *rows])
    held_out = val_rows(int(starts[-1]))
    missing = [i for i in range(len(shards)) if not (out / f"train_{i:05}.bin").is_file()]
    context = multiprocessing.get_context("spawn")  # the tokenizer's threads do not survive a fork
    counter = context.Value("q", sum(rows) - sum(rows[i] for i in missing))
    with (
        tqdm(total=sum(rows), unit="doc", desc="tokenising", initial=counter.value) as bar,
        ProcessPoolExecutor(workers, context, _share_counter, (counter,)) as pool,
    ):
        tasks = set()
        for i in missing:
            inside = held_out[(held_out >= starts[i]) & (held_out < starts[i + 1])]
            tasks.add(pool.submit(tokenize_shard, shards[i], int(starts[i]), set(inside.tolist()), out, i))
        while tasks:
            done, tasks = wait(tasks, timeout=0.5, return_when="FIRST_COMPLETED")
            bar.n = counter.value
            bar.refresh()
            for task in done:
                task.result()  # a failed shard stops here; the finished ones are kept
    with open(out / "val.bin", "wb") as val:
        for part in sorted(out.glob("val_*.part")):
            val.write(part.read_bytes())
    for leftover in [*out.glob("val_*.part"), out / "plan.json"]:
        leftover.unlink()
    write_meta(out, "gpt2", 50257, f"{shards[0]} … ({len(shards)} shards), {sum(rows)} documents")
    shutil.rmtree(folder, ignore_errors=True)  # an empty leftover; prepared ones were refused above
    out.rename(folder)
    return folder


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="folder of local Parquet files instead of the Hub")
    parser.add_argument("--dataset", default="openwebtext", help="name of the corpus below data/, or a path")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="shards tokenised at a time")
    args = parser.parse_args()
    shards = SHARDS
    if args.source:
        shards = [str(p) for p in sorted(Path(args.source).glob("*.parquet"))]
        if not shards:
            raise UserError(f"source = {args.source!r}: no *.parquet files there")
    folder = prepare(shards, args.dataset, args.workers)
    counts = {s: sum(p.stat().st_size // 2 for p in folder.glob(f"{s}*.bin")) for s in EXPECTED}
    print(f"{folder}: " + ", ".join(f"{n:,} {split} tokens" for split, n in counts.items()))
    if not args.source and counts != EXPECTED:
        print(f"WARNING: nanoGPT counts {EXPECTED['train']:,} and {EXPECTED['val']:,} tokens")
    return 0


if __name__ == "__main__":
    run_cli(main, "data.openwebtext")
