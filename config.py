"""The run's configuration: one documented dataclass, read from a config file and the command line.

A config file is Python made of plain assignments to the names below (`lr = 6e-4`); being Python, it
is executed, so run only files you trust. The command line overrides it: `--max_steps=200`.
Anything unknown, ill-typed or contradictory is a `UserError`: one line, exit code 2, nothing written.
"""

import argparse
import dataclasses
import difflib
import math
import re
import shutil
import sys
import tempfile
import textwrap
import traceback
import typing
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent


class UserError(Exception):
    """Bad input. Its message is one line that names the field, the value and what would be right."""


def run_cli(main: Callable[[], int], prog: str, leave: Callable[[int], None] = sys.exit):
    """Run `main()` and leave with the exit code that it returns.

    Bad input or a disk error prints one line on stderr and gives exit code 2. Ctrl-C gives 130. Any other exception
    prints a traceback and gives 1. `leave(code)` ends the process.
    """
    try:
        code = main()
    except (UserError, OSError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except Exception:
        traceback.print_exc()
        code = 1
    leave(code)


@dataclass(frozen=True)
class Number:
    """The numbers of type `kind` from `low` to `high`.

    `value in number` checks a field of Config; number(text) parses an option of argparse.
    """

    kind: type
    low: float
    high: float = math.inf

    @property
    def top(self) -> float:
        """The largest value allowed: `high`, but no more than a 64-bit integer or a float32 can hold."""
        return min(self.high, 2**63 - 1 if self.kind is int else FLOAT32[1])

    def __contains__(self, value) -> bool:
        """Whether value has this kind (an int may stand for a float) and lies in the range."""
        return type(value) in (int, self.kind) and self.low <= value <= self.top

    def allowed(self, value) -> str:
        """The allowed values in words, for a message that refuses `value`: "a whole number of 1 to 8"."""
        kind = "a whole number" if self.kind is int else "a number"
        if self.high < math.inf or (type(value) in (int, float) and self.top < value):
            return f"{kind} of {self.low:g} to {self.top:g}"
        return f"{kind} above 0" if self.low == FLOAT32[0] else f"{kind} of {self.low:g} or more"

    def __call__(self, text: str) -> int | float:
        value = number_in(text, self.kind)
        if value not in self:
            raise argparse.ArgumentTypeError(f"{shown(text)}: must be {self.allowed(value)}")
        return value


FLOAT32 = (2.0**-126, 3.4028234663852886e38)  # the smallest normal float32 and the largest
SIZE, COUNT, POWER = Number(int, 1), Number(int, 0), Number(float, -100, 100)
SECONDS = Number(int, 1, 10**6)
POSITIVE, NOT_NEGATIVE, SHARE = Number(float, FLOAT32[0]), Number(float, 0), Number(float, 0, 1)
BETA = Number(float, 0, 0.999999999)  # the β of a moving average, which is below 1


def opt(default, group: str, help: str, range: Number | None = None):
    """A field of Config, with the group and the text that `--help` prints, and its range."""
    return field(default=default, metadata={"group": group, "help": help, "range": range})


def shown(value) -> str:
    """The value as a message shows it: its repr, shortened."""
    if type(value) is int and value.bit_length() > 256:
        return f"{'-' * (value < 0)}2^{value.bit_length() - 1}…"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def in_float32(value: float) -> bool:
    """Whether value is positive and float32 holds it without underflow or overflow."""
    return FLOAT32[0] <= value <= FLOAT32[1]


def power(base: float, exponent: float) -> float:
    """base^exponent; infinity where it overflows, or where base is 0 and exponent negative."""
    try:
        return base**exponent
    except (OverflowError, ZeroDivisionError):
        return math.inf


@dataclass(frozen=True)
class Config:
    """Every choice of a run. Defaults are the paper's NanoGPT-5M (Table 4) with plain AdamW."""

    # fmt: off
    # model
    n_layer: int = opt(24, "model", "blocks", SIZE)
    d_model: int = opt(48, "model", "width of the residual stream", SIZE)
    n_head: int = opt(6, "model", "attention heads; must divide d_model", SIZE)
    d_ff: int = opt(192, "model", "hidden width of the MLP, or of each expert's", SIZE)
    vocab_size: int = opt(50304, "model", "rows of the embedding and of the untied head", SIZE)
    block_size: int = opt(256, "model", "context length in tokens", SIZE)
    norm: Literal["layernorm", "rmsnorm"] = opt(
        "layernorm", "model", "norm in every block and before the head, with gains")
    mlp: Literal["gelu", "swiglu"] = opt("gelu", "model", "plain MLP with GELU | gated with SiLU, three matrices")
    position: Literal["learned", "rope", "none"] = opt(
        "learned", "model", "embedding | rotated queries and keys | none")
    rope_theta: float = opt(10_000.0, "model", "θ of RoPE, whose angles are position · θ^(−2i/width)", POSITIVE)
    attention: Literal["mha", "mla", "alternating"] = opt(
        "mha", "model", "multi-head | latent | MHA in even blocks, MLA in odd ones")
    qk_norm: bool = opt(False, "model", "normalise every head's queries and keys, with gains")
    logit_cap: float = opt(
        0.0, "model", "cap c of attention logits a, which become c · tanh(a / c) as in Gemma 2; 0 = off", NOT_NEGATIVE)
    n_kv_head: int = opt(0, "model", "heads of keys and values in MHA; 0 = n_head; must divide n_head", COUNT)
    mla_rank: int = opt(0, "model", "MLA's latent dimensions", COUNT)
    mla_rope_dim: int = opt(0, "model", "MLA's rotary dimensions with position = rope; 0 = no positions in MLA", COUNT)
    n_experts: int = opt(0, "model", "experts of the MLP; 0 = a dense one", COUNT)
    top_k: int = opt(4, "model", "experts that a token goes to", SIZE)
    # parameterisation
    init_std: float = opt(0.02, "parameterisation", "initial standard deviation before multipliers", POSITIVE)
    base_width: int = opt(
        768, "parameterisation", "width at which μP's multipliers are 1; 0 = standard parameterisation", COUNT)
    embed_lr_power: float = opt(
        0.5, "parameterisation", "embedding's lr × (base_width/d_model)^this; paper 0.5, nanoGPT-mup 0", POWER)
    logit_power: float = opt(
        0.0, "parameterisation", "logits × (base_width/d_model)^this; paper 0, nanoGPT-mup 1", POWER)
    attn_scale_power: float = opt(
        0.5, "parameterisation", "attention logits ÷ (width of a head's queries)^this; paper 0.5, nanoGPT-mup 1", POWER)
    attn_lr: float = opt(1.0, "parameterisation", "learning rate of attention's matrices × this", POSITIVE)
    norm_lr: float = opt(1.0, "parameterisation", "learning rate of the norms' gains × this", POSITIVE)
    head_lr: float = opt(1.0, "parameterisation", "learning rate of the head × this", POSITIVE)
    # data
    dataset: str = opt("openwebtext", "data", "a folder below data/, or a path to a folder of .bin files")
    fallback: str = opt(
        "", "data", "corpora, comma-separated; the first prepared one is used, with a warning, if dataset is not")
    batch_size: int = opt(480, "data", "sequences a step", SIZE)
    micro_batch: int = opt(12, "data", "sequences a forward pass; must divide batch_size", SIZE)
    # optimizer
    optimizer: Literal["adamw", "spam", "stable_spam", "adagc", "muon", "spectral_sphere", "zclip"] = opt(
        "adamw", "optimizer",
        "AdamW, or a rival that uses AdamW's rates and decays (remedies/rivals.py), on one process or with DDP")
    lr: float = opt(6e-4, "optimizer", "learning rate of parameters whose multiplier is 1", POSITIVE)
    lr_scale: float = opt(1.0, "optimizer", "peak of the schedule as a multiple of lr", POSITIVE)
    schedule: Literal["linear", "constant"] = opt("linear", "optimizer", "after warm-up: linear decay | constant")
    warmup_steps: int = opt(2000, "optimizer", "steps of the linear warm-up", COUNT)
    min_lr_ratio: float = opt(0.1, "optimizer", "end of the linear decay as a share of the peak", SHARE)
    max_steps: int = opt(50_000, "optimizer", "steps of the run, and horizon of the schedule", SIZE)
    beta1: float = opt(0.9, "optimizer", "AdamW β₁", BETA)
    beta2: float = opt(0.95, "optimizer", "AdamW β₂", BETA)
    eps: float = opt(1e-8, "optimizer", "AdamW ε", POSITIVE)
    weight_decay: float = opt(
        0.1, "optimizer",
        "AdamW's λ; with decay_coupling = independent, the share that a weight loses in a step at the peak rate",
        NOT_NEGATIVE)
    decay_coupling: Literal["coupled", "independent"] = opt(
        "coupled", "optimizer", "decay a step: coupled lr·λ as in PyTorch | independent λ·lr/peak")
    grad_clip: float = opt(
        1.0, "optimizer", "largest global gradient norm; 0 = off; with optimizer = zclip, ZClip clips at it",
        NOT_NEGATIVE)
    logit_trust: float = opt(
        0.0, "optimizer", "largest move of an input's attention logit in a step, nats (remedies/trust.py); 0 = off",
        NOT_NEGATIVE)
    logit_clip: float = opt(
        0.0, "optimizer", "largest attention logit that the weights allow an input, nats (remedies/clip.py); 0 = off",
        NOT_NEGATIVE)
    logit_clip_map: Literal["clip", "scale"] = opt(
        "clip", "optimizer",
        "clip = the singular values of W_QᵀW_K that exceed logit_clip | scale = the whole W_Q and W_K, as QK-clip does")
    balance_coef: float = opt(0.01, "optimizer", "weight of the experts' load-balancing loss", NOT_NEGATIVE)
    # MSign
    msign_period: int = opt(0, "MSign", "steps between two applications of MSign; 0 = never (no MSign)", COUNT)
    msign_targets: str = opt(
        "attention", "MSign", "attention | mlp | blocks | matrix names or patterns, comma-separated (W_V,W_O)")
    msign_backend: Literal["auto", "eigh", "svd", "polar"] = opt(
        "auto", "MSign",
        "auto = polar on CUDA, else eigh | eigh = fp64 Gram matrix | svd = fp32, the paper's | polar = fp16 products")
    msign_map: Literal["sign", "zero", "scale", "clip", "soft", "random"] = opt(
        "sign", "MSign",
        "sign = MSign; the others are controls (remedies/controls.py): zero = 0 | scale = W at MSign's spectral norm | "
        "clip = singular values limited to it | soft = their square roots | random = a random orthogonal matrix; "
        "the last two keep ‖W‖_F")
    msign_below: float = opt(0.0, "MSign", "only the matrices whose stable rank is below this; 0 = all", NOT_NEGATIVE)
    msign_reset: bool = opt(False, "MSign", "after each application also set the targets' moments and step counts to 0")
    # measurements
    probe_every: int = opt(
        50, "measurements", "steps between spectra, norms of gradients and updates, activations; 0 = never", COUNT)
    layers_every: int = opt(
        250, "measurements", "steps between records of every single layer, a multiple of probe_every; 0 = never", COUNT)
    jacobian_every: int = opt(1000, "measurements", "steps between layer Jacobians; 0 = never", COUNT)
    jacobian_positions: int = opt(0, "measurements", "single tokens measured together with layer Jacobians", COUNT)
    theory_every: int = opt(0, "measurements", "steps between measurements of the paper's theorems; 0 = never", COUNT)
    msign_probe: bool = opt(False, "measurements", "also measure right before and after every MSign application")
    probe_batch: int = opt(2, "measurements", "sequences in the probe batch, which is always the same", SIZE)
    eval_every: int = opt(500, "measurements", "steps between validation losses; 0 = never", COUNT)
    eval_batches: int = opt(8, "measurements", "micro-batches of the fixed validation set", SIZE)
    # run
    on_alarm: Literal["off", "tell", "remedy", "half_rate"] = opt(
        "off", "run", "when a collapse is near or there (stability/rescue.py): tell = say so | remedy = go back to the "
        "last healthy checkpoint and on with logit_trust, off until then | half_rate = the same at half the rate")
    name: str = opt("", "run", "folder below runs_dir; default: the config file's name")
    runs_dir: str = opt("runs", "run", "where run folders go")
    init_from: str = opt(
        "", "run", "start from the weights in this folder: a GPT-2, Llama, Mistral, Mixtral or Qwen3 of transformers")
    resume: bool = opt(False, "run", "go on from the run's last checkpoint")
    dry_run: bool = opt(False, "run", "print the plan and stop before the first step")
    ckpt_every: int = opt(500, "run", "steps between checkpoints; 0 = only at the end", COUNT)
    seed: int = opt(0, "run", "random seed of the initial weights and of the batches", COUNT)
    device: str = opt("auto", "run", "auto | cpu | cuda | cuda:N | mps")
    dtype: Literal["float32", "bfloat16"] = opt("float32", "run", "bfloat16 = autocast")
    attn_kernel: Literal["auto", "chunked", "math", "flash", "efficient", "cudnn"] = opt(
        "auto", "run", "auto = chunked, model.py's own, for heads up to 64 on a CPU, else PyTorch's choice")
    compile: Literal["off", "blocks", "whole"] = opt(
        "off", "run", "torch.compile each block (fast to start) | the whole loss; on a GPU with CUDA graphs if a step "
        "has one micro-batch")
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = opt(
        "auto", "run", "with several processes: ddp = a whole model on each | fsdp = shards | hsdp = shards within a "
        "node, replicas across nodes | auto = the first that fits of ddp, hsdp, fsdp")
    recompute: int = opt(
        0, "run", "the first blocks, this many, keep only their inputs and are computed again in the backward pass",
        COUNT)
    deterministic: bool = opt(False, "run", "on a GPU, only kernels that repeat every bit; slower")
    threads: int = opt(0, "run", "CPU threads; 0 = PyTorch's choice", Number(int, 0, 1024))
    patience: int = opt(
        600, "run", "seconds that a process waits for the others in training, before which all write their stacks",
        SECONDS)
    start_patience: int = opt(1800, "run", "seconds that a process waits for the others before step 1", SECONDS)
    profile: str = opt("", "run", "START:STOP = write a trace of these steps, both included, by PyTorch's profiler")
    wandb: Literal["auto", "online", "offline", "off"] = opt(
        "auto", "run", "auto = online when logged in, else offline")
    wandb_project: str = opt("msign", "run", "W&B project")
    wandb_group: str = opt("", "run", "W&B group; default: the config file's name")
    # fmt: on
    def __post_init__(self):
        for f in dataclasses.fields(self):
            check_type(f, getattr(self, f.name))
        for holds, name, right in (*self._model_rules(), *self._run_rules()):
            if not holds:
                raise UserError(f"{name} = {shown(getattr(self, name))}: must be {right}")

    def _model_rules(self):
        """Rules between fields that concern the model: (whether it holds, the field to blame, what would be right)."""
        below = range(min(self.n_head, self.d_model), 0, -1)[:10_000]  # a search that ends soon for any number
        near = next((n for n in below if self.d_model % n == 0), 1)
        yield self.d_model % self.n_head == 0, "n_head", f"a divisor of d_model={self.d_model}, such as {near}"
        d_head = max(1, self.d_model // self.n_head)
        kv_fits = not self.n_kv_head or self.n_head % self.n_kv_head == 0
        yield kv_fits, "n_kv_head", f"a divisor of n_head={self.n_head}"
        if self.logit_cap:  # only plain products compute it
            yield self.attn_kernel == "auto", "attn_kernel", f"auto with logit_cap={self.logit_cap:g}"
        mla = self.attention != "mha"
        if mla:
            yield self.mla_rank > 0, "mla_rank", f"above 0 with attention={self.attention!r}"
            yield self.mla_rope_dim % 2 == 0, "mla_rope_dim", "even"
        if self.position == "rope" and self.attention != "mla":
            yield d_head % 2 == 0, "n_head", f"such that heads have an even width for RoPE, not {d_head}"
        if self.n_experts:
            yield self.n_experts >= self.top_k, "n_experts", f"at least top_k={self.top_k}, or 0"
        # every factor that the model multiplies with has to be a number that float32 holds
        d_qk = d_head + (self.mla_rope_dim if mla and self.position == "rope" else 0)
        for base, name in ((self.width_mult, "embed_lr_power"), (self.width_mult, "logit_power"),
                           (1 / d_qk, "attn_scale_power")):  # fmt: skip
            right = f"a power of {base:g} that float32 holds, such as {FIELDS[name].default:g}"
            yield in_float32(power(base, getattr(self, name))), name, right

    def _run_rules(self):
        """Rules between fields that concern training and measuring, in the form of `_model_rules`."""
        yield self.batch_size % self.micro_batch == 0, "micro_batch", f"a divisor of batch_size={self.batch_size}"
        if self.layers_every and self.probe_every:
            multiple = self.layers_every % self.probe_every == 0
            yield multiple, "layers_every", f"a multiple of probe_every={self.probe_every}"
        inside = self.jacobian_positions < self.block_size
        yield inside, "jacobian_positions", f"0 or more, and below block_size={self.block_size}"
        if self.theory_every:  # the paper's theorems are about this architecture
            as_stated = (self.norm, self.mlp, self.attention, self.n_experts) == ("layernorm", "gelu", "mha", 0)
            as_stated = as_stated and self.position != "rope" and not self.qk_norm and not self.logit_cap
            as_stated = as_stated and self.n_kv_head in (0, self.n_head)
            right = "0 unless the model is dense, with LayerNorm, GELU, MHA, n_kv_head = n_head, no RoPE, QK-norm, cap"
            yield as_stated, "theory_every", right
        if self.msign_probe:
            yield self.msign_period > 0, "msign_probe", "False when msign_period = 0"
        if self.decay_coupling == "independent":
            right = "below 0.01, such as 1e-4, with decay_coupling='independent': the share lost in a step"
            yield self.weight_decay < 0.01, "weight_decay", right
        shared = self.attention != "mha" and self.position == "rope" and self.mla_rope_dim
        for name in ("logit_trust", "logit_clip"):  # their bounds are ones of these logits
            bounded = not self.qk_norm and not shared
            yield bounded or not getattr(self, name), name, "0 with qk_norm, and with RoPE in MLA (mla_rope_dim)"
        if self.on_alarm == "remedy":
            yield self.logit_trust > 0, "on_alarm", "off, tell or half_rate with logit_trust=0, or logit_trust above 0"
        if self.on_alarm in ("remedy", "half_rate"):
            yield self.ckpt_every > 0, "ckpt_every", f"above 0 with on_alarm={self.on_alarm!r}, which goes back to one"
        if self.optimizer != "adamw":
            yield self.parallel in ("auto", "ddp"), "parallel", f"ddp or auto with optimizer={self.optimizer!r}"
        right = f"START:STOP with 1 ≤ START ≤ STOP ≤ max_steps={self.max_steps}"
        yield not self.profile or len(self.profiled) > 0, "profile", right
        a_name = self.name == Path(self.name).name and self.name not in (".", "..")
        yield a_name and len(self.name.encode()) <= 200, "name", "a single folder name of at most 200 bytes"
        for name in ("dataset", "fallback", "runs_dir", "init_from"):
            longest = max(len(part.encode()) for part in re.split("[/,]", getattr(self, name)))
            yield longest <= 255, name, "a path whose parts have at most 255 bytes each"

    @property
    def architecture(self) -> dict:
        """{field: value} of the fields that a checkpoint must agree with: those of the group "model"."""
        return {name: getattr(self, name) for name, f in FIELDS.items() if f.metadata["group"] == "model"}

    @property
    def width_mult(self) -> float:
        """m = base_width / d_model, the m of every μP rule; 1 under the standard parameterisation."""
        return self.base_width / self.d_model if self.base_width else 1.0

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.block_size

    @property
    def profiled(self) -> range:
        """The steps that cfg.profile names, of those from 1 to max_steps."""
        if not (found := re.fullmatch("([0-9]{1,19}):([0-9]{1,19})", self.profile)):
            return range(0)
        start, stop = map(int, found.groups())
        return range(start, stop + 1) if start >= 1 and stop <= self.max_steps else range(0)

    @property
    def peak_lr(self) -> float:
        return self.lr * self.lr_scale

    def lr_at(self, step: int) -> float:
        """Learning rate of a 1-indexed step, before the μP multipliers."""
        if step <= self.warmup_steps:
            return self.peak_lr * step / self.warmup_steps
        if self.schedule == "constant":
            return self.peak_lr
        done = (step - self.warmup_steps) / (self.max_steps - self.warmup_steps)
        return self.peak_lr * (1 - (1 - self.min_lr_ratio) * done)


FIELDS = {f.name: f for f in dataclasses.fields(Config)}
GROUPS: dict[str, list[dataclasses.Field]] = {}
for _f in FIELDS.values():
    GROUPS.setdefault(_f.metadata["group"], []).append(_f)


def up_to_date(recorded: dict) -> dict:
    """A recorded configuration with every field of this version.

    A field that did not exist then had its default value, and `recompute` was all blocks (True) or none.
    """
    fields = {name: f.default for name, f in FIELDS.items()} | recorded
    if type(fields["recompute"]) is bool:
        fields["recompute"] *= fields["n_layer"]
    return fields


def choices_of(f: dataclasses.Field) -> tuple[str, ...]:
    """The values of a field that has a few named ones; () for any other."""
    return typing.get_args(f.type) if typing.get_origin(f.type) is Literal else ()


def due(every: int, step: int) -> bool:
    """Whether an action that is taken every `every` steps (0: never) is due at `step`; steps count from 1."""
    return bool(every) and step % every == 0


def check_type(f: dataclasses.Field, value):
    """Raise UserError unless `value` has the field's declared type and lies in its range."""
    limits = f.metadata["range"]
    if choices := choices_of(f):
        holds, right = value in choices, f"one of {', '.join(choices)}"
    elif limits:
        holds, right = value in limits, limits.allowed(value)
    elif f.type is bool:
        holds, right = type(value) is bool, "True or False"
    else:  # no path, record or message of one line can hold control characters and surrogates
        unfit = {"Cc", "Cs", "Zl", "Zp"}
        holds = type(value) is str and not unfit & set(map(unicodedata.category, value)) and len(value.encode()) <= 2000
        right = "a string of at most 2000 bytes without control characters"
    if not holds:
        raise UserError(f"{f.name} = {shown(value)}: must be {right}")


def nearest(name: str, names: Iterable[str]) -> str:
    """The entry of `names` that is most like `name`."""
    return difflib.get_close_matches(name[:100], names, n=1, cutoff=0)[0]


def unknown_key(name: str, where: str) -> UserError:
    return UserError(f"{shown(name)}: no such field ({where}); nearest is {nearest(name, FIELDS)}")


def number_in(text: str, kind: type) -> int | float | str:
    """The text as a number of that kind, or the text itself if it is no such number."""
    try:
        return kind(text)
    except ValueError:
        return text


def parse_value(f: dataclasses.Field, text: str):
    """The command line's text as the field's type. A text that does not parse is returned; check_type refuses it."""
    if f.type is bool:
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
    return number_in(text, f.type) if f.type in (int, float) else text


def assignments(path: Path) -> dict:
    """{name: value} of a file of plain assignments, without names that begin with an underscore.

    Raises UserError if the file does not run.
    """
    values = {}
    try:
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), values)
    except Exception as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    return {k: v for k, v in values.items() if not k.startswith("_")}


