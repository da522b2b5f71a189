"""Nemotron-CC v1, the corpus of the paper's larger models, as token files; 40 of its 31 279 files unless told otherwise.

    python -m data.nemotron_cc [--files=40] [--workers=8] [--tokenizer=cl100k_base]    # streamed from Common Crawl
    python -m data.nemotron_cc --source=FOLDER --dataset=NAME    # local .jsonl.zstd files

The whole is 6.3e12 tokens in 10.4 TiB (https://data.commoncrawl.org/contrib/Nemotron/Nemotron-CC/index.html), so a file
is about 2.0e8 tokens and 0.37 GB, and 40 files are 8e9 tokens: more than the 6.6e9 of the longest run that reads them,
100 000 steps of 65 536. They are 15 GB to stream and 32 GB to write. The files are those at equal distances in the
sorted list, whose order is quality, kind (real or synthetic) and crawl, so that the mixture is about that of the whole.

Documents 0, 2000, 4000, … of each file are for validation. Synthetic documents rephrase real ones and near duplicates
remain, so what is held out is not wholly unseen.

The paper's vocabulary seems to be Llama-3's, 128 256 entries; Llama-3's tokenizer is gated. Our choice is tiktoken's
cl100k_base (100 277 entries, which fit; the vocabulary is downloaded once, 1.7 MB); --tokenizer=gpt2 is the same
offline. cl100k_base is written as uint32, gpt2 as uint16.
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
    """The addresses of all files, sorted."""
    try:
        with reading(SITE + LIST), urlopen(Request(SITE + LIST, headers=AGENT), timeout=30) as response:
            packed = response.read()
            paths = gzip.decompress(packed).decode().split()
    except UserError as error:
        raise UserError(f"{error}; its stand-in from another site: python -m data.fineweb_edu") from error
    if hashlib.sha256(packed).hexdigest() != LIST_SHA256:
        print(f"WARNING: {SITE + LIST} has changed; other files will be chosen than before", file=sys.stderr)
    return [SITE + path for path in sorted(paths)]


def main() -> int:
    return command(__doc__, "nemotron-cc", ".jsonl.zstd", published, FILES)


if __name__ == "__main__":
    run_cli(main, "data.nemotron_cc")
