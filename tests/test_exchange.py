"""A model taken out to transformers and one brought in: the same function, or one line that says why not."""

import json
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

from config import UserError, load_config
from data.reader import TokenFiles
from data.tokenizer import get_tokenizer
from engine import exchange
from engine.sampling import open_model
from model import GPT
from tests.conftest import here, noisy_model, refused, small
from tests.test_parallel import several
from train import train

ROPE = dict(norm="rmsnorm", mlp="swiglu", position="rope")
EXPERTS = dict(n_experts=4, top_k=2, d_ff=24)
POWERS = dict(logit_power=1.0, attn_scale_power=1.0)
MODELS = {
    "gpt2": {}, "llama": dict(ROPE, n_kv_head=1), "mixtral": ROPE | EXPERTS, "qwen3": dict(ROPE, qk_norm=True),
    "qwen3_moe": dict(ROPE, **EXPERTS, qk_norm=True),
}  # fmt: skip
TEXTS = [
    "",
    "plain words, 12345 numbers",
    "it's  two   spaces\n\n\tand tabs ",
    "Ā ā é ß 漢字 🙂 \u200d e\u0301",
    "\0nul\x7f\r\n",
    "don'T" * 20,
]
TOKENS = torch.randint(256, (3, 8), generator=torch.Generator().manual_seed(1))


def brought_in(folder, **fields) -> GPT:
    """A model with these fields, whose weights come from the folder."""
    cfg = small(init_from=str(folder), **fields)
    model = GPT(cfg)
    exchange.load(cfg, model)
    return model


@torch.no_grad()
def assert_same_logits(ours, theirs):
    """Equal up to rounding in fp32, which was measured to be below 1e-6 of the largest logit."""
    logits = ours(TOKENS)
    torch.testing.assert_close(logits, theirs.eval()(TOKENS).logits, rtol=0, atol=5e-6 * logits.abs().max().item())


# --- out ---


@pytest.mark.parametrize("model_type", MODELS)
def test_out_and_in_again_is_the_identity_whatever_the_powers(model_type, tmp_path):
    """transformers has no factor of the logits, nor another scale of attention: both are in the weights there."""
    model = noisy_model(**MODELS[model_type], **POWERS)
    assert exchange.export(model, "bytes", tmp_path / "out") == model_type
    theirs, about = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(about.values())
    assert_same_logits(model, theirs)
    for options in (POWERS, {}):
        again = brought_in(tmp_path / "out", **MODELS[model_type], **options)
        assert_same_logits(again, theirs)
        same = [
            torch.allclose(a, b, rtol=1e-6, atol=0) for a, b in zip(model.parameters(), again.parameters(), strict=True)
        ]
        assert all(same) == (options == POWERS)
    generation = theirs.generation_config
    assert (generation.bos_token_id, generation.eos_token_id) == (0, 0)


def test_a_large_model_is_written_in_several_files(tmp_path):
    model = noisy_model(**ROPE)
    exchange.export(model, "", tmp_path / "out", shard="20KB")
    assert len(exchange.weight_files(tmp_path / "out")) > 1
    assert_same_logits(model, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert all(map(torch.equal, model.parameters(), brought_in(tmp_path / "out", **ROPE).parameters()))


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_the_tokenizer_has_our_ids_and_gives_the_text_back(name, model_type, tmp_path):
    ours = get_tokenizer(name)
    exchange.export(GPT(small(**MODELS[model_type], vocab_size=ours.vocab_size)), name, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = [theirs(text)["input_ids"] for text in TEXTS]
    assert ids == [array[:-1].tolist() for array in ours.encode(TEXTS)]
    assert [theirs.decode(line) for line in ids] == TEXTS
    if name == "gpt2":
        assert theirs.eos_token_id == ours.eot


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(position="rope"), "position = 'rope': must be 'learned', because gpt2"),
        (dict(position="none"), "position = 'none': must be 'learned', because gpt2"),
        (dict(ROPE, norm="layernorm"), "norm = 'layernorm': must be 'rmsnorm', because llama"),
        (dict(ROPE, mlp="gelu", **EXPERTS), "mlp = 'gelu': must be 'swiglu', because mixtral"),
        (dict(ROPE, attention="mla", mla_rank=4), "attention = 'mla': must be 'mha', because llama"),
        (dict(attention="alternating", mla_rank=4), "attention = 'alternating': must be 'mha', because gpt2"),
        (dict(qk_norm=True), "qk_norm = True: must be False, because gpt2"),
        (dict(n_kv_head=1), "n_kv_head = 1: must be 2, because gpt2"),
        (dict(n_experts=4), "n_experts = 4: must be 0, because gpt2"),
    ],
)
def test_what_transformers_has_not_is_refused_before_anything_is_written(options, says, tmp_path):
    with pytest.raises(UserError) as error:
        exchange.export(GPT(small(**options)), "bytes", tmp_path / "new" / "out")
    assert says in str(error.value) and not list(tmp_path.iterdir())


