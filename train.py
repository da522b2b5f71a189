"""Train a GPT with AdamW or MSign and record everything that happens to it.

    python train.py configs/nano_5m_msign.py [--max_steps=200 --device=cpu ...]
    python train.py configs/nano_5m_msign.py --resume
    torchrun --nproc_per_node=8 train.py configs/gpt_3b.py

Every run is a folder below runs/ (engine/runlog.py says what is in it). `--dry_run` prints the plan and stops.
"""

import dataclasses
import math
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from config import Config, due, load_config, run_cli
from data import corpora
from engine import checkpoint, exchange, machine, parallel
from engine.announce import about, announce
from engine.clock import Clock
from engine.hang import Patience
from engine.optimizer import build_optimizer
from engine.runlog import NoLog, RunLog, read_metrics
from engine.signals import Signals
from engine.trace import Trace
from engine.validation import validation_loss
from msign import NonFiniteWeightError, counts
from remedies import rivals
from stability import footprint
from stability.collapse import Watch, outcome
from stability.instruments import Instruments
from stability.rescue import Rescue


def train(cfg: Config) -> int:
    """The whole run. Returns the exit code: 0, or 128 + n after signal n."""
    with Patience(cfg) as patience:
        run = Run(cfg)
        if cfg.dry_run or not run.begin():
            return 0
        patience.training(run.folder, run.world.rank, run.world.size > 1)
        with machine.chosen_kernel(cfg), run.trace, Signals() as signals:
            stopped = loop(run, signals, patience.beat)
            if stopped:
                return stop(run, signals.received or signal.SIGTERM)  # SIGTERM stands for another process's signal
        return end(run)


# --- set-up ---


