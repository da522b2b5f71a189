"""Whatever is asked for: a configuration that works as it was given, or one clear line.

FUZZ=1000 python -m pytest -n0 tests/test_fuzz.py -k runs_or_is_refused    # that many command lines instead of 60
"""

import contextlib
import io
import itertools
import os
import random
import shutil
import signal
import warnings
from collections import Counter
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import mup
import train
from config import FIELDS, Config, UserError, load_config
from data.reader import TokenFiles
from engine import machine, runlog
from model import GPT
from msign import msign, restored_sign
from stability.probes import spectra
from tests.conftest import SMALL

settings.register_profile("here", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("here")

ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
    st.sampled_from([0, 1, -1, 2**63, 10**9999, 1e400, "", "..", "a/b", "\0", "\n", "\ud800", "x" * 5000]),
)  # fmt: skip


def a_line_that_names(error: UserError, names):
    text = str(error)
    assert len(text.splitlines()) == 1, text
    assert any(name in text for name in names), text


@settings(max_examples=1500)
@given(st.dictionaries(st.sampled_from(sorted(FIELDS)), ANYTHING, min_size=1, max_size=3))
def test_any_value_of_any_field(values):
    try:
        cfg = Config(**SMALL | values)
    except UserError as error:
        a_line_that_names(error, {**SMALL, **values})
    else:
        for name, value in values.items():
            assert value not in ("\0", "\n", "\ud800")  # no path, message or record can hold them
            assert getattr(cfg, name) is value or getattr(cfg, name) == value  # nothing was corrected in silence


ARGUMENT = st.one_of(
    st.text(max_size=12),
    st.builds("--{}={}".format, st.sampled_from(sorted(FIELDS)),
              st.one_of(st.text(max_size=6), st.integers().map(str), st.floats().map(str))),
    st.builds("--{}".format, st.one_of(st.sampled_from(sorted(FIELDS)), st.text(max_size=8))),
)  # fmt: skip


@settings(max_examples=300)
@given(st.lists(ARGUMENT, max_size=3))
def test_any_command_line(arguments):
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            load_config(["configs/nano_5m_adamw.py", *arguments])
    except UserError as error:
        assert len(str(error).splitlines()) == 1, error
    except SystemExit as done:
        assert not done.code  # --help


def some(name: str, *values):
    """Values of an architecture's field, the default among them."""
    f = FIELDS[name]
    choices = get_args(f.type) if get_origin(f.type) is Literal else (False, True) if f.type is bool else values
    return st.sampled_from([*choices])


ARCHITECTURES = st.fixed_dictionaries({
    "n_layer": some("n_layer", 1, 2, 3), "d_model": some("d_model", 6, 8, 12), "n_head": some("n_head", 1, 2, 3, 4),
    "d_ff": some("d_ff", 1, 8), "vocab_size": some("vocab_size", 2, 7), "block_size": some("block_size", 1, 5),
    "norm": some("norm"), "mlp": some("mlp"), "position": some("position"), "attention": some("attention"),
    "qk_norm": some("qk_norm"), "logit_cap": some("logit_cap", 0.0, 0.5),
    "n_kv_head": some("n_kv_head", 0, 1, 2), "mla_rank": some("mla_rank", 0, 3),
    "mla_rope_dim": some("mla_rope_dim", 0, 1, 2), "n_experts": some("n_experts", 0, 1, 3),
    "top_k": some("top_k", 1, 2, 4), "base_width": some("base_width", 0, 8, 100),
    "attn_kernel": st.sampled_from(["auto", "math"]),
})  # fmt: skip


@settings(max_examples=400)
@given(ARCHITECTURES)
def test_an_architecture_that_is_not_refused_trains(fields):
    try:
        cfg = Config(**SMALL | fields)
    except UserError as error:
        a_line_that_names(error, fields)
        return
    model = GPT(cfg)
    mup.init_weights(model, cfg)
    assert {id(p) for g in mup.param_groups(model, cfg) for p in g["params"]} == set(map(id, model.parameters()))
    tokens = torch.randint(cfg.vocab_size, (2, cfg.block_size), generator=torch.Generator().manual_seed(0))
    loss = model(tokens, tokens)
    loss.backward()
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))


