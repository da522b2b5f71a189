"""Prepare FineWeb-Edu's sample of 10e9 tokens, the stand-in for Nemotron-CC.

    python -m data.fineweb_edu [--files=14] [--workers=8] [--tokenizer=cl100k_base]    # 29 GB from the Hugging Face Hub
    python -m data.fineweb_edu --source=FOLDER --dataset=NAME    # local Parquet files with a column "text"

The sample has 14 Parquet files with 9 672 101 documents, read at a pinned revision; 40 GB are written. Documents 0,
2000, 4000, … of each file are for validation. Tokenizers and dtypes are those of data.nemotron_cc.
"""

from config import UserError, run_cli
from data.shards import command, count_rows

REVISION = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
SHARDS = [f"hf://datasets/HuggingFaceFW/fineweb-edu@{REVISION}/sample/10BT/{i:03}_00000.parquet" for i in range(14)]


def published() -> list[str]:
    """The addresses of all files. Raises UserError if the first one cannot be read."""
    try:
        count_rows(SHARDS[0])
    except UserError as error:
        raise UserError(f"{error}; to use files on this machine, give --source=FOLDER") from error
    return SHARDS


def main() -> int:
    return command(__doc__, "fineweb-edu", ".parquet", published)


if __name__ == "__main__":
    run_cli(main, "data.fineweb_edu")
