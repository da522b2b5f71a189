"""Prepare Nemotron-CC v1, the corpus of the paper's larger models, by default from 40 of its 31 279 files.

    python -m data.nemotron_cc [--files=40] [--workers=8] [--tokenizer=cl100k_base]    # streamed from Common Crawl
    python -m data.nemotron_cc --source=FOLDER --dataset=NAME    # local .jsonl.zstd files

The whole corpus has 6.3e12 tokens in 10.4 TiB (https://data.commoncrawl.org/contrib/Nemotron/Nemotron-CC/index.html).
So one file has about 2.0e8 tokens and 0.37 GB. The 40 files have 8e9 tokens; the longest run that reads them needs
6.6e9 (100 000 steps of 65 536 tokens). 15 GB are streamed and 32 GB written. The list of files is sorted by quality,
kind (real or synthetic) and crawl. The 40 files lie at equal distances in this list, so their mixture is about that of
the whole corpus.

Documents 0, 2000, 4000, … of each file are for validation. Synthetic documents rephrase real ones, and near duplicates
remain. So a model has seen text similar to the validation documents.

The paper's vocabulary seems to be Llama-3's with 128 256 entries, but Llama-3's tokenizer is gated. We use tiktoken's
cl100k_base, whose 100 277 entries fit into that vocabulary; it is downloaded once (1.7 MB) and its tokens are written
as uint32. --tokenizer=gpt2 needs no network for the vocabulary and writes uint16.
"""

import gzip
import hashlib
import sys
from urllib.request import Request, urlopen

from config import UserError, run_cli
from data.shards import AGENT, command, reading

SITE = "https://data.commoncrawl.org/"
LIST = "contrib/Nemotron/Nemotron-CC/data-jsonl.paths.gz"
LIST_SHA256 = "d8201c1e05b5e9fecef7678457c172f98a19a25f1dd656cdba1f937e7a29e68e"
FILES = 40


def published() -> list[str]:
    """The addresses of all files, sorted. Raises UserError if their list cannot be read."""
    try:
        with reading(SITE + LIST), urlopen(Request(SITE + LIST, headers=AGENT), timeout=30) as response:
            packed = response.read()
            paths = gzip.decompress(packed).decode().split()
    except UserError as error:
        raise UserError(f"{error}; a substitute from another site is prepared by python -m data.fineweb_edu") from error
    if hashlib.sha256(packed).hexdigest() != LIST_SHA256:
        print(
            f"WARNING: {SITE + LIST} has changed; the files chosen now differ from those chosen before", file=sys.stderr
        )
    return [SITE + path for path in sorted(paths)]


def main() -> int:
    return command(__doc__, "nemotron-cc", ".jsonl.zstd", published, FILES)


if __name__ == "__main__":
    run_cli(main, "data.nemotron_cc")
