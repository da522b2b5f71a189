"""Several processes on one CPU, with gloo: the same numbers, the same weights, and nobody left waiting."""

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec

import numpy as np
import pytest
import torch

import mup
from config import FIELDS, Config, UserError, load_config
from engine import checkpoint, parallel
from engine.runlog import PER_LAYER
from engine.sampling import open_model
from model import GPT
from tests.conftest import ROOT, SMALL, ranks, refused, small, start
from tests.several import stopped, trainings
from train import RunLog, build_optimizer, train

LLAMA = ["--norm=rmsnorm", "--mlp=swiglu", "--position=rope", "--n_kv_head=1"]
MODELS = {
    "gpt": [],
    "moe": [*LLAMA, "--n_experts=4", "--top_k=2", "--attention=alternating", "--mla_rank=8", "--msign_targets=blocks",
            "--logit_trust=0.5", "--logit_clip=0.05"],
}  # fmt: skip
# on four processes the experts are on two nodes of two
RUNS = [("gpt", "ddp", 2), ("gpt", "fsdp", 2), ("gpt", "fsdp", 4), ("moe", "ddp", 2), ("moe", "fsdp", 2),
        ("moe", "hsdp", 4)]  # fmt: skip
BACK = {"ddp": ["--on_alarm=half_rate"], "fsdp": ["--on_alarm=remedy", "--logit_trust=0.05"]}


def torchrun(n: int, script, *arguments) -> list[str]:
    """What `start` starts as torchrun, whose processes are not forked."""
    return [find_spec("torch.distributed.run").origin, f"--nproc_per_node={n}", "--master_port=0",
            "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", str(ROOT / script), *map(str, arguments)]  # fmt: skip


def several(n: int, function: str, *arguments, **env):
    """A function of tests/several.py on n processes; the result, which rank 0 prints."""
    done = ranks(n, "tests/several.py", function, *map(json.dumps, arguments), **env)
    assert [rank.returncode for rank in done] == [0] * n, [rank.stderr for rank in done]
    return json.loads(done[0].stdout.split("RESULT ")[1].splitlines()[0])


def fresh(folder) -> tuple[GPT, torch.optim.Optimizer, dict]:
    """A model and an optimizer as a run begins with, but for the weights, and the model's architecture."""
    cfg = Config(**{k: v for k, v in json.loads((folder / "record.json").read_text())["config"].items() if k in FIELDS})
    model = GPT(cfg)
    return model, build_optimizer(cfg, model), cfg.architecture


