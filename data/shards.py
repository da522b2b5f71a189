"""From shards of documents to a corpus of token files: what openwebtext, nemotron_cc and fineweb_edu share.

A shard is one source file: a Parquet file with a column "text" (a path or hf://…), or a .jsonl.zstd file with a field
"text" (a path or https://…). Shards are read as streams. Each becomes one train_*.bin, written whole or not at all. A
preparation that is interrupted can be repeated and then does only the missing shards. The corpus appears at the end.
"""

import argparse
import http.client
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from urllib.request import Request, urlopen

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import load_dataset
from tqdm import tqdm

from config import Number, Parser, UserError
from data.reader import corpus_dir, is_prepared, write_meta
from data.tokenizer import get_tokenizer

DOCUMENTS_AT_A_TIME = 1000
HELD_OUT = range(0, sys.maxsize, 2000)  # a shard's documents for validation; nanoGPT holds out the same share
RETRY_AFTER = (1, 4, 16, 64)  # seconds between attempts to continue a download
AGENT = {"User-Agent": "python -m data"}  # some servers refuse urllib's default


@contextmanager
def reading(url: str):
    """Inside, any error becomes a UserError of one line that names the source `url`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # every transport and every format has errors of its own
        raise UserError(f"{url}: {type(error).__name__}: {' '.join(str(error).split())}") from error


class Download(io.RawIOBase):
    """The bytes of an https URL, in order. When the connection breaks, the download continues where it stopped."""

    def __init__(self, url: str):
        self.url, self.position, self.size, self.response = url, 0, None, None

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def _connect(self):
        request = Request(self.url, headers={**AGENT, "Range": f"bytes={self.position}-"})
        self.response = urlopen(request, timeout=60)
        if self.response.length is None or (self.position and self.response.status != 206):
            raise OSError("the server cannot continue a broken download")
        self.size = self.position + self.response.length

    def readinto(self, buffer) -> int:
        for pause in (*RETRY_AFTER, None):
            try:
                if self.response is None:
                    self._connect()
                n = self.response.readinto(buffer)
                if n or self.position == self.size:
                    self.position += n
                    return n
                raise ConnectionError(f"closed after {self.position} of {self.size} bytes")
            except (OSError, http.client.HTTPException):
                self.response = None
                if pause is None:
                    raise
            time.sleep(pause)


def count_rows(url: str) -> int:
    """The number of documents in a Parquet file. Raises UserError if it cannot be read."""
    with reading(url), fsspec.open(url, "rb") as f:
        return pq.ParquetFile(f).metadata.num_rows


def _parquet(url: str) -> Iterator[tuple[list, float]]:
    rows, done = count_rows(url), 0
    documents = load_dataset("parquet", data_files=[url], split="train", streaming=True).select_columns(["text"])
    for batch in documents.iter(DOCUMENTS_AT_A_TIME):
        done += len(batch["text"])
        yield batch["text"], done / rows


def _jsonl(url: str) -> Iterator[tuple[list, float]]:
    with Download(url) if "://" in url else open(url, "rb") as file:
        lines = io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd"))
        while batch := list(islice(lines, DOCUMENTS_AT_A_TIME)):
            size = file.size if isinstance(file, Download) else os.fstat(file.fileno()).st_size
            yield [json.loads(line).get("text") for line in batch if line.strip()], file.tell() / size


def read_texts(url: str) -> Iterator[tuple[list[str], float]]:
    """Batches of a shard's texts, each with the share of the shard that has been read so far.

    Raises UserError for a shard that cannot be read and for a document whose text is not a string.
    """
    with reading(url):
        row = 0
        for texts, share in (_parquet if url.endswith(".parquet") else _jsonl)(url):
            for text in texts:
                if not isinstance(text, str):
                    raise UserError(f"{url}: document {row} has text = {text!r}: must be a string")
                row += 1
            yield texts, share


def _start_worker(counter):
    global shards_done
    shards_done = counter
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C

    def leave_with_parent():  # a worker that outlives its parent would write into the files of the next preparation
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def tokenize_shard(url: str, held_out: Sequence[int], tokenizer: str, out: Path, index: int):
    """Tokenise one shard into out/train_<index>.bin and out/val_<index>.part; the former appears last.

    Raises UserError for a shard that cannot be read or leaves nothing to train on.
    """
    encode = get_tokenizer(tokenizer).encode
    train_path = out / f"train_{index:05}.bin"
    partial = train_path.with_suffix(".partial")
    row, before = 0, 0.0
    with open(partial, "wb") as train, open(out / f"val_{index:05}.part", "wb") as val:
        for texts, share in read_texts(url):
            for tokens in encode(texts):
                (val if row in held_out else train).write(tokens.tobytes())
                row += 1
            with shards_done.get_lock():
                shards_done.value += share - before
            before = share
    if not partial.stat().st_size:
        raise UserError(f"{url}: {row} documents, which leaves none to train on")
    os.replace(partial, train_path)


def refuse_prepared(dataset: str):
    """Raise UserError if the corpus exists already."""
    if is_prepared(dataset):
        folder = corpus_dir(dataset)
        raise UserError(f"dataset = {dataset!r}: {folder} is already prepared; delete it to prepare it anew")


def prepare(dataset: str, shards: list[tuple[str, Sequence[int]]], tokenizer: str, workers: int, source: str) -> Path:
    """Make a corpus of the shards, each (address, the rows held out for validation). Returns its folder.

    An interrupted preparation goes on where it stopped. Raises UserError if the corpus exists already, and for a shard
    that cannot be read.
    """
    refuse_prepared(dataset)
    vocab_size = get_tokenizer(tokenizer).vocab_size
    folder = corpus_dir(dataset)
    out = folder.with_name(f".{folder.name}-unfinished")
    out.mkdir(parents=True, exist_ok=True)
    plan = json.dumps({"tokenizer": tokenizer, "shards": [[url, str(held_out)] for url, held_out in shards]})
    if not (out / "plan.json").is_file() or (out / "plan.json").read_text() != plan:
        # the files there belong to other shards, another split or another tokenizer
        shutil.rmtree(out)
        out.mkdir()
        (out / "plan.json").write_text(plan)
    _tokenize_missing(shards, tokenizer, workers, out)
    with open(out / "val.bin", "wb") as val:
        for part in sorted(out.glob("val_*.part")):
            val.write(part.read_bytes())
    for leftover in [*out.glob("val_*.part"), out / "plan.json"]:
        leftover.unlink()
    write_meta(out, tokenizer, vocab_size, source)
    shutil.rmtree(folder, ignore_errors=True)  # an empty folder at most, since prepared ones were refused above
    out.rename(folder)
    return folder


def _tokenize_missing(shards: list[tuple[str, Sequence[int]]], tokenizer: str, workers: int, out: Path):
    """Tokenise the shards that have no file in `out` yet, with a progress bar. Raises UserError as `prepare` does."""
    missing = [i for i in range(len(shards)) if not (out / f"train_{i:05}.bin").is_file()]
    context = multiprocessing.get_context("spawn")  # the tokenizer's threads would not survive a fork
    counter = context.Value("d", len(shards) - len(missing))
    with (
        tqdm(total=len(shards), unit="shard", desc="tokenising", initial=len(shards) - len(missing)) as bar,
        ProcessPoolExecutor(workers, context, _start_worker, (counter,)) as pool,
    ):
        tasks = {pool.submit(tokenize_shard, *shards[i], tokenizer, out, i) for i in missing}
        try:
            while tasks:
                done, tasks = wait(tasks, timeout=0.5, return_when="FIRST_COMPLETED")
                bar.n = round(counter.value, 2)
                bar.refresh()
                for task in done:
                    task.result()
        except UserError as error:
            raise UserError(f"{error} (the same command goes on with the shards that are missing)") from error
        except KeyboardInterrupt:
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure, shards under way are finished and kept


def token_counts(folder: Path) -> dict[str, int]:
    """{split: number of tokens} of a prepared corpus."""
    files = json.loads((folder / "meta.json").read_text())["files"]
    return {s: sum(f["tokens"] for name, f in files.items() if name.startswith(s)) for s in ("train", "val")}


def report(folder: Path) -> str:
    """A line with the folder and the numbers of tokens in it."""
    return f"{folder}: " + ", ".join(f"{n:,} {split} tokens" for split, n in token_counts(folder).items())


def parser(doc: str, dataset: str, suffix: str) -> Parser:
    """A parser with the options that every preparation has."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help=f"folder of local *{suffix} files instead of the network")
    parser.add_argument("--dataset", default=dataset, help=f"name of the corpus below data/, or a path [{dataset}]")
    parser.add_argument("--workers", type=Number(int, 1), default=os.cpu_count(), help="shards at a time [%(default)s]")
    return parser


