"""Train a GPT with AdamW or MSign and record everything that happens to it.

    python train.py configs/nano_5m_msign.py [--max_steps=200 --device=cpu ...]
    python train.py configs/nano_5m_msign.py --resume
    torchrun --nproc_per_node=8 train.py configs/gpt_3b.py

Every run is a folder below runs/ (see runlog.py). `--dry_run` prints the plan and stops.
"""

import dataclasses
import os
import platform
import signal
import sys
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import record

import mup
from config import Config, UserError, load_config, run_cli
from data import stdlib
from data.reader import TokenFiles, is_prepared
from engine import budget, checkpoint, machine, parallel
from engine.runlog import NoLog, RunLog, read_metrics
from model import GPT
from msign import MSign, NonFiniteWeightError, counts
from remedies import controls, rivals
from stability import metrics as measure
from stability import theory
from stability.collapse import Watch, final_loss, find_onsets

ARCHITECTURE = [
    "n_layer",
    "d_model",
    "n_head",
    "d_ff",
    "vocab_size",
    "block_size",
    "norm",
    "qk_norm",
    "mlp",
    "position",
    "rope_theta",
    "attention",
    "n_kv_head",
    "mla_rank",
    "mla_rope_dim",
    "n_experts",
    "top_k",
]


def open_data(cfg: Config) -> tuple[TokenFiles, TokenFiles | None, list[str]]:
    """Training and validation tokens, and what has to be announced about them."""
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
    if val:
        val.require("eval_batches", cfg.eval_batches, cfg.eval_batches * cfg.micro_batch)
    (val or train).require("probe_batch", cfg.probe_batch, cfg.probe_batch)
    return train, val, notes


def build_optimizer(cfg: Config, model: GPT, group=None) -> torch.optim.Optimizer:
    optimizer = rivals.build(cfg, mup.param_groups(model, cfg), model.named_parameters())
    if not cfg.msign_period:
        return optimizer
    update = controls.update_of(cfg.msign_map, cfg.msign_backend, cfg.msign_below)
    try:
        return MSign(
            optimizer, model.named_parameters(), cfg.msign_period, cfg.msign_targets, update=update, group=group,
            reset=cfg.msign_reset,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"msign_targets = {cfg.msign_targets!r}: {error}") from error


def print_plan(cfg: Config, model: GPT, optimizer, train: TokenFiles, world: parallel.World, sharded: bool):
    print(f"{cfg.name}: {cfg.n_layer} layers, d {cfg.d_model}, {cfg.n_head} heads on {world.device}, {cfg.dtype}")
    if world.size > 1:
        print(
            f"  {world.size} processes, "
            + ("the model sharded (FSDP2)" if sharded else "each with the whole model (DDP)")
        )
    numel = {}
    for name, p in model.named_parameters():
        numel[mup.role_of(name)] = numel.get(mup.role_of(name), 0) + p.numel()
    active = sum(map(model.active, model.parameters()))
    of = f" ({active:,} a token)" if cfg.n_experts else ""
    print(f"  parameters {sum(numel.values()):,}{of}: " + ", ".join(f"{role} {n:,}" for role, n in numel.items()))
    for group in optimizer.param_groups:
        print(f"  lr × {group['lr_mult']:<4g} decay {group['weight_decay']:<6g} {', '.join(group['roles'])}")
    print(f"  data {cfg.dataset if train.folder.name == cfg.dataset else train.folder}: {len(train):,} tokens")
    accumulate = cfg.batch_size // cfg.micro_batch // world.size
    ranks = f"{world.size} × " if world.size > 1 else ""
    flops = model.flops_per_token() * cfg.tokens_per_step
    print(
        f"  a step: {cfg.tokens_per_step:,} tokens = {ranks}{accumulate} × {cfg.micro_batch} × {cfg.block_size}, {flops:.3g} FLOPs"
    )
    memory = budget.Memory.of(cfg, world.size, sharded).total
    print(f"  memory ≈ {memory / 2**30:.2f} GiB (weights, gradients, moments, one micro-batch's activations)")
    print(
        f"  {cfg.max_steps:,} steps, {cfg.schedule} schedule, peak lr {cfg.peak_lr:g} = {cfg.lr_scale:g} × {cfg.lr:g}"
    )
    if cfg.warmup_steps >= cfg.max_steps:
        print(f"  NOTE: the warm-up ({cfg.warmup_steps:,} steps) outlasts the run; the peak rate is never held")
    if cfg.msign_period:
        what = {"sign": "MSign", "zero": "set to zero"}.get(cfg.msign_map, f"control: {cfg.msign_map}")
        which = f", stable rank below {cfg.msign_below:g}" if cfg.msign_below else ""
        print(
            f"  {what} every {cfg.msign_period} steps on {len(optimizer.params)} matrices ({cfg.msign_targets}{which})"
        )
    else:
        print(f"  plain {'AdamW' if cfg.optimizer == 'adamw' else cfg.optimizer}")