def in_this_process(argv: list[str]) -> int:
    return train(load_config(argv))


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_numbers(a, b, rel=2e-5):
    """Every logged number, but for rounding; a Lanczos residual is what rounding leaves of it."""
    for x, y in zip(lines(a), lines(b), strict=True):
        assert set(x) == set(y)
        for key in x:
            loose = "residual/" in key or key.endswith(("/residual", "ratio")) or "ratio/" in key
            assert (x[key] is None) == (y[key] is None), key
            if x[key] is not None:
                fifth_digit = 1.01e-4 if PER_LAYER.fullmatch(key) else 0  # to which these are logged
                limit = max(100 * rel if loose else rel, fifth_digit)
                assert x[key] == pytest.approx(y[key], rel=limit, abs=1e-7), (x["iter"], key)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every model on one, two and four processes, and some more that go on where others were stopped."""
    folder = tmp_path_factory.mktemp("parallel")
    (folder / "corpus").mkdir()
    rng = np.random.default_rng(0)
    for split, size in (("train", 5000), ("val", 1000)):
        (np.cumsum(rng.integers(0, 4, size)) % 256).astype(np.uint16).tofile(folder / "corpus" / f"{split}.bin")
    places = {"dataset": str(folder / "corpus"), "runs_dir": str(folder / "runs")}
    every = {"jacobian_every": 6, "eval_every": 6, "probe_every": 3, "layers_every": 6, "ckpt_every": 4}
    values = SMALL | places | every | {"micro_batch": 1, "eval_batches": 3, "max_steps": 12, "msign_period": 5}
    (folder / "small.py").write_text("\n".join(f"{k} = {v!r}" for k, v in values.items()) + "\n")
    small_py = str(folder / "small.py")

    def jobs(processes):
        return [[small_py, *MODELS[name], f"--name={name}-{way}{processes}", f"--parallel={way}"]
                for name, way, size in RUNS if size == processes]  # fmt: skip

    def back(name, how):
        return [[small_py, *BACK[how], f"--name=back-{how}-{name}", f"--parallel={how}"]]

    alone = [[small_py, *options, f"--name={name}-one"] for name, options in MODELS.items()]
    assert set(trainings(alone + back("one", "ddp") + back("one", "fsdp"))) == {0}
    assert set(several(2, "trainings", jobs(2) + back("two", "ddp") + back("two", "fsdp"))) == {0}
    assert set(several(4, "trainings", jobs(4), LOCAL_WORLD_SIZE=2)) == {0}
    return folder


@pytest.mark.parametrize("model, way, processes", RUNS)
def test_every_logged_number_is_the_same_on_one_two_and_four_processes(runs, model, way, processes):
    """Loss, gradient norm, spectra, Jacobians, updates, validation: MSign has been applied twice by the end."""
    one, several = (runs / "runs" / f"{model}-{suffix}" for suffix in ("one", f"{way}{processes}"))
    assert_same_numbers(one, several)
    last = lines(several)[-1]
    assert {"jacobian/alignment", "srank/W_O", "val/loss", "grad_norm/1.W_up", "update_norm/0.W_V"} <= set(last)
    if model == "moe":  # both limits have changed steps
        assert all(min(line.get(f"{limit}/least", 1) for line in lines(several)) < 1 for limit in ("trust", "clip"))
    record = json.loads((several / "record.json").read_text())["machine"]
    assert (record["processes"], record["parallel"]) == (processes, way)


@pytest.mark.parametrize("how", BACK)
def test_two_processes_go_back_together(runs, how):
    one, two = (runs / "runs" / f"back-{how}-{name}" for name in ("one", "two"))
    assert_same_numbers(one, two)
    assert json.loads((two / "rescue.json").read_text()) == {"rang": 9, "back_to": 8}
    assert len((two / "abandoned.jsonl").read_text().splitlines()) == 1
    assert [p.name for p in checkpoint.checkpoints(two)] == ["ckpt_0000012"]


def test_stopped_on_two_processes_and_gone_on_with_on_another_number(runs, monkeypatch):
    """One rank gets a SIGTERM during step 8, of which there is a checkpoint anyway: both stop after it.

    Sharded to one and to four processes, one to sharded; replicated to replicated and to one and back; both to two
    nodes of two and back.
    """
    folder, small_py = runs / "runs", str(runs / "small.py")
    sharded = dict.fromkeys(("to4", "to2x2", "moe-to1"), "fsdp")
    names = sharded | dict.fromkeys(("ddp", "ddp-to1", "ddp-to4"), "ddp")

    def job(name, *more):
        return [small_py, *(MODELS["moe"] if name.startswith("moe") else []), f"--name={name}", *more]

    several(2, "stopped", 7, [job(name, f"--parallel={way}") for name, way in names.items()])
    for name in names:
        assert [p.name for p in checkpoint.checkpoints(folder / name)] == ["ckpt_0000008"]
        assert not list((folder / name).glob("*.partial"))
        assert {p.name for p in (folder / name / "ckpt_0000008").iterdir()} >= {"__0_0.distcp", "__1_0.distcp"}
        model = open_model(folder / name, torch.device("cpu"))[0]
        twin, optimizer, architecture = fresh(folder / name)
        checkpoint.load(folder / name / "ckpt_0000008", architecture, twin, optimizer)
        assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert in_this_process(job("moe-to1", "--resume")) == 0
    monkeypatch.setattr(RunLog, "log", RunLog.log)  # `stopped` changes it
    assert stopped(9, [job("to2"), job("ddp-to1", "--resume")]) == [128 + signal.SIGTERM] * 2
    monkeypatch.undo()
    assert checkpoint.checkpoints(folder / "ddp-to1")[-1].name == "ckpt_0000010.pt"
    on_four = {"to4": "fsdp", "ddp-to4": "hsdp", "to2x2": "hsdp"}
    jobs = [job(name, "--resume", f"--parallel={way}") for name, way in on_four.items()]
    assert several(4, "stopped", 9, jobs, LOCAL_WORLD_SIZE=2) == [128 + signal.SIGTERM] * 3
    on_two = {"to2": "fsdp", "ddp": "ddp", "ddp-to1": "ddp", "to4": "fsdp", "ddp-to4": "ddp", "to2x2": "fsdp"}
    jobs = [job(name, "--resume", f"--parallel={way}") for name, way in on_two.items()]
    assert several(2, "trainings", jobs) == [0] * 6
    for name in (*names, "to2"):
        assert_same_numbers(folder / ("moe-one" if name.startswith("moe") else "gpt-one"), folder / name)
    metrics = [(folder / name / "metrics.jsonl").read_bytes() for name in ("gpt-ddp2", "ddp")]
    assert metrics[0] == metrics[1]


def test_all_ranks_write_their_shares_while_training_goes_on(runs, tmp_path):
    """Each optimizer goes on to the bit. Then a disk is full, folders differ, and a rank dies while it writes."""
    victim = [str(runs / "small.py"), "--name=killed", "--parallel=ddp"]
    done = ranks(2, "tests/several.py", "checkpoints", json.dumps(str(tmp_path)), json.dumps(victim), timeout=100)
    assert done[1].returncode == -signal.SIGKILL and done[0].returncode > 0, done[0].stderr
    found = json.loads(done[0].stdout.split("RESULT ")[1].splitlines()[0])
    assert found["same"] == {"adamw": True, "spam": True, "muon": True}
    for name, total in found["total"].items():
        counted = found["counted"][name]
        assert sum(rank["copied"] for rank in counted) == total  # every tensor once
        for rank in counted:
            assert rank["copied"] <= total / 2 + rank["largest"]
            assert rank["copied"] <= rank["file"] < rank["copied"] + 3000 * rank["tensors"]
            assert rank["read"] == total and rank["at once"] <= 2 * rank["largest"]
    limited, elsewhere = found["full disk"], found["elsewhere"]
    assert len(set(limited)) == 1 and "cannot be written" in limited[0] and "File too large" in limited[0]
    assert len(set(elsewhere)) == 1 and "__1_0.distcp was written elsewhere" in elsewhere[0]
    folder = runs / "runs" / "killed"
    assert [p.name for p in checkpoint.checkpoints(folder)] == ["ckpt_0000004"]
    assert (folder / "ckpt_0000008.partial" / "__1_0.distcp").stat().st_size
    assert in_this_process([*victim, "--resume"]) == 0
    assert_same_numbers(runs / "runs" / "gpt-one", folder)
    assert [p.name for p in folder.glob("ckpt_*")] == ["ckpt_0000012.pt"]


def test_a_damaged_shard_and_a_foreign_pickle_are_refused(runs, tmp_path):
    source = checkpoint.checkpoints(runs / "runs" / "gpt-fsdp2")[-1]
    architecture = json.loads((source / checkpoint.ABOUT).read_text())["architecture"]
    model, optimizer, _ = fresh(source.parent)

    def copy(name):
        path = tmp_path / name / source.name
        shutil.copytree(source, path)
        return path

    checkpoint.load(copy("whole"), architecture, model, optimizer)
    path = copy("damaged")
    shard = path / "__1_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"not a whole checkpoint \(checksum of __1_0.distcp is wrong\)"):
        checkpoint.load(path, architecture, model, optimizer)
    with pytest.raises(UserError, match="n_layer = 2 there, 3 here"):
        checkpoint.load(copy("other"), architecture | {"n_layer": 3}, model, optimizer)
    path = copy("old")
    about = json.loads((path / checkpoint.ABOUT).read_text())
    (path / checkpoint.ABOUT).write_text(json.dumps(about | {"adam": True}))
    with pytest.raises(UserError, match=r"until 2026-11-24; only the code that wrote it can read it .*record\.json"):
        checkpoint.load(path, architecture, model, optimizer)
    path = copy("cut")
    (path / "__0_0.distcp").unlink()
    with pytest.raises(UserError, match=r"not a whole checkpoint \(checksum of __0_0.distcp is wrong\)"):
        checkpoint.load(path, architecture, model, optimizer)

    class Evil:
        def __init__(self, call, *args):
            self.call, self.args = call, args

        def __reduce__(self):
            return self.call, self.args

    path, executed = copy("evil"), tmp_path / "executed"
    # the second is a class of a module of which .metadata holds a function; it opens a file
    for evil in (Evil(executed.mkdir), Evil(torch.serialization._open_file, str(executed), "w")):
        (path / ".metadata").write_bytes(pickle.dumps(evil))
        about = json.loads((path / checkpoint.ABOUT).read_text())
        about["files"][".metadata"] = hashlib.sha256((path / ".metadata").read_bytes()).hexdigest()
        (path / checkpoint.ABOUT).write_text(json.dumps(about))
        with pytest.raises(UserError, match="which does not belong there"):
            checkpoint.load(path, architecture, model, optimizer)
        assert not executed.exists()


@pytest.mark.parametrize("ranks", [3, 4])
def test_msign_on_several_ranks_is_one_processs_and_each_computes_its_share(ranks):
    """Rows that do not divide, fewer rows than ranks, stacks of experts, a zero matrix."""
    found = several(ranks, "signs")
    for kind, result in found.items():
        assert result["error"] < 1e-5, kind
        assert sum(result["matrices"]) == 6 + 5, kind  # none is computed twice
        assert max(result["matrices"]) <= -(-11 // ranks) + 1, kind
        assert result["bytes"] == result["expected"], kind  # what the plan says
        copies = {"replicated": ranks, "sharded": 1, "hybrid": 2}[kind]
        written = Counter(name for names in result["written"] for name in names)  # by each rank in a checkpoint
        assert set(written.values()) == {ranks // copies} and len(written) == 7, kind
    assert max(found["sharded"]["bytes"]) < max(found["replicated"]["bytes"])


@pytest.mark.parametrize("ranks", [3, 4])
def test_every_rank_measures_the_spectra_of_its_share_and_gathers_one_matrix_at_a_time(ranks):
    for kind, found in several(ranks, "spectra").items():
        assert found["same"], kind
        assert sum(found["matrices"]) == 6 + 5, kind  # none is measured twice
        assert max(found["matrices"]) <= -(-11 // ranks) + 1, kind
        assert kind == "replicated" or max(found["at once"]) == 60


def test_a_sharded_model_is_measured_on_rank_0_without_being_there_as_a_whole():
    found = several(2, "lent")
    assert found["same"]
    for name in ("activations", "jacobians"):
        most, left = found[name]
        assert found["rest"] + found["block"] <= most <= found["rest"] + 2 * found["block"] and left == 0, name
    most, left = found["at once"]
    assert most == found["rest"] + 6 * found["block"] and left == 0


def test_gradients_are_held_once_while_they_accumulate_and_are_one_processs():
    assert several(4, "gradients") == {"ddp": True, "fsdp": True, "hsdp": True}


def test_compiled_blocks_of_a_sharded_model_with_recomputation_give_the_same():
    found = several(4, "compiled")
    assert found.pop("breaks") == 0
    for of in found.values():
        assert of["blocks"] == pytest.approx(of["off"], rel=1e-5) and of["off"][1] > 0
    assert found["fsdp"]["off"] == pytest.approx(found["hsdp"]["off"], rel=1e-5)


def test_msign_refuses_on_all_ranks_at_once():
    found = several(2, "refusals")
    assert found["nan"] == ["NonFiniteWeightError: b holds a value that is not finite; MSign changed no weight"] * 2
    for kind in ("columns", "replicated", "twice"):
        assert len(set(found[kind])) == 1
        assert found[kind][0].startswith("ValueError: a is distributed as")
    assert found["meshes"][0].startswith("ValueError: b lies on DeviceMesh(")


def test_initial_weights_do_not_depend_on_the_sharding(runs):
    cfg = small()
    world = parallel.World(0, 1, torch.device("cpu"))
    model = parallel.build(cfg, world, sharded=False)
    plain = GPT(cfg)
    mup.init_weights(plain, cfg)
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b), name
    first = [lines(runs / "runs" / f"gpt-{how}")[0]["train/loss"] for how in ("one", "ddp2", "fsdp2", "fsdp4")]
    assert max(first) - min(first) < 1e-6


def test_bad_input_is_one_line_before_any_process_waits(runs):
    small_py = runs / "small.py"
    for options, says in (
        (["--micro_batch=4"], "micro_batch = 4: times WORLD_SIZE=2 must divide batch_size=4"),
        (["--msign_targets=W_X"], "'W_X' matches no matrix"),
        (["--name=gpt-one"], "exists; go on with --resume"),
    ):
        done = ranks(2, "train.py", small_py, "--name=x", *options, timeout=60)
        assert [rank.returncode for rank in done] == [2, 2]
        assert {rank.stderr.strip() for rank in done} == {done[0].stderr.strip()}
        assert len(done[0].stderr.splitlines()) == 1 and says in done[0].stderr, done[0].stderr
    assert not (runs / "runs" / "x").exists()
    for way in ("fsdp", "hsdp"):
        with pytest.raises(UserError, match=f"compile = 'whole': must be blocks or off with parallel = '{way}'"):
            parallel.start(small(parallel=way, compile="whole"))
    for per_node, rank in ((4, 1), (1, 0), (3, 1), (2, 0)):  # one node, nodes of one, a rest, ranks in another order
        says = f"RANK=1 of WORLD_SIZE=4 is LOCAL_RANK={rank} of LOCAL_WORLD_SIZE={per_node} on its node"
        environment = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(per_node)}
        refused("train.py", small_py, "--name=x", "--parallel=hsdp", says=says, **environment)
    refused("train.py", small_py, "--name=x", says="LOCAL_WORLD_SIZE: must be whole numbers", RANK="one")


def test_a_checkpoint_of_another_model_is_refused_everywhere(runs):
    record = runs / "runs" / "gpt-one" / "record.json"
    text = record.read_text()
    summary = record.with_name("summary.json").rename(record.with_name("kept.json"))
    try:
        changed = json.loads(text)
        changed["config"]["d_ff"] = 128
        record.write_text(json.dumps(changed))
        done = ranks(2, "train.py", runs / "small.py", "--name=gpt-one", "--resume", "--d_ff=128", timeout=120)
        assert [rank.returncode for rank in done] == [2, 2]
        for rank in done:
            assert "checkpoint of another architecture (d_ff = 64 there, 128 here)" in rank.stderr
    finally:
        record.write_text(text)
        summary.rename(record.with_name("summary.json"))


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_when_a_rank_dies_the_others_stop_and_the_run_goes_on_from_the_last_checkpoint(runs, tmp_path, way):
    name = f"dies-{way}"
    arguments = [runs / "small.py", f"--name={name}", f"--parallel={way}", "--ckpt_every=50", "--max_steps=100000",
                 "--probe_every=0", "--jacobian_every=0", "--eval_every=0"]  # fmt: skip
    said = tmp_path / "said"
    process = start(*torchrun(2, "train.py", *arguments), output=(os.devnull, str(said)))
    folder = runs / "runs" / name
    deadline = time.time() + 120
    while not checkpoint.checkpoints(folder) and time.time() < deadline:
        time.sleep(0.1)
    ranks = [
        int(pid)
        for pid in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    ]
    assert len(ranks) == 2
    began = time.time()
    os.kill(ranks[1], signal.SIGKILL)
    process.join(90)
    assert time.time() - began < 60
    assert process.exitcode and "SIGKILL" in said.read_text()
    saved = checkpoint.step_of(checkpoint.checkpoints(folder)[-1])
    done = several(2, "stopped", saved + 5, [[str(a) for a in arguments] + ["--resume"]])
    assert done == [128 + signal.SIGTERM]
    assert lines(folder)[-1]["iter"] == saved + 6
    assert [line["iter"] for line in lines(folder)] == list(range(1, saved + 7))


def test_one_of_several_processes_leaves_without_taking_the_interpreter_down():
    """What must be flushed is; what the interpreter does at its end, when threads may abort it, does not happen."""
    code = """
