"""`Monitor` in other people's loops: transformers' Trainer, Lightning, accelerate, Weights & Biases.

Each function imports its library when it is called. The options are those of `Monitor`.
"""

from stability.monitor import Monitor


def numbers(report: dict) -> dict[str, float]:
    """The values of a report, which loggers take: without the step, the events and what is not finite."""
    return {name: v for name, v in report.items() if name != "iter" and isinstance(v, int | float)}


def monitor_trainer(trainer, **options):
    """Add a callback to a transformers.Trainer and return it; its `monitor` is made when training starts.

    What is measured joins the Trainer's logs and goes wherever it reports. Raises ValueError unless the Trainer logs
    every step and clips gradients, since it computes their norm only then.
    """
    from transformers import TrainerCallback

    args = trainer.args
    for name, needed, is_so in (
        ("logging_strategy", "'steps'", args.logging_strategy == "steps"),
        ("logging_steps", "1", args.logging_steps == 1),
        ("max_grad_norm", "above 0 (1e9 does not clip)", (args.max_grad_norm or 0) > 0),
    ):
        if not is_so:
            raise ValueError(f"{name} = {getattr(args, name)!r}: must be {needed} for the monitor")

    class MonitorCallback(TrainerCallback):
        monitor: Monitor

        def on_train_begin(self, args, state, control, model, **_):
            self.monitor = Monitor(model, **options)

        def on_optimizer_step(self, args, state, control, **_):
            self.monitor.measure()  # before the Trainer sets the gradients to zero

        def on_log(self, args, state, control, logs, **_):
            if "loss" in logs and "grad_norm" in logs:
                measured = numbers(self.monitor.step(logs["loss"], logs["grad_norm"]))
                logs |= {name: v for name, v in measured.items() if name not in ("loss", "grad_norm")}
                state.log_history[-1] |= logs

        def on_train_end(self, args, state, control, **_):
            self.monitor.close()

    callback = MonitorCallback()
    trainer.callback_handler.callbacks.insert(0, callback)  # ahead of the callbacks that report
    return callback


def lightning_callback(**options):
    """A Lightning callback, for Trainer(callbacks=[…]), that logs to the Trainer's loggers and is in checkpoints."""
    import torch
    from lightning.pytorch import Callback

    class MonitorCallback(Callback):
        monitor: Monitor | None = None
        saved, norm = None, None

        def on_train_start(self, trainer, pl_module):
            self.monitor = Monitor(pl_module, **options)
            if self.saved:
                self.monitor.load_state_dict(self.saved)

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):  # before clipping
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            self.norm = torch.nn.utils.get_total_norm(gradients)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if self.monitor is None or self.norm is None:  # the gradients of more batches are to be added
                return
            report, self.norm = self.monitor.step(outputs["loss"], self.norm), None
            for logger in trainer.loggers:
                logger.log_metrics(numbers(report), step=report["iter"])

        def on_train_end(self, trainer, pl_module):
            if self.monitor:
                self.monitor.close()

        def state_dict(self):
            return self.monitor.state_dict() if self.monitor else {}

        def load_state_dict(self, state_dict):
            self.saved = state_dict

    return MonitorCallback()


def log_to_accelerate(accelerator, report: dict):
    """Log a report of `Monitor.step` to the trackers of an accelerate.Accelerator."""
    accelerator.log(numbers(report), step=report["iter"])


def log_to_wandb(run, report: dict):
    """Log a report of `Monitor.step` to a W&B run, and send an alert for each of its events."""
    run.log(numbers(report), step=report["iter"])
    for event in report["events"]:
        run.alert(title="training moved", text=event, level="WARN")
