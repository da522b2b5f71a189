"""The run's configuration: one documented dataclass, read from a config file and the command line.

A config file is Python made of plain assignments to the names below (`lr = 6e-4`); being Python, it
is executed, so run only files you trust. The command line overrides it: `--max_steps=200`.
Anything unknown, ill-typed or contradictory is a `UserError`: one line, exit code 2, nothing written.
"""

import argparse
import dataclasses
import difflib
import math
import shutil
import sys
import tempfile
import textwrap
import traceback
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent


class UserError(Exception):
    """Bad input. Its message is one line that names the field, the value and what would be right."""


def run_cli(main: Callable[[], int], prog: str, leave: Callable[[int], None] = sys.exit):
    """Run `main()` and leave with the exit code that it returns.

    Bad input and a disk that refuses are one line on stderr and exit code 2; Ctrl-C is 130; any other exception is a traceback and 1.
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


def opt(default, group: str, help: str):
    return field(default=default, metadata={"group": group, "help": help})


@dataclass(frozen=True)
class Config:
    """Every choice of a run. Defaults are the paper's NanoGPT-5M (Table 4) with plain AdamW."""

    # fmt: off
    # model
    n_layer: int = opt(24, "model", "blocks")
    d_model: int = opt(48, "model", "width of the residual stream")
    n_head: int = opt(6, "model", "attention heads; must divide d_model")
    d_ff: int = opt(192, "model", "hidden width of the MLP, or of each expert's")
    vocab_size: int = opt(50304, "model", "rows of the embedding and of the untied head")
    block_size: int = opt(256, "model", "context length in tokens")
    norm: Literal["layernorm", "rmsnorm"] = opt("layernorm", "model", "of every block and of the output, with gains")
    mlp: Literal["gelu", "swiglu"] = opt("gelu", "model", "plain MLP with GELU | gated with SiLU, three matrices")
    position: Literal["learned", "rope", "none"] = opt("learned", "model", "an embedding | rotated queries and keys | none")
    rope_theta: float = opt(10_000.0, "model", "base of RoPE's wavelengths")
    attention: Literal["mha", "mla", "alternating"] = opt("mha", "model", "multi-head | latent | MHA in even blocks, MLA in odd ones")
    qk_norm: bool = opt(False, "model", "normalise every head's queries and keys, with gains (MHA only)")
    n_kv_head: int = opt(0, "model", "heads of keys and values in MHA; 0 = n_head; must divide n_head")
    mla_rank: int = opt(0, "model", "MLA's latent dimensions")
    mla_rope_dim: int = opt(0, "model", "MLA's rotary dimensions with position = rope; 0 = no positions in MLA")
    n_experts: int = opt(0, "model", "experts of the MLP; 0 = a dense one")
    top_k: int = opt(4, "model", "experts that a token goes to")
    balance_coef: float = opt(0.01, "optimizer", "of the experts' load-balancing loss")
    # parameterisation
    init_std: float = opt(0.02, "parameterisation", "initial standard deviation before multipliers")
    base_width: int = opt(768, "parameterisation", "width at which μP's multipliers are 1; 0 = standard parameterisation")
    embed_lr_power: float = opt(0.5, "parameterisation", "embedding lr × (base_width/d_model)^this; paper 0.5, practice 0")
    logit_power: float = opt(0.0, "parameterisation", "logits × (base_width/d_model)^this; paper 0, practice 1")
    attn_scale_power: float = opt(0.5, "parameterisation", "attention logits ÷ d_head^this; paper 0.5, practice 1")
    attn_lr: float = opt(1.0, "parameterisation", "learning rate of attention's matrices × this")
    norm_lr: float = opt(1.0, "parameterisation", "learning rate of the norms' gains × this")
    head_lr: float = opt(1.0, "parameterisation", "learning rate of the read-out × this")
    # data
    dataset: str = opt("openwebtext", "data", "a folder below data/, or a path to a folder of .bin files")
    fallback: str = opt("", "data", "corpora to use, with a warning, when dataset is not prepared: the first that is, comma-separated")
    batch_size: int = opt(480, "data", "sequences a step")
    micro_batch: int = opt(12, "data", "sequences a forward pass; must divide batch_size")
    # optimizer
    optimizer: Literal["adamw", "spam", "stable_spam", "adagc", "muon", "spectral_sphere", "zclip"] = opt("adamw", "optimizer", "AdamW | a rival with AdamW's rates and decays (rivals.py); one process or DDP")
    lr: float = opt(6e-4, "optimizer", "learning rate of parameters whose multiplier is 1")
    lr_scale: float = opt(1.0, "optimizer", "peak of the schedule as a multiple of lr")
    schedule: Literal["linear", "constant"] = opt("linear", "optimizer", "after warm-up: linear decay | constant")
    warmup_steps: int = opt(2000, "optimizer", "linear warm-up")
    min_lr_ratio: float = opt(0.1, "optimizer", "end of the linear decay as a share of the peak")
    max_steps: int = opt(50_000, "optimizer", "steps of the run, and horizon of the schedule")
    beta1: float = opt(0.9, "optimizer", "AdamW β₁")
    beta2: float = opt(0.95, "optimizer", "AdamW β₂")
    eps: float = opt(1e-8, "optimizer", "AdamW ε")
    weight_decay: float = opt(0.1, "optimizer", "AdamW's λ; with independent decay, the share lost a step at the peak")
    decay_coupling: Literal["coupled", "independent"] = opt("coupled", "optimizer", "decay a step: coupled lr·λ as in PyTorch | independent λ·lr/peak")
    grad_clip: float = opt(1.0, "optimizer", "largest global gradient norm (ZClip takes it over); 0 = off")
    # MSign
    msign_period: int = opt(0, "MSign", "apply every so many steps; 0 = never (plain AdamW)")
    msign_targets: str = opt("attention", "MSign", "attention | mlp | blocks | matrix names or patterns, comma-separated (W_V,W_O)")
    msign_backend: Literal["auto", "eigh", "svd", "polar"] = opt("auto", "MSign", "auto = polar on CUDA, else eigh | eigh = fp64 Gram matrix | svd = fp32, the paper's letter | polar = fp32 products")
    msign_map: Literal["sign", "zero", "scale", "clip", "soft", "random"] = opt("sign", "MSign", "replace W by its norm-restored sign | a control (controls.py): 0, W at the sign's spectral norm, singular values clipped at it, square-rooted singular values, a random sign")
    msign_below: float = opt(0.0, "MSign", "only the matrices whose stable rank is below this; 0 = all")
    msign_reset: bool = opt(False, "MSign", "also start its targets' moments anew")
    # measurements
    probe_every: int = opt(50, "measurements", "steps between spectra, norms of gradients and updates, activations; 0 = never")
    layers_every: int = opt(250, "measurements", "steps between every layer's own values, a multiple of probe_every; 0 = never")
    jacobian_every: int = opt(1000, "measurements", "steps between layer Jacobians; 0 = never")
    jacobian_positions: int = opt(0, "measurements", "with them, this many single tokens' own Jacobians")
    theory_every: int = opt(0, "measurements", "steps between both sides of the paper's theorems; 0 = never")
    msign_probe: bool = opt(False, "measurements", "also measure right before and after every MSign application")
    probe_batch: int = opt(2, "measurements", "sequences that are measured on, always the same")
    eval_every: int = opt(500, "measurements", "steps between validation losses; 0 = never")
    eval_batches: int = opt(8, "measurements", "micro-batches of the fixed validation set")
    # run
    name: str = opt("", "run", "folder below runs_dir; default: the config file's name")
    runs_dir: str = opt("runs", "run", "where run folders go")
    resume: bool = opt(False, "run", "go on from the run's last checkpoint")
    dry_run: bool = opt(False, "run", "print the plan and stop before the first step")
    ckpt_every: int = opt(500, "run", "steps between checkpoints; 0 = only at the end")
    seed: int = opt(0, "run", "of the initial weights and of the batches")
    device: str = opt("auto", "run", "auto | cpu | cuda | cuda:N | mps")
    dtype: Literal["float32", "bfloat16"] = opt("float32", "run", "bfloat16 = autocast")
    attn_kernel: Literal["auto", "chunked", "math", "flash", "efficient", "cudnn"] = opt("auto", "run", "auto = chunked, model.py's own, for heads up to 64 on a CPU, else PyTorch's choice")
    compile: Literal["off", "blocks", "whole"] = opt("off", "run", "torch.compile each block (fast to start) | the whole loss, with CUDA graphs on a GPU")
    parallel: Literal["auto", "ddp", "fsdp"] = opt("auto", "run", "with several processes: ddp = a whole model on each | fsdp = shards | auto = ddp where it fits")
    recompute: bool = opt(False, "run", "keep only the blocks' inputs, compute them again in the backward pass")
    threads: int = opt(0, "run", "CPU threads; 0 = PyTorch's choice")
    wandb: Literal["auto", "online", "offline", "off"] = opt("auto", "run", "auto = online when logged in, else offline")
    wandb_project: str = opt("msign", "run", "W&B project")
    wandb_group: str = opt("", "run", "W&B group; default: the config file's name")
    # fmt: on

    def __post_init__(self):
        for f in dataclasses.fields(self):
            check_type(f, getattr(self, f.name))
        positive = (
            "n_layer d_model n_head d_ff vocab_size block_size batch_size micro_batch max_steps eval_batches probe_batch"
            " lr lr_scale eps init_std top_k rope_theta attn_lr norm_lr head_lr"
        )
        not_negative = (
            "base_width warmup_steps weight_decay grad_clip msign_period msign_below probe_every layers_every jacobian_every theory_every eval_every ckpt_every seed"
            " threads min_lr_ratio n_kv_head mla_rank mla_rope_dim n_experts balance_coef"
        )
        for name in positive.split():
            self._require(getattr(self, name) > 0, name, "a number above 0")
        for name in not_negative.split():
            self._require(getattr(self, name) >= 0, name, "0 or more")
        for name in ("beta1", "beta2"):
            self._require(0 <= getattr(self, name) < 1, name, "at least 0 and below 1")
        self._require(self.min_lr_ratio <= 1, "min_lr_ratio", "at most 1")
        if self.d_model % self.n_head:
            fits = [h for h in range(1, self.d_model + 1) if self.d_model % h == 0]
            near = min(fits, key=lambda h: abs(h - self.n_head))
            self._require(False, "n_head", f"a divisor of d_model={self.d_model}, such as {near}")
        if self.n_kv_head:
            self._require(self.n_head % self.n_kv_head == 0, "n_kv_head", f"a divisor of n_head={self.n_head}")
        self._require(
            not self.qk_norm or self.attention == "mha", "qk_norm", f"False with attention={self.attention!r}"
        )
        if self.attention != "mha":
            self._require(self.mla_rank > 0, "mla_rank", f"above 0 with attention={self.attention!r}")
            self._require(self.mla_rope_dim % 2 == 0, "mla_rope_dim", "even")
        if self.position == "rope" and self.attention != "mla":
            d_head = self.d_model // self.n_head
            self._require(d_head % 2 == 0, "n_head", f"such that heads have an even width for RoPE, not {d_head}")
        if self.n_experts:
            self._require(self.n_experts >= self.top_k, "n_experts", f"at least top_k={self.top_k}, or 0")
        if self.theory_every:
            as_stated = (self.norm, self.mlp, self.attention, self.n_experts) == ("layernorm", "gelu", "mha", 0)
            as_stated = as_stated and self.position != "rope" and not self.n_kv_head and not self.qk_norm
            self._require(
                as_stated,
                "theory_every",
                "0 for anything but the dense model with LayerNorm, GELU, MHA, no RoPE, no QK-norm",
            )
        self._require(
            self.batch_size % self.micro_batch == 0, "micro_batch", f"a divisor of batch_size={self.batch_size}"
        )
        if self.layers_every and self.probe_every:
            whole = self.layers_every % self.probe_every == 0
            self._require(whole, "layers_every", f"a multiple of probe_every={self.probe_every}")
        fits = 0 <= self.jacobian_positions < self.block_size
        self._require(fits, "jacobian_positions", f"0 or more, and below block_size={self.block_size}")
        self._require(self.msign_period or not self.msign_probe, "msign_probe", "False when msign_period = 0")
        if self.decay_coupling == "independent":
            self._require(self.weight_decay < 0.01, "weight_decay", "a share lost per step, such as 1e-4")
        if self.optimizer != "adamw":
            self._require(self.parallel != "fsdp", "parallel", f"ddp or auto with optimizer={self.optimizer!r}")
        name_ok = self.name == Path(self.name).name and self.name not in (".", "..")
        self._require(name_ok, "name", "a single folder name")

    def _require(self, ok: bool, name: str, right: str):
        if not ok:
            raise UserError(f"{name} = {getattr(self, name)!r}: must be {right}")

    @property
    def width_mult(self) -> float:
        """m = base_width / d_model, the m of every μP rule; 1 under the standard parameterisation."""
        return self.base_width / self.d_model if self.base_width else 1.0

    @property
    def architecture(self) -> dict:
        """{field: value} of the fields that decide the shape of the model."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata["group"] == "model"}

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.block_size

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


def due(every: int, step: int) -> bool:
    """Whether what is done every so many steps (0: never) is done at this one; steps count from 1."""
    return bool(every) and step % every == 0


def check_type(f: dataclasses.Field, value):
    """Raise UserError unless `value` is of the field's declared type (an int may stand for a float)."""
    if typing.get_origin(f.type) is Literal:
        choices = typing.get_args(f.type)
        if value not in choices:
            raise UserError(f"{f.name} = {value!r}: must be one of {', '.join(choices)}")
        return
    wanted = (int, float) if f.type is float else (f.type,)
    if type(value) not in wanted or (f.type is float and not math.isfinite(value)):
        kind = {int: "a whole number", float: "a finite number", bool: "True or False", str: "a string"}[f.type]
        raise UserError(f"{f.name} = {value!r}: must be {kind}")
    if f.type is str and "\0" in value:
        raise UserError(f"{f.name} = {value!r}: must not hold a NUL, which no path can")