def read_config_file(path: str | Path) -> dict:
    """The assignments of a config file as a dict.

    Raises UserError for a missing file, an unknown field or a wrong value.
    """
    path = Path(path)
    if not path.is_file():
        near = nearest(path.stem, [p.stem for p in sorted((ROOT / "configs").glob("*.py"))])
        raise UserError(f"{shown(str(path))}: no such config file; nearest is configs/{near}.py")
    values = assignments(path)
    for name, value in values.items():
        if name not in FIELDS:
            raise unknown_key(name, f"in {path}")
        check_type(FIELDS[name], value)
    return values


class Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors."""

    def error(self, message):
        raise UserError(message)


def output_folder(text: str) -> Path:
    """`type=` of an argparse option: a writable folder, created while parsing, so that a bad path fails at once."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        right = f"must be a place that can be written to ({error.strerror})"
        raise argparse.ArgumentTypeError(f"{text!r}: {right}") from error
    return path


def output_stem(text: str) -> Path:
    """`type=` of an argparse option: the beginning of a file's path, whose folder is created and must be writable."""
    return output_folder(str(Path(text).parent)) / Path(text).name


def parser_of(groups: dict[str, list[dataclasses.Field]]) -> Parser:
    """The parser of train.py's command line, with the fields of `groups` as its options."""
    parser = Parser(
        prog="train.py", usage="train.py CONFIG.py [--field=value ...]", description="Train a GPT with AdamW or MSign.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=120),
        allow_abbrev=False, add_help=False,
    )  # fmt: skip
    parser.add_argument("config", help="a file of plain assignments, such as configs/nano_5m_msign.py")
    parser.add_argument("-h", "--help", nargs="?", const="", action=Help, help="this; a group, a field, or all")
    for group, fields in groups.items():
        options = parser.add_argument_group(group)
        for f in fields:
            metavar = "|".join(choices_of(f)) or f.type.__name__.upper()
            flag = {"nargs": "?", "const": "true"} if f.type is bool else {}
            help = f"{f.metadata['help']} [{f.default}]".replace("%", "%%")
            options.add_argument(f"--{f.name}", metavar=metavar, help=help, **flag)
    return parser


