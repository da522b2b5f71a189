"""Models in the format of Hugging Face's transformers: ours written in it, and its weights read into ours.

There, in transformers, a model is a folder of config.json, model*.safetensors and the tokenizer's files. FAMILIES says
which of our architectures a model type of transformers computes, and what it calls the fields and weights. Both
directions read this one table. Two of our factors do not exist there and are multiplied into weights (`folded`). Logits
stay the same up to rounding.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from config import Config, UserError, shown
from data.tokenizer import get_tokenizer, gpt2_files
from engine.checkpoint import checkpoints, sha256_of
from engine.parallel import fill
from model import GPT, NORM_EPS


@dataclass(frozen=True)
class Family:
    """A model type of transformers."""

    architecture: str  # the class that computes it
    prefix: str  # of the name of every weight but the head's
    fixed: dict  # {our field: the one value that this model type can have}
    sizes: dict[str, str]  # {our field: its name in config.json}
    settings: dict  # {name in config.json: the value with which it computes what our model does}
    # {name there: names here}, without ".weight"; # is the layer, @ the expert; we stack the experts. Several names
    # here are one matrix there, the first on top.
    names: dict[str, str]


_GPT2 = Family(
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    fixed=dict(norm="layernorm", mlp="gelu", position="learned", attention="mha", qk_norm=False, n_experts=0),
    sizes=dict(n_layer="n_layer", d_model="n_embd", n_head="n_head", n_kv_head="n_head", d_ff="n_inner",
               vocab_size="vocab_size", block_size="n_positions"),
    settings=dict(activation_function="gelu", layer_norm_epsilon=NORM_EPS, scale_attn_weights=True,
                  scale_attn_by_inverse_layer_idx=False, add_cross_attention=False),
    names={
        "wte": "tok_emb", "wpe": "pos_emb", "ln_f": "final_norm", "lm_head": "head",
        "h.#.ln_1": "blocks.#.attn_norm", "h.#.ln_2": "blocks.#.mlp_norm",
        "h.#.attn.c_attn": "blocks.#.attn.W_Q blocks.#.attn.W_K blocks.#.attn.W_V",
        "h.#.attn.c_proj": "blocks.#.attn.W_O",
        "h.#.mlp.c_fc": "blocks.#.mlp.W_up", "h.#.mlp.c_proj": "blocks.#.mlp.W_down",
    },
)  # fmt: skip
_ALIKE = dict(norm="rmsnorm", mlp="swiglu", position="rope", attention="mha")
_SIZES = dict(
    n_layer="num_hidden_layers", d_model="hidden_size", n_head="num_attention_heads", n_kv_head="num_key_value_heads",
    vocab_size="vocab_size", block_size="max_position_embeddings",
)  # fmt: skip
_SETTINGS = dict(hidden_act="silu", rms_norm_eps=NORM_EPS)
_ATTENTION = {
    "embed_tokens": "tok_emb", "norm": "final_norm", "lm_head": "head",
    "layers.#.input_layernorm": "blocks.#.attn_norm", "layers.#.post_attention_layernorm": "blocks.#.mlp_norm",
    "layers.#.self_attn.q_proj": "blocks.#.attn.W_Q", "layers.#.self_attn.k_proj": "blocks.#.attn.W_K",
    "layers.#.self_attn.v_proj": "blocks.#.attn.W_V", "layers.#.self_attn.o_proj": "blocks.#.attn.W_O",
}  # fmt: skip
_QK_NORM = {
    "layers.#.self_attn.q_norm": "blocks.#.attn.q_norm", "layers.#.self_attn.k_norm": "blocks.#.attn.k_norm",
}  # fmt: skip


def _llama_like(architecture: str, qk_norm: bool, d_ff: str, mlp: dict[str, str], **settings) -> Family:
    """A Family that differs from Llama only in its normed queries and keys, its MLP and the settings of its MLP."""
    dense = {} if "router" in mlp.values() else dict(n_experts=0)
    sizes = {} if dense else dict(n_experts="num_local_experts", top_k="num_experts_per_tok")
    return Family(
        architecture, "model.", _ALIKE | dict(qk_norm=qk_norm) | dense, _SIZES | dict(d_ff=d_ff) | sizes,
        _SETTINGS | settings, _ATTENTION | (_QK_NORM if qk_norm else {})
        | {f"layers.#.{theirs}": f"blocks.#.mlp.{ours}" for theirs, ours in mlp.items()},
    )  # fmt: skip


_DENSE = {"mlp.gate_proj": "W_gate", "mlp.up_proj": "W_up", "mlp.down_proj": "W_down"}
_MIXTRAL = {"block_sparse_moe.gate": "router", "block_sparse_moe.experts.@.w1": "W_gate",
            "block_sparse_moe.experts.@.w3": "W_up", "block_sparse_moe.experts.@.w2": "W_down"}  # fmt: skip
_QWEN3_MOE = {"mlp.gate": "router", "mlp.experts.@.gate_proj": "W_gate", "mlp.experts.@.up_proj": "W_up",
              "mlp.experts.@.down_proj": "W_down"}  # fmt: skip
_FULL = dict(sliding_window=None)  # every token sees all before it
FAMILIES = {
    "gpt2": _GPT2,
    "llama": _llama_like("LlamaForCausalLM", False, "intermediate_size", _DENSE),
    "mistral": _llama_like("MistralForCausalLM", False, "intermediate_size", _DENSE, **_FULL),
    "qwen3": _llama_like("Qwen3ForCausalLM", True, "intermediate_size", _DENSE, **_FULL),
    "mixtral": _llama_like("MixtralForCausalLM", False, "intermediate_size", _MIXTRAL, **_FULL),
    "qwen3_moe": _llama_like("Qwen3MoeForCausalLM", True, "moe_intermediate_size", _QWEN3_MOE, **_FULL,
                             norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[]),
}  # fmt: skip


def counterpart(cfg: Config) -> str:
    """The model type, a key of FAMILIES, that computes what a model of `cfg` does.

    Raises UserError where there is none; it names the first field that the most similar model type cannot have.
    """
    if (cfg.norm == "layernorm") + (cfg.mlp == "gelu") + (cfg.position == "learned") > 1:
        model_type, more = "gpt2", dict(n_kv_head=cfg.n_head) if cfg.n_kv_head else {}
    else:
        dense, sparse = ("qwen3", "qwen3_moe") if cfg.qk_norm else ("llama", "mixtral")
        model_type, more = sparse if cfg.n_experts else dense, {}
    for name, value in (FAMILIES[model_type].fixed | dict(logit_cap=0.0) | more).items():
        if getattr(cfg, name) != value:
            raise UserError(
                f"{name} = {getattr(cfg, name)!r}: must be {value!r}, because {model_type} can have no other and is"
                " the model of transformers nearest to this one"
            )
    return model_type


def folded(cfg: Config) -> dict[str, float]:
    """{role: factor} of our model's factors that transformers has not; there they are part of the role's weights.

    They are the logits' factor, and attention's scale divided by d_head^(-1/2). Queries that are normed take the
    latter in the gains of their norm.
    """
    scale = (cfg.d_model // cfg.n_head) ** (0.5 - cfg.attn_scale_power)
    return {"head": cfg.width_mult**cfg.logit_power, "q_norm" if cfg.qk_norm else "W_Q": scale}


def pairs(family: Family, cfg: Config) -> Iterator[tuple[str, list[str]]]:
    """(name there, names here) of every weight, without the prefix there and ".weight"; @ still is any expert."""
    for theirs, ours in family.names.items():
        for layer in map(str, range(cfg.n_layer if "#" in theirs else 1)):
            yield theirs.replace("#", layer), ours.replace("#", layer).split()


def transposed(name: str) -> bool:
    """Whether transformers stores this weight as (inputs, outputs): GPT-2's matrices c_attn, c_proj and c_fc."""
    return ".c_" in name


