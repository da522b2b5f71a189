"""From shards to token files: Nemotron-CC, FineWeb-Edu, and tokens that uint16 cannot hold. No outside network."""

import gzip
import hashlib
import json
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken

from config import ROOT, UserError, run_cli
from data import fineweb_edu, nemotron_cc, shards
from data.reader import TokenFiles, is_prepared, token_dtype, write_corpus, write_meta
from data.tokenizer import TOKENIZERS, Tokenizer, get_tokenizer


def packed(texts, frames=1):
    lines = [json.dumps({"warc_record_id": str(i), "text": t}).encode() + b"\n" for i, t in enumerate(texts)]
    blob, cut = b"".join(lines), len(b"".join(lines)) // frames
    parts = [blob[i * cut : (i + 1) * cut if i < frames - 1 else None] for i in range(frames)]
    return b"".join(pa.compress(part, codec="zstd", asbytes=True) for part in parts)


def documents(name, n):
    return [f"{name} {i} " + "word " * (i % 5) + "\u2028é" for i in range(n)]


def tokens_of(folder, split, dtype=np.uint16):
    return np.concatenate([np.fromfile(p, dtype) for p in sorted(folder.glob(f"{split}*.bin"))])


def run(monkeypatch, module, *options):
    monkeypatch.setattr(sys, "argv", ["prog", *map(str, options)])
    return module.main()


def is_as_expected(folder, texts):
    """Whether val holds documents 0, 2000, … of each file and train all others, in order."""
    encode = get_tokenizer("gpt2").encode
    val = [t for file in texts for i, t in enumerate(file) if i in (0, 2000, 4000)]
    train = [t for file in texts for i, t in enumerate(file) if i not in (0, 2000, 4000)]
    return all(
        np.array_equal(tokens_of(folder, split), np.concatenate(encode(wanted)))
        for split, wanted in (("val", val), ("train", train))
    )


def test_local_jsonl_is_tokenised_and_resumed(tmp_path, monkeypatch, capsys):
    texts = [documents("a", 4100), documents("b", 12), documents("c", 2001)]
    paths = [tmp_path / "source" / "quality=high" / f"CC-MAIN-2013-20-part-{i:05}.jsonl.zstd" for i in range(3)]
    paths[0].parent.mkdir(parents=True)
    for path, file in zip(paths, texts, strict=True):
        path.write_bytes(packed(file))
    whole = paths[2].read_bytes()
    paths[2].write_bytes(whole[:-20])
    made, unfinished = tmp_path / "made", tmp_path / ".made-unfinished"
    options = (f"--source={tmp_path / 'source'}", f"--dataset={made}", "--tokenizer=gpt2", "--workers=1")
    with pytest.raises(UserError, match=r"00002\.jsonl\.zstd: OSError: Truncated .*the same command goes on"):
        run(monkeypatch, nemotron_cc, *options)
    assert not is_prepared(str(made))
    assert sorted(p.name for p in unfinished.glob("train*.bin")) == ["train_00000.bin", "train_00001.bin"]
    before = (unfinished / "train_00000.bin").stat().st_ino
    paths[2].write_bytes(whole)
    capsys.readouterr()
    assert run(monkeypatch, nemotron_cc, *options) == 0
    assert "3 of 3 *.jsonl.zstd files as tokens of gpt2" in capsys.readouterr().out
    assert (made / "train_00000.bin").stat().st_ino == before  # not done a second time
    assert not unfinished.exists()
    assert is_as_expected(made, texts)
    meta = json.loads((made / "meta.json").read_text())
    assert (meta["tokenizer"], meta["dtype"], meta["vocab_size"]) == ("gpt2", "uint16", 50257)
    assert sorted(meta["files"]) == ["train_00000.bin", "train_00001.bin", "train_00002.bin", "val.bin"]
    with pytest.raises(UserError, match="already prepared"):
        run(monkeypatch, nemotron_cc, *options)


def test_local_parquet_is_tokenised(tmp_path, monkeypatch):
    texts = [documents("a", 30), documents("b", 2100), documents("c", 40)]
    (tmp_path / "source").mkdir()
    for i, file in enumerate(texts):
        table = pa.table({"id": list(range(len(file))), "text": file})
        pq.write_table(table, tmp_path / "source" / f"00{i}_00000.parquet")
    made = tmp_path / "made"
    options = (f"--source={tmp_path / 'source'}", f"--dataset={made}", "--tokenizer=gpt2", "--workers=2", "--files=2")
    assert run(monkeypatch, fineweb_edu, *options) == 0
    assert is_as_expected(made, [texts[0], texts[2]])
    assert "every 2000th document" in json.loads((made / "meta.json").read_text())["source"]