class Help(argparse.Action):
    """`--help` prints every field with its default on one screen; `--help=GROUP`, `=FIELD` or `=all` explains them."""

    def __call__(self, parser, namespace, what, option_string=None):
        one = {name: {f.metadata["group"]: [f]} for name, f in FIELDS.items()}
        known = {"all": GROUPS, **{group: {group: fields} for group, fields in GROUPS.items()}, **one}
        if what and what not in known:
            raise UserError(f"help = {shown(what)}: no such group or field; nearest is {nearest(what, known)}")
        if what:
            print(parser_of(known[what]).format_help(), end="")
            parser.exit()
        print("train.py CONFIG.py [--field=value ...]\n")
        print("Every field and its default; --help=GROUP, --help=FIELD or --help=all says what they mean.")
        width = min(118, shutil.get_terminal_size().columns)
        for group, fields in GROUPS.items():
            line = f"{group:17} " + "  ".join(f"{f.name}={f.default}" for f in fields)
            print(textwrap.fill(line, width, subsequent_indent=" " * 18, break_on_hyphens=False))
        parser.exit()


def load_config(argv: list[str]) -> Config:
    """`CONFIG.py [--field=value ...]` as a Config. Raises UserError; `--help` prints and exits 0."""
    args, rest = parser_of(GROUPS).parse_known_args(argv)
    for text in rest:
        if text.startswith("-"):
            raise unknown_key(text.lstrip("-").split("=")[0].replace("-", "_"), "on the command line")
        raise UserError(f"{shown(text)}: unexpected; overrides are written --field=value")
    given = {name: parse_value(FIELDS[name], v) for name, v in vars(args).items() if v is not None and name != "config"}
    values = read_config_file(args.config) | given
    stem = Path(args.config).stem
    return Config(**{"wandb_group": stem} | values | {"name": values.get("name") or stem})
