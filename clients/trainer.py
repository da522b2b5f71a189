"""The Trainer of transformers as a client, with a small GPT-2 or Llama made from its config class.

MSign goes in through `Trainer(optimizers=…)`, the measurements come from `stability.adapters.monitor_trainer`.
"""

import tempfile

import torch
from torch.utils.data import Dataset

from clients.record import Record, with_msign
from config import Config
from data.reader import TokenFiles
from engine import exchange
from msign import NonFiniteWeightError
from stability.adapters import monitor_trainer

# GPT-2's config class drops a tenth, and names a token that a vocabulary of bytes has not
OTHER = {"gpt2": dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None)}


class Rows(Dataset):
    """A text as consecutive rows of block_size tokens, without overlap; the model shifts the labels itself."""

    def __init__(self, tokens: TokenFiles):
        self.tokens = tokens

    def __len__(self) -> int:
        return int(self.tokens.ends[-1]) // self.tokens.block_size

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        row = self.tokens.windows([i * self.tokens.block_size])[0][0]
        return {"input_ids": row, "labels": row}


def build_model(cfg: Config):
    """The model of transformers with cfg's architecture, its weights drawn by its own rule. UserError: none has it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family = exchange.counterpart(cfg)
    settings = exchange.settings_of(cfg, exchange.FAMILIES[family]) | OTHER.get(family, {})
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))


def build_trainer(cfg: Config, rows: Dataset, folder: str):
    """A Trainer that logs every step, whose optimizer is AdamW with MSign around it, and whose monitor is attached."""
    from transformers import Trainer, TrainingArguments, get_constant_schedule_with_warmup, set_seed

    set_seed(cfg.seed)
    model = build_model(cfg)
    settings = dict(lr=cfg.peak_lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, weight_decay=cfg.weight_decay)
    optimizer = with_msign(torch.optim.AdamW(model.parameters(), **settings), model, cfg)
    arguments = TrainingArguments(
        folder, max_steps=cfg.max_steps, per_device_train_batch_size=cfg.batch_size, max_grad_norm=cfg.grad_clip,
        seed=cfg.seed, use_cpu=True, logging_steps=1, logging_nan_inf_filter=False, save_strategy="no", report_to=[],
        disable_tqdm=True,
    )  # fmt: skip
    scheduler = get_constant_schedule_with_warmup(optimizer, cfg.warmup_steps)
    trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, scheduler))
    monitor_trainer(trainer, every=cfg.probe_every, warn=print)
    return trainer


def recording(record: Record):
    """The callback that hands what the Trainer logs, and the rate of its step, to the record."""
    from transformers import PrinterCallback, TrainerCallback

    class RecordCallback(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer, **_):
            self.lr = optimizer.param_groups[0]["lr"]  # what the Trainer logs is the next step's

        def on_log(self, args, state, control, logs, **_):
            if "loss" in logs:
                record.step(logs["loss"], logs["grad_norm"], self.lr, logs)

    return RecordCallback(), PrinterCallback


def train(cfg: Config):
    """Train `cfg` by the Trainer and record the run."""
    import transformers

    record = Record(cfg, {"name": "transformers.Trainer", "version": transformers.__version__})
    if record.finished:
        return
    stopped = None
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(cfg, Rows(record.tokens), folder)
        callback, printer = recording(record)
        trainer.add_callback(callback)
        trainer.remove_callback(printer)
        try:
            trainer.train()
        except NonFiniteWeightError as error:
            stopped = error
    record.end(stopped)
