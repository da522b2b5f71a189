"""Which corpus a run trains on: cfg.dataset, or a fallback where that is not prepared."""

from pathlib import Path

from config import Config
from data import stdlib
from data.reader import TokenFiles, is_prepared


def open_splits(cfg: Config) -> tuple[TokenFiles, TokenFiles | None, list[str]]:
    """Training tokens, validation tokens (None if eval_every = 0), and lines to announce about them.

    A corpus that is not prepared is replaced by the first prepared one of cfg.fallback. If none is prepared, the last
    name is tried, so that the error names it. Raises UserError as `TokenFiles` does.
    """
    dataset, notes = cfg.dataset, []
    if dataset not in stdlib.CORPORA and not is_prepared(dataset) and cfg.fallback:
        names = [name.strip() for name in cfg.fallback.split(",")]
        dataset = next((name for name in names if name in stdlib.CORPORA or is_prepared(name)), names[-1])
        notes.append(f"DATA: {cfg.dataset!r} is not prepared here; training on {dataset!r} instead")
    if dataset in stdlib.CORPORA:
        found = stdlib.prepare(dataset, spare=Path(cfg.runs_dir) / ".data")
        if found != dataset:
            notes.append(f"DATA: data/ cannot be written; {dataset!r} is in {found}")
        dataset = found
    train = TokenFiles(dataset, "train", cfg.block_size, cfg.vocab_size)
    val = TokenFiles(dataset, "val", cfg.block_size, cfg.vocab_size) if cfg.eval_every else None
    return train, val, notes