def test_a_killed_preparation_leaves_no_worker_behind():
    # such a worker would go on writing into the files of the next attempt
    script = """if True:
        import multiprocessing, os, signal, time
        from concurrent.futures import ProcessPoolExecutor
        from data import shards
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(1, context, shards._start_worker, (context.Value("d", 0),))
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 300)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    # the pipe ends only when the worker is gone, too
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == -9
    assert int(done.stdout) > 0


class Server(BaseHTTPRequestHandler):
    """Serves files from memory; the first answer for a path in `broken` stops halfway."""

    files, broken, ranges, requests = {}, set(), True, []

    def do_GET(self):
        self.requests.append(self.path)
        if self.path not in self.files:
            return self.send_error(404)
        whole = self.files[self.path]
        start = int(self.headers["Range"][6:-1]) if "Range" in self.headers and self.ranges else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(whole) - start))
        self.end_headers()
        stop = len(whole)
        if self.path in self.broken:
            self.broken.discard(self.path)
            stop = start + (len(whole) - start) // 2
        self.wfile.write(whole[start:stop])

    def log_message(self, *args):
        pass


@pytest.fixture
def site(monkeypatch):
    """A fresh Server, which is running at its `url` and is not reached through a proxy."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(shards, "RETRY_AFTER", (0, 0))
    handler = type("Handler", (Server,), {"files": {}, "broken": set(), "ranges": True, "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    handler.url = f"http://127.0.0.1:{server.server_port}"
    yield handler
    server.shutdown()
    server.server_close()


def test_a_broken_download_goes_on_where_it_broke(site):
    texts = documents("a", 2500)
    rng = np.random.default_rng(0)
    texts[7] = "".join(map(chr, rng.integers(32, 1000, 500_000)))  # more than one buffer
    site.files["/x.jsonl.zstd"] = packed(texts, frames=3)
    site.broken.add("/x.jsonl.zstd")
    batches = list(shards.read_texts(f"{site.url}/x.jsonl.zstd"))
    assert [t for batch, _ in batches for t in batch] == texts
    assert site.requests == ["/x.jsonl.zstd"] * 2
    shares = [share for _, share in batches]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    site.broken.add("/x.jsonl.zstd")
    site.ranges = False  # the server starts from the beginning: nothing may be read twice
    with pytest.raises(UserError, match=r"x\.jsonl\.zstd: OSError: the server cannot continue"):
        list(shards.read_texts(f"{site.url}/x.jsonl.zstd"))
    with pytest.raises(UserError, match=r"y\.jsonl\.zstd: HTTPError: HTTP Error 404"):
        list(shards.read_texts(f"{site.url}/y.jsonl.zstd"))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"text": null}\n', "document 2 has text = None"),
        (b'{"txt": "a"}\n', "document 2 has text = None"),
        (b'{"text": "a\n', "JSONDecodeError"),
        (b"[1]\n", "AttributeError"),
    ],
)
def test_bad_lines_are_refused(tmp_path, line, says):
    path = tmp_path / "x.jsonl.zstd"
    path.write_bytes(pa.compress(b'{"text": "a"}\n\n{"text": "b"}\n' + line, codec="zstd", asbytes=True))
    with pytest.raises(UserError, match=says) as error:
        list(shards.read_texts(str(path)))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_files_are_chosen_in_proportion(site, monkeypatch, capsys):
    kinds = {"high/actual": 2755, "high/synthetic": 9000, "low/actual": 2000, "medium/actual": 17524}
    paths = [f"{kind}/{i:05}.jsonl.zstd" for kind, n in kinds.items() for i in range(n)]
    listing = gzip.compress("\n".join(reversed(paths)).encode())
    site.files["/" + nemotron_cc.LIST] = listing
    monkeypatch.setattr(nemotron_cc, "SITE", site.url + "/")
    monkeypatch.setattr(nemotron_cc, "LIST_SHA256", hashlib.sha256(listing).hexdigest())
    listed = nemotron_cc.published()
    assert listed == [f"{site.url}/{path}" for path in paths]  # sorted
    assert capsys.readouterr().err == ""
    chosen = shards.spread(listed, nemotron_cc.FILES)
    assert len(set(chosen)) == 40
    for kind, n in kinds.items():
        assert abs(sum(kind in url for url in chosen) - 40 * n / len(paths)) < 1
    assert shards.spread(listed, len(listed)) == listed
    assert shards.spread(list("abcde"), 1) == ["c"]
    for n in (0, 31280):
        with pytest.raises(UserError, match=f"files = {n}: must be 1 to 31279"):
            shards.spread(listed, n)
    monkeypatch.setattr(nemotron_cc, "LIST_SHA256", "0")
    nemotron_cc.published()
    assert "has changed" in capsys.readouterr().err