import atexit, sys
from engine import parallel
atexit.register(print, "flushed")
class Late:
    def __del__(self): print("finalised", flush=True)
late = Late()
print("said")
parallel.leave(3)"""
    for several, said in (({"TORCHELASTIC_RUN_ID": "x"}, "said flushed"), ({}, "said flushed finalised")):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **several}
        )
        assert (done.returncode, done.stdout.split()) == (3, said.split()), done.stderr


def test_what_is_chosen_when_nothing_is_said():
    cpu = parallel.World(0, 2, torch.device("cpu"))
    gpu = parallel.World(0, 8, torch.device("cuda"))
    assert parallel.choose(small(), cpu) == ("ddp", [])
    large = small(d_model=2048, d_ff=8192, n_layer=16)
    assert parallel.choose(large, gpu, total_memory=8 * 2**30) == ("fsdp", [])
    assert parallel.choose(large, gpu, total_memory=80 * 2**30) == ("ddp", [])
    on_nodes = parallel.World(0, 8, torch.device("cuda"), per_node=4)
    chosen = [parallel.choose(large, on_nodes, total_memory=size * 2**30)[0] for size in (4, 5, 8, 80)]
    assert chosen == ["fsdp", "hsdp", "hsdp", "ddp"]
    for way in ("fsdp", "hsdp"):
        layout, (said,) = parallel.choose(small(parallel=way), parallel.World(0, 1, torch.device("cpu")))
        assert layout == "ddp" and f"{way!r} with one process: nothing is sharded" in said


REDUCED = ["--d_model=32", "--n_layer=2", "--n_head=4", "--d_ff=48", "--block_size=16", "--vocab_size=512",
           "--batch_size=4", "--micro_batch=2", "--max_steps=10", "--warmup_steps=3", "--lr_scale=4", "--eval_every=5",
           "--eval_batches=2", "--probe_every=10", "--layers_every=10", "--jacobian_every=10", "--compile=off",
           "--wandb=off"]  # fmt: skip
CONFIGS = ["nano_5m", "sigma_40m", "llama_1b", "llama_moe_3b"]


def test_every_configuration_trains_at_reduced_width_on_one_and_on_two_processes(runs):
    """AdamW and MSign of the paper's models, and the ladder's largest with recomputation, in their own precision.

    On two processes without AdamW's, which are MSign's without MSign.
    """

    def jobs(suffix, configs, *more):
        out = []
        for config in configs:
            options = [
                f"--dataset={runs / 'corpus'}",
                f"--runs_dir={runs / 'reduced'}",
                f"--name={config}-{suffix}",
                *more,
            ]
            options += ["--mla_rank=8"] if "sigma" in config else ["--msign_period=0"] if "adamw" in config else []
            options += [] if "adamw" in config else ["--msign_period=4"]
            out.append([str(ROOT / "configs" / f"{config}.py"), *REDUCED, *options])
        return out

    configs = [f"{c}_{o}" for c in CONFIGS for o in ("adamw", "msign")] + ["gpt_3b"]
    on_two = [config for config in configs if "adamw" not in config]
    assert {in_this_process(argv) for argv in jobs("one", configs)} == {0}
    assert set(several(2, "trainings", jobs("two", on_two, "--parallel=fsdp"))) == {0}
    for config in configs:
        one = lines(runs / "reduced" / f"{config}-one")
        assert len(one) == 10 and one[-1]["train/loss"] < one[0]["train/loss"], config
        applied = [line["iter"] for line in one if "msign/fallbacks" in line]
        assert applied == ([] if "adamw" in config else [4, 8]), config
    for config in on_two:
        one, two = (lines(runs / "reduced" / f"{config}-{suffix}") for suffix in ("one", "two"))
        assert len(two) == 10 and one[-1]["train/loss"] == pytest.approx(two[-1]["train/loss"], rel=5e-3), config
