"""What is done about a run that hangs: stacks are written, waiting ends, and one line says so.

A process can wait in vain for another one. Both then write their Python stacks. The waiting fails, and the process that
waited ends with one line.
"""

import contextlib
import faulthandler
import os
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from config import Config, UserError

STACKS = "stacks"  # the folder, in the run's, of what is written about a hang
STDERR = 2


def record_collectives(cfg: Config):
    """Have NCCL record its last 2000 collectives, and write them to stacks/nccl_RANK in the run's folder on a timeout.

    To be called before the process group is made. What the user has set stays. (PyTorch 2.14 calls these variables so;
    older names, which it still reads, are in the second column.)
    """
    place = Path(cfg.runs_dir, cfg.name, STACKS, "nccl_").absolute()
    for name, old, value in (
        ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE", "2000"),
        ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(place)),
        ("TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_NCCL_DUMP_ON_TIMEOUT", "1"),
    ):
        if old not in os.environ:
            os.environ.setdefault(name, value)


def lost(error: BaseException | None, where: str = "") -> UserError | None:
    """What to raise for an error of a process that lost the others, or waited for them in vain; None for any other."""
    if not isinstance(error, dist.DistError) and not (isinstance(error, RuntimeError) and "gloo" in str(error)):
        return None
    why = str(error).split("\n")[0].split(". ")[0]
    return UserError(f"rank {os.environ.get('RANK', 0)} lost the others ({why}){where}; go on with --resume")


class Patience:
    """A context in which this process writes its Python stack, all threads, when it makes no progress.

    Until `training` is called, no progress means that cfg.start_patience seconds have passed, and the stack goes to
    stderr. After that, it means that nine tenths of cfg.patience have passed since a `beat`, and the stacks of several
    processes go to the files stacks/rankN.txt in the run's folder. A collective then fails after cfg.patience seconds,
    so every process has written its stack before. A thread of faulthandler's writes, whatever Python is doing.
    """

    def __init__(self, cfg: Config):
        self.cfg, self.file, self.where, self.after = cfg, None, "", cfg.start_patience

    def __enter__(self):
        self._arm()
        return self

    def _arm(self):
        self.armed = time.monotonic()
        faulthandler.dump_traceback_later(self.after, file=self.file or STDERR)

    def training(self, folder: Path, rank: int, several: bool):
        """Set-up is over. folder: the run's. All processes call this together."""
        if several:
            dist.set_timeout(timedelta(seconds=self.cfg.patience))
            (folder / STACKS).mkdir(parents=True, exist_ok=True)  # other machines may not see the folder of rank 0
            self.file = open(folder / STACKS / f"rank{rank}.txt", "a")  # noqa: SIM115 (closed in __exit__)
            self.where = f"; what each rank did is in {folder / STACKS}"
        self.after = 0.9 * self.cfg.patience
        self._arm()

    def beat(self):
        """There is progress. Cheap: the clock is set again once in a twentieth of the patience."""
        if time.monotonic() - self.armed > 0.05 * self.cfg.patience:
            self._arm()

    def __exit__(self, kind, error, traceback):
        faulthandler.cancel_dump_traceback_later()
        if self.file:
            self.file.close()
            path = Path(self.file.name)
            with contextlib.suppress(OSError):  # another rank's file may still be there
                if not path.stat().st_size:
                    path.unlink()
                    path.parent.rmdir()
        if said := lost(error, self.where):
            raise said from error
