"""The launch scripts, with stand-ins for srun, scontrol, ssh and SkyPilot that start everything on this machine.

torchrun and its processes are forked from one that has imported PyTorch; tests/test_parallel.py starts real ones.
"""

import json
import os
import re
import socket
import socketserver
import subprocess
import sys
import threading
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from multiprocessing.connection import wait

import pytest
import yaml
from torch.distributed.run import parse_args

from tests.conftest import ROOT, here, start
from tests.test_faults import in_a_session_of_its_own

SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
"$@" & "$@" & wait -n && wait -n
"""
SCONTROL = "#!/bin/sh\necho localhost\necho other\n"
SSH = """#!/bin/bash
[ "$1" = -tt ] && [ "$2" = localhost ] || exit 9
exec bash -c "$3"
"""


# in the place of torchrun: asks a Torchruns for it, and ends as it ends
TORCHRUN = """#!/bin/sh
exec "$TESTS_PYTHON" -S - "$@" << 'END'
import json, os, socket, sys
asked = socket.create_connection(("localhost", int(os.environ["TESTS_PORT"])))
asked.sendall(json.dumps([os.getpid(), sys.argv[1:], dict(os.environ)]).encode() + b"\\n")
sys.exit(int(asked.makefile().readline()))
END
"""


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return str(s.getsockname()[1])


class Torchruns(socketserver.StreamRequestHandler):
    """Starts what TORCHRUN asks for, with the output of the asking process, and stops it when that is stopped."""

    def handle(self):
        pid, words, env = json.loads(self.rfile.readline())
        words = [str(ROOT / word) if word == "train.py" else word for word in words]
        output = tuple(f"/proc/{pid}/fd/{number}" for number in (1, 2))
        first = partial(in_a_session_of_its_own, None)
        process = start(find_spec("torch.distributed.run").origin, *words, output=output, first=first, **env)
        if process.sentinel not in wait([process.sentinel, self.connection]):
            process.terminate()
        process.join()
        with suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(f"{process.exitcode}\n".encode())


@pytest.fixture
def repository(tmp_path):
    """A folder with all that this one has, but for an environment in which torchrun is TORCHRUN."""
    copy = tmp_path / "repository"
    (copy / ".venv" / "bin").mkdir(parents=True)
    for path in ROOT.iterdir():
        if path.name != ".venv":
            (copy / path.name).symlink_to(path)
    (copy / ".venv" / "bin" / "torchrun").write_text(TORCHRUN)
    (copy / ".venv" / "bin" / "torchrun").chmod(0o755)
    return copy


@pytest.fixture
def cluster(tmp_path, repository):
    """Environment of two 'nodes' of one process each."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "ssh": SSH}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    with socketserver.ThreadingTCPServer(("localhost", 0), Torchruns) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        yield {
            **os.environ,
            "PATH": f"{tools}:{os.environ['PATH']}",
            "TESTS_PYTHON": sys.executable, "TESTS_PORT": str(server.server_address[1]),
            "OMP_NUM_THREADS": "1", "NPROC": "1", "MASTER_PORT": free_port(), "SLURM_SUBMIT_DIR": str(repository),
            "SLURM_JOB_NODELIST": "two", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7",
        }  # fmt: skip
        server.shutdown()


@pytest.mark.parametrize("launch, times", [(["scripts/slurm.sh"], 2), (["scripts/ssh.sh", "localhost localhost"], 1)])
def test_two_nodes_train_one_model_and_go_on(launch, times, cluster, repository, config_file, tmp_path):
    for _ in range(times):  # the second time there is nothing left to do
        done = subprocess.run(
            ["bash", *launch, config_file, "--batch_size=4", "--micro_batch=2", "--parallel=ddp", "--device=cpu"],
            cwd=repository, env=cluster, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    assert ("already finished" in done.stdout + done.stderr) == (times == 2)
    folder = tmp_path / "runs" / "small"
    assert json.loads((folder / "summary.json").read_text())["steps"] == 20
    assert json.loads((folder / "record.json").read_text())["machine"]["processes"] == 2


def test_ssh_stops_all_when_one_machine_fails(cluster, repository, config_file):
    done = subprocess.run(
        ["bash", "scripts/ssh.sh", "localhost elsewhere", config_file],
        cwd=repository, env=cluster, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 9


def test_torchrun_waits_for_the_last_checkpoint_but_not_longer_than_slurm():
    patience = {}
    for script in ("slurm.sh", "ssh.sh", "sky.yaml"):
        text = (ROOT / "scripts" / script).read_text()
        patience[script] = int(re.search(r"--shutdown-timeout=(\d+) .*train\.py", text, re.DOTALL)[1])
    before_the_end = int(re.search("--signal=TERM@(\\d+)", (ROOT / "scripts" / "slurm.sh").read_text())[1])
    assert (
        30 < patience["ssh.sh"] == patience["sky.yaml"] == patience["slurm.sh"] < before_the_end
    )  # 30 s is torchrun's own


def test_skypilots_file_starts_the_second_of_two_nodes(tmp_path, config_file):
    """What it hands to torchrun is read by torchrun's own parser, and what that hands to train.py is run dry."""
    task = yaml.safe_load((ROOT / "scripts" / "sky.yaml").read_text())
    assert set(task) == {"name", "num_nodes", "resources", "workdir", "envs", "setup", "run"} and task["workdir"] == "."
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name, text in {"torchrun": 'printf "%s\\0" "$@"', "python": 'echo prepares "$@"'}.items():
        (tmp_path / ".venv" / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / ".venv" / "bin" / name).chmod(0o755)
    (tmp_path / "make").write_text("#!/bin/sh\necho makes $@\n")
    (tmp_path / "make").chmod(0o755)
    node = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "8",
            "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "PATH": f"{tmp_path}:{os.environ['PATH']}"}  # fmt: skip
    given = {"ARGS": f"{config_file} --dry_run --device=cpu", "DATA": "openwebtext"}

    def bash(script, env):
        done = subprocess.run(["bash", "-ec", script], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert bash(task["setup"], node | given) == "makes .venv/.complete\nprepares -m data.openwebtext\n"
    assert bash(task["setup"], node | task["envs"]) == "makes .venv/.complete\n"
    words = parse_args(bash(task["run"], node | given).split("\0")[:-1])
    assert (words.nnodes, words.node_rank, words.nproc_per_node, words.master_addr) == ("2", 1, "8", "10.0.0.1")
    assert words.training_script == "train.py" and words.training_script_args[-1] == "--resume"
    done = here("train.py", *words.training_script_args)
    assert done.returncode == 0 and "20 steps" in done.stdout, done.stderr
    default = parse_args(bash(task["run"], node | task["envs"]).split("\0")[:-1]).training_script_args
    assert (ROOT / default[0]).is_file() and default[1:] == ["--resume"]


def test_ssh_says_how_it_is_called():
    done = subprocess.run(["bash", "scripts/ssh.sh", "node1"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "usage:" in done.stderr
