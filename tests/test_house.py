"""The rooms and what they may not do: who imports whom, and which calls occur nowhere."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# a room imports only from rooms named before it; train.py and scripts/ may import anything
ORDER = (
    "config", "model", "mup", "msign", "controls", "rivals", "probes", "theory", "measure", "data", "collapse", "machine", "budget",
    "parallel", "checkpoint", "runlog", "runs", "evidence", "figures", "pool", "train",
)  # fmt: skip
ROOMS = {path.stem: [path] for path in ROOT.glob("*.py")} | {"data": list((ROOT / "data").glob("*.py"))}
SOURCES = [p for pattern in ("*.py", "data/*.py", "scripts/*.py", "configs/**/*.py") for p in ROOT.glob(pattern)]


def imported(path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return {name.split(".")[0] for name in names}


def test_every_room_has_its_place():
    assert set(ROOMS) == set(ORDER)


@pytest.mark.parametrize("room", ORDER)
def test_a_room_imports_only_from_those_before_it(room):
    found = set.union(*(imported(path) for path in ROOMS[room])) & {*ORDER, "scripts", "tests"} - {room}
    assert found <= set(ORDER[: ORDER.index(room)])


def test_msign_needs_pytorch_and_nothing_else():
    assert imported(ROOT / "msign.py") <= {"torch", *sys.stdlib_module_names}


def test_a_configuration_is_read_without_pytorch():
    code = "import sys, config; config.load_config(['configs/gpt_3b.py']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_from_data_and_no_shell_strings(path):
    """Config files are executed, by design, in one place; metadata of sharded checkpoints goes through an Unpickler that knows its types."""
    for node in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
        name = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert name not in (
            "eval",
            "os.system",
            "os.popen",
            "pickle.load",
            "pickle.loads",
            "marshal.loads",
            "yaml.load",
        )
        assert name != "exec" or path.name == "config.py"
        assert options.get("shell", "False") == "False" and options.get("allow_pickle", "False") == "False"
        assert name != "torch.load" or options.get("weights_only") == "True"