def local_shards(source: str, suffix: str) -> list[str]:
    """The paths of all files in the folder `source` that end with `suffix`. Raises UserError if there are none."""
    shards = [str(path) for path in sorted(Path(source).rglob(f"*{suffix}"))]
    if not shards:
        raise UserError(f"source = {source!r}: no *{suffix} files there")
    return shards


def spread(shards: list[str], n: int) -> list[str]:
    """n of the shards at equal distances in their order. Raises UserError unless 1 ≤ n ≤ len(shards).

    If the order groups shards by kind, every kind is chosen in proportion to its number.
    """
    if not 1 <= n <= len(shards):
        raise UserError(f"files = {n}: must be 1 to {len(shards)}")
    return [shards[(2 * i + 1) * len(shards) // (2 * n)] for i in range(n)]


def command(doc: str, dataset: str, suffix: str, published: Callable[[], list[str]], files: int | None = None) -> int:
    """Prepare, from the command line, a corpus that has no validation split of its own; returns exit code 0.

    The documents HELD_OUT of each shard are for validation. `published` lists the shards on the network; `files` of
    them are used by default, or all if None.
    """
    options = parser(doc, dataset, suffix)
    options.add_argument(
        "--files",
        type=Number(int, 1),
        help=f"number of shards, evenly spread over all of them [{files or 'all'}, or all with --source]",
    )
    options.add_argument("--tokenizer", default="cl100k_base", help="cl100k_base, gpt2 or bytes [%(default)s]")
    args = options.parse_args()
    refuse_prepared(args.dataset)
    everything = local_shards(args.source, suffix) if args.source else published()
    default = len(everything) if args.source or files is None else files
    shards = spread(everything, default if args.files is None else args.files)
    print(
        f"{args.dataset}: {len(shards)} of {len(everything)} *{suffix} files as tokens of {args.tokenizer}", flush=True
    )
    source = f"{shards[0]} … ({len(shards)} of {len(everything)} files), validation: every {HELD_OUT.step}th document"
    folder = prepare(args.dataset, [(url, HELD_OUT) for url in shards], args.tokenizer, args.workers, source)
    print(report(folder))
    return 0
