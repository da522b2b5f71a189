"""The package: what `pip install .` brings works in an environment that has PyTorch and nothing else."""

import importlib.metadata
import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGES = (ROOT / "README.md", ROOT / "docs" / "extending.md")


def requirements() -> dict[str, list[str]]:
    """requirements.txt: what follows "# to run" and "# to test …", under "train" and "test"."""
    found, part = {"train": [], "test": []}, ""
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line.startswith("# to "):
            part = "train" if line.startswith("# to run") else "test"
        elif line.strip():
            found[part].append(line.split("#")[0].strip())
    return found


def with_its_requirements(name: str, found: set[str]):
    """Add to `found` the installed distribution of that name and, in turn, those that it requires."""
    name = re.match(r"[\w.-]+", name).group()
    if name.lower() in found:
        return
    try:
        needs = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:  # for another platform
        return
    found.add(name.lower())
    for need in needs:
        if "extra ==" not in need:
            with_its_requirements(need, found)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The interpreter of a new environment that holds the wheel, PyTorch and what PyTorch requires."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    needed: set[str] = set()
    with_its_requirements("torch", needed)
    for name in needed:
        for file in importlib.metadata.files(name) or []:
            place = site / file.parts[0]
            if file.parts[0] != ".." and not place.exists():
                place.symlink_to(file.locate().parents[len(file.parts) - 2] if len(file.parts) > 1 else file.locate())
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", site, wheel]
    subprocess.run(install, check=True, capture_output=True)
    return folder / "bin" / "python"


def test_only_msign_and_what_needs_no_gpt_of_ours_is_packed(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {"__init__.py", "probes.py", "collapse.py", "attached.py", "monitor.py", "adapters.py", "py.typed"}
    assert {name for name in names if "dist-info" not in name} == {
        "msign/__init__.py", "msign/py.typed", *(f"stability/{name}" for name in modules)
    }  # fmt: skip


def test_the_extras_are_the_requirements_and_all_are_locked():
    metadata = (ROOT / "pyproject.toml").read_text()
    lock = (ROOT / "requirements.lock").read_text().lower().replace("_", "-")
    for extra, lines in requirements().items():
        names = [re.match(r"[\w.-]+", line).group().lower().replace("_", "-") for line in lines]
        assert [name for name in names if f"\n{name}==" not in lock] == []
        (listed,) = re.findall(rf"^{extra} = \[\n(.*?)^\]", metadata, flags=re.M | re.S)
        assert re.findall(r'"(.*)"', listed) == lines


def test_the_pages_examples_run_where_only_pytorch_is(python, tmp_path):
    examples = [text for page in PAGES for text in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)]
    assert len(examples) >= 2
    absent = ("train", "config", "model", "mup", "stability.theory", "pandas", "transformers")
    alone = "import importlib.util\nfor name in {}:\n    assert importlib.util.find_spec(name) is None, name\n"
    script = tmp_path / "examples.py"
    script.write_text("\n".join([alone.format(absent), *examples]))
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([python, "-I", script], cwd=tmp_path, env=one_thread, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


USE = """# mypy: disallow-untyped-calls, disallow-untyped-defs, no-implicit-reexport
from typing import Any

import torch
from msign import MSign, Target, describe, find, msign
from stability import Monitor
from stability.collapse import Collapse, Watch, find_collapse
from stability.probes import Jacobians, jacobians
from typing_extensions import assert_type

model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2), 2)
optimizer = MSign(torch.optim.SGD(model.parameters()), model, targets="attention", split={"x": (8, 8, 8)})
optimizer.step()
optimizer.step(lambda: 1.0)
optimizer.load_state_dict(optimizer.state_dict())
assert_type(optimizer.param_groups, list[dict[str, Any]])
assert_type(find(model), dict[str, Target])
assert_type(describe(find(model)), str)
assert_type(msign(torch.eye(2)), torch.Tensor)
monitor = Monitor(model, every=5)
monitor.measure()
report = monitor.step(torch.tensor(1.0), 1.0)
print(report["loss"], report["events"])
monitor.close()
assert_type(monitor.jacobians(torch.zeros(2)), Jacobians)
assert_type(jacobians(torch.nn.ModuleList(), torch.zeros(2)).sigma, torch.Tensor)
assert_type(Watch().add(1.0, None), Collapse | None)
find_collapse(["1.0"], [1.0])  # told: the loss is no number
MSign(model, model)  # told: the model is no optimizer
Monitor(model, evry=5)  # told: no such option
"""


def test_the_installed_package_is_typed(python, tmp_path):
    """mypy finds nothing in the package, and in a program that uses it just what is wrong there."""
    (tmp_path / "use.py").write_text(USE)
    modules = ["-p", "msign", "-p", "stability", "-m", "use"]
    options = ["--config-file", ROOT / "pyproject.toml", "--python-executable", python, "--no-error-summary"]
    command = [sys.executable, "-m", "mypy", *options, "--cache-dir", tmp_path / "cache", *modules]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    found = [line.split(":")[:2] for line in done.stdout.splitlines() if " note: " not in line]
    wrong = [number for number, line in enumerate(USE.splitlines(), 1) if "# told: " in line]
    assert found == [["use.py", str(number)] for number in wrong], done.stdout + done.stderr
