"""Print a prompt and the text with which a trained model continues it.

python scripts/sample.py runs/nano_5m_msign                               # from the run's last checkpoint
python scripts/sample.py runs/mine/ckpt_0000500.pt --prompt="def " --tokens=200 --temperature=0.7
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from config import Number, Parser, UserError, run_cli
from data.tokenizer import get_tokenizer
from engine import machine
from engine.sampling import open_model, sample


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, or one of its checkpoints")
    parser.add_argument("--prompt", default="\n", help="the text to continue [a line break]")
    parser.add_argument("--tokens", type=Number(int, 0), default=500, help="number of tokens to add [500]")
    parser.add_argument("--temperature", type=Number(float, 0), default=0.8, help="0 = always the likeliest [0.8]")
    parser.add_argument(
        "--top_k", type=Number(int, 0), default=0, help="draw only among this many of the likeliest tokens; 0 = all [0]"
    )
    parser.add_argument("--seed", type=Number(int, 0), default=0, help="random seed of the draws [0]")
    parser.add_argument("--tokenizer", default="", help="bytes, gpt2 or cl100k_base [the one that the corpus names]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps [auto]")
    args = parser.parse_args()
    model, record = open_model(args.run, machine.pick_device(args.device))
    name = args.tokenizer or record["data"].get("tokenizer", "")
    if not name:
        raise UserError(f"tokenizer = '': must be given, because the corpus of {args.run} names none")
    tokenizer = get_tokenizer(name)
    # without the end-of-text token that encode appends; an empty prompt starts with it
    prompt = tokenizer.encode([args.prompt])[0][:-1].tolist() or [tokenizer.eot]
    generator = torch.Generator().manual_seed(args.seed)
    tokens = list(sample(model, list(prompt), args.tokens, args.temperature, args.top_k, generator))
    print(args.prompt + tokenizer.decode(tokens))
    return 0


if __name__ == "__main__":
    run_cli(main, "sample.py")