# --- in ---

SIZES = dict(vocab_size=256, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=32, rms_norm_eps=1e-5)  # fmt: skip
ALIKE = dict(ROPE, n_head=4, n_kv_head=2)
THEIRS = {  # {name: (model type, its configuration, our fields)}
    "gpt2": ("gpt2", dict(vocab_size=256, n_embd=16, n_layer=2, n_head=2, n_positions=32, activation_function="gelu"),
             {}),
    "llama": ("llama", dict(SIZES, intermediate_size=40, rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
              dict(ALIKE, d_ff=40, rope_theta=500.0)),
    "tied llama": ("llama", dict(SIZES, intermediate_size=40, tie_word_embeddings=True), dict(ALIKE, d_ff=40)),
    "mistral": ("mistral", dict(SIZES, intermediate_size=40, sliding_window=None), dict(ALIKE, d_ff=40)),
    "mixtral": ("mixtral", dict(SIZES, intermediate_size=24, num_local_experts=4),
                dict(ALIKE, **EXPERTS, rope_theta=1e6)),
    "qwen3": ("qwen3", dict(SIZES, intermediate_size=40, head_dim=4), dict(ALIKE, d_ff=40, qk_norm=True)),
}  # fmt: skip


def random_model(name: str):
    """A model of THEIRS with noise on all weights but biases, which are zero."""
    model_type, options, _ = THEIRS[name]
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(model_type, **options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.add_(0 if key.endswith("bias") else 0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("name", THEIRS)
def test_a_model_of_transformers_has_its_own_logits_here(name, tmp_path):
    theirs = random_model(name)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert_same_logits(brought_in(tmp_path, **THEIRS[name][2]), theirs)


def test_a_gpt2_without_the_prefix_and_with_its_masks_in_bf16(tmp_path):
    """As the oldest files are: names without "transformer.", and the causal mask stored under the name of a bias."""
    theirs = random_model("gpt2").bfloat16()
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = {key.removeprefix("transformer."): value for key, value in load_file(path).items()}
    save_file(state | {"h.0.attn.bias": torch.ones(1, 1, 32, 32).tril()}, path)
    assert_same_logits(brought_in(tmp_path), theirs.float())


def edited(**changes):
    """A change of config.json."""

    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def reweighed(change):
    """A change of the weights: change(state)."""

    def edit(folder):
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")

    return edit


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


BIAS, NORM = "transformer.h.0.mlp.c_fc.bias", "transformer.ln_f.weight"


@pytest.mark.parametrize(
    "name, edit, fields, says",
    [
        ("gpt2", pickled, {}, "must hold its weights as model*.safetensors, not pytorch_model.bin, because pickled"),
        ("gpt2", lambda folder: (folder / "config.json").unlink(), {}, "must be a folder with a config.json"),
        ("gpt2", edited(model_type="bert"), {}, "model_type = 'bert' in config.json: must be one of gpt2, llama"),
        ("gpt2", edited(activation_function="gelu_new"), {}, "activation_function = 'gelu_new' in config.json"),
        ("gpt2", edited(n_positions=4), {}, "block_size = 8: must be at most 4"),
        ("gpt2", lambda folder: (folder / "config.json").write_text("{"), {}, "config.json: JSONDecodeError: "),
        ("gpt2", edited(n_embd="wide"), {}, "config.json: "),
        ("gpt2", lambda folder: (folder / "config.json").write_text("{}"), {}, "config.json: KeyError: 'model_type'"),
        ("gpt2", lambda folder: (folder / "model.safetensors").write_bytes(b"0" * 99), {}, "init_from = "),
        ("gpt2", reweighed(lambda state: state[BIAS].add_(1)), {}, "h.0.mlp.c_fc.bias is not zero; our model has no"),
        ("gpt2", reweighed(lambda state: state.pop(NORM)), {}, "ln_f.weight is not in its weight files"),
        ("gpt2", reweighed(lambda state: state.update({NORM: torch.ones(3)})), {}, "ln_f.weight is (3,), not (16,)"),
        ("gpt2", reweighed(lambda state: state.update(more=torch.ones(3))), {}, "our model has no place for more"),
        ("gpt2", None, dict(d_ff=32, n_layer=3), "n_layer = 3: must be 2 with init_from="),
        ("gpt2", None, dict(d_ff=32, n_layer=3), "; give --n_layer=2 --d_ff=64\n"),
        ("llama", None, dict(n_kv_head=0), "n_kv_head = 4: must be 2"),
        ("llama", edited(rms_norm_eps=1e-6), {}, "rms_norm_eps = 1e-06 in config.json: must be 1e-05"),
        ("llama", edited(head_dim=8), {}, "head_dim = 8 in config.json: must be 4"),
        ("llama", edited(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}), {}, "'linear'"),
        ("mistral", edited(sliding_window=4), {}, "sliding_window = 4 in config.json: must be None"),
    ],
)  # fmt: skip
def test_what_our_model_cannot_compute_is_refused(name, edit, fields, says, tmp_path):
    random_model(name).save_pretrained(tmp_path)
    if edit:
        edit(tmp_path)
    with pytest.raises(UserError) as error:
        brought_in(tmp_path, **{**THEIRS[name][2], **fields})
    assert says in f"{error.value}\n" and len(str(error.value).splitlines()) == 1
    assert re.match(r"\w+ = ", str(error.value))


# --- runs ---


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A folder with the configuration of a run, the run itself, and its model exported to `out` by the command."""
    from tests.conftest import SMALL, corpus

    folder = tmp_path_factory.mktemp("exchange")
    places = {"dataset": str(corpus.__wrapped__(folder)), "runs_dir": str(folder / "runs")}
    values = {**SMALL, **places, **POWERS, "probe_every": 0, "layers_every": 0, "eval_every": 0, "lr": 3e-3}
    (folder / "small.py").write_text("\n".join(f"{k} = {v!r}" for k, v in values.items()) + "\n")
    assert train(load_config([str(folder / "small.py"), "--name=first", "--base_width=0"])) == 0
    done = here("scripts/export.py", folder / "runs/first", folder / "out", "--tokenizer=bytes")
    assert (done.returncode, done.stdout) == (0, f"{folder / 'out'}: a gpt2, with the tokenizer of bytes\n"), (
        done.stderr
    )
    return folder


def losses(folder) -> list[float]:
    return [json.loads(line)["train/loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_begins_with_the_loss_of_the_model_brought_in(first):
    """Whatever μP's factors are; and it goes on with --resume where that model is no longer there."""
    model, mine = (
        first / "first-model",
        [str(first / "small.py"), "--name=second", f"--init_from={first / 'first-model'}"],
    )
    shutil.copytree(first / "out", model)
    assert train(load_config(mine)) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model)
    x, y = TokenFiles(str(first / "corpus"), "train", 8, 256).batch(0, 1, 4)
    with torch.no_grad():
        loss = F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten())
    run = first / "runs" / "second"
    assert losses(run)[0] == pytest.approx(loss.item(), rel=1e-5)
    assert losses(run)[0] < losses(first / "runs/first")[0] - 0.1
    assert list(json.loads((run / "record.json").read_text())["init_from"]) == ["model.safetensors"]
    (run / "summary.json").unlink()
    refused("train.py", *mine[:2], "--init_from=", "--resume", says="init_from = '': the run")
    weights = load_file(model / "model.safetensors")
    weights["transformer.ln_f.weight"] += 1
    save_file(weights, model / "model.safetensors")
    refused("train.py", *mine, "--resume", says="not the weights that")
    shutil.rmtree(model)
    before = (run / "metrics.jsonl").read_bytes()
    assert train(load_config([*mine, "--resume"])) == 0
    assert (run / "metrics.jsonl").read_bytes() == before
    for path in run.glob("ckpt_*"):
        path.unlink()
    (run / "summary.json").unlink()
    refused("train.py", *mine, "--resume", says="must be a folder with a config.json")


