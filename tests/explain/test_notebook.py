"""The Colab notebook, executed from top to bottom on the CPU."""

import os
import subprocess
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "launchers" / "cam_colab.ipynb"


def test_the_notebook_has_no_logic_of_its_own():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    for word in ("def ", "class ", "for ", "while ", "lambda"):
        assert word not in "\n".join(line for line in code.splitlines() if not line.startswith("#"))
    assert all(not cell.get("outputs") for cell in notebook.cells)


@pytest.mark.slow  # builds the package and trains two models
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """Its install cell builds the real package from a copy, into a folder beside the tests' environment."""
    work = tmp_path / "work"
    work.mkdir()
    if not (ROOT / ".git").exists():
        pytest.skip("needs a checkout")
    parts = ("effnet_fast", "kernels", "pyproject.toml", "README.md", "LICENSE")
    listing = subprocess.check_output(["git", "ls-files", "-z", *parts], cwd=ROOT, text=True)
    for name in filter(None, listing.split("\0")):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes((ROOT / name).read_bytes())
    site = tmp_path / "site"
    for name, value in {
        "PIP_TARGET": str(site),
        "PIP_NO_DEPS": "1",
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads this as: without isolation, for there is no network
        "PYTHONPATH": f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "CUDA_VISIBLE_DEVICES": "",
    }.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(work)}}
    nbclient.NotebookClient(notebook, timeout=None, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert (site / "effnet_fast" / "explain" / "gallery.html").is_file()
    assert any("image/png" in output.get("data", {}) for output in outputs), "the grid is shown inline"
    assert any("torch.Size([4, 32, 32])" in output.get("data", {}).get("text/plain", "") for output in outputs)
    for name in ("gallery.html", "summary.csv", "grids/grid-00001.png"):
        assert (work / "maps" / name).stat().st_size > 0
    assert not [output for output in outputs if "error: " in output.get("text", "")]
