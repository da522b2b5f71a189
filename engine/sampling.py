"""A trained model opened again, and tokens drawn from it."""

import json
from pathlib import Path

import torch

from config import FIELDS, Config, UserError, up_to_date
from engine import checkpoint
from model import GPT


@torch.no_grad()
def sample(model: GPT, tokens: list[int], count: int, temperature: float, top_k: int, generator: torch.Generator):
    """Yields `count` tokens that continue `tokens`, one by one, and appends each to `tokens`.

    temperature 0 takes the likeliest token; top_k = 0 draws among all tokens.
    """
    device = next(model.parameters()).device
    for _ in range(count):
        context = torch.tensor([tokens[-model.cfg.block_size :]], device=device)
        logits = model(context)[0, -1].float().cpu()
        if top_k:
            logits[logits < logits.topk(min(top_k, len(logits))).values[-1]] = -torch.inf
        if temperature:
            chosen = torch.multinomial((logits / temperature).softmax(0), 1, generator=generator)
        else:
            chosen = logits.argmax()
        tokens.append(int(chosen))
        yield tokens[-1]


def open_model(path: Path, device: torch.device) -> tuple[GPT, dict]:
    """The model of a run folder's last checkpoint, or of one checkpoint, and the run's record.

    Raises UserError if there is no run folder or no such checkpoint in it.
    """
    folder = path if (path / "record.json").is_file() else path.parent
    if not (folder / "record.json").is_file():
        raise UserError(f"{path}: not a run folder, nor a checkpoint in one (no record.json)")
    record = json.loads((folder / "record.json").read_text())
    saved = checkpoint.checkpoints(folder)
    if not saved:
        raise UserError(f"{folder}: no checkpoint to sample from")
    path = saved[-1] if path == folder else path
    if path not in saved:
        raise UserError(f"{path}: no such checkpoint; there is {', '.join(file.name for file in saved)}")
    cfg = Config(**{key: value for key, value in up_to_date(record["config"]).items() if key in FIELDS})
    model = GPT(cfg)
    checkpoint.load_weights(path, cfg.architecture, model)
    return model.to(device).eval(), record