def settings_of(cfg: Config, family: Family) -> dict:
    """The entries of config.json that decide what a model of `cfg` computes."""
    theirs = {key: getattr(cfg, name) for name, key in family.sizes.items() if name != "n_kv_head"} | family.settings
    if cfg.position == "rope":
        theirs["num_key_value_heads"] = cfg.n_kv_head or cfg.n_head
        theirs["head_dim"] = cfg.d_model // cfg.n_head
        theirs["rope_parameters"] = {"rope_type": "default", "rope_theta": cfg.rope_theta}
    return theirs


# --- out ---

WRITTEN = ("bytes", "gpt2")  # the tokenizers whose files are written with a model


@torch.no_grad()
def weights_of(model: GPT, family: Family) -> dict[str, Tensor]:
    """The model's weights as transformers stores them: {name: float32 tensor with memory of its own}."""
    own, factors = dict(model.named_parameters()), folded(model.cfg)
    state = {}
    for theirs, ours in pairs(family, model.cfg):
        name = theirs if theirs == "lm_head" else family.prefix + theirs
        value = torch.cat([own[f"{one}.weight"] * factors.get(one.split(".")[-1], 1.0) for one in ours])
        value = value.T.contiguous() if transposed(theirs) else value
        if "@" in name:
            state |= {f"{name.replace('@', str(e))}.weight": W.clone() for e, W in enumerate(value)}
        else:
            state[f"{name}.weight"] = value
        if family is _GPT2 and theirs.startswith(("h.", "ln_")):  # the only ones that have biases
            state[f"{name}.bias"] = value.new_zeros(value.shape[-1])
    return state