def gaussian(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=100)
@given(SHAPES, st.integers(0, 99), st.floats(1e-12, 1e12), st.sampled_from(["eigh", "svd"]))
def test_the_sign_knows_no_scale_and_turns_with_its_matrix(shape, seed, scale, backend):
    W, Q = gaussian(shape, seed), torch.linalg.qr(gaussian((shape[1], shape[1]), seed + 1)).Q
    s = torch.linalg.svdvals(W)
    assume(bool((s[:, -1] > 1e-2 * s[:, 0]).all()))
    sign = msign(W, backend=backend)
    tolerance = {"rtol": 0, "atol": 1e-3 if backend == "svd" else 1e-5}
    torch.testing.assert_close(msign(W * scale, backend=backend), sign, **tolerance)
    torch.testing.assert_close(msign(Q @ W, backend=backend), Q @ sign, **tolerance)
    torch.testing.assert_close(msign(W.mT, backend=backend), sign.mT, **tolerance)
    torch.testing.assert_close(msign(sign, backend=backend), sign, **tolerance)
    restored = restored_sign(W, backend)
    norms = [torch.linalg.matrix_norm(M) for M in (restored, W)]
    torch.testing.assert_close(*norms, rtol=1e-3, atol=0)


@settings(max_examples=100)
@given(SHAPES, st.integers(0, 99), st.floats(1e-9, 1e9))
def test_stable_ranks_know_no_scale_and_lie_between_one_and_the_rank(shape, seed, scale):
    W = gaussian(shape[1:], seed).float()
    (one,), (other,) = (list(spectra({"W": M}).values()) for M in (W, W * scale))
    assert 1 - 1e-6 <= one.srank <= min(W.shape) + 1e-4
    assert other.srank == pytest.approx(one.srank, rel=1e-4)
    assert one.srank * one.sigma1**2 == pytest.approx(one.fro**2, rel=1e-5)