class Run:
    """A run: its model, optimizer, data and record, and the step that it has reached.

    The constructor checks cfg against data and machine (UserError) and prints the plan; `begin` opens the record.
    step: the last one begun. healthy: the step of the last checkpoint before any sign of a collapse.
    """

    def __init__(self, cfg: Config):
        machine.prepare(cfg)
        self.cfg = cfg
        self.folder = Path(cfg.runs_dir) / cfg.name
        self.train_data, self.val_data, notes = corpora.open_splits(cfg)
        self.world = parallel.start(cfg, footprint.needs)
        self.device = self.world.device
        self.layout, announced = parallel.choose(cfg, self.world)  # ddp, fsdp or hsdp
        self.sharded = self.layout != "ddp"
        self.notes = notes + announced
        self.model = parallel.build(cfg, self.world, self.sharded)
        exchange.load(cfg, self.model)
        self.optimizer = build_optimizer(cfg, self.model, self.world.group)
        self.accumulate = cfg.batch_size // cfg.micro_batch // self.world.size
        self.step, self.healthy, self.log, self.watch = 0, 0, NoLog(), Watch()
        self.rescue = Rescue(cfg, self.folder / "rescue.json", self.world.tell)
        if self.world.main:
            announce(cfg, self.model, self.optimizer, self.train_data, self.world, self.sharded)

    def begin(self) -> bool:
        """Compile, open the record and resume from the last checkpoint. False if the run had already finished."""
        cfg, world, device = self.cfg, self.world, self.device
        matrices = [p for p in self.model.parameters() if p.ndim == 2]
        self.arithmetic = machine.set_arithmetic(device, matrices)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")
        self.replica = parallel.Replica(self.model, world, self.sharded)
        self.loss_of, compilation, announced = machine.compiled(
            cfg, self.model, device, self.autocast, self.replica, self.accumulate
        )
        self.arithmetic |= compilation
        self.notes += announced
        for note in self.notes if world.main else []:
            print(f"WARNING {note}", file=sys.stderr)
        self.log = world.on_main(lambda: RunLog(cfg, about(self)), otherwise=NoLog())
        if world.tell(self.log.finished):
            self.log.say(f"{self.folder}: already finished; nothing to resume")
            return False
        self.writer = checkpoint.Several() if world.size > 1 else checkpoint.Single()
        self.restore(self.log.resumed)
        if self.rescue.can_go_back and self.step == 0:
            self.save()
        probe = tuple(t.to(device) for t in (self.val_data or self.train_data).fixed_windows(cfg.probe_batch))
        spread = world.group, partial(parallel.lend, self.model, world), parallel.norms
        self.instruments = Instruments(cfg, self.model, probe, *spread, self.autocast, warn=self.not_measured)
        self.clock = Clock.of(cfg, self.model, world)
        self.trace = Trace(cfg, self.folder, device, world.main)
        if cfg.msign_period:
            measure = self.instruments.observe_msign if cfg.msign_probe else None
            self.optimizer.observe = self.clock.around_msign(measure)
        return True

    def restore(self, from_checkpoint: bool):
        """Load the last checkpoint, if asked for, and show what was logged until then to `watch` and `rescue`."""
        found = self.world.tell(checkpoint.checkpoints(self.folder) if from_checkpoint else [])
        metrics_bytes = 0
        if found:
            state = checkpoint.load(found[-1], self.cfg.architecture, self.model, self.optimizer)
            self.step, metrics_bytes = state["step"], state["metrics_bytes"]
            self.healthy = checkpoint.step_of(found[0])  # at most two are kept: the last healthy one and the last
        for note in self.notes:
            self.log.event("fallback", note=note)
        lines = self.world.tell(self.log.start(self.step, metrics_bytes))
        for line in lines:
            self.watch.add(line["train/loss"], line["grad_norm"])
        self.rescue.restore(lines, self.optimizer)
        if self.log.resumed:
            self.log.say(f"resumed after step {self.step}")

    def go_back(self):
        """Return to the last healthy checkpoint, from where the run goes on as cfg.on_alarm says."""
        self.log.event("went back", rang=self.step, back_to=self.healthy)
        self.log.say(f"back to step {self.healthy}, and on with {self.cfg.on_alarm}")
        self.writer.back_to(self.folder, self.healthy)
        self.world.on_main(partial(self.rescue.go_back, self.step, self.healthy), otherwise=None)
        self.replica.zero_grad()
        self.instruments.weights_before.clear()
        self.watch, self.notes = Watch(), []
        self.restore(True)

    def save(self):
        """Write a checkpoint of this step, unless a weight or a moment is not finite: then the run has collapsed."""
        if bad := parallel.not_finite(self.model, self.optimizer, self.world):
            self.watch.not_finite(f"{bad} is not finite")
            return
        self.healthy = self.healthy if self.watch.suspicious else self.step
        about = {"architecture": self.cfg.architecture, "metrics_bytes": self.log.metrics_bytes()}
        prune = partial(checkpoint.prune, self.folder, {self.healthy, self.step})
        self.writer.save(self.folder, self.step, self.model, self.optimizer, about, prune)

    def draw(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """This process's inputs and targets of a step, each (micro_batch, block_size), perhaps still being copied."""
        x, y = map(self.world.share, self.train_data.batch(self.cfg.seed, step, self.cfg.batch_size))
        return list(zip(x.split(self.cfg.micro_batch), y.split(self.cfg.micro_batch), strict=True))

    def not_measured(self, why: str):
        """Say and record that something could not be measured at this step."""
        self.log.event("not measured", step=self.step, why=why)
        self.log.say(f"step {self.step}: {why}")


# --- the loop ---


def loop(run: Run, signals: Signals, beat: Callable[[], None]) -> bool:
    """Train until the last step, a non-finite value or a signal to any process. True if a signal stopped it early.

    beat: is called at every step, to tell that the run does not hang.
    """
    cfg, world, watch, clock = run.cfg, run.world, run.watch, run.clock
    parameters = list(run.model.parameters())
    clip_at = cfg.grad_clip if cfg.grad_clip and cfg.optimizer != "zclip" else math.inf  # ZClip clips by itself
    batch = run.draw(run.step + 1)
    while run.step < cfg.max_steps:
        run.step += 1
        run.trace.step(run.step)
        beat()
        clock.to("measure")  # before the update: the weights are still those of this step's loss and gradient
        metrics = run.instruments.before_step(run.step)
        if run.val_data and (due(cfg.eval_every, run.step) or run.step == cfg.max_steps):
            metrics["val/loss"] = validation_loss(run)
        clock.to("forward_backward")
        lr = cfg.lr_at(run.step) * run.rescue.rate
        for group in run.optimizer.param_groups:
            group["lr"] = lr * group["lr_mult"]
        loss = forward_backward(run, batch)
        clock.to("data")
        batch = run.draw(run.step + 1)  # drawn while a GPU still computes
        clock.to("measure")
        metrics |= run.instruments.gradients(run.step)
        clock.to("optimizer")
        grad_norm = parallel.clip_(parameters, clip_at)
        # a step without measurement, validation or MSign waits for the device and the other ranks only here
        signalled = torch.tensor(float(signals.received is not None), device=run.device)
        sums = world.sum(torch.stack([loss / world.size, signalled]))
        loss, signalled, grad_norm = torch.stack([*sums, grad_norm]).tolist()
        clock.settle()
        watch.add(loss, grad_norm)
        if watch.finite:
            metrics |= update(run)
        clock.to("log")
        run.log.log(run.step, {"train/loss": loss, "grad_norm": grad_norm, "lr": lr, **metrics})
        if clock.due:
            run.log.times(clock.line(run.step))
        clock.to("save")
        if watch.finite and (run.step == cfg.max_steps or due(cfg.ckpt_every, run.step)):
            run.save()
        if watch.collapse and watch.collapse.noticed == run.step:
            run.log.event("collapse", **dataclasses.asdict(watch.collapse))
            run.log.say(f"{cfg.name}: {watch.collapse} (last healthy checkpoint: step {run.healthy})")
        if rung := run.rescue.ring(run.step, metrics | {"train/loss": loss}, watch):
            run.log.alarm(run.step, rung)
            if run.rescue.can_go_back:
                run.go_back()
                watch, batch = run.watch, run.draw(run.step + 1)
        if signalled or not watch.finite:
            return bool(signalled) and watch.finite and run.step < cfg.max_steps
    return False


def forward_backward(run: Run, batch: list[tuple[Tensor, Tensor]]) -> Tensor:
    """This process's mean loss, nats per token; .grad then holds the gradient of the mean loss of all processes."""
    loss = torch.zeros((), device=run.device)
    for i, (x, y) in enumerate(batch):
        with run.replica.accumulating(last=i + 1 == run.accumulate):
            with run.autocast:
                part = run.loss_of(x, y) / run.accumulate
            part.backward()
        loss += part.detach()
    return loss


def update(run: Run) -> dict[str, float]:
    """Take the optimizer's step, in which MSign acts when it is due. Returns {metric: value} of the step."""
    metrics, before = {}, counts.copy()
    try:
        run.optimizer.step()
    except NonFiniteWeightError as error:
        run.watch.not_finite(str(error))
    if due(run.cfg.msign_period, run.step):
        new = counts - before
        here = torch.tensor([float(new[key]) for key in ("fallbacks", "matrices")], device=run.device)
        metrics["msign/fallbacks"], metrics["msign/matrices"] = run.world.sum(here).tolist()
    run.replica.zero_grad()
    run.clock.to("measure")
    if due(run.cfg.probe_every, run.step):
        metrics |= rivals.limits(run.optimizer)
    return run.instruments.updates(run.step) | metrics


# --- the end ---


def stop(run: Run, received: signal.Signals) -> int:
    """Save a run that a signal stopped. Returns the exit code."""
    run.save()
    run.writer.wait()
    run.log.times(run.clock.last_line(run.step))
    run.log.event("stopped", signal=received.name, step=run.step)
    run.log.say(f"{received.name}: saved after step {run.step}; go on with --resume")
    run.log.close()
    return 128 + received


def end(run: Run) -> int:
    """Write the summary of a run that took its last step or met a value that is not finite. Returns the exit code."""
    run.writer.wait()
    run.log.times(run.clock.last_line(run.step))
    if not run.world.main:
        return 0
    watch = run.watch
    summary = {
        "status": "finished" if watch.finite else "stopped: not finite",
        "steps": run.step,
        **outcome(read_metrics(run.folder), watch.collapse, run.cfg.lr, run.healthy),
        **(run.rescue.went or {}),
        "tokens_per_second": run.log.tokens_per_second(run.step),
        "peak_memory_gib": machine.peak_memory(run.device) / 2**30,
    }
    run.log.close(summary)
    how = f"{summary['status']} after step {run.step}; {watch.collapse or 'no collapse'}"
    print(f"{run.cfg.name}: {how}; record in {run.folder}")
    return 0


def main() -> int:
    code = train(load_config(sys.argv[1:]))
    parallel.finish()
    return code


if __name__ == "__main__":
    # `record` lets torchrun show the error of the process that failed first
    run_cli(record(main) if "TORCHELASTIC_RUN_ID" in os.environ else main, "train.py", parallel.leave)
