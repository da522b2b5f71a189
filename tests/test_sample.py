"""A corpus of one's own, and text from a checkpoint, as a user would make them."""

import pytest
import torch

from engine.sampling import sample
from model import GPT
from tests.conftest import here, refused, run, small

PHRASE = "the quick brown fox jumps over the lazy dog. "


def test_ones_own_text_is_trained_on_and_comes_out_again(tmp_path, config_file):
    (tmp_path / "fox.txt").write_text(PHRASE * 400)
    done = here("-m", "data.text", tmp_path / "fox.txt", f"--name={tmp_path / 'fox'}")
    assert done.returncode == 0, done.stderr
    assert "17,101 train tokens, 900 val tokens" in done.stdout
    options = [f"--dataset={tmp_path / 'fox'}", "--name=fox", "--max_steps=300", "--lr=0.003", "--block_size=32"]
    options += ["--batch_size=16", "--micro_batch=16", "--base_width=0"]
    assert run("train.py", config_file, *options).returncode == 0
    done = run("scripts/sample.py", tmp_path / "runs/fox", "--prompt=the quick", "--tokens=30", "--temperature=0")
    assert done.stdout == (PHRASE * 2)[: 9 + 30] + "\n"
    draw = ["scripts/sample.py", tmp_path / "runs/fox/ckpt_0000300.pt", "--tokens=20", "--temperature=2"]
    again = [run(*draw, f"--seed={seed}").stdout for seed in (1, 1, 2)]
    assert again[0] == again[1] != again[2]


def test_sampling_follows_the_models_probabilities():
    model = GPT(small())
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
        p = model(torch.tensor([[7, 8]]))[0, -1].softmax(0)
    draws = [next(sample(model, [7, 8], 1, 1.0, 0, torch.Generator().manual_seed(i))) for i in range(2000)]
    share = torch.bincount(torch.tensor(draws), minlength=256) / 2000
    top = p.topk(8).indices
    torch.testing.assert_close(share[top], p[top], atol=0.04, rtol=0)
    among = {next(sample(model, [7, 8], 1, 5.0, 3, torch.Generator().manual_seed(i))) for i in range(50)}
    assert among == set(p.topk(3).indices.tolist())


@pytest.mark.parametrize(
    "options, says",
    [
        ([], "not a run folder, nor a checkpoint in one"),
        (["--tokens=-1"], "argument --tokens: '-1': must be a whole number of 0 or more"),
    ],
)
def test_what_cannot_be_sampled_from(tmp_path, options, says):
    refused("scripts/sample.py", tmp_path / "none", *options, says=says)


def test_a_run_without_checkpoints_or_tokenizer(tmp_path, config_file):
    assert run("train.py", config_file, "--name=x").returncode == 0
    refused("scripts/sample.py", tmp_path / "runs/x", says="tokenizer = ''")
    refused(
        "scripts/sample.py", tmp_path / "runs/x/ckpt_0000001.pt", says="no such checkpoint; there is ckpt_0000020.pt"
    )
    assert run("scripts/sample.py", tmp_path / "runs/x", "--tokenizer=bytes", "--tokens=5").returncode == 0
    (tmp_path / "runs/x/ckpt_0000020.pt").unlink()
    refused("scripts/sample.py", tmp_path / "runs/x", says="no checkpoint to sample from")


@pytest.mark.parametrize("content, says", [(b"", "empty; must hold text"), (b"ab\xff", "byte 2 is not UTF-8")])
def test_what_is_not_text(tmp_path, content, says):
    (tmp_path / "a.txt").write_bytes(content)
    refused("-m", "data.text", tmp_path / "a.txt", f"--name={tmp_path / 'a'}", says=says)
    assert not (tmp_path / "a").exists()
    refused("-m", "data.text", tmp_path / "b.txt", says="b.txt")