def unknown_key(name: str, where: str) -> UserError:
    near = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0)
    return UserError(f"{name!r}: no such field ({where}); nearest is {near[0]}")


def parse_value(f: dataclasses.Field, text: str):
    """The command line's text as the field's type; a text that does not parse is left for check_type."""
    if f.type is bool:
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
    if f.type in (int, float):
        try:
            return f.type(text)
        except ValueError:
            return text
    return text


def assignments(path: Path) -> dict:
    """What a file of plain assignments assigns, but for names that begin with an underscore. Raises UserError if it does not run."""
    values = {}
    try:
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), values)
    except Exception as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    return {k: v for k, v in values.items() if not k.startswith("_")}


def read_config_file(path: str | Path) -> dict:
    """The assignments of a config file as a dict. Raises UserError on anything but known fields."""
    path = Path(path)
    if not path.is_file():
        here = sorted(p.as_posix() for p in (ROOT / "configs").glob("*.py"))
        near = difflib.get_close_matches(path.stem, [Path(p).stem for p in here], n=1, cutoff=0)
        hint = f"; nearest is configs/{near[0]}.py" if near else ""
        raise UserError(f"{path}: no such config file{hint}")
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


@dataclass(frozen=True)
class Number:
    """An option's type for argparse: a finite number of that kind, from `low` to `high`."""

    kind: type
    low: float
    high: float = math.inf

    def __call__(self, text: str) -> int | float:
        try:
            value = self.kind(text)
        except ValueError:
            value = math.nan
        if not self.low <= value <= self.high or value == math.inf:
            upto = f" to {self.high:g}" if self.high < math.inf else " or more"
            kind = "a whole number" if self.kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r}: must be {kind} of {self.low:g}{upto}")
        return value


