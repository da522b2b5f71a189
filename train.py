"""Train a GPT with AdamW or MSign and record everything that happens to it.

    python train.py configs/nano_5m_msign.py [--max_steps=200 --device=cpu ...]
    python train.py configs/nano_5m_msign.py --resume

Every run is a folder below runs/ (see runlog.py). `--dry_run` prints the plan and stops.
"""

import dataclasses
import os
import platform
import signal
import sys

import torch

import checkpoint
import machine
import measure
import mup
import theory
from collapse import Watch, final_loss, find_onsets
from config import Config, UserError, load_config, run_cli
from data import stdlib
from data.reader import TokenFiles, is_prepared
from model import GPT
from msign import MSign, NonFiniteWeightError, zero
from runlog import RunLog, read_metrics

ARCHITECTURE = ("n_layer", "d_model", "n_head", "d_ff", "vocab_size", "block_size")


def open_data(cfg: Config) -> tuple[TokenFiles, TokenFiles | None, list[str]]:
    """Training and validation tokens, and what has to be announced about them."""
    dataset, notes = cfg.dataset, []
    if dataset in stdlib.CORPORA:
        stdlib.prepare(dataset)
    elif not is_prepared(dataset) and cfg.fallback:
        notes.append(f"DATA: {dataset!r} is not prepared here; training on {cfg.fallback!r} instead")
        dataset = cfg.fallback
        if dataset in stdlib.CORPORA:
            stdlib.prepare(dataset)
    train = TokenFiles(dataset, "train", cfg.block_size, cfg.vocab_size)
    val = TokenFiles(dataset, "val", cfg.block_size, cfg.vocab_size) if cfg.eval_every else None
    return train, val, notes


def build_optimizer(cfg: Config, model: GPT) -> torch.optim.Optimizer:
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(mup.param_groups(model, cfg), betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=fused)
    if not cfg.msign_period:
        return optimizer
    update = zero if cfg.msign_map == "zero" else None
    try:
        return MSign(
            optimizer, model.named_parameters(), cfg.msign_period, cfg.msign_targets, cfg.msign_backend, update
        )
    except ValueError as error:
        raise UserError(f"msign_targets = {cfg.msign_targets!r}: {error}") from error