def test_a_missing_network_is_one_line_that_names_the_stand_in(tmp_path, monkeypatch, capfd):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(nemotron_cc, "SITE", f"http://127.0.0.1:{port}/")
    monkeypatch.setattr(fineweb_edu, "SHARDS", ["memory://nowhere/000_00000.parquet"])
    for module, hint in ((nemotron_cc, "python -m data.fineweb_edu"), (fineweb_edu, "--source=FOLDER")):
        monkeypatch.setattr(sys, "argv", ["prog", f"--dataset={tmp_path / 'made'}"])
        with pytest.raises(SystemExit) as left:
            run_cli(module.main, module.__name__)
        out, err = capfd.readouterr()
        assert (left.value.code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"{module.__name__}: error: ")
        assert err.endswith(hint + "\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--workers=0"], "argument --workers: '0': must be a whole number of 1 or more"),
        (["--files=2"], "files = 2: must be 1 to 1"),
        (["--tokenizer=llama"], "tokenizer = 'llama': must be one of bytes, gpt2, cl100k_base"),
        (["--source=nowhere"], r"source = 'nowhere': no \*\.jsonl\.zstd files there"),
    ],
)
def test_bad_options_are_refused(tmp_path, monkeypatch, options, says):
    (tmp_path / "x.jsonl.zstd").write_bytes(packed(["a", "b"]))
    with pytest.raises(UserError, match=says):
        run(monkeypatch, nemotron_cc, f"--source={tmp_path}", f"--dataset={tmp_path / 'made'}", *options)
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl.zstd"]


def wide_encoding(name):
    """An encoding of single bytes with the special tokens of cl100k_base."""
    ranks = {bytes([i]): i for i in range(256)}
    return tiktoken.Encoding(
        name, pat_str=r"(?s:.)", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 100257, "<|x|>": 100276}
    )