def output_folder(text: str) -> Path:
    """An option's type for argparse: a folder that can be written to, which is made before any work that would be lost."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}: must be a place that can be written to ({error.strerror})"
        ) from error
    return path


def output_stem(text: str) -> Path:
    """The same for the beginning of a file's path."""
    return output_folder(str(Path(text).parent)) / Path(text).name


def parser_of(fields: Iterable[dataclasses.Field]) -> Parser:
    """train.py's command line, of these fields alone."""
    parser = Parser(
        prog="train.py", usage="train.py CONFIG.py [--field=value ...]", description="Train a GPT with AdamW or MSign.", allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=120), add_help=False,
    )  # fmt: skip
    parser.add_argument("config", help="a file of plain assignments, such as configs/nano_5m_msign.py")
    parser.add_argument("-h", "--help", nargs="?", const="", action=Help, help="this; a group, a field, or all")
    groups = {}
    for f in fields:
        group = f.metadata["group"]
        groups.setdefault(group, parser.add_argument_group(group) if group not in groups else None)
        choices = typing.get_args(f.type) if typing.get_origin(f.type) is Literal else ()
        metavar = "|".join(choices) or f.type.__name__.upper()
        flag = {"nargs": "?", "const": "true"} if f.type is bool else {}
        help = f"{f.metadata['help']} [{f.default}]".replace("%", "%%")
        groups[group].add_argument(f"--{f.name}", metavar=metavar, help=help, default=None, **flag)
    return parser


