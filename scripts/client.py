"""Train one run of a client: nanoGPT, or the Trainer of transformers with a GPT-2 or a Llama.

    python scripts/client.py configs/clients/nanogpt.py --msign_period=100 [--field=value ...]
    python scripts/sweep.py configs/sweeps/clients.py        # all runs of the report, by this command

The name of the configuration's file says which client it is.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import UserError, load_config, run_cli

CLIENTS = {"nanogpt": "nanogpt", "gpt2": "trainer", "llama": "trainer"}


def main() -> int:
    cfg, name = load_config(sys.argv[1:]), Path(sys.argv[1]).stem
    if name not in CLIENTS:
        raise UserError(f"{sys.argv[1]}: must be a client's configuration: one of {', '.join(CLIENTS)}")
    if CLIENTS[name] == "nanogpt":  # its own module `model` must be the first of that name
        from clients.nanogpt import train
    else:
        from clients.trainer import train
    train(cfg)
    return 0


if __name__ == "__main__":
    run_cli(main, "client.py")
