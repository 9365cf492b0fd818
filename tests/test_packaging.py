"""The wheel, the files that git tracks, and lazy imports."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from effnet_fast import internals, provenance
from effnet_fast.provenance import TESTED
from marks import needs_installation

ROOT = Path(__file__).parents[1]
EXPOSED = {"effnet_fast", "effnet_kernels"}
SOURCE_SUFFIXES = {
    ".py",
    ".pyi",
    ".cpp",
    ".h",
    ".yaml",
    ".yml",
    ".toml",
    ".sh",
    ".md",
    ".json",
    ".ipynb",
    ".csv",
    ".sbatch",
}
SOURCE_FOLDERS = ("effnet_fast", "kernels", "launchers", "benchmarks", "tests", ".ci")
SOURCE_FILES = (
    *("Makefile", "constraints.txt", "pyproject.toml", ".gitignore", ".ci/run"),
    *("LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "launchers/Dockerfile"),
)
HEAVY = ("torch", "triton", "nvidia", "captum", "optuna", "matplotlib")


def python(*arguments: str, cwd: Path, **environment: str) -> str:
    """Standard output of this interpreter, run with the installed package and without the tests' path."""
    finished = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    return finished.stdout


@pytest.fixture(scope="session")
def tracked() -> set[str]:
    """Files that git tracks, or that `git add .` would add."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs git and a checkout")
    listing = subprocess.check_output(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True
    )
    return {name for name in listing.split("\0") if (ROOT / name).is_file()}


@pytest.fixture(scope="session")
def wheel(tracked, tmp_path_factory) -> zipfile.ZipFile:
    """The wheel, built offline from a copy of the tracked files."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name)
    python("-c", f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})", cwd=source)
    (built,) = folder.glob("*.whl")
    return zipfile.ZipFile(built)


def sources(folder: str) -> set[str]:
    """Python and C++ files, recipes and pages under a folder of the repository, relative to it."""
    paths = {path for suffix in ("py", "yaml", "html", "cpp", "h") for path in (ROOT / folder).rglob(f"*.{suffix}")}
    return {path.relative_to(ROOT / folder).as_posix() for path in paths}


def test_wheel_exposes_exactly_two_packages(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == EXPOSED


def test_wheel_holds_every_source_and_recipe(wheel):
    expected = {f"effnet_fast/{name}" for name in sources("effnet_fast")}
    expected |= {f"effnet_kernels/{name}" for name in sources("kernels/effnet_kernels")}
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} >= expected


CONSUMER = """
from typing import assert_type
import effnet_fast
from effnet_fast import EvalConfig, ExportConfig, SearchConfig, StudyConfig, TrainConfig
from effnet_fast.model.trained import TrainedModel
from effnet_fast.run.search import SearchResult
from effnet_fast.run.study import StudyResult

result = effnet_fast.train(TrainConfig(num_epochs=1), on_evaluation=lambda epoch, row: print(epoch + 1, row["top1"]))
assert_type(result.top1, float)
assert_type(result.model(), TrainedModel)
assert_type(effnet_fast.evaluate(EvalConfig("last.pt")).top5, float)
assert_type(effnet_fast.export(ExportConfig("last.pt")).model(), TrainedModel)
assert_type(effnet_fast.search(SearchConfig()), SearchResult)
assert_type(effnet_fast.study(StudyConfig()), StudyResult)
assert_type(effnet_fast.load("last.pt").predict("photo.png")[0][0].label, str)
assert_type(effnet_fast.list_models(), list[str])
TrainConfig(num_epochs="three")  # error
effnet_fast.train("recipe.yaml")  # error
"""


def test_type_checkers_see_the_types_of_the_wheel(wheel, tmp_path):
    """mypy reads an installed package's types only if it has py.typed; torch is not installed there, hence unknown."""
    pytest.importorskip("mypy")
    python("-m", "venv", "--without-pip", str(tmp_path / "venv"), cwd=tmp_path)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    wheel.extractall(packages)
    (tmp_path / "consumer.py").write_text(CONSUMER)
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--python-executable", tmp_path / "venv" / "bin" / "python", "consumer.py"],
        cwd=tmp_path, capture_output=True, text=True, env={k: v for k, v in os.environ.items() if k != "MYPYPATH"},
    )  # fmt: skip
    wrong = {line.split(":")[1] for line in checked.stdout.splitlines() if ": error: " in line}
    expected = {str(n) for n, line in enumerate(CONSUMER.splitlines(), start=1) if line.endswith("# error")}
    assert wrong == expected, checked.stdout + checked.stderr


def test_wheel_carries_licence_and_command(wheel):
    names = wheel.namelist()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    (entry_points,) = [name for name in names if name.endswith(".dist-info/entry_points.txt")]
    assert "effnet-fast = effnet_fast.cli:main" in wheel.read(entry_points).decode()


