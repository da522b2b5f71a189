import hashlib
import json
import sysconfig
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset

from config import UserError
from data import openwebtext, stdlib
from data.reader import TokenFiles, is_prepared, write_corpus
from data.tokenizer import get_tokenizer


def tokens_of(path):
    return np.fromfile(path, np.uint16)


def test_windows_are_the_files_tokens(corpus):
    data = TokenFiles(str(corpus), "train", 8, 256)
    flat = tokens_of(corpus / "train.bin")
    x, y = data.windows(np.array([0, 17, len(flat) - 9]))
    assert x.dtype == torch.int64
    assert x[1].tolist() == flat[17:25].tolist()
    assert y[1].tolist() == flat[18:26].tolist()
    assert y[2, -1] == flat[-1]  # the last token is reachable
    assert data.ends[-1] == len(flat) - 8


def test_a_batch_depends_on_seed_and_step_alone(corpus):
    data, again = (TokenFiles(str(corpus), "train", 8, 256) for _ in range(2))
    x, y = data.batch(3, 7, 16)
    for step in (1, 2, 100):
        again.batch(3, step, 16)
    again.fixed_windows(5)
    torch.manual_seed(1)
    np.random.seed(2)
    assert torch.equal(x, again.batch(3, 7, 16)[0])
    assert not torch.equal(x, data.batch(3, 8, 16)[0])
    assert not torch.equal(x, data.batch(4, 7, 16)[0])
    assert torch.equal(y[:, :-1], x[:, 1:])
    starts = np.random.Generator(np.random.Philox(key=[3, 7])).integers(0, 5000 - 8, 16)
    assert torch.equal(x, data.windows(starts)[0])  # frozen: recorded runs must be repeatable


def test_windows_cover_everything_about_evenly(corpus):
    data = TokenFiles(str(corpus), "train", 8, 256)
    starts = np.random.Generator(np.random.Philox(key=[0, 1])).integers(0, data.ends[-1], 20_000)
    counts = np.histogram(starts, bins=10, range=(0, data.ends[-1]))[0]
    assert counts.min() > 1800
    assert counts.max() < 2200


def test_headed_shards_are_read_and_never_crossed(tmp_path):
    for i in range(3):
        header = np.zeros(256, np.int32)
        header[:3] = 20240520, 1, 50
        with open(tmp_path / f"fineweb_train_{i:06}.bin", "wb") as f:
            f.write(header.tobytes() + np.arange(100 * i, 100 * i + 50, dtype=np.uint16).tobytes())
    data = TokenFiles(str(tmp_path), "train", 9, 50257)
    assert len(data) == 150
    x, y = data.windows(np.arange(data.ends[-1]))
    assert data.ends.tolist() == [41, 82, 123]
    assert torch.equal(x[:, 0], torch.cat([torch.arange(41) + 100 * i for i in range(3)]))
    assert torch.equal(y[:, -1], x[:, 0] + 9)


def headed(count, actual):
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, count
    return header.tobytes() + bytes(2 * actual)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "has 0 tokens; one window takes block_size + 1 = 9"),
        (bytes(16), "8 tokens; one window takes"),
        (bytes(101), "truncated or damaged"),
        (headed(60, 50), "60 tokens take 1144: truncated"),
        (headed(0, 0), "0 tokens"),
        (np.full(50, 256, np.uint16).tobytes(), "vocab_size = 256: "),
    ],
)
def test_bad_files_are_refused(tmp_path, content, says):
    (tmp_path / "train.bin").write_bytes(content)
    with pytest.raises(UserError) as error:
        TokenFiles(str(tmp_path), "train", 8, 256)
    assert says in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_missing_and_shortened_corpora_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"dataset = 'nowhere': no \*train\*\.bin"):
        TokenFiles("nowhere", "train", 8, 256)
    where = str(tmp_path / "made")
    write_corpus(where, {"train": np.arange(100)}, "bytes", 256, "test")
    path = tmp_path / "made" / "train.bin"
    path.write_bytes(path.read_bytes()[:-4])  # whole tokens: only meta.json can tell
    with pytest.raises(UserError, match="196 bytes, but 100 tokens take 200"):
        TokenFiles(where, "train", 8, 256)


def test_fingerprint_sees_every_bit(corpus, monkeypatch):
    def fingerprint():
        return TokenFiles(str(corpus), "train", 8, 256).fingerprint()

    before = fingerprint()
    path = corpus / "train.bin"
    raw = bytearray(path.read_bytes())
    raw[5001] ^= 0
    path.write_bytes(bytes(raw))
    assert fingerprint() == before
    raw[5000] ^= 1
    path.write_bytes(bytes(raw))
    assert fingerprint() != before
    monkeypatch.setattr("data.reader.FULL_HASH_BYTES", 100)
    assert fingerprint().startswith("sha256-sampled:")


def test_meta_says_what_was_written(tmp_path):
    write_corpus(str(tmp_path / "made"), {"train": np.arange(100), "val": np.arange(50)}, "bytes", 256, "test")
    meta = json.loads((tmp_path / "made" / "meta.json").read_text())
    assert meta["files"]["train.bin"]["tokens"] == 100
    assert meta["files"]["val.bin"]["max_token"] == 49
    assert (meta["tokenizer"], meta["dtype"], meta["source"]) == ("bytes", "uint16", "test")
    raw = (tmp_path / "made" / "train.bin").read_bytes()
    assert meta["files"]["train.bin"]["sha256"] == hashlib.sha256(raw).hexdigest()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made"]