@settings(max_examples=50)
@given(
    st.lists(st.integers(6, 40), min_size=1, max_size=3),
    st.integers(1, 5),
    st.integers(0, 2**31),
    st.integers(1, 10**6),
)
def test_every_window_is_a_piece_of_one_file(tmp_path_factory, sizes, block, seed, step):
    folder, flats = tmp_path_factory.mktemp("corpus"), []
    for i, size in enumerate(sizes):
        flats.append(np.arange(size, dtype=np.uint16) + 100 * i)
        flats[-1].tofile(folder / f"train_{i}.bin")
    data = TokenFiles(str(folder), "train", block, 1000)
    x, y = data.batch(seed, step, 4)
    for row, target in zip(x.tolist(), y.tolist(), strict=True):
        flat = flats[row[0] // 100]
        assert row + target[-1:] == flat[row[0] % 100 :][: block + 1].tolist()
    assert len(data) == sum(sizes)


# --- whole runs -------------------------------------------------------------------------------------------------------

# every kind of measurement, most at every step, and MSign
RUN = SMALL | dict(
    device="cpu", max_steps=2, probe_every=1, layers_every=1, jacobian_every=2, jacobian_positions=1,
    eval_every=1, ckpt_every=1, msign_period=2, msign_probe=True,
)  # fmt: skip
# left out: W&B starts a process of its own, the compilers take half a minute (tests/test_wandb.py, tests/test_train.py)
LEFT_OUT = {"wandb", "compile"}
CHOICES = {"device": ["auto", "cpu", "cuda", "cuda:0", "cuda:99", "mps", "tpu"], "fallback": ["stdlib-bytes,x"]}
TEXTS = [
    "",
    "x" * 300,
    "x" * 5000,
    "ü λ 漢字 🙂",
    "..",
    "~no-such-user/x",
    "two\nlines",
    "\udcff",
    "*",
    "[",
    "%s",
    "a,,b",
    "-",
]
ENOUGH, TOO_MUCH = 1, 8  # seconds: of a run that is then asked to end, and of one that does not
MEMORY = 2**26  # bytes that the runs are told they have: no refused size is ever tried


class AtWork(BaseException):
    """A run that was not refused and had not ended when its time was over."""


def values_of(f) -> list[list[str]]:
    """Texts for a field: its choices; a huge one; the ends of its range; and all else that somebody could write."""
    limits, choices = f.metadata["range"], get_args(f.type) if get_origin(f.type) is Literal else ()
    if choices:
        return [list(choices), [], [], ["", "nonsense", choices[0].upper()]]
    if f.type is bool:
        return [["true", "false"], [], [], ["", "maybe"]]
    if f.type is str:
        return [CHOICES.get(f.name, []), ["x" * 300], [], TEXTS]
    huge, ends = "999999999" if f.type is int else "1e300", [str(f.type(end)) for end in (limits.low, limits.top)]
    others = [
        "0",
        "-1",
        "1",
        "2",
        "3",
        "1e-300",
        "-1e300",
        "0.5",
        "nan",
        "inf",
        "1" + 30 * "0",
        "9" * 5000,
        "",
        "½",
        "0x1",
    ]
    return [[], [huge], ends, others]


# each was a traceback once, or worse: 999 999 threads are a segmentation fault
FOUND = [
    "eval_batches=999999999", "logit_power=1e300", "attn_kernel=efficient", "attn_kernel=cudnn", "msign_backend=polar",
    "n_layer=1", "n_layer=999999999", "threads=999999", "lr=1e300", "seed=99999999999999999999",
    "dataset=~no-such-user/x",
]  # fmt: skip


def command_lines():
    """Lists of --field=value without end: every field alone, choices and huge values first; then pairs, triples."""
    yield from ([f"--{text}"] for text in FOUND)
    fields = [f for f in FIELDS.values() if f.name not in LEFT_OUT]
    for kind in range(4):
        for f in fields:
            yield from ([f"--{f.name}={text}"] for text in values_of(f)[kind])
    draw = random.Random(0)
    while True:
        some = draw.sample(fields, draw.choice([2, 2, 3]))
        yield [f"--{f.name}={draw.choice([*itertools.chain(*values_of(f))])}" for f in some]


def outcome(arguments: list[str]) -> str:
    """What became of one command line: "refused", "ran" or "at work"; otherwise what is wrong with that."""
    began = []

    def alarm(*_):
        began.append(None)
        if len(began) > TOO_MUCH // ENOUGH:
            raise AtWork
        if signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, None):
            signal.raise_signal(signal.SIGTERM)  # the run ends after its step and saves

    before = signal.signal(signal.SIGALRM, alarm), signal.getsignal(signal.SIGTERM)
    signal.setitimer(signal.ITIMER_REAL, ENOUGH, ENOUGH)
    try:
        code = train.train(load_config(["run.py", *arguments]))
        return "ran" if code in (0, 128 + signal.SIGTERM) else f"exit code {code}"
    except (UserError, OSError) as error:
        if len(str(error).splitlines()) != 1 or len(str(error)) > 1000:
            return f"not one line: {str(error)[:1000]!r}"
        if not any(f"{name} = " in str(error) for name in FIELDS):
            return f"names no field: {error}"
        return "refused"
    except AtWork:
        return "at work"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before[0])
        signal.signal(signal.SIGTERM, before[1])


def test_a_command_line_runs_or_is_refused(tmp_path, corpus, monkeypatch):
    """In this process, on a model of 15 000 parameters; what is refused has written nothing."""
    here = tmp_path / "inside" / "here"  # for runs_dir = ..
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setattr(machine, "memory_of", lambda device: MEMORY)
    monkeypatch.setattr(runlog, "code_version", dict)  # git takes longer than the run
    (here / "run.py").write_text("\n".join(f"{k} = {v!r}" for k, v in {**RUN, "dataset": str(corpus)}.items()))
    untouched, seen, wrong = set(tmp_path.rglob("*")), Counter(), []
    for arguments in itertools.islice(command_lines(), int(os.environ.get("FUZZ", 60))):
        printed = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            warnings.simplefilter("ignore")
            became = outcome(arguments)
        written = set(tmp_path.rglob("*")) - untouched
        if became == "refused" and written:
            became = f"refused, but wrote {sorted(written)[0].relative_to(tmp_path)}"
        for path in written:
            shutil.rmtree(path, ignore_errors=True)
            path.unlink(missing_ok=True)
        seen[became if became in ("ran", "refused", "at work") else "wrong"] += 1
        if became == "at work":
            print(*arguments, "still at work")
        if became not in ("ran", "refused", "at work"):
            wrong.append(f"{' '.join(arguments)[:200]!r}: {became}")
        torch.set_num_threads(1)
    print(dict(seen))
    assert not wrong, "\n".join(wrong)
