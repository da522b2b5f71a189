"""What is said of a run before its first step: the plan that is printed, and what record.json holds."""

from dataclasses import asdict

import mup
from config import Config
from data.reader import TokenFiles
from engine import budget, exchange, machine
from engine.parallel import World
from model import GPT


def announce(cfg: Config, model: GPT, optimizer, train: TokenFiles, world: World, sharded: bool):
    """Print the plan of a run: model, parameter groups, data, cost of a step, memory, schedule."""
    print(f"{cfg.name}: {cfg.n_layer} layers, d {cfg.d_model}, {cfg.n_head} heads on {world.device}, {cfg.dtype}")
    if world.size > 1:
        over = f"over the {world.per_node} of each node (HSDP)" if world.per_node else "(FSDP2)"
        how = f"the model sharded {over}" if sharded else "each with the whole model (DDP)"
        print(f"  {world.size} processes, {how}")
    numel: dict[str, int] = {}
    for name, p in model.named_parameters():
        numel[mup.role_of(name)] = numel.get(mup.role_of(name), 0) + p.numel()
    active = f" ({sum(map(model.active, model.parameters())):,} a token)" if cfg.n_experts else ""
    roles = ", ".join(f"{role} {count:,}" for role, count in numel.items())
    print(f"  parameters {sum(numel.values()):,}{active}: {roles}")
    if cfg.init_from:
        print(f"  first weights: {cfg.init_from}")
    for group in optimizer.param_groups:
        print(f"  lr × {group['lr_mult']:<4g} decay {group['weight_decay']:<6g} {', '.join(group['roles'])}")
    print(f"  data {cfg.dataset if train.folder.name == cfg.dataset else train.folder}: {len(train):,} tokens")
    accumulate = cfg.batch_size // cfg.micro_batch // world.size
    ranks = f"{world.size} × " if world.size > 1 else ""
    batch = f"{ranks}{accumulate} × {cfg.micro_batch} × {cfg.block_size}"
    flops = model.flops_per_token() * cfg.tokens_per_step
    print(f"  a step: {cfg.tokens_per_step:,} tokens = {batch}, {flops:.3g} FLOPs")
    memory = budget.Memory.of(cfg, world.shards if sharded else 1)
    parts = ", ".join(f"{what} {size / 2**30:.2f}" for what, size in asdict(memory).items() if size)
    print(f"  memory ≈ {memory.total / 2**30:.2f} GiB: {parts}")
    peak = f"peak lr {cfg.peak_lr:g} = {cfg.lr_scale:g} × {cfg.lr:g}"
    print(f"  {cfg.max_steps:,} steps, {cfg.schedule} schedule, {peak}")
    if cfg.warmup_steps >= cfg.max_steps:
        print(f"  NOTE: the warm-up ({cfg.warmup_steps:,} steps) outlasts the run; the peak rate is never held")
    print(f"  {intervention(cfg, optimizer)}")


def about(run) -> dict:
    """What record.json says of a run besides its configuration, code and versions; run: train.Run."""
    cfg, data, size = run.cfg, run.train_data, run.world.size
    about_data = {"folder": data.folder.name, "fingerprint": data.fingerprint(), "notes": run.notes, **data.meta}
    processes = {"processes": size, "parallel": run.layout if size > 1 else None}
    about_machine = machine.describe(cfg, run.device) | processes | run.arithmetic
    about_model = {"parameters": sum(p.numel() for p in run.model.parameters())} | exchange.origin(cfg)
    return {"data": about_data, "machine": about_machine, **about_model}


def intervention(cfg: Config, optimizer) -> str:
    """What is done to the weights besides the optimizer's step, in words."""
    begins = " after an alarm" if cfg.on_alarm == "remedy" else ""
    limit = (
        f"; logit_trust{begins}: a step moves a logit by at most {cfg.logit_trust:g} nats" if cfg.logit_trust else ""
    )
    if cfg.logit_clip:
        limit += f"; logit_clip ({cfg.logit_clip_map}): the weights allow no logit above {cfg.logit_clip:g} nats"
    if not cfg.msign_period:
        return f"plain {'AdamW' if cfg.optimizer == 'adamw' else cfg.optimizer}{limit}"
    what = {"sign": "MSign", "zero": "set to zero"}.get(cfg.msign_map, f"control: {cfg.msign_map}")
    which = f", stable rank below {cfg.msign_below:g}" if cfg.msign_below else ""
    matrices = f"{len(optimizer.targets)} matrices ({cfg.msign_targets}{which})"
    return f"{what} every {cfg.msign_period} steps on {matrices}{limit}"
