"""The Colab notebook, run on the CPU; a stub stands in for google.colab."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from command_line import run
from notebooks import run_cells

nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "launchers" / "cam_colab.ipynb"
COLAB = {
    "google/colab/__init__.py": "",
    "google/colab/files.py": (
        "import os, shutil\n"
        "def upload(target_dir): shutil.copytree(os.environ['UPLOADS'], target_dir)\n"
        "def download(path): shutil.copy(path, os.environ['DOWNLOADS'])\n"
    ),
    "google/colab/drive.py": "def mount(path): print('mounted', path)\n",
}


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def execute(notebook, folder):
    """Run all code cells in `folder` and return their outputs."""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for outputs in run_cells(cells, folder) for output in outputs]
    assert not [output for output in outputs if "error: " in output.get("text", "")]
    return outputs


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A study of five models on a few images, which the notebook takes instead of training for minutes."""
    folder = tmp_path_factory.mktemp("study") / "results"
    run(
        "study --dataset synthetic --image_size 16 --output_stride 8 --limit_train 8 --limit_eval 4 --batch_size 4 "
        f"--num_epochs 1 --device cpu --save_dir {folder}"
    )
    return folder


def test_notebook_has_no_logic():
    notebook = read()
    nbformat.validate(notebook)
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    for word in ("def ", "class ", "for ", "while ", "lambda"):
        assert word not in "\n".join(line for line in code.splitlines() if not line.startswith("#"))
    assert all(not cell.get("outputs") for cell in notebook.cells)


@pytest.mark.slow  # builds the package
def test_notebook_from_top_to_bottom(results, tmp_path, monkeypatch):
    """The install cell builds the package from a copy of the sources, into a folder beside the tests' environment."""
    work = tmp_path / "work"
    work.mkdir()
    if not (ROOT / ".git").exists():
        pytest.skip("needs a checkout")
    parts = ("effnet_fast", "kernels", "pyproject.toml", "README.md", "LICENSE")
    listing = subprocess.check_output(["git", "ls-files", "-z", *parts], cwd=ROOT, text=True)
    for name in filter(None, listing.split("\0")):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes((ROOT / name).read_bytes())
    shutil.copytree(results, work / "results")
    site = tmp_path / "site"
    for name, value in {
        "PIP_TARGET": str(site),
        "PIP_NO_DEPS": "1",
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads 0 as "no isolation", which needs no network
        "PYTHONPATH": f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "CUDA_VISIBLE_DEVICES": "",
    }.items():
        monkeypatch.setenv(name, value)
    outputs = execute(read(), work)
    assert (site / "effnet_fast" / "explain" / "gallery.html").is_file()
    assert (work / "installed.txt").read_text().startswith("torch=="), "the constraint keeps the installed torch"
    assert any("image/png" in output.get("data", {}) for output in outputs), "the grid is shown"
    assert any("torch.Size([4, 32, 32])" in output.get("data", {}).get("text/plain", "") for output in outputs)
    for name in ("gallery.html", "grids/grid-00001.png"):
        assert (work / "maps" / name).stat().st_size > 0
    assert len((work / "maps" / "summary.csv").read_text().splitlines()) == 1 + 5, "five models"


@pytest.mark.slow  # starts kernels
@pytest.mark.parametrize(("source", "target"), [("upload", "download"), ("drive", "drive")])
def test_upload_download_and_drive(results, tmp_path, monkeypatch, source, target):
    photos, stubs, work = tmp_path / "photos", tmp_path / "stubs", tmp_path / "work"
    for folder in (photos, work, tmp_path / "downloads"):
        folder.mkdir()
    Image.effect_noise((40, 32), 80).convert("RGB").save(photos / "mine.png")
    shutil.copytree(results, work / "results")
    for name, text in COLAB.items():
        (stubs / name).parent.mkdir(parents=True, exist_ok=True)
        (stubs / name).write_text(text)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (stubs, ROOT, ROOT / "kernels"))))
    monkeypatch.setenv("UPLOADS", str(photos))
    monkeypatch.setenv("DOWNLOADS", str(tmp_path / "downloads"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    notebook = read()
    notebook.cells = [cell for cell in notebook.cells if "@title Install" not in cell.source]
    parameters = {
        'IMAGES = "examples"': f'IMAGES = "{source}"',
        "/content/drive/MyDrive/images": str(photos),
        'SAVE = "keep here"': f'SAVE = "{target}"',
        "/content/drive/MyDrive/maps": str(tmp_path / "downloads"),
    }
    for before, after in parameters.items():
        assert sum(before in cell.source for cell in notebook.cells) == 1
        for cell in notebook.cells:
            cell.source = cell.source.replace(before, after)
    execute(notebook, work)
    assert "mine.png" in (tmp_path / "downloads" / "gallery.html").read_text()