def print_plan(cfg: Config, model: GPT, optimizer, train: TokenFiles, device: torch.device):
    print(f"{cfg.name}: {cfg.n_layer} layers, d {cfg.d_model}, {cfg.n_head} heads on {device}, {cfg.dtype}")
    numel = {}
    for name, p in model.named_parameters():
        numel[mup.role_of(name)] = numel.get(mup.role_of(name), 0) + p.numel()
    print(f"  parameters {sum(numel.values()):,}: " + ", ".join(f"{role} {n:,}" for role, n in numel.items()))
    for group in optimizer.param_groups:
        print(f"  lr × {group['lr_mult']:<4g} decay {group['weight_decay']:<6g} {', '.join(group['roles'])}")
    print(f"  data {cfg.dataset if train.folder.name == cfg.dataset else train.folder}: {len(train):,} tokens")
    accumulate = cfg.batch_size // cfg.micro_batch
    flops = model.flops_per_token() * cfg.tokens_per_step
    memory = 16 * sum(numel.values()) + model.activation_bytes()
    print(
        f"  a step: {cfg.tokens_per_step:,} tokens = {accumulate} × {cfg.micro_batch} × {cfg.block_size}, {flops:.3g} FLOPs"
    )
    print(f"  memory ≈ {memory / 2**30:.2f} GiB (weights, gradients, moments, one micro-batch's activations)")
    print(
        f"  {cfg.max_steps:,} steps, {cfg.schedule} schedule, peak lr {cfg.peak_lr:g} = {cfg.lr_scale:g} × {cfg.lr:g}"
    )
    if cfg.warmup_steps >= cfg.max_steps:
        print(f"  NOTE: the warm-up ({cfg.warmup_steps:,} steps) outlasts the run; the peak rate is never held")
    if cfg.msign_period:
        what = "MSign" if cfg.msign_map == "sign" else "set to zero"
        print(f"  {what} every {cfg.msign_period} steps on {len(optimizer.params)} matrices ({cfg.msign_targets})")
    else:
        print("  plain AdamW")


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
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"WORLD_SIZE = {os.environ['WORLD_SIZE']}: must be 1; this driver runs as a single process")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    device = machine.pick_device(cfg.device)
    train_data, val_data, notes = open_data(cfg)
    model = GPT(cfg)
    mup.init_weights(model, cfg)
    model.to(device)
    optimizer = build_optimizer(cfg, model)
    print_plan(cfg, model, optimizer, train_data, device)
    for note in notes:
        print(f"WARNING {note}", file=sys.stderr)
    if cfg.dry_run:
        return 0
    arithmetic = machine.set_arithmetic(device, [p for p in model.parameters() if p.ndim == 2])
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")
    loss_of, compilation, announced = machine.compiled(cfg, model, device, autocast)
    for note in announced:
        print(f"WARNING {note}", file=sys.stderr)
    notes += announced

    log = RunLog(cfg, {
        "data": {"folder": train_data.folder.name, "fingerprint": train_data.fingerprint(), "notes": notes, **train_data.meta},
        "machine": {"device": str(device), "threads": torch.get_num_threads(), "processor": platform.machine(),
                    "attention_kernel": machine.attention_kernel(cfg, device), "dtype": cfg.dtype,
                    **arithmetic, **compilation,
                    "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None},
        "parameters": sum(p.numel() for p in model.parameters()),
    })  # fmt: skip
    if log.finished:
        print(f"{log.folder}: already finished; nothing to resume")
        return 0
    architecture = {k: getattr(cfg, k) for k in ARCHITECTURE}
    step, metrics_bytes, saved = 0, 0, checkpoint.checkpoints(log.folder)
    if log.resumed and saved:
        state = checkpoint.load(saved[-1], architecture)
        step, metrics_bytes = state["step"], state["metrics_bytes"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        del state
    for note in notes:
        log.event("fallback", note=note)
    watch = Watch()
    for line in log.start(step, metrics_bytes):
        watch.add(line["train/loss"], line["grad_norm"])
    if log.resumed:
        log.say(f"resumed after step {step}")
    healthy = checkpoint.step_of(saved[0]) if saved else 0  # at most two are kept: the last healthy one, the last

    def save():
        nonlocal healthy
        bad = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
        if bad:
            watch.not_finite(f"{bad[0]} is not finite")
            return
        checkpoint.save(log.folder, step, {
            "model": model.state_dict(), "optimizer": optimizer.state_dict(),
            "architecture": architecture, "metrics_bytes": log.metrics_bytes(),
        })  # fmt: skip
        if not watch.suspicious:
            healthy = step
        checkpoint.prune(log.folder, keep={healthy, step})

    # --- the loop ---
    accumulate = cfg.batch_size // cfg.micro_batch
    parameters = dict(model.named_parameters())
    probe, probe_targets = (t.to(device) for t in (val_data or train_data).fixed_windows(cfg.probe_batch))

    def due(every: int) -> bool:
        return bool(every) and step % every == 0

    def draw(step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The micro-batches of a step, on their way to the device."""
        x, y = train_data.batch(cfg.seed, step, cfg.batch_size)
        if device.type == "cuda":
            x, y = x.pin_memory(), y.pin_memory()
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        return list(zip(x.split(cfg.micro_batch), y.split(cfg.micro_batch), strict=True))

    def warn(text: str):
        log.event("not measured", step=step, why=text)
        log.say(f"step {step}: {text}")

    def around_msign(when: str):
        found = measure.weights(model, False) | measure.activations(model, probe, False, warn)
        found |= measure.jacobians(model, probe, False, warn)
        metrics.update({f"{when}_msign/{k}": v for k, v in found.items()})

    if cfg.msign_probe:
        optimizer.observe = around_msign
    batch = draw(step + 1)
    with machine.chosen_kernel(cfg), Signals() as signals:
        while step < cfg.max_steps and signals.received is None:
            step += 1
            metrics = {}
            # measured on the weights that this step's loss and gradient belong to, before they change
            probing, each_layer = due(cfg.probe_every), due(cfg.layers_every)
            if probing:
                metrics |= measure.weights(model, each_layer)
                metrics |= measure.activations(model, probe, each_layer, warn, autocast)
            if due(cfg.jacobian_every):
                metrics |= measure.jacobians(model, probe, True, warn, cfg.jacobian_positions)
            if due(cfg.theory_every):
                sides = theory.flat(model, probe, probe_targets)
                metrics |= {f"theory/{name}": value for name, value in sides.items()}
            lr = cfg.lr_at(step)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_mult"]
            loss = torch.zeros((), device=device)
            for xs, ys in batch:
                with autocast:
                    part = loss_of(xs, ys) / accumulate
                part.backward()
                loss += part.detach()
            batch = draw(step + 1)  # while a GPU is still at work
            if probing:
                metrics |= measure.norms("grad_norm", {n: p.grad for n, p in parameters.items()}, each_layer)
                before = {n: p.detach().clone() for n, p in parameters.items()}
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters.values(), cfg.grad_clip or float("inf"))
            # the one moment of a step in which the host waits for the device
            values = torch.stack([loss, grad_norm]).tolist()
            metrics = {"train/loss": values[0], "grad_norm": values[1], "lr": lr, **metrics}
            watch.add(metrics["train/loss"], metrics["grad_norm"])
            if watch.finite:
                try:
                    optimizer.step()
                except NonFiniteWeightError as error:
                    watch.not_finite(str(error))
                optimizer.zero_grad(set_to_none=True)
                if probing:
                    moved = {n: p.detach() - before[n] for n, p in parameters.items()}
                    metrics |= measure.norms("update_norm", moved, each_layer)
                if val_data and (step % cfg.eval_every == 0 or step == cfg.max_steps):
                    metrics["val/loss"] = evaluate(cfg, loss_of, autocast, val_data, device)
            log.log(step, metrics)
            if watch.finite and (step == cfg.max_steps or (cfg.ckpt_every and step % cfg.ckpt_every == 0)):
                save()
            if watch.collapse and watch.collapse.noticed == step:
                log.event("collapse", **dataclasses.asdict(watch.collapse))
                log.say(f"{cfg.name}: {watch.collapse} (last healthy checkpoint: step {healthy})")
            if not watch.finite:
                break
        if signals.received and watch.finite and step < cfg.max_steps:
            save()
            log.event("stopped", signal=signals.received.name, step=step)
            log.say(f"{signals.received.name}: saved after step {step}; go on with --resume")
            log.close()
            return 128 + signals.received

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
def evaluate(cfg: Config, loss_of, autocast, data: TokenFiles, device: torch.device) -> float:
    """Mean loss over eval_batches micro-batches of fixed windows."""
    x, y = data.fixed_windows(cfg.eval_batches * cfg.micro_batch)
    total = 0.0
    for xs, ys in zip(x.split(cfg.micro_batch), y.split(cfg.micro_batch), strict=True):
        with autocast:
            total += loss_of(xs.to(device), ys.to(device)).item()
    return total / cfg.eval_batches


if __name__ == "__main__":
    run_cli(lambda: train(load_config(sys.argv[1:])), "train.py")