class Help(argparse.Action):
    """`--help` prints every field with its default on one screen; `--help=GROUP`, `=FIELD` or `=all`, what they mean."""

    def __call__(self, parser, namespace, what, option_string=None):
        groups: dict[str, list[dataclasses.Field]] = {}
        for f in FIELDS.values():
            groups.setdefault(f.metadata["group"], []).append(f)
        if what:
            known = {"all": list(FIELDS.values()), **groups, **{name: [f] for name, f in FIELDS.items()}}
            if what not in known:
                near = difflib.get_close_matches(what, known, n=1, cutoff=0)
                raise UserError(f"help = {what!r}: no such group or field; nearest is {near[0]}")
            print(parser_of(known[what]).format_help(), end="")
        else:
            print(
                "train.py CONFIG.py [--field=value ...]\n\nEvery field and its default; --help=GROUP, --help=FIELD or --help=all says what they mean."
            )
            lines = textwrap.TextWrapper(
                min(118, shutil.get_terminal_size().columns), subsequent_indent=" " * 18, break_on_hyphens=False
            )
            for group, fields in groups.items():
                lines.initial_indent = f"{group:17} "
                print(lines.fill("  ".join(f"{f.name}={f.default}" for f in fields)))
        parser.exit()


def load_config(argv: list[str]) -> Config:
    """`CONFIG.py [--field=value ...]` as a Config. Raises UserError; `--help` prints and exits 0."""
    parser = parser_of(FIELDS.values())
    args, rest = parser.parse_known_args(argv)
    for text in rest:
        name = text.lstrip("-").split("=")[0].replace("-", "_")
        raise (
            unknown_key(name, "on the command line")
            if text.startswith("-")
            else UserError(f"{text!r}: unexpected; overrides are written --field=value")
        )
    values = read_config_file(args.config)
    given = {k: v for k, v in vars(args).items() if v is not None and k != "config"}
    values |= {k: parse_value(FIELDS[k], v) for k, v in given.items()}
    name = Path(args.config).stem
    values = {"name": name, "wandb_group": name} | values
    return Config(**values)
