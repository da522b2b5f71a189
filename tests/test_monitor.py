"""The monitor: each of its numbers against a direct computation, its words, and that training does not notice it."""

import copy
import csv
import math
import weakref

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import stability
import stability.monitor
from msign import Target, find
from stability import adapters, attached
from stability.attached import largest_of_products
from stability.probes import jacobians
from tests.conftest import noisy_model

TOKENS = torch.randint(0, 64, (4, 8), generator=torch.Generator().manual_seed(0))


def gpt() -> nn.Module:
    return noisy_model(n_head=4, n_kv_head=2, attn_kernel="flash")


def llama(attention: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, initializer_range=0.3)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8)
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, attn_implementation=attention))


class Encoder(nn.Module):
    """PyTorch's own encoder layers; returns a loss."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(64, 32)
        layers = (nn.TransformerEncoderLayer(32, 4, 64, dropout, batch_first=True) for _ in range(2))
        self.layers = nn.ModuleList(layers)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return x.square().mean() + x[..., 0].mean()


def loss_of(model: nn.Module) -> torch.Tensor:
    if isinstance(model, LlamaForCausalLM):
        return model(input_ids=TOKENS, labels=TOKENS).loss
    return model(TOKENS) if isinstance(model, Encoder) else model(TOKENS, TOKENS)


def train(model: nn.Module, steps: int, monitor, optimizer=None, clip: float = 1.0) -> list[dict]:
    """The monitor's reports; without an optimizer, AdamW."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), 1e-2)
    reports = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if monitor:
            reports.append(monitor.step(loss, norm))
    return reports


def measured(model: nn.Module, clip: float = 1.0) -> dict:
    """A measured report of a model that does not move."""
    monitor = stability.Monitor(model, every=2)
    return train(model, 2, monitor, torch.optim.SGD(model.parameters(), 0.0), clip)[1]


def heads_of_gpt(model):
    return [(b.attn.scale, b.attn.W_Q.weight, b.attn.W_K.weight, 4, 2) for b in model.blocks]


def heads_of_llama(model):
    found = [layer.self_attn for layer in model.model.layers]
    return [(attn.scaling, attn.q_proj.weight, attn.k_proj.weight, 4, 2) for attn in found]


def heads_of_encoder(model):
    return [(8**-0.5, *layer.self_attn.in_proj_weight.chunk(3)[:2], 4, 4) for layer in model.layers]


@pytest.mark.parametrize(
    "make, heads", [(gpt, heads_of_gpt), (lambda: llama("sdpa"), heads_of_llama), (Encoder, heads_of_encoder)]
)
def test_the_largest_product_of_a_head_is_a_dense_singular_value(make, heads):
    model, found = make(), {}
    for layer, (scale, W_Q, W_K, h, groups) in enumerate(heads(model)):
        k = len(W_Q) // h
        for i in range(h):
            Q, K = W_Q[i * k : (i + 1) * k].double(), W_K[i // (h // groups) * k :][:k].double()
            found[layer, i] = scale * torch.linalg.svdvals(Q.T @ K)[0].item()
    report = measured(model)
    layer, head = max(found, key=found.get)
    assert report["qk/sigma1"] == pytest.approx(found[layer, head], rel=1e-6)
    assert (report["qk/layer"], report["qk/head"]) == (layer, head)


def test_spectra_and_updates_are_their_definitions():
    model = llama("sdpa")
    W_Q = [layer.self_attn.q_proj.weight for layer in model.model.layers]
    monitor = stability.Monitor(model, every=2)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    train(model, 1, monitor, optimizer)
    before = [W.detach().clone() for W in W_Q]
    report = train(model, 1, monitor, optimizer)[0]
    s = [torch.linalg.svdvals(W.double()) for W in before]
    sranks = [(x.square().sum() / x[0] ** 2).item() for x in s]
    assert report["sigma1/W_Q"] == pytest.approx(math.prod(x[0].item() for x in s) ** (1 / 3), rel=1e-3)
    assert report["srank/W_Q"] == pytest.approx(math.prod(sranks) ** (1 / 3), rel=2e-3)
    moved = math.hypot(*((W - old).norm().item() for W, old in zip(W_Q, before, strict=True)))
    assert report["update_norm/W_Q"] == pytest.approx(moved, rel=1e-5)


def test_gradient_norms_are_those_before_clipping():
    model = gpt()
    loss_of(model).backward()
    expected = math.hypot(*(block.attn.W_Q.weight.grad.norm().item() for block in model.blocks))
    for clip in (1e9, 1e-3):
        assert measured(gpt(), clip)["grad_norm/W_Q"] == pytest.approx(expected, rel=1e-3)
    assert expected > 0.01  # above what the clipping leaves


def logits_of_gpt(model):
    x, largest = model.embed(TOKENS[:1]), []
    for block in model.blocks:
        largest.append(block.attn.logits(block.attn_norm(x)).amax().item())
        x = block(x)
    return max(largest)


def logits_of_encoder(model):
    x, largest = model.embedding(TOKENS[:1]), []
    for layer in model.layers:
        y = x @ layer.self_attn.in_proj_weight.T + layer.self_attn.in_proj_bias
        q, k, _ = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in y.chunk(3, -1))
        largest.append((q @ k.mT / math.sqrt(8)).amax().item())
        x = layer(x)
    return max(largest)


