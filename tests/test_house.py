"""The house: which room may import which, and which calls occur nowhere."""

import ast
import graphlib
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# a room imports from itself and from the floors below its own; ROOMS maps a room to its files
FLOORS = (
    {"scripts"}, {"trials"}, {"train", "analysis", "clients"}, {"engine", "stability"}, {"mup"},
    {"model", "remedies", "data"}, {"config", "msign"},
)  # fmt: skip
PACKAGES = ("scripts", "trials", "analysis", "clients", "engine", "stability", "remedies", "data")
ROOMS = {path.stem: [path] for path in ROOT.glob("*.py")} | {
    name: sorted((ROOT / name).glob("*.py")) for name in PACKAGES
}
SOURCES = [*(path for paths in ROOMS.values() for path in paths), *ROOT.glob("configs/**/*.py")]


def imported(path) -> set[str]:
    """Modules that a file imports, in full: `from engine import budget` is engine.budget."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in (node for node in nodes if isinstance(node, ast.ImportFrom) and node.module):
        names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def rooms_of(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names} & set.union(*FLOORS, {"tests"})


def test_every_room_has_its_floor_and_says_what_it_is_for():
    assert set(ROOMS) == set.union(*FLOORS)
    assert len({*ROOMS, "configs"}) <= 14
    for name in set(PACKAGES) - {"scripts"}:
        said = ast.get_docstring(ast.parse((ROOT / name / "__init__.py").read_text()))
        first, empty, about = said.splitlines()
        assert first and not empty and about.count(". ") >= 1, name  # what it holds, and what it does not


@pytest.mark.parametrize("floor", range(len(FLOORS)))
def test_a_room_imports_only_from_the_floors_below(floor):
    below = set.union(set(), *FLOORS[floor + 1 :])
    for room in FLOORS[floor]:
        for path in ROOMS[room]:
            assert rooms_of(imported(path)) <= below | {room}, path


def test_no_file_imports_itself_in_a_circle():
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path for paths in ROOMS.values() for path in paths
    }
    graph = {name: imported(path) & set(modules) - {name} for name, path in modules.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("path", ["msign.py", "stability/probes.py", "stability/collapse.py"])
def test_what_can_be_copied_needs_pytorch_and_nothing_else(path):
    assert {name.split(".")[0] for name in imported(ROOT / path)} <= {"torch", *sys.stdlib_module_names}


@pytest.mark.parametrize(
    "path", ["stability/monitor.py", "stability/attached.py", "stability/alarm.py", "remedies/trust.py"]
)
def test_the_monitor_and_the_limit_need_pytorch_and_what_can_be_copied(path):
    ours = {"msign", "stability.collapse", "stability.probes", "stability.attached", "stability"}
    names = {name for name in imported(ROOT / path) if name.split(".")[0] not in {"torch", *sys.stdlib_module_names}}
    assert {name.rpartition(".")[0] if name.rpartition(".")[0] in ours else name for name in names} <= ours


def test_the_monitor_is_exported_without_pytorch():
    code = "import sys, stability; sys.exit('torch' in sys.modules or 'Monitor' not in dir(stability))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_configuration_is_read_without_pytorch():
    code = "import sys, config; config.load_config(['configs/gpt_3b.py']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_from_data_and_no_shell_strings(path):
    """Config files are executed, by design, in one place; an Unpickler reads the metadata of sharded checkpoints."""
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


def functions(path):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


def length(node) -> int:
    return node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_short_and_keep_to_their_own_variables(path):
    assert [node.name for node in functions(path) if length(node) > 80] == []
    assert not any(isinstance(node, ast.Nonlocal) for node in ast.walk(ast.parse(path.read_text())))


def test_the_driver_is_read_in_one_sitting():
    path = ROOT / "train.py"
    assert len(path.read_text().splitlines()) <= 300
    (loop,) = (node for node in functions(path) if node.name == "loop")
    assert length(loop) <= 60


def test_the_front_page_is_short_and_no_line_of_prose_is_long():
    """Python's lines are ruff's to check; a table's row and a link cannot be broken."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md"), *ROOT.glob("results/*.md")]
    for page in pages:
        for number, line in enumerate(page.read_text().splitlines(), 1):
            assert len(line) <= 120 or line.lstrip().startswith("|") or "](" in line, f"{page.name}:{number}"