def test_wheel_keeps_dali_and_triton_to_linux(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    requirements = [line for line in wheel.read(name).decode().splitlines() if line.startswith("Requires-Dist:")]
    for package in ("triton", "nvidia-dali"):
        matching = [line for line in requirements if line.removeprefix("Requires-Dist: ").startswith(package)]
        assert matching
        assert all('sys_platform == "linux"' in line for line in matching)


@needs_installation
def test_installation_exposes_exactly_two_packages(tmp_path):
    """Seen from a folder outside the repository, as by a user of the package."""
    installed = {name for name, owners in metadata.packages_distributions().items() if "effnet-fast" in owners}
    assert {name for name in installed if not name.startswith("__editable__")} == EXPOSED
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name.isidentifier()} | EXPOSED
    script = (
        "import sys; from importlib.util import find_spec\n"
        "for name in sys.argv[1:]:\n"
        "    spec = find_spec(name)\n"
        "    print(name, *(spec and (spec.submodule_search_locations or [spec.origin]) or []), sep='\\t')"
    )
    lines = python("-I", "-c", script, *sorted(folders), cwd=tmp_path).splitlines()
    places = {name: paths for name, *paths in (line.split("\t") for line in lines)}
    ours = {name for name, paths in places.items() if any(Path(path).is_relative_to(ROOT / name) for path in paths)}
    assert ours <= EXPOSED
    assert all(places[name] for name in EXPOSED)


def test_git_ignores_no_source(tracked):
    """An unanchored `data/` in .gitignore would drop effnet_fast/data/ silently."""
    on_disk = {
        path.relative_to(ROOT).as_posix()
        for folder in SOURCE_FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in SOURCE_SUFFIXES and not any(part.endswith(".egg-info") for part in path.parts)
    }
    assert on_disk, "no source found: the folders were renamed"
    assert on_disk | set(SOURCE_FILES) <= tracked


@pytest.mark.parametrize(
    ("argv", "most_modules"),
    [(None, 120), (["--help"], 150), (["train", "--help"], 350), (["info", "--help"], 350)],
    ids=["import", "help", "train-help", "info-help"],
)
def test_import_is_lazy(tmp_path, argv, most_modules):
    """Help imports few modules, none of them heavy, so that it answers at once."""
    script = f"""
import contextlib, io, json, sys
import effnet_fast
with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.suppress(SystemExit):
    if {argv!r} is not None:
        from effnet_fast.cli import main
        main({argv!r})
print(json.dumps([len(output.getvalue()), sorted(set({HEAVY!r}) & set(sys.modules)), len(sys.modules)]))
"""
    printed, heavy, modules = json.loads(python("-c", script, cwd=tmp_path))
    assert heavy == []
    assert modules <= most_modules
    assert argv is None or printed > 200


def test_tested_versions_are_the_constraints():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {name: pins[name] for name in provenance.TESTED} == provenance.TESTED
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["dev"], *extras["export"], *extras["hub"], *extras["notebook"]]
    names = {re.match(r"[\w-]+", line)[0].lower().replace("_", "-") for line in needed} - {"effnet-fast"}
    assert names - {name.lower().replace("_", "-") for name in pins} == set(), "pin these in constraints.txt"


def test_citation_and_changelog():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation.keys() >= {"cff-version", "message", "title", "authors"}  # what the format requires
    assert citation["license"] in (ROOT / "LICENSE").read_text().splitlines()[0]
    assert "## Unreleased" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    ("installed", "newer"), [("2.13.9+cu130", False), ("2.11.0", False), ("2.14.0", True), ("3.0.0.dev1", True)]
)
def test_newer_versions_than_tested_are_one_line(monkeypatch, installed, newer):
    monkeypatch.setattr(provenance, "version", lambda name: installed if name == "torch" else None)
    message = provenance.newer_than_tested()
    assert message == (
        f"newer than the tested versions: torch {installed} (tested: 2.13.0); constraints.txt has those"
        if newer
        else None
    )


def test_a_version_without_a_private_name_is_one_line(monkeypatch):
    internals.check_operators()
    monkeypatch.setattr(internals, "OPERATORS", ("_foreach_gone_",))
    message = rf"torch .* has no torch._foreach_gone_, which effnet_fast uses: pip install torch=={TESTED['torch']}"
    with pytest.raises(ValueError, match=message):
        internals.check_operators()
    with pytest.raises(ValueError, match=r"optuna .* has no optuna.storages.gone.Backend"):
        internals.internal("optuna.storages.gone.Backend")
    with pytest.raises(ModuleNotFoundError):
        internals.internal("no_such_package.name")


def test_trains_without_triton_and_dali(tmp_path):
    script = """
import sys
for name in ("triton", "nvidia", "nvidia.dali", "captum", "optuna"):
    sys.modules[name] = None
from effnet_fast.cli import main
main(
    "train --dataset synthetic --device cpu --output_stride 32 --limit_train 64 --limit_eval 32 --batch_size 32 "
    "--num_epochs 1 --log_every_steps 1 --run_name bare --save_dir .".split()
)
"""
    output = python("-c", script, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert "DALI is not installed" in output
    assert (tmp_path / "bare" / "last.pt").stat().st_size > 1_000_000