def tokenizer_of(name: str, block_size: int):
    """Our tokenizer of this name, one of WRITTEN, as one of transformers, with the same ids.

    One difference remains: the text "<|endoftext|>" is the end of a text there, and an ordinary text in our corpora.
    The bytes' tokenizer declares no end token: a special token takes its own spelling out of the text, and the end of
    ours, byte 0, is spelt Ā.
    """
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    common = dict(model_max_length=block_size, clean_up_tokenization_spaces=False)
    if name == "gpt2":
        merges, vocabulary = gpt2_files()
        vocab, merges = models.BPE.read_file(str(vocabulary), str(merges))
        return transformers.GPT2TokenizerFast(vocab=vocab, merges=merges, **common)
    bpe = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in bytes_to_unicode().items()}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **common)


def refuse_full(folder: Path):
    """Raise UserError unless `folder` is empty or does not exist."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"out = {shown(str(folder))}: must be a new or an empty folder")


def export(model: GPT, tokenizer_name: str, folder: Path, shard: str = "5GB") -> str:
    """Write the model and the tokenizer's files to `folder`, whole or not at all. Returns the model type.

    tokenizer_name: one of WRITTEN; no tokenizer's files are written for any other. shard: the largest size of one file
    of weights. Raises UserError, before anything is written, if transformers has no counterpart of the model, if the
    tokenizer has more tokens than the model, or if the folder is not empty.
    """
    import transformers

    model_type = counterpart(model.cfg)
    refuse_full(folder)
    family, end = FAMILIES[model_type], None
    if tokenizer_name in WRITTEN:
        ours = get_tokenizer(tokenizer_name)
        end = ours.eot
        if ours.vocab_size > model.cfg.vocab_size:
            right = f"must have at most vocab_size={model.cfg.vocab_size} tokens"
            raise UserError(f"tokenizer = {tokenizer_name!r}: {right}, not {ours.vocab_size}")
    config = transformers.AutoConfig.for_model(
        model_type, **settings_of(model.cfg, family), architectures=[family.architecture], dtype="float32",
        tie_word_embeddings=False, bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    # our model has no dropout, and GPT-2 has some unless told otherwise
    config.update({key: 0.0 for key in vars(config) if key.endswith("_pdrop")})
    tokenizer = tokenizer_of(tokenizer_name, model.cfg.block_size) if tokenizer_name in WRITTEN else None
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        written = Path(scratch) / "model"
        written.mkdir()
        config.save_pretrained(written)
        transformers.GenerationConfig.from_model_config(config).save_pretrained(written)
        save_torch_state_dict(weights_of(model, family), written, max_shard_size=shard)
        if tokenizer:
            tokenizer.save_pretrained(written)
        written.rename(folder)
    return model_type


# --- in ---


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that hold a model's weights in the format safetensors."""
    return sorted(folder.glob("model*.safetensors"))


def origin(cfg: Config) -> dict:
    """What record.json says of weights from cfg.init_from: {"init_from": {file: sha256}}; {} if there are none."""
    files = weight_files(Path(cfg.init_from)) if cfg.init_from else []
    return {"init_from": {path.name: sha256_of(path) for path in files}} if files else {}


def load(cfg: Config, model: GPT):
    """Fill the model with the weights in the folder cfg.init_from.

    Nothing happens if init_from is "", or if the run goes on from a checkpoint, which has weights of its own. Every
    process reads all weights, one at a time, and keeps its part. Raises UserError if the folder's model is not of cfg's
    architecture, if our model cannot compute what it does, or if its weights are missing or pickled.
    """
    if not cfg.init_from or (cfg.resume and checkpoints(Path(cfg.runs_dir) / cfg.name)):
        return
    try:
        family, tied = _opened(cfg, Path(cfg.init_from))
        _read(cfg, model, family, tied)
    except (ValueError, OSError, SafetensorError) as error:
        raise UserError(f"init_from = {shown(cfg.init_from)}: {str(error).splitlines()[0]}") from error


