"""The validation loss of a run."""

import torch


@torch.no_grad()
def validation_loss(run) -> float:
    """Nats per token: the mean over eval_batches fixed micro-batches, shared out to the processes; run: train.Run."""
    cfg, world = run.cfg, run.world
    x, y = run.val_data.fixed_windows(cfg.eval_batches * cfg.micro_batch)
    batches = list(zip(x.split(cfg.micro_batch), y.split(cfg.micro_batch), strict=True))
    total = torch.zeros((), device=run.device)
    for i in range(0, cfg.eval_batches, world.size):
        mine = i + world.rank
        x, y = batches[min(mine, cfg.eval_batches - 1)]  # idle ranks repeat the last: a sharded model needs every rank
        with run.autocast:
            loss = run.loss_of(x.to(run.device), y.to(run.device))
        total += loss if mine < cfg.eval_batches else 0
    run.replica.reshard()
    return world.sum(total).item() / cfg.eval_batches