def test_standard_library_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr("data.reader.DATA", tmp_path)
    stdlib.prepare("stdlib-bytes")
    train, val = (TokenFiles("stdlib-bytes", split, 32, 256) for split in ("train", "val"))
    assert 6e6 < len(train) + len(val) < 4e7
    assert 0.02 < len(val) / len(train) < 0.1
    text = bytes(tokens_of(tmp_path / "stdlib-bytes" / "train.bin").astype(np.uint8)).decode()
    assert "class OrderedDict(dict):" in text
    assert text.count("\0") == sum(not stdlib.is_val(n) for n in stdlib.source_files(stdlib_root()))


def test_small_corpus_is_the_beginning_of_the_large_one(tmp_path, monkeypatch):
    monkeypatch.setattr("data.reader.DATA", tmp_path)
    for name in ("stdlib-bytes", "stdlib-small"):
        stdlib.prepare(name)
    large, small = (tokens_of(tmp_path / name / "train.bin") for name in ("stdlib-bytes", "stdlib-small"))
    assert len(small) == 8192 and np.array_equal(small, large[:8192])
    large, small = (tokens_of(tmp_path / name / "val.bin") for name in ("stdlib-bytes", "stdlib-small"))
    assert np.array_equal(small, large)


def stdlib_root():
    return Path(sysconfig.get_paths()["stdlib"])


def test_standard_library_leaves_tests_and_packages_out():
    names = stdlib.source_files(stdlib_root())
    assert "json/decoder.py" in names
    assert not [n for n in names if {"test", "tests", "site-packages"} & set(n.split("/"))]


def test_tokenizers():
    gpt2, as_bytes = get_tokenizer("gpt2"), get_tokenizer("bytes")
    # known ids of OpenAI's GPT-2 encoder
    assert gpt2.encode(["Hello world", ""])[0].tolist() == [15496, 995, 50256]
    assert (gpt2.vocab_size, gpt2.eot) == (50257, 50256)
    assert as_bytes.encode(["aé"])[0].tolist() == [97, 0xC3, 0xA9, 0]
    for tokenizer in (gpt2, as_bytes):
        ids = tokenizer.encode(["def f(x):\n    return 'naïve'\n"])[0]
        assert tokenizer.decode(ids[:-1]) == "def f(x):\n    return 'naïve'\n"
        assert ids.dtype == np.uint16
    with pytest.raises(UserError, match="tokenizer = 'bpe'"):
        get_tokenizer("bpe")


def parquet_shards(folder, counts):
    folder.mkdir()
    texts = [f"document {i}: " + "word " * (i % 7) for i in range(sum(counts))]
    start = 0
    for i, n in enumerate(counts):
        pq.write_table(
            pa.table({"text": texts[start : start + n]}), folder / f"train-{i:05}-of-{len(counts):05}.parquet"
        )
        start += n
    return texts


def test_openwebtext_split_is_nanogpts():
    for n in (3, 2001, 4500):
        split = Dataset.from_dict({"row": list(range(n))}).train_test_split(test_size=0.0005, seed=2357, shuffle=True)
        assert openwebtext.val_rows(n).tolist() == sorted(split["test"]["row"])


def test_openwebtext_is_tokenised_and_resumed(tmp_path):
    texts = parquet_shards(tmp_path / "parquet", [2500, 10, 1991])
    shards = sorted(str(p) for p in (tmp_path / "parquet").iterdir())
    where = str(tmp_path / "owt")
    whole = Path(shards[2]).read_bytes()
    pq.write_table(pa.table({"text": pa.array([None] * 1991, pa.string())}), shards[2])
    with pytest.raises(UserError, match=r"00002-of-00003.parquet: document 0 has text = None: .*same command goes on"):
        openwebtext.prepare(shards, where, 1)  # fails on the last shard
    Path(shards[2]).write_bytes(whole)
    unfinished = tmp_path / ".owt-unfinished"
    assert not is_prepared(where)
    assert sorted(p.name for p in unfinished.glob("train_*.bin")) == ["train_00000.bin", "train_00001.bin"]
    before = (unfinished / "train_00000.bin").stat().st_ino
    openwebtext.prepare(shards, where, 2)
    assert (tmp_path / "owt" / "train_00000.bin").stat().st_ino == before  # not done a second time
    assert not unfinished.exists()
    gpt2 = get_tokenizer("gpt2")
    held_out = set(openwebtext.val_rows(len(texts)).tolist())
    assert len(held_out) == 3
    for split, wanted in (("val", held_out), ("train", set(range(len(texts))) - held_out)):
        got = np.concatenate([tokens_of(p) for p in sorted((tmp_path / "owt").glob(f"{split}*.bin"))])
        assert np.array_equal(got, np.concatenate(gpt2.encode([texts[i] for i in sorted(wanted)]))), split
    meta = json.loads((tmp_path / "owt" / "meta.json").read_text())
    assert meta["tokenizer"] == "gpt2"
    assert sorted(meta["files"]) == ["train_00000.bin", "train_00001.bin", "train_00002.bin", "val.bin"]
    assert len(TokenFiles(where, "train", 8, 50304)) > 20_000
    with pytest.raises(UserError, match="already prepared"):
        openwebtext.prepare(shards, where, 1)


def test_openwebtext_leftovers_of_other_shards_are_not_mixed_in(tmp_path):
    parquet_shards(tmp_path / "parquet", [40, 40])
    shards = sorted(str(p) for p in (tmp_path / "parquet").iterdir())
    unfinished = tmp_path / ".owt-unfinished"
    unfinished.mkdir()
    (unfinished / "train_00000.bin").write_bytes(bytes(200))
    openwebtext.prepare(shards, str(tmp_path / "owt"), 1)
    assert tokens_of(tmp_path / "owt" / "train_00000.bin").any()
