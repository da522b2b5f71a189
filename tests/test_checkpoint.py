import resource

import pytest
import torch

from config import UserError
from engine import checkpoint

ARCHITECTURE = {"n_layer": 2, "d_model": 16}


def trained(steps=2):
    """A model and an optimizer that has taken steps."""
    torch.manual_seed(0)
    model = torch.nn.Linear(100, 100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.ones(1, 100)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def state(value=1.0):
    model, optimizer = trained()
    with torch.no_grad():
        model.weight.fill_(value)
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "architecture": ARCHITECTURE,
        "metrics_bytes": 7,
    }


def load(path, architecture=ARCHITECTURE):
    model, optimizer = trained(0)
    before = model.weight.detach().clone()
    try:
        return checkpoint.load(path, architecture, model, optimizer), model, optimizer
    except UserError:
        assert torch.equal(model.weight, before) and not optimizer.state
        raise


def test_round_trip_and_order(tmp_path):
    for step in (5, 100, 20):
        checkpoint.save(tmp_path, step, state(float(step)))
    assert [checkpoint.step_of(p) for p in checkpoint.checkpoints(tmp_path)] == [5, 20, 100]
    loaded, model, optimizer = load(checkpoint.checkpoints(tmp_path)[-1])
    assert (loaded["step"], loaded["metrics_bytes"]) == (100, 7)
    assert torch.equal(model.weight, torch.full((100, 100), 100.0))
    for ours, saved in zip(optimizer.state.values(), trained()[1].state.values(), strict=True):
        assert all(torch.equal(ours[k], saved[k]) for k in ("step", "exp_avg", "exp_avg_sq"))
    (tmp_path / "ckpt_0000120.partial").write_bytes(b"cut")
    checkpoint.prune(tmp_path, keep={20, 100})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt_0000020.pt", "ckpt_0000100.pt"]


def test_damage_is_refused(tmp_path):
    path = checkpoint.save(tmp_path, 3, state())
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1  # one bit, inside the tensor: torch.load alone would accept it
    for damaged in (whole[: len(whole) // 2], bytes(flipped), b"", b"text"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="not a whole checkpoint"):
            load(path)


def test_foreign_files_and_pickles_are_refused(tmp_path):
    path = tmp_path / "ckpt_0000001.pt"
    torch.save({"weights": torch.ones(2)}, path)
    with pytest.raises(UserError, match="missing entry 'model'"):
        load(path)

    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("executed").mkdir, ())

    torch.save({"architecture": Evil()}, path)
    with pytest.raises(UserError, match="not a whole checkpoint"):
        load(path)
    assert not (tmp_path / "executed").exists()


def test_another_architecture_is_refused(tmp_path):
    path = checkpoint.save(tmp_path, 3, state())
    with pytest.raises(UserError, match=r"n_layer = 2 there, 24 here"):
        load(path, ARCHITECTURE | {"n_layer": 24})


def test_a_full_disk_leaves_the_previous_one(tmp_path):
    kept = checkpoint.save(tmp_path, 3, state())
    before = kept.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(UserError, match=r"cannot be written .* --resume from ckpt_0000003\.pt"):
            checkpoint.save(tmp_path, 6, state())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt_0000003.pt"]
    assert kept.read_bytes() == before