class Signals:
    """Remembers the first SIGINT or SIGTERM, so that the step can end and be saved; a second one kills."""

    received = None

    def __enter__(self):
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number, frame):
        self.received = signal.Signals(number)
        signal.signal(number, signal.SIG_DFL)

    def __exit__(self, *exc):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def train(cfg: Config) -> int:
    """The whole run. Returns the exit code: 0, or 128 + n after signal n."""
    # --- set-up: everything that can be refused is refused before anything is written ---
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    train_data, val_data, notes = open_data(cfg)
    world = parallel.start(cfg)
    device = world.device
    how, announced = parallel.choose(cfg, world)
    sharded = how == "fsdp" and world.size > 1
    notes += announced
    model = parallel.build(cfg, world, sharded)
    optimizer = build_optimizer(cfg, model, world.group)
    if world.main:
        print_plan(cfg, model, optimizer, train_data, world, sharded)
    if cfg.dry_run:
        return 0
    arithmetic = machine.set_arithmetic(device, [p for p in model.parameters() if p.ndim == 2])
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")
    replica = parallel.Replica(model, world, sharded)
    loss_of, compilation, announced = machine.compiled(cfg, model, device, autocast, replica)
    notes += announced
    for note in notes if world.main else []:
        print(f"WARNING {note}", file=sys.stderr)

    def open_log():
        return RunLog(cfg, {
            "data": {"folder": train_data.folder.name, "fingerprint": train_data.fingerprint(), "notes": notes, **train_data.meta},
            "machine": {"device": str(device), "threads": torch.get_num_threads(), "processor": platform.machine(),
                        "attention_kernel": machine.attention_kernel(cfg, device), "dtype": cfg.dtype,
                        "processes": world.size, "parallel": how if world.size > 1 else None,
                        **arithmetic, **compilation,
                        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None},
            "parameters": sum(p.numel() for p in model.parameters()),
        })  # fmt: skip

    log = world.on_main(open_log, otherwise=NoLog())
    folder = Path(cfg.runs_dir) / cfg.name
    if world.tell(log.finished):
        log.say(f"{folder}: already finished; nothing to resume")
        return 0
    architecture = {k: getattr(cfg, k) for k in ARCHITECTURE}
    step, metrics_bytes, saved = 0, 0, world.tell(checkpoint.checkpoints(folder) if log.resumed else [])
    if saved:
        state = checkpoint.load(saved[-1], architecture, model, optimizer)
        step, metrics_bytes = state["step"], state["metrics_bytes"]
    for note in notes:
        log.event("fallback", note=note)
    watch = Watch()
    for line in world.tell(log.start(step, metrics_bytes)):
        watch.add(line["train/loss"], line["grad_norm"])
    if log.resumed:
        log.say(f"resumed after step {step}")
    healthy = checkpoint.step_of(saved[0]) if saved else 0  # at most two are kept: the last healthy one, the last
    writer = checkpoint.Sharded() if sharded else None

    def save():
        nonlocal healthy
        here = [name for name, p in parameters.items() if not parallel.finite(p)]
        for name, p in parameters.items():
            moments = filter(torch.is_tensor, optimizer.state.get(p, {}).values())
            here += [f"a moment of {name}"] * (not all(map(parallel.finite, moments)))
        bad = world.agree(here)
        if bad:
            watch.not_finite(f"{bad[0]} is not finite")
            return
        healthy = healthy if watch.suspicious else step
        about = {"architecture": architecture, "metrics_bytes": log.metrics_bytes()}
        keep = {healthy, step}
        if writer:
            writer.save(folder, step, model, optimizer, about, lambda: checkpoint.prune(folder, keep))
        elif world.main:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoint.save(folder, step, state | about)
            checkpoint.prune(folder, keep)

    # --- the loop ---
    accumulate = cfg.batch_size // cfg.micro_batch // world.size
    parameters = dict(model.named_parameters())
    clip_at = cfg.grad_clip if cfg.grad_clip and cfg.optimizer != "zclip" else float("inf")  # ZClip clips by itself
    probe, probe_targets = (t.to(device) for t in (val_data or train_data).fixed_windows(cfg.probe_batch))

    def due(every: int) -> bool:
        return bool(every) and step % every == 0

    def draw(step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """This rank's micro-batches of a step, on their way to the device."""
        x, y = map(world.share, train_data.batch(cfg.seed, step, cfg.batch_size))
        if device.type == "cuda":
            x, y = x.pin_memory(), y.pin_memory()
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        return list(zip(x.split(cfg.micro_batch), y.split(cfg.micro_batch), strict=True))

    def warn(text: str):
        log.event("not measured", step=step, why=text)
        log.say(f"step {step}: {text}")

    def measured(each_layer: bool, every_block: bool, of_run: bool) -> dict[str, float]:
        """What is measured on the whole model, by rank 0; the others wait."""
        plain, found = parallel.whole(model, world), {}
        try:
            if plain is not None and not of_run:
                found |= measure.weights(plain, False) | measure.activations(plain, probe, False, warn)
                found |= measure.jacobians(plain, probe, False, warn)
                return found
            if plain is not None and due(cfg.probe_every):
                found |= measure.weights(plain, each_layer)
                found |= measure.activations(plain, probe, each_layer, warn, autocast)
            if plain is not None and due(cfg.jacobian_every):
                found |= measure.jacobians(plain, probe, True, warn, cfg.jacobian_positions)
            if plain is not None and due(cfg.theory_every):
                sides = theory.flat(plain, probe, probe_targets)
                found |= {f"theory/{name}": value for name, value in sides.items()}
        except torch.OutOfMemoryError as error:
            warn(f"out of memory: {str(error).splitlines()[0]}")
        return found

    def around_msign(when: str):
        found = measured(False, False, False)
        metrics.update({f"{when}_msign/{k}": v for k, v in found.items()})

    if cfg.msign_probe:
        optimizer.observe = around_msign
    batch, stop = draw(step + 1), False
    with machine.chosen_kernel(cfg), Signals() as signals:
        while step < cfg.max_steps and not stop:
            step += 1
            metrics = {}
            # measured on the weights that this step's loss and gradient belong to, before they change
            probing, each_layer = due(cfg.probe_every), due(cfg.layers_every)
            if probing or due(cfg.jacobian_every) or due(cfg.theory_every):
                metrics |= measured(each_layer, True, True)
            if val_data and (step % cfg.eval_every == 0 or step == cfg.max_steps):
                metrics["val/loss"] = evaluate(cfg, loss_of, autocast, val_data, world)
                replica.reshard()
            lr = cfg.lr_at(step)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_mult"]
            loss = torch.zeros((), device=device)
            for i, (xs, ys) in enumerate(batch):
                with replica.accumulating(last=i + 1 == accumulate):
                    with autocast:
                        part = loss_of(xs, ys) / accumulate
                    part.backward()
                loss += part.detach()
            batch = draw(step + 1)  # while a GPU is still at work
            if probing:
                grads = parallel.norms({n: p.grad for n, p in parameters.items()})
                metrics |= measure.norms("grad_norm", grads, each_layer)
                before = {n: p.detach().clone() for n, p in parameters.items()}
            grad_norm = parallel.clip_(list(parameters.values()), clip_at)
            # the one moment of a step in which the host waits for the device, and for the other ranks
            signalled = torch.tensor(float(signals.received is not None), device=device)
            values = [*world.sum(torch.stack([loss / world.size, signalled])), grad_norm]
            values = torch.stack(values).tolist()
            stop = values[1] > 0
            metrics = {"train/loss": values[0], "grad_norm": values[2], "lr": lr, **metrics}
            watch.add(metrics["train/loss"], metrics["grad_norm"])
            if watch.finite:
                before_step = counts.copy()
                try:
                    optimizer.step()
                except NonFiniteWeightError as error:
                    watch.not_finite(str(error))
                if due(cfg.msign_period):
                    new = counts - before_step
                    here = torch.tensor([float(new[key]) for key in ("fallbacks", "matrices")], device=device)
                    metrics["msign/fallbacks"], metrics["msign/matrices"] = world.sum(here).tolist()
                optimizer.zero_grad(set_to_none=True)
                if probing:
                    moved = parallel.norms({n: p.detach() - before[n] for n, p in parameters.items()})
                    metrics |= measure.norms("update_norm", moved, each_layer)
            log.log(step, metrics)
            if watch.finite and (step == cfg.max_steps or (cfg.ckpt_every and step % cfg.ckpt_every == 0)):
                save()
            if watch.collapse and watch.collapse.noticed == step:
                log.event("collapse", **dataclasses.asdict(watch.collapse))
                log.say(f"{cfg.name}: {watch.collapse} (last healthy checkpoint: step {healthy})")
            if not watch.finite:
                break
        if stop and watch.finite and step < cfg.max_steps:
            save()
            if writer:
                writer.wait()
            received = signals.received or signal.SIGTERM  # that another rank received
            log.event("stopped", signal=received.name, step=step)
            log.say(f"{received.name}: saved after step {step}; go on with --resume")
            log.close()
            return 128 + received
    if writer:
        writer.wait()
    if not world.main:
        return 0

    # --- the end: finished, or collapsed to values that are not finite ---
    lines = read_metrics(log.folder)
    summary = {
        "status": "finished" if watch.finite else "stopped: not finite",
        "steps": step,
        "collapse": watch.collapse and dataclasses.asdict(watch.collapse)
        | {"lr_multiple": cfg.lr_at(watch.collapse.step) / cfg.lr, "last_healthy_checkpoint": healthy,
           "onsets": str(find_onsets(lines, watch.collapse.step))},
        "train/loss": final_loss([line["train/loss"] for line in lines]),
        "val/loss": next((line["val/loss"] for line in reversed(lines) if "val/loss" in line), None),
        "max_grad_norm": max(line["grad_norm"] or float("inf") for line in lines),
        "tokens_per_second": log.tokens_per_second(step),
        "peak_memory_gib": machine.peak_memory(device) / 2**30,
    }  # fmt: skip
    log.close(summary)
    print(
        f"{cfg.name}: {summary['status']} after step {step}; {watch.collapse or 'no collapse'}; record in {log.folder}"
    )
    return 0


@torch.no_grad()
def evaluate(cfg: Config, loss_of, autocast, data: TokenFiles, world: parallel.World) -> float:
    """Mean loss over eval_batches micro-batches of fixed windows, which the ranks share."""
    x, y = data.fixed_windows(cfg.eval_batches * cfg.micro_batch)
    batches = list(zip(x.split(cfg.micro_batch), y.split(cfg.micro_batch), strict=True))
    total = torch.zeros((), device=world.device)
    for i in range(0, cfg.eval_batches, world.size):
        mine = i + world.rank
        xs, ys = batches[min(mine, cfg.eval_batches - 1)]  # a sharded model needs all ranks to pass through it
        with autocast:
            loss = loss_of(xs.to(world.device), ys.to(world.device))
        total += loss if mine < cfg.eval_batches else 0
    return world.sum(total).item() / cfg.eval_batches


def main() -> int:
    code = None
    try:
        code = train(load_config(sys.argv[1:]))
        return code
    finally:
        parallel.finish(in_order=code is not None)


if __name__ == "__main__":
    # torchrun then shows the error of the rank that failed first
    run_cli(record(main) if "TORCHELASTIC_RUN_ID" in os.environ else main, "train.py")