def logits_of_llama(model):
    largest, future = [], torch.ones(8, 8, dtype=torch.bool).triu(1)

    def look(attn, args, named):
        x = named["hidden_states"]
        q, k = (proj(x).unflatten(-1, (-1, 8)).transpose(1, 2) for proj in (attn.q_proj, attn.k_proj))
        q, k = apply_rotary_pos_emb(q, k, *named["position_embeddings"])
        logits = q @ k.repeat_interleave(2, 1).mT * attn.scaling
        largest.append(logits.masked_fill(future, -math.inf).amax().item())

    handles = [layer.self_attn.register_forward_pre_hook(look, with_kwargs=True) for layer in model.model.layers]
    model(TOKENS[:1])
    for handle in handles:
        handle.remove()
    return max(largest)


@pytest.mark.parametrize(
    "make, direct",
    [
        (gpt, logits_of_gpt),
        (lambda: noisy_model(attn_kernel="chunked"), logits_of_gpt),
        (lambda: noisy_model(attention="mla", mla_rank=8), logits_of_gpt),
        (Encoder, logits_of_encoder),
        (lambda: llama("eager"), logits_of_llama),
        (lambda: llama("sdpa"), logits_of_llama),
    ],
    ids=["gpt", "gpt_chunked", "gpt_mla", "encoder", "llama_eager", "llama_sdpa"],
)
def test_the_largest_logit_is_that_of_an_explicit_product(make, direct):
    model = make()
    with torch.no_grad():
        expected = direct(model)
    assert measured(model)["attention/max_logit"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("causal", [False, True])
def test_the_largest_logit_in_chunks_knows_masks(mask, causal, monkeypatch):
    monkeypatch.setattr("stability.attached.ELEMENTS", 40)  # two rows at a time
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(4, 6, 8, generator=g), torch.randn(2, 5, 8, generator=g)
    logits = q @ k.repeat_interleave(2, 0).mT * 0.3
    given = {"scale": 0.3, "is_causal": causal, "attn_mask": None}
    if mask == "bool":
        given["attn_mask"] = torch.rand(1, 1, 6, 5, generator=g) > 0.5
        logits = logits.masked_fill(~given["attn_mask"][0], -math.inf)
    elif mask == "float":
        given["attn_mask"] = torch.randn(6, 5, generator=g)
        logits = logits + given["attn_mask"]
    if causal:
        logits = logits.masked_fill(torch.ones(6, 5, dtype=torch.bool).triu(1), -math.inf)
    assert largest_of_products(q, k, given).item() == pytest.approx(logits.amax().item(), rel=1e-5)


def test_the_gain_is_that_of_the_first_block():
    model = gpt()
    with torch.no_grad():
        x = model.embed(TOKENS)
        expected = (model.blocks[0](x).norm() / x.norm()).item()
    assert measured(model)["residual/gain"] == pytest.approx(expected, rel=1e-5)


def test_jacobians_are_those_of_the_blocks_also_if_they_take_more_than_the_stream():
    model = gpt()
    monitor = stability.Monitor(model, every=2)
    with torch.no_grad():
        x = model.embed(TOKENS)
    got, expected = monitor.jacobians(TOKENS), jacobians(model.blocks, x)
    torch.testing.assert_close(got.sigma, expected.sigma)
    assert model.training and not hooks(model)
    report = train(model, 1, monitor)[0]
    assert report["jacobian/alignment"] == pytest.approx(expected.alignment.mean().item(), rel=1e-5)
    eager, sdpa = (stability.Monitor(llama(name)).jacobians(TOKENS).sigma for name in ("eager", "sdpa"))
    torch.testing.assert_close(eager, sdpa, rtol=1e-3, atol=0)
    with pytest.raises(ValueError, match="found no blocks"):
        stability.Monitor(nn.Linear(2, 2), warn=lambda line: None).jacobians(torch.ones(1, 2))


@pytest.mark.parametrize("make", [gpt, lambda: llama("eager"), lambda: Encoder(dropout=0.1)])
def test_training_stays_the_same_bit_for_bit(make):
    ends = []
    for watched in (False, True):
        model = make()
        torch.manual_seed(1)
        monitor = stability.Monitor(model, every=2) if watched else None
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        train(model, 3, monitor, optimizer)
        if watched:
            monitor.jacobians(TOKENS)
        train(model, 2, monitor, optimizer)
        ends.append([*(p.detach() for p in model.parameters()), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_are_there_for_one_pass_and_go_on_close():
    model = gpt()
    monitor = stability.Monitor(model, every=3)
    assert hooks(model) == 0
    train(model, 2, monitor)
    assert hooks(model) > 0
    loss_of(copy.deepcopy(model))  # the copy's hooks do nothing
    with torch.no_grad():
        loss_of(model)  # and a pass without gradients does not count
    assert monitor.forward.max_logit is None and monitor.forward.gain is None
    loss_of(model)
    assert hooks(model) == 0 and monitor.forward.max_logit is not None
    monitor = stability.Monitor(model, every=2)
    train(model, 1, monitor)
    monitor.close()
    assert hooks(model) == 0
    assert not {"srank/attention", "attention/max_logit"} & set(train(model, 1, monitor)[0])


def test_an_exception_in_the_model_or_in_a_measurement_leaves_nothing_behind(monkeypatch):
    model, said = gpt(), []
    monitor = stability.Monitor(model, every=2, warn=said.append)
    train(model, 1, monitor)
    broken = model.blocks[0].attn.W_O.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss_of(model)
    broken.remove()
    assert _get_current_dispatch_mode() is None
    monitor.close()
    assert hooks(model) == 0
    monkeypatch.setattr("stability.attached.largest_of_products", lambda *_: 1 / 0)
    train(model, 4, stability.Monitor(model, every=2, warn=said.append))
    assert said == ["attention logits are not measured: division by zero"]


def test_what_cannot_be_measured_is_said_once():
    model, said = gpt(), []
    model.blocks[0].compile()
    monitor = stability.Monitor(model, every=2, warn=said.append)
    with torch.compiler.set_stance("force_eager"):
        reports = train(model, 4, monitor)
    assert len(said) == 1 and "compiled" in said[0]
    assert "srank/attention" in reports[3] and "attention/max_logit" not in reports[3]
    said.clear()
    plain = stability.Monitor(nn.Linear(2, 2), warn=said.append)
    assert plain.step(1.0, 1.0) == {"iter": 1, "loss": 1.0, "grad_norm": 1.0, "events": []}
    assert len(said) == 2 and all("not measured" in line for line in said)


def replay(lines: list[dict], said: list[str], log=lambda report: None) -> list[str]:
    """The events of a monitor to which the values of made-up lines are given as if it had measured them."""
    monitor, events = stability.Monitor(nn.Linear(2, 2), warn=said.append), []
    for line in lines:
        monitor.taken = {name: v for name, v in line.items() if name not in ("loss", "grad_norm")}
        report = monitor.step(line["loss"], line["grad_norm"])
        log(report)
        events += report["events"]
    return events


def test_words_and_alerts_say_once_what_moved_and_whether_the_gradient_norm_has():
    import wandb

    said, alerts, run = [], [], wandb.init(mode="disabled")
    run.alert = lambda title, text, level: alerts.append(text)
    lines = [
        {"loss": 3.0, "grad_norm": 1.0 if step < 600 else 5.0}
        | ({"attention/max_logit": 12.0 if step < 400 else 31.0} if step % 10 == 0 else {})
        for step in range(1, 901)
    ]
    events = replay(lines, said, lambda report: adapters.log_to_wandb(run, report))
    assert said[2:] == alerts == events  # after two lines on what a linear layer does not have
    assert events == [
        "step 500: the largest attention logit moved first, at step 400 (12 → 31); the gradient norm has not",
        "step 750: the gradient norm moved at step 649 (1 → 5), 249 steps after the largest attention logit",
    ]


def test_the_collapse_is_reported_once():
    said = []
    events = replay([{"loss": 3.0 if step < 150 else 4.0, "grad_norm": 1.0} for step in range(500)], said)
    assert len(events) == 1 and "mean loss rose from 3.00 to" in events[0] and events[0] in said
    events = replay([{"loss": math.nan, "grad_norm": 1.0}] * 3, said)
    assert events == ["step 1: collapsed at step 1: the loss is not finite"]


def test_measuring_keeps_to_its_share_of_the_time(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(stability.monitor, "perf_counter", lambda: clock[0])

    def steps_and_shares(seconds: float, share: float, steps: int) -> list[tuple[int, float]]:
        """Of the measured steps, when a step takes 1 s and a measurement so many."""

        def slow(*_):
            clock[0] += seconds
            return {"srank/attention": 1.0}

        monkeypatch.setattr(stability.monitor, "weights", slow)
        monitor, found = stability.Monitor(nn.Linear(2, 2), share=share, warn=lambda line: None), []
        for _ in range(steps):
            clock[0] += 1.0
            report = monitor.step(1.0, 1.0)
            if "srank/attention" in report:
                found.append((report["iter"], report["monitor/share"]))
        return found

    found = steps_and_shares(4.0, 0.1, 400)
    assert found[0][0] == 10 and 9 <= len(found) <= 12
    assert all(share <= 0.105 for _, share in found[1:])
    assert [step for step, _ in steps_and_shares(0.001, 1.0, 35)] == [10, 20, 30]


def test_a_resumed_monitor_goes_on_as_if_nothing_had_happened():
    def history(resume_at: int | None = None) -> list[dict]:
        model = gpt()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        monitor = stability.Monitor(model, every=4)
        train(model, resume_at or 9, monitor, optimizer)
        if resume_at:
            state = copy.deepcopy(monitor.state_dict())
            monitor.close()
            monitor = stability.Monitor(model, every=4)
            monitor.load_state_dict(state)
            train(model, 9 - resume_at, monitor, optimizer)
        return [{name: v for name, v in line.items() if name != "monitor/share"} for line in monitor.history]

    assert history(resume_at=3) == history() == history(resume_at=4)  # step 4 is measured
    assert "attention/max_logit" in history()[3]


@pytest.mark.parametrize("bad", [{"every": 0}, {"share": 0.0}, {"share": 1.5}])
def test_values_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} = .*must be"):
        stability.Monitor(nn.Linear(2, 2), **bad)


def scalars(folder) -> dict[str, dict[int, float]]:
    """{name: {step: value}} in the TensorBoard event file below the folder, as TensorBoard itself reads it."""
    (file,) = folder.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    return {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}


def logged(history: list[dict], name: str) -> dict[int, float]:
    return {line["iter"]: pytest.approx(line[name], rel=1e-6) for line in history if name in line}


def trainer(folder, **options):
    from transformers import Trainer, TrainingArguments

    fixed = dict(report_to=["tensorboard"], use_cpu=True, save_strategy="no", disable_tqdm=True, max_steps=5)
    args = TrainingArguments(str(folder), **fixed, **{"logging_steps": 1, **options})
    return Trainer(llama("sdpa"), args, train_dataset=[{"input_ids": row, "labels": row} for row in TOKENS])


def test_transformers_trainer_logs_what_is_measured(tmp_path):
    from transformers import TrainerCallback

    lines = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs, **_):
            lines.append(dict(logs))

    with pytest.raises(ValueError, match="logging_steps = 2: must be 1"):
        adapters.monitor_trainer(trainer(tmp_path, logging_steps=2))
    own = trainer(tmp_path)
    own.add_callback(Reporter)
    callback = adapters.monitor_trainer(own, every=2)
    own.train()
    assert [line["iter"] for line in callback.monitor.history] == [1, 2, 3, 4, 5]
    for found in (lines, own.state.log_history):
        assert [i for i, line in enumerate(found, 1) if "attention/max_logit" in line] == [2, 4]
        assert all(found[1][name] > 0 for name in ("grad_norm/W_Q", "update_norm/W_Q", "qk/sigma1", "residual/gain"))
    shown = scalars(tmp_path)
    for name in ("attention/max_logit", "srank/attention", "grad_norm/W_Q"):
        assert shown[f"train/{name}"] == logged(callback.monitor.history, name) and len(shown[f"train/{name}"]) == 2


def test_lightning_logs_what_is_measured_and_resumes(tmp_path):
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = gpt()

        def training_step(self, batch, _):
            return loss_of(self.model)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-2)

    def fit(steps, checkpoint=None):
        callback = adapters.lightning_callback(every=2)
        quiet = dict(enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
        training = dict(max_steps=steps, accelerator="cpu", gradient_clip_val=0.1, accumulate_grad_batches=2)
        loggers = [kind(tmp_path, version=steps) for kind in (CSVLogger, TensorBoardLogger)]
        own = pl.Trainer(logger=loggers, callbacks=[callback], **training, **quiet)
        own.fit(Module(), torch.utils.data.DataLoader(range(20)), ckpt_path=checkpoint)
        own.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return callback.monitor.history

    first = fit(3)
    folder = tmp_path / "lightning_logs" / "version_3"
    rows, shown = list(csv.DictReader((folder / "metrics.csv").open())), scalars(folder)
    assert len(rows) == 3
    for name in ("loss", "attention/max_logit", "grad_norm/W_up"):
        wanted = logged(first, name)
        assert len(wanted) == (3 if name == "loss" else 1)
        assert shown[name] == wanted == {int(row["step"]): float(row[name]) for row in rows if row[name]}
    assert first[1]["grad_norm/W_up"] > 0
    second = fit(5, tmp_path / "3.ckpt")
    assert second[:3] == first and [line["iter"] for line in second] == [1, 2, 3, 4, 5]


def test_accelerate_and_wandb_log_what_is_measured():
    import wandb
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker, on_main_process

    kept, alerts = {}, []

    class Tracker(GeneralTracker):
        name, requires_logging_directory, tracker = "kept", False, None

        @on_main_process
        def log(self, values, step, **_):
            kept[step] = values

    accelerator = Accelerator(cpu=True, log_with=Tracker())
    accelerator.init_trackers("monitor")
    model = accelerator.prepare(gpt())
    run = wandb.init(mode="disabled")
    run.alert = lambda title, text, level: alerts.append((text, wandb.AlertLevel(level)))
    reports = train(model, 2, stability.Monitor(model, every=2))
    reports[1]["events"] = ["step 2: something moved"]
    for report in reports:
        adapters.log_to_accelerate(accelerator, report)
        adapters.log_to_wandb(run, report)
    assert set(kept) == {1, 2} and kept[2]["qk/sigma1"] == reports[1]["qk/sigma1"] and "events" not in kept[2]
    assert alerts == [("step 2: something moved", wandb.AlertLevel.WARN)]


def test_a_weight_in_shards_is_not_held_when_it_has_been_measured(monkeypatch):
    """Of a model in shards a process gathers one module at a time; here every gathered matrix is counted."""
    model = noisy_model(n_layer=3)
    targets, alive, most = find(model, "blocks"), weakref.WeakSet(), []
    expected = attached.weights(model, targets.values())

    def gathered(self):
        found = {role: W.clone() for role, W in matrices(self).items()}
        alive.update(found.values())
        most.append(len(alive))
        return found

    matrices = Target.matrices
    monkeypatch.setattr(Target, "matrices", gathered)
    monkeypatch.setattr(attached, "ELEMENTS", 0)  # every matrix is measured as soon as it is there
    found = attached.weights(model, targets.values())
    assert len(most) == 18 and max(most) <= 5  # the four of a module, and the one that has just been measured
    assert found.keys() == expected.keys()
    assert all(found[key] == pytest.approx(expected[key], rel=1e-2) for key in found)