def test_two_processes_begin_with_the_same_weights(first):
    mine = [str(first / "small.py"), f"--init_from={first / 'out'}", "--max_steps=3", "--micro_batch=2"]
    ways = [[*mine, "--name=one"], *([*mine, f"--name={how}", f"--parallel={how}"] for how in ("ddp", "fsdp"))]
    assert train(load_config(ways[0])) == 0
    assert several(2, "trainings", ways[1:]) == [0, 0]
    for how in ("ddp", "fsdp"):
        assert losses(first / "runs" / how) == pytest.approx(losses(first / "runs" / "one"), rel=1e-5)
    assert (first / "runs/fsdp/ckpt_0000003").is_dir()
    sharded, _ = open_model(first / "runs/fsdp", torch.device("cpu"))
    assert here("scripts/export.py", first / "runs/fsdp", first / "sharded").returncode == 0
    assert_same_logits(sharded, transformers.AutoModelForCausalLM.from_pretrained(first / "sharded"))


def test_a_full_folder_and_foreign_tokens_are_refused(first):
    before = sorted(first.rglob("*"))
    arguments = "scripts/export.py", first / "runs/first"
    refused(*arguments, first / "out", says=f"out = '{first / 'out'}': must be a new or an empty folder")
    refused(*arguments, first / "small.py", says="must be a new or an empty folder")
    refused(*arguments, first / "new", "--tokenizer=gpt2", says="must have at most vocab_size=256 tokens, not 50257")
    refused(*arguments, first / "new", "--tokenizer=words", says="argument --tokenizer: invalid choice: 'words'")
    assert sorted(first.rglob("*")) == before
    (first / "empty").mkdir()
    assert exchange.export(open_model(first / "runs/first", torch.device("cpu"))[0], "", first / "empty") == "gpt2"
    assert not list((first / "empty").glob("tokenizer*"))