def _opened(cfg: Config, folder: Path) -> tuple[Family, bool]:
    """The family of the folder's model, and whether its head is its embedding.

    Raises UserError if the model is not of cfg's architecture, ValueError if no Config can match it.
    """
    if not (folder / "config.json").is_file():
        raise ValueError("must be a folder with a config.json")
    from transformers import AutoConfig  # takes seconds, and only a run with init_from needs it

    try:
        model_type = json.loads((folder / "config.json").read_text())["model_type"]
        if model_type in FAMILIES:
            theirs, family = AutoConfig.from_pretrained(folder, local_files_only=True), FAMILIES[model_type]
    except Exception as error:  # of many types, for a file that is no JSON or has wrong values
        raise ValueError(f"config.json: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    if model_type not in FAMILIES:
        raise ValueError(f"model_type = {model_type!r} in config.json: must be one of {', '.join(FAMILIES)}")
    fields = family.fixed | {name: getattr(theirs, key) for name, key in family.sizes.items()}
    fields["d_ff"] = fields["d_ff"] or 4 * fields["d_model"]  # GPT-2's n_inner may be absent
    if fields["position"] == "rope":
        fields["rope_theta"] = float(theirs.rope_parameters["rope_theta"])
    for key, value in settings_of(Config(**fields), family).items():
        if (key, getattr(theirs, key, value)) not in ((key, value), ("head_dim", None), ("n_inner", None)):
            raise ValueError(f"{key} = {getattr(theirs, key)!r} in config.json: must be {value!r}, as in our model")
    longest = fields.pop("block_size")
    if cfg.block_size > longest:
        raise UserError(f"block_size = {cfg.block_size}: must be at most {longest} with init_from={str(folder)!r}")
    ours = vars(cfg) | {"n_kv_head": cfg.n_kv_head or cfg.n_head}
    differs = [name for name in fields if ours[name] != fields[name]]
    if differs:
        raise UserError(
            f"{differs[0]} = {ours[differs[0]]!r}: must be {fields[differs[0]]!r} with init_from={str(folder)!r}; give "
            + " ".join(f"--{name}={fields[name]}" for name in differs)
        )
    return family, bool(theirs.tie_word_embeddings)


def _read(cfg: Config, model: GPT, family: Family, tied: bool):
    """Fill the model from the folder's files. Raises ValueError if they lack a weight or have one that ours lacks."""
    there = _Files(Path(cfg.init_from), family.prefix)
    own, factors = dict(model.named_parameters()), folded(cfg)
    for theirs, ours in pairs(family, cfg):
        if theirs == "lm_head" and tied:
            there.unread.discard("lm_head.weight")
            theirs = next(name for name, here in family.names.items() if here == "tok_emb")
        name = f"{theirs}.weight"
        if "@" in name:
            value = torch.stack([there.read(name.replace("@", str(e))) for e in range(cfg.n_experts)])
        else:
            value = there.read(name).T if transposed(name) else there.read(name)
        if ours == ["pos_emb"]:
            value = value[: cfg.block_size]
        parts = [own[f"{one}.weight"] for one in ours]
        rows = [p.shape[0] for p in parts]
        if value.shape != (sum(rows), *parts[0].shape[1:]):
            raise ValueError(f"{name} is {tuple(value.shape)}, not {(sum(rows), *parts[0].shape[1:])}")
        for one, p, part in zip(ours, parts, value.split(rows), strict=True):
            fill(p, part / factors.get(one.split(".")[-1], 1.0))
    there.refuse_unread()


class _Files:
    """The tensors in a folder's weight files, by name without the prefix, read one at a time."""

    # causal masks and RoPE's frequencies, which older versions stored as well; our model computes them
    CONSTANTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")

    def __init__(self, folder: Path, prefix: str):
        """Raises ValueError if there are no weight files."""
        if not weight_files(folder):
            pickled = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in sorted(folder.glob(pattern))]
            but = f", not {pickled[0]}, because pickled weights are never read" if pickled else ""
            raise ValueError(f"must hold its weights as model*.safetensors{but}")
        files = [safe_open(path, "pt") for path in weight_files(folder)]
        self.where = {key.removeprefix(prefix): (file, key) for file in files for key in file.keys()}  # noqa: SIM118
        self.unread = set(self.where)

    def read(self, name: str) -> Tensor:
        """The tensor in float32. Raises ValueError if there is none."""
        if name not in self.where:
            raise ValueError(f"{name} is not in its weight files")
        file, key = self.where[name]
        self.unread.discard(name)
        return file.get_tensor(key).float()

    def refuse_unread(self):
        """Raise ValueError if a tensor is left that changes what the model computes."""
        for name in sorted(name for name in self.unread if not name.endswith(self.CONSTANTS)):
            if not name.endswith(".bias"):
                raise ValueError(f"our model has no place for {name}")
            if self.read(name).any():
                raise ValueError(f"{name} is not zero; our model has no biases, and no matrix can replace them")
