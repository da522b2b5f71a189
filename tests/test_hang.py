"""Processes that wait for another one in vain."""

import json
import os
import time

import torch

import train
from config import load_config
from engine import hang, machine
from tests.conftest import ranks, small


def test_a_rank_that_sleeps_is_found_and_the_run_ends(config_file, tmp_path):
    began = time.monotonic()
    argv = [str(config_file), "--micro_batch=2", "--parallel=fsdp", "--patience=2", "--probe_every=0"]
    done = ranks(2, "tests/several.py", "sleeping", *map(json.dumps, (3, 3.5, argv)), timeout=60)
    assert time.monotonic() - began < 50  # most of it to start the processes
    folder = tmp_path / "runs" / "small"
    for rank, process in enumerate(done):
        (said,) = process.stderr.strip().splitlines()
        assert process.returncode == 2 and f"error: rank {rank} lost the others" in said
        assert said.endswith(f"; what each rank did is in {folder}/stacks; go on with --resume")
    assert "Timed out waiting 2000ms" in done[0].stderr
    waits, sleeps = ((folder / "stacks" / f"rank{rank}.txt").read_text() for rank in (0, 1))
    assert "in all_gather" in waits and "in forward_backward" in waits
    assert "in sleepy" in sleeps and "all_gather" not in sleeps
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2


def test_steps_that_follow_each_other_seldom_set_the_clock(config_file, tmp_path, monkeypatch):
    armed, ended = [], []
    monkeypatch.setattr(hang.faulthandler, "dump_traceback_later", lambda after, file: armed.append((after, file)))
    monkeypatch.setattr(hang.faulthandler, "cancel_dump_traceback_later", lambda: ended.append(True))
    train.train(load_config([str(config_file), "--patience=1000"]))
    assert armed == [(1800, hang.STDERR), (900, hang.STDERR)] and ended == [True]
    with hang.Patience(small(patience=1)) as patience:
        patience.training(tmp_path, 0, several=False)
        for _ in range(2):
            time.sleep(0.06)
            patience.beat()
    assert armed[2:] == [(1800, hang.STDERR), *[(0.9, hang.STDERR)] * 3]


def test_an_error_that_is_not_the_others_fault_stays_what_it_is():
    assert hang.lost(RuntimeError("CUDA error")) is None and hang.lost(None) is None
    said = str(hang.lost(torch.distributed.DistStoreError("Timed out after 3 seconds. 1/2 clients joined.\nmore")))
    assert said == "rank 0 lost the others (Timed out after 3 seconds); go on with --resume"


def test_what_is_asked_of_nccl_and_of_cudas_allocator_unless_the_user_has(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "environ", {})
    cfg = small(name="x", runs_dir=str(tmp_path), device="cuda")
    hang.record_collectives(cfg)
    place = f"{tmp_path}/x/stacks/nccl_"
    asked = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_FR_DUMP_TEMP_FILE": place, "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
    assert os.environ == asked
    users = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "9", "TORCH_FR_DUMP_TEMP_FILE": "here", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}
    monkeypatch.setattr(os, "environ", dict(users))
    hang.record_collectives(cfg)
    assert os.environ == users
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for given, then in (
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "a:1"}, "a:1"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "b:2"}, "b:2"),
    ):
        monkeypatch.setattr(os, "environ", dict(given))
        machine.prepare(cfg)
        assert machine.allocator() == then and len(os.environ) == 1
    monkeypatch.setattr(os, "environ", {})
    machine.prepare(small(device="cpu"))
    assert machine.allocator() is None
