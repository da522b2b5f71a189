import resource

import pytest
import torch

import checkpoint
from config import UserError

ARCHITECTURE = {"n_layer": 2, "d_model": 16}


def state(value=1.0):
    return {
        "model": {"w": torch.full((100, 100), value)}, "optimizer": {}, "architecture": ARCHITECTURE,
        "metrics_bytes": 7,
    }  # fmt: skip


def test_round_trip_and_order(tmp_path):
    for step in (5, 100, 20):
        checkpoint.save(tmp_path, step, state(float(step)))
    assert [checkpoint.step_of(p) for p in checkpoint.checkpoints(tmp_path)] == [5, 20, 100]
    loaded = checkpoint.load(checkpoint.checkpoints(tmp_path)[-1], ARCHITECTURE)
    assert (loaded["step"], loaded["metrics_bytes"]) == (100, 7)
    assert torch.equal(loaded["model"]["w"], torch.full((100, 100), 100.0))
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
            checkpoint.load(path, ARCHITECTURE)


def test_foreign_files_and_pickles_are_refused(tmp_path):
    path = tmp_path / "ckpt_0000001.pt"
    torch.save({"weights": torch.ones(2)}, path)
    with pytest.raises(UserError, match="missing entry 'architecture'"):
        checkpoint.load(path, ARCHITECTURE)

    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("executed").mkdir, ())

    torch.save({"architecture": Evil()}, path)
    with pytest.raises(UserError, match="not a whole checkpoint"):
        checkpoint.load(path, ARCHITECTURE)
    assert not (tmp_path / "executed").exists()


def test_another_architecture_is_refused(tmp_path):
    path = checkpoint.save(tmp_path, 3, state())
    with pytest.raises(UserError, match=r"n_layer = 2 there, 24 here"):
        checkpoint.load(path, ARCHITECTURE | {"n_layer": 24})


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
