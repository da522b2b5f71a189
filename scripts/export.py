"""Write a trained model as a folder that Hugging Face's transformers loads.

python scripts/export.py runs/nano_5m_msign out/                    # the run's last checkpoint
python scripts/export.py runs/mine/ckpt_0000500.pt out/

In Python then: AutoModelForCausalLM.from_pretrained("out"), AutoTokenizer.from_pretrained("out")
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from config import Parser, run_cli
from engine import exchange
from engine.sampling import open_model


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, or one of its checkpoints")
    parser.add_argument("out", type=Path, metavar="OUT", help="new or empty folder")
    parser.add_argument("--tokenizer", choices=exchange.WRITTEN, help="for a corpus that does not name its own")
    args = parser.parse_args()
    model, record = open_model(args.run, torch.device("cpu"))
    name = args.tokenizer or record["data"].get("tokenizer", "")
    model_type = exchange.export(model, name, args.out)
    print(
        f"{args.out}: a {model_type}, with {f'the tokenizer of {name}' if name in exchange.WRITTEN else 'no tokenizer'}"
    )
    return 0


if __name__ == "__main__":
    run_cli(main, "export.py")
