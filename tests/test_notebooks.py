"""Every notebook opens and runs from the committed logs, and is stored without outputs."""

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT, run

# what each has to show besides figures
NOTEBOOKS = {
    "replot_failures": ["collapsed at step", "stable rank", "attention lives", "step 1812: a collapse may come"],
    "theory": ["attention's Jacobian below its bound", "Theorem 4.2 promises 0.500; the product is 5.1e-07"],
    "your_run": ["collapsed at step", "jacobian/alignment/3", "log Z"],
}


@pytest.fixture(scope="module")
def client():
    """A kernel for all notebooks, since each start of one imports PyTorch and more."""
    folder = {"metadata": {"path": str(ROOT / "notebooks")}}
    client = NotebookClient(nbformat.v4.new_notebook(), timeout=120, resources=folder)
    with client.setup_kernel():
        yield client


FORGET = f"""%reset -f
import sys
sys.path[:] = [path for path in sys.path if path != {str(ROOT)!r}]
for name in {[path.stem for path in ROOT.iterdir() if path.suffix in ("", ".py")]!r}:
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        del sys.modules[module]
%reset -f
"""


def executed(client, notebook):
    """Everything the notebook printed or displayed as text, and the number of figures.

    Names and modules of an earlier notebook are forgotten first.
    """
    client.nb = notebook
    client.nb.cells.insert(0, nbformat.v4.new_code_cell(FORGET))
    client.execute(cleanup_kc=False)
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    texts = [output.get("text", "") + output.get("data", {}).get("text/markdown", "") for output in shown]
    return "\n".join(texts), sum("image/png" in output.get("data", {}) for output in shown)


def opened(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def test_all_are_tested_and_stored_without_outputs():
    assert {path.stem for path in ROOT.glob("notebooks/*.ipynb")} == set(NOTEBOOKS)
    for name in NOTEBOOKS:
        code = [cell for cell in opened(name).cells if cell.cell_type == "code"]
        assert all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs(client, name):
    text, figures = executed(client, opened(name))
    for said in NOTEBOOKS[name]:
        assert said in text
    assert figures >= 3


def test_your_run_opens_a_run_folder_and_an_offline_wandb_run(client, config_file, tmp_path):
    every = ["--max_steps=110", "--jacobian_every=50", "--theory_every=50"]
    assert run("train.py", config_file, *every, "--wandb=offline", "--eval_every=0").returncode == 0
    (written,) = (tmp_path / "runs").iterdir()
    both = []
    for folders in (written, written / "wandb"):
        notebook = opened("your_run")
        (cell,) = [cell for cell in notebook.cells if cell.source.startswith("folders = ")]
        _, rest = cell.source.split("\n", 1)
        cell.source = f"folders = [Path({str(folders)!r})]\n{rest}"
        both.append(executed(client, notebook))
    assert both[0] == both[1]
    assert "AdamW: no collapse" in both[0][0]
    assert both[0][1] == 6  # overview, figures 1 to 3, heat maps, theorems
