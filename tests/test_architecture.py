"""The rules of the house, read from the source: imports run downward, doors stay few, names stay clear."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE, KERNELS = ROOT / "effnet_fast", ROOT / "kernels" / "effnet_kernels"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")])
FOLDERS = ("effnet_fast", "kernels", "launchers", "benchmarks", "tests")

GROUND = {"config", "credentials", "checkpoint", "precision", "distributed", "provenance", "rendezvous", "streams"}
FLOOR = {"model", "data"} | GROUND
VERBS = {"train", "search", "explain", "report"}
# What each room may import besides itself; `effnet_fast` is the face, __init__.py.
MAY_IMPORT = {
    "effnet_fast": {"model", "explain"},
    "__main__": {"cli"},
    "cli": {"run"} | GROUND,
    "run": VERBS | FLOOR,
    **dict.fromkeys(VERBS, FLOOR),
    "explain": FLOOR | {"report"},
    "model": GROUND | {"data", "effnet_kernels"},
    "data": GROUND,
    **{room: {"credentials"} for room in GROUND},
    "effnet_kernels": set(),
}
# Imported where they are needed, never on the way there.
HEAVY = {"triton", "nvidia", "captum", "optuna", "apex", "amp_C"}
BUILDERS = {"create_model", "from_description", "load_dataset", "make_loader"}
BUILT = {"EfficientNet", "ResNet", "DenseNet", "Loader", "DaliLoader", "ResidentLoader", "TorchLoader"}


@dataclass(frozen=True)
class Import:
    """One imported module or name, dotted in full, and whether importing the file imports it too."""

    target: str
    line: int
    at_top: bool


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports_of(path: Path) -> list[Import]:
    tree = parse(path)
    inside = {id(node) for later in ast.walk(tree) if is_deferred(later) for node in ast.walk(later)}
    return [
        Import(target, node.lineno, at_top=id(node) not in inside)
        for node in ast.walk(tree)
        for target in targets_of(node)
    ]


def is_deferred(node: ast.AST) -> bool:
    """A function, or what only a type checker reads."""
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def targets_of(node: ast.AST) -> Iterator[str]:
    """Dotted names that a statement or an import_module("...") call imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: write imports in full, not relative"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and called_name(node) in ("import_module", "__import__") and node.args:
        argument = node.args[0]
        if isinstance(argument, ast.Constant):
            yield str(argument.value)


def called_name(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def room_of(path: Path) -> str:
    if path.is_relative_to(KERNELS):
        return "effnet_kernels"
    first = path.relative_to(PACKAGE).parts[0]
    return "effnet_fast" if first == "__init__.py" else first.removesuffix(".py")


def imported_room(target: str) -> str | None:
    """The room that a dotted name belongs to; None for other people's packages and for the version."""
    package, _, rest = target.partition(".")
    if package == "effnet_kernels":
        return package
    if package != "effnet_fast" or rest in ("", "__version__"):
        return None
    first = rest.split(".")[0]
    is_room = (PACKAGE / first).is_dir() or (PACKAGE / f"{first}.py").is_file()
    return first if is_room else "model"  # what else the face hands out lives in model


def test_every_room_has_its_rule():
    assert {room_of(path) for path in SOURCES} <= MAY_IMPORT.keys()


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_run_downward(path):
    room = room_of(path)
    allowed = MAY_IMPORT[room] | {room, None}
    upward = [f"line {i.line}: {i.target}" for i in imports_of(path) if imported_room(i.target) not in allowed]
    assert not upward, f"{name_of(path)} may import {sorted(MAY_IMPORT[room])}, but: {upward}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_imports_benchmarks_launchers_or_tests(path):
    outside = {"benchmarks", "launchers", "tests", "kernels"}
    assert not [i for i in imports_of(path) if i.target.split(".")[0] in outside]


def test_blocks_is_the_only_door_to_the_kernels():
    doors = {
        name_of(path)
        for path in PACKAGE.rglob("*.py")
        if any(i.target.split(".")[0] == "effnet_kernels" for i in imports_of(path))
    }
    assert doors <= {"effnet_fast/model/blocks.py"}


def test_train_builds_neither_model_nor_loader():
    floor = [parse(path) for room in ("model", "data") for path in (PACKAGE / room).rglob("*.py")]
    defined = {getattr(node, "name", "") for tree in floor for node in ast.walk(tree)}
    assert defined >= BUILDERS | BUILT, "a builder was renamed: name it here"
    built = [
        f"{name_of(path)}:{node.lineno}: {called_name(node)}"
        for path in (PACKAGE / "train").glob("*.py")
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call) and called_name(node) in BUILDERS | BUILT
    ]
    assert not built


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=name_of)
def test_heavy_packages_are_imported_where_they_are_needed(path):
    """At the top of data/dali.py and of effnet_kernels at the most; elsewhere inside the function that uses them."""
    if path == PACKAGE / "data" / "dali.py":
        return
    on_the_way = [i for i in imports_of(path) if i.at_top and i.target.split(".")[0] in HEAVY]
    assert not on_the_way


def test_config_and_cli_import_no_torch():
    for name in ("__init__", "__main__", "cli", "config"):
        assert not [i for i in imports_of(PACKAGE / f"{name}.py") if i.target.split(".")[0] == "torch"], name


def test_only_cli_reads_argv():
    readers = {
        name_of(path)
        for path in SOURCES
        for node in ast.walk(parse(path))
        if (isinstance(node, ast.Attribute) and node.attr == "argv") or "sys.argv" in targets_of(node)
    }
    assert readers == {"effnet_fast/cli.py"}


def test_no_room_is_called_utils():
    vague = {"util", "utils", "helper", "helpers", "common", "misc"}
    named = [
        path
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if vague & {part.removesuffix(".py") for part in path.relative_to(ROOT).parts}
    ]
    assert not named


def test_folders_that_must_not_be_packages_are_none():
    """A `kernels` of ours would hide the package of that name; pytest imports tests by their paths."""
    folders = [ROOT / name for name in ("kernels", "launchers", "benchmarks")]
    assert not [folder for folder in folders if (folder / "__init__.py").exists()]
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_what_comes_from_elsewhere_comes_through_few_doors():
    """The network through archive.py, which verifies what it gets; pickles through readers that run no code."""
    networked = {"urllib", "http", "requests", "httpx", "ftplib"}
    doors = {name_of(path) for path in SOURCES for i in imports_of(path) if i.target.split(".")[0] in networked}
    assert doors == {"effnet_fast/data/archive.py"}
    calls = [(path, node) for path in SOURCES for node in ast.walk(parse(path)) if isinstance(node, ast.Call)]
    for path, node in calls:
        words = {(word.arg, ast.unparse(word.value)) for word in node.keywords}
        if ast.unparse(node.func) == "torch.load":
            assert ("weights_only", "True") in words, f"{name_of(path)}:{node.lineno}"
        assert ("allow_pickle", "True") not in words, f"{name_of(path)}:{node.lineno}"
    unsafe = {"pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load", "eval", "exec", "os.system"}
    assert [name_of(path) for path, node in calls if ast.unparse(node.func) in unsafe] == []
