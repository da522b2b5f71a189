"""The memory that measurements take, as counted before a run, against what they take; and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train
from config import UserError, load_config
from engine import machine
from model import GPT
from stability import footprint, metrics, probes
from tests.conftest import noisy_model, small

CPU = torch.device("cpu")
LLAMA = dict(norm="rmsnorm", mlp="swiglu", position="rope")
MODELS = {
    "gpt": dict(attn_kernel="math"),
    "chunked": dict(attn_kernel="chunked"),
    "mla": LLAMA | dict(attention="alternating", mla_rank=4, attn_kernel="math"),
    "experts": LLAMA | dict(n_experts=4, top_k=2, attn_kernel="math"),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("positions", [0, 2])
def test_the_count_meets_what_jacobians_and_activations_hold(name, positions):
    """All blocks at once, as on a CPU; the peak includes what Lanczos iteration makes of its vectors for a moment."""
    sizes = dict(n_layer=2, d_model=32, d_ff=128, block_size=64, vocab_size=512, jacobian_positions=positions)
    model = noisy_model(**MODELS[name] | sizes)
    cfg = model.cfg
    tokens = torch.randint(cfg.vocab_size, (cfg.probe_batch, cfg.block_size))
    with torch.no_grad():
        x = model.embed(tokens)
    (_, spectrum), (_, activations), (_, jacobians) = footprint.needs(cfg, CPU, False)
    with footprint.Held([*model.parameters(), x]) as held:
        probes.jacobians(model.blocks, x, range(positions))
    # what is counted in place of experts is not padded, and they pad every group of tokens to the length of the longest
    assert (0.65 if cfg.n_experts else 0.95) * held.most < jacobians < 1.15 * held.most
    with footprint.Held(model.parameters()) as held:
        metrics.forward_pass(model, tokens)
    assert (0.5 if cfg.n_experts else 0.7) * held.most < activations < 1.05 * held.most
    W = torch.randn(48, 96)
    with footprint.Held([W]) as held:
        probes.spectra({"W": W})
    assert 0.7 * held.most < footprint.of_spectrum([W]) < 1.3 * held.most
    assert spectrum == footprint.of_spectrum(p for p in model.blocks.parameters() if p.ndim > 1)


NOT_PROBED = dict(probe_every=0, layers_every=0)


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(probe_batch=64), "probe_batch = 64: must be less"),
        (dict(probe_batch=1, **NOT_PROBED), "jacobian_every = 1000: must be 0"),
        (dict(probe_batch=1, jacobian_every=0), "probe_every = 5: must be 0"),
        (dict(probe_batch=1, jacobian_every=0, msign_period=1, msign_probe=True, **NOT_PROBED),
         "msign_probe = True: must be False"),
    ],
)  # fmt: skip
def test_what_does_not_fit_beside_the_weights_is_refused_before_the_run(monkeypatch, options, says):
    """One byte is lacking; with it, or without measurements, the run may begin."""
    cfg = small(block_size=128, n_head=8, batch_size=1, micro_batch=1, eval_every=0, compile="blocks", **options)
    most = max(need for _, need in machine.measuring(cfg, CPU, 1, footprint.needs))
    monkeypatch.setattr(machine, "BLOCK_OBJECTS", 0)
    monkeypatch.setattr(machine, "memory_of", lambda device: most - 1)
    with pytest.raises(UserError, match=f"{says}; with the other fields it takes .* GiB of memory, and cpu has "):
        machine.require(cfg, CPU, footprint=footprint.needs)
    not_measured = replace(cfg, jacobian_every=0, msign_probe=False, **NOT_PROBED)
    machine.require(not_measured, CPU, footprint=footprint.needs)
    monkeypatch.setattr(machine, "memory_of", lambda device: most)
    machine.require(cfg, CPU, footprint=footprint.needs)


def test_train_asks_before_it_begins(monkeypatch, config_file):
    cfg = load_config([str(config_file), "--probe_batch=64", "--compile=blocks"])
    most = max(need for _, need in machine.measuring(cfg, CPU, 1, footprint.needs))
    monkeypatch.setattr(machine, "memory_of", lambda device: most - 1)
    with pytest.raises(UserError, match="probe_batch = 64: must be less"):
        train.train(cfg)
    assert not (Path(cfg.runs_dir) / cfg.name).exists()


def test_a_sharded_model_is_counted_block_by_block():
    """What is lent, two blocks and what lies outside blocks, does not grow with the number of blocks."""
    first, more = (list(footprint.needs(small(n_layer=n), torch.device("cuda"), True)) for n in (4, 8))
    assert first == more
    alone = footprint.needs(small(n_layer=4), torch.device("cuda"), False)
    blocks = GPT(small(n_layer=2))
    lent = 4 * sum(p.numel() for p in blocks.parameters())
    assert [need - other for (_, need), (_, other) in zip(first, alone, strict=True)] == [0, lent, lent]
