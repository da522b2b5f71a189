"""Print a prompt and the text with which a trained model continues it.

python scripts/sample.py runs/nano_5m_msign                               # from the run's last checkpoint
python scripts/sample.py runs/mine/ckpt_0000500.pt --prompt="def " --tokens=200 --temperature=0.7
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from config import FIELDS, Config, Number, Parser, UserError, run_cli
from data.tokenizer import get_tokenizer
from engine import checkpoint, machine
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

    Raises UserError if there is none.
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
    cfg = Config(**{key: value for key, value in record["config"].items() if key in FIELDS})
    model = GPT(cfg)
    checkpoint.load_weights(path, cfg.architecture, model)
    return model.to(device).eval(), record


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, or one of its checkpoints")
    parser.add_argument("--prompt", default="\n")
    parser.add_argument("--tokens", type=Number(int, 0), default=500, help="how many to add [500]")
    parser.add_argument("--temperature", type=Number(float, 0), default=0.8, help="0 = always the likeliest [0.8]")
    parser.add_argument("--top_k", type=Number(int, 0), default=0, help="among the likeliest so many; 0 = all [0]")
    parser.add_argument("--seed", type=Number(int, 0), default=0)
    parser.add_argument("--tokenizer", default="", help="for a corpus that does not name its own")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    model, record = open_model(args.run, machine.pick_device(args.device))
    name = args.tokenizer or record["data"].get("tokenizer", "")
    if not name:
        raise UserError(f"tokenizer = '': {args.run} was trained on a corpus that names none; must be given")
    tokenizer = get_tokenizer(name)
    prompt = tokenizer.encode([args.prompt])[0][:-1].tolist() or [tokenizer.eot]
    generator = torch.Generator().manual_seed(args.seed)
    tokens = list(sample(model, list(prompt), args.tokens, args.temperature, args.top_k, generator))
    print(args.prompt + tokenizer.decode(tokens))
    return 0


if __name__ == "__main__":
    run_cli(main, "sample.py")