def test_dtype_follows_the_vocabulary(monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", wide_encoding)
    assert [token_dtype(n) for n in (256, 2**16, 2**16 + 1)] == [np.uint16, np.uint16, np.uint32]
    for name, dtype in (("bytes", np.uint16), ("gpt2", np.uint16), ("cl100k_base", np.uint32)):
        tokenizer = get_tokenizer(name)
        (ids,) = tokenizer.encode(["é"])
        assert (tokenizer.name, ids.dtype, ids[-1]) == (name, dtype, tokenizer.eot)
        assert tokenizer.decode(ids[:-1]) == "é"
    assert (tokenizer.vocab_size, ids.tolist()) == (100277, [0xC3, 0xA9, 100257])

    def offline(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match=r"cl100k_base.*cannot be downloaded \(ConnectionError\); --tokenizer=gpt2"):
        get_tokenizer("cl100k_base")


def test_a_shard_of_wide_tokens(tmp_path, monkeypatch):
    wide = Tokenizer(
        "wide", 70_000, 69_999, lambda ts: [np.array([65_536 + len(t), 69_999], np.uint32) for t in ts], str
    )
    monkeypatch.setitem(TOKENIZERS, "wide", lambda: wide)
    monkeypatch.setattr(shards, "shards_done", shards.multiprocessing.Value("d", 0), raising=False)
    (tmp_path / "x.jsonl.zstd").write_bytes(packed(["a" * i for i in range(10)]))
    out = tmp_path / "out"
    out.mkdir()
    shards.tokenize_shard(str(tmp_path / "x.jsonl.zstd"), range(0, 10, 4), "wide", out, 0)
    assert shards.shards_done.value == 1
    assert np.fromfile(out / "val_00000.part", np.uint32)[::2].tolist() == [65_536, 65_540, 65_544]
    write_meta(out, "wide", wide.vocab_size, "test")
    x, _ = TokenFiles(str(out), "train", 6, 70_000).windows(np.array([0]))
    assert x[0].tolist() == [65_537, 69_999, 65_538, 69_999, 65_539, 69_999]
    with pytest.raises(UserError, match="1 documents, which leaves none to train on"):
        (tmp_path / "y.jsonl.zstd").write_bytes(packed(["a"]))
        shards.tokenize_shard(str(tmp_path / "y.jsonl.zstd"), shards.HELD_OUT, "wide", out, 1)


WIDE = np.r_[0, 65_535, 65_536, 100_276, np.arange(70_000, 70_096)]


def test_uint32_round_trip(tmp_path):
    made = tmp_path / "made"
    write_corpus(str(made), {"train": WIDE, "val": WIDE[:50]}, "cl100k_base", 100_277, "test")
    meta = json.loads((made / "meta.json").read_text())
    assert (meta["dtype"], meta["files"]["train.bin"]["tokens"]) == ("uint32", 100)
    assert (made / "train.bin").stat().st_size == 400
    data = TokenFiles(str(made), "train", 8, 128_256)
    assert len(data) == 100
    x, y = data.windows(np.array([0, data.ends[-1] - 1]))
    assert x[0].tolist() == WIDE[:8].tolist()
    assert y[1].tolist() == WIDE[-8:].tolist()
    with pytest.raises(UserError, match=r"vocab_size = 100276: .* holds token 100276; must be at least 100277"):
        TokenFiles(str(made), "train", 8, 100_276)


def test_large_uint32_files_are_not_scanned(tmp_path, monkeypatch):
    write_corpus(str(tmp_path / "made"), {"train": WIDE}, "cl100k_base", 100_277, "test")
    meta_path = tmp_path / "made" / "meta.json"
    meta_path.write_text(meta_path.read_text().replace("100276,", "120000,"))
    monkeypatch.setattr("data.reader.FULL_HASH_BYTES", 399)
    with pytest.raises(UserError, match="holds token 120000"):
        TokenFiles(str(tmp_path / "made"), "train", 8, 110_000)
    monkeypatch.setattr("data.reader.FULL_HASH_BYTES", 400)
    TokenFiles(str(tmp_path / "made"), "train", 8, 110_000)


def header(magic, count):
    head = np.zeros(256, np.int32)
    head[:3] = magic, 7, count
    return head.tobytes()


@pytest.mark.parametrize(
    ("meta", "content"),
    [
        ({"dtype": "uint32"}, WIDE.astype(np.uint32).tobytes()),
        ({"dtype": "uint32"}, header(20240520, 100) + WIDE.astype(np.uint32).tobytes()),
        (None, header(20240801, 100) + WIDE.astype(np.uint32).tobytes()),
    ],
)
def test_uint32_files_of_others(tmp_path, meta, content):
    if meta:
        (tmp_path / "meta.json").write_text(json.dumps(meta))
    path = tmp_path / "x_train_000.bin"
    path.write_bytes(content)
    data = TokenFiles(str(tmp_path), "train", 99, 100_277)
    assert data.windows(np.array([0]))[0][0].tolist() == WIDE[:-1].tolist()
    path.write_bytes(content[:-2])
    with pytest.raises(UserError, match=f"{len(content) - 2} bytes, but .* truncated or damaged uint32 file"):
        TokenFiles(str(tmp_path), "train", 8, 100_277)


def test_shortened_uint32_files_and_unknown_dtypes_are_refused(tmp_path):
    made = tmp_path / "made"
    write_corpus(str(made), {"train": WIDE}, "cl100k_base", 100_277, "test")
    path = made / "train.bin"
    path.write_bytes(path.read_bytes()[:-4])  # whole tokens: only meta.json can tell
    with pytest.raises(UserError, match="396 bytes, but 100 tokens take 400: truncated or damaged uint32 file"):
        TokenFiles(str(made), "train", 8, 100_277)
    (made / "meta.json").write_text('{"dtype": "int64"}')
    with pytest.raises(UserError, match=r"meta\.json: dtype = 'int64': must be uint16 or uint32"):
        TokenFiles(str(made), "train", 8, 100_277)


def test_fingerprint_of_uint32_files(tmp_path):
    write_corpus(str(tmp_path / "made"), {"train": WIDE}, "cl100k_base", 100_277, "test")
    raw = Path(tmp_path / "made" / "train.bin").read_bytes()
    wanted = hashlib.sha256(repr([400]).encode() + raw).hexdigest()
    assert TokenFiles(str(tmp_path / "made"), "train", 8, 100_277).fingerprint() == f"sha256:{wanted}"
