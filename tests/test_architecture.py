"""Rules read from the source: imports run downward, special imports have one place, files and functions stay small."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from effnet_fast import internals

ROOT = Path(__file__).parents[1]
PACKAGE, KERNELS = ROOT / "effnet_fast", ROOT / "kernels" / "effnet_kernels"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")])
FOLDERS = ("effnet_fast", "kernels", "launchers", "benchmarks", "tests")

GROUND = {
    "config",
    "credentials",
    "internals",
    "checkpoint",
    "precision",
    "distributed",
    "provenance",
    "rendezvous",
    "streams",
    "openmp",
    "faults",
    "heap",
    "consoles",
    "outcome",
}
FLOOR = {"model", "data"} | GROUND
VERBS = {"train", "search", "explain", "report"}
# What each room may import besides itself; `effnet_fast` is __init__.py.
MAY_IMPORT = {
    "effnet_fast": {"run", "explain", "model", "config", "openmp"},
    "__main__": {"cli"},
    "cli": {"run"} | GROUND,
    "run": VERBS | FLOOR,
    **dict.fromkeys(VERBS, FLOOR),
    **dict.fromkeys(("explain", "search"), FLOOR | {"report"}),
    "model": GROUND | {"data", "effnet_kernels"},
    "data": GROUND,
    **{room: {"credentials", "provenance", "internals", "faults"} for room in GROUND},
    "effnet_kernels": set(),
}
# Slow to import, so imported only in the functions that need them.
HEAVY = {"triton", "nvidia", "captum", "optuna", "apex", "amp_C", "huggingface_hub"}
BUILDERS = {"create_model", "model_from_options", "from_description", "load_dataset", "make_loader"}
BUILT = {"EfficientNet", "ResNet", "DenseNet", "Loader", "DaliLoader", "ResidentLoader", "TorchLoader"}


@dataclass(frozen=True)
class Import:
    """An imported module or name.

    Attributes:
        line: in its file.
        at_top: whether it is imported when the file is.
        is_guarded: whether the file handles that it is missing.
    """

    target: str
    line: int
    at_top: bool
    is_guarded: bool


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def imports_of(path: Path) -> list[Import]:
    tree = parse(path)
    inside = {id(node) for later in ast.walk(tree) if is_deferred(later) for node in ast.walk(later)}
    guarded = {id(node) for each in ast.walk(tree) if is_guard(each) for node in each.body}
    return [
        Import(target, node.lineno, at_top=id(node) not in inside, is_guarded=id(node) in guarded)
        for node in ast.walk(tree)
        for target in targets_of(node)
    ]


def is_deferred(node: ast.AST) -> bool:
    """A function, or a block that only a type checker reads."""
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def is_guard(node: ast.AST) -> bool:
    """A try statement that catches ImportError."""
    return isinstance(node, ast.Try) and any(dotted(handler.type) == "ImportError" for handler in node.handlers)


def targets_of(node: ast.AST) -> Iterator[str]:
    """Dotted names that a statement or a call of import_module("...") imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: write imports in full, not relative"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and called_name(node) in ("import_module", "__import__") and node.args:
        argument = node.args[0]
        if isinstance(argument, ast.Constant):
            yield str(argument.value)


def dotted(node: ast.AST) -> str:
    """`a.b.c` of such an expression; empty for any other."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return base and f"{base}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def called_name(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def room_of(path: Path) -> str:
    if path.is_relative_to(KERNELS):
        return "effnet_kernels"
    first = path.relative_to(PACKAGE).parts[0]
    return "effnet_fast" if first == "__init__.py" else first.removesuffix(".py")


def imported_room(target: str) -> str | None:
    """The room of a dotted name; None for other packages and for the version."""
    package, _, rest = target.partition(".")
    if package == "effnet_kernels":
        return package
    if package != "effnet_fast" or rest in ("", "__version__"):
        return None
    first = rest.split(".")[0]
    is_room = (PACKAGE / first).is_dir() or (PACKAGE / f"{first}.py").is_file()
    return first if is_room else "model"  # other names of __init__.py come from model


def test_every_room_has_a_rule():
    assert {room_of(path) for path in SOURCES} <= MAY_IMPORT.keys()


def imports(paths: Iterable[Path]) -> Iterator[tuple[Path, Import]]:
    return ((path, each) for path in paths for each in imports_of(path))


def test_imports_run_downward():
    upward = [
        f"{name_of(path)}:{each.line}: {each.target}; {room_of(path)} may import {sorted(MAY_IMPORT[room_of(path)])}"
        for path, each in imports(SOURCES)
        if imported_room(each.target) not in MAY_IMPORT[room_of(path)] | {room_of(path), None}
    ]
    assert not upward


def test_nothing_imports_benchmarks_launchers_or_tests():
    outside = {"benchmarks", "launchers", "tests", "kernels"}
    assert not [(path, each) for path, each in imports(SOURCES) if each.target.split(".")[0] in outside]


def test_only_blocks_imports_the_kernels():
    doors = {
        name_of(path)
        for path in PACKAGE.rglob("*.py")
        if any(i.target.split(".")[0] == "effnet_kernels" for i in imports_of(path))
    }
    assert doors <= {"effnet_fast/model/blocks.py"}


def test_train_builds_neither_model_nor_loader():
    floor = [parse(path) for room in ("model", "data") for path in (PACKAGE / room).rglob("*.py")]
    defined = {getattr(node, "name", "") for tree in floor for node in ast.walk(tree)}
    assert defined >= BUILDERS | BUILT, "a builder was renamed: update the names above"
    built = [
        f"{name_of(path)}:{node.lineno}: {called_name(node)}"
        for path in (PACKAGE / "train").glob("*.py")
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call) and called_name(node) in BUILDERS | BUILT
    ]
    assert not built


def test_heavy_packages_are_imported_in_functions():
    """Except in data/dali.py and effnet_kernels, which are themselves imported in functions."""
    paths = set(PACKAGE.rglob("*.py")) - {PACKAGE / "data" / "dali.py"}
    assert not [(path, each) for path, each in imports(paths) if each.at_top and each.target.split(".")[0] in HEAVY]


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


def test_folders_that_are_not_packages():
    """Hugging Face has a package named `kernels`; pytest imports tests by path."""
    folders = [ROOT / name for name in ("kernels", "launchers", "benchmarks")]
    assert not [folder for folder in folders if (folder / "__init__.py").exists()]
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_network_and_pickles_have_one_place_each():
    """Only archive.py, which verifies checksums, and weights/hub.py use the network; no pickle can run code."""
    networked = {"urllib", "http", "requests", "httpx", "ftplib", "huggingface_hub"}
    doors = {name_of(path) for path in SOURCES for i in imports_of(path) if i.target.split(".")[0] in networked}
    assert doors == {"effnet_fast/data/archive.py", "effnet_fast/model/weights/hub.py"}
    calls = [(path, node) for path in SOURCES for node in ast.walk(parse(path)) if isinstance(node, ast.Call)]
    for path, node in calls:
        true = {k.arg for k in node.keywords if isinstance(k.value, ast.Constant) and k.value.value is True}
        assert "weights_only" in true or dotted(node.func) != "torch.load", f"{name_of(path)}:{node.lineno}"
        assert "allow_pickle" not in true, f"{name_of(path)}:{node.lineno}"
    unsafe = {"pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load", "eval", "exec", "os.system"}
    assert [name_of(path) for path, node in calls if dotted(node.func) in unsafe] == []


PRIVATE = re.compile(r"(torch|triton|optuna)\.(\w+\.)*_(?!_)\w*")


def private_names(path: Path) -> Iterator[str]:
    """LINE: NAME of every use of a name of torch, Triton or Optuna that is not public."""
    in_full = dict(bound for node in ast.walk(parse(path)) for bound in bindings_of(node))
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Attribute):
            first, _, rest = dotted(node).partition(".")
            name = f"{in_full.get(first, first)}.{rest}"
            if PRIVATE.fullmatch(name) and node.attr not in internals.OPERATORS:
                yield f"{node.lineno}: {name}"
    for each in imports_of(path):
        # effnet_kernels imports nothing of effnet_fast, so it has its own guards.
        if PRIVATE.match(each.target) and not (each.is_guarded and room_of(path) == "effnet_kernels"):
            yield f"{each.line}: {each.target}"


def bindings_of(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Names that an import binds, and their names in full."""
    if isinstance(node, ast.Import):
        yield from ((alias.asname, alias.name) for alias in node.names if alias.asname)
    elif isinstance(node, ast.ImportFrom):
        yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)


def test_private_names_of_packages_are_in_internals():
    """A new torch may lack them; internals.py then says so in one line."""
    assert not [f"{name_of(path)}:{found}" for path in SOURCES for found in private_names(path)]


@pytest.mark.parametrize("source", [
    "import torch._inductor", "from torch._subclasses.fake_tensor import FakeTensorMode", "from torch import _dynamo",
    "import torch.utils._python_dispatch as modes", "import torch.nn as nn\nnn._reduction",
    "import torch.distributed as dist\ndist._x", "torch._C", "optuna.storages._base.BaseStorage",
    "import importlib\nimportlib.import_module('torch._inductor')",
    "try:\n    import torch._inductor\nexcept ImportError:\n    pass",
])  # fmt: skip
def test_private_names_are_found(tmp_path, monkeypatch, source):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    path = tmp_path / "source.py"
    path.write_text(source)
    assert len(list(private_names(path))) == 1


def test_public_and_guarded_names_are_not_private_ones(tmp_path, monkeypatch):
    path = tmp_path / "source.py"
    guarded = "try:\n    from torch._x import y\nexcept ImportError:\n    y = None"
    path.write_text(f"import torch\ntorch.__version__\ntorch._foreach_add_([], [])\nself._x\n{guarded}")
    monkeypatch.setitem(globals(), "KERNELS", tmp_path)
    assert not list(private_names(path))


MAX_FILE_LINES, MAX_CLASS_LINES, MAX_ARGUMENTS = 400, 220, 10
LONG_FILES = {PACKAGE / "config.py"}  # a list of settings


def test_files_classes_and_functions_are_small():
    paths = sorted(set(PACKAGE.rglob("*.py")) - LONG_FILES)
    assert not [path for path in paths if len(path.read_text(encoding="utf-8").splitlines()) > MAX_FILE_LINES]
    nodes = [(path, node) for path in paths for node in ast.walk(parse(path))]
    classes = [(path, node) for path, node in nodes if isinstance(node, ast.ClassDef)]
    assert not [(path, c.name) for path, c in classes if c.end_lineno - c.lineno >= MAX_CLASS_LINES]
    functions = [(path, node) for path, node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert not [(path, f.name) for path, f in functions if number_of_arguments(f) > MAX_ARGUMENTS]


def number_of_arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Arguments besides self and cls; *args and **kwargs count as one each."""
    arguments = function.args
    named = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len(set(named) - {"self", "cls"}) + bool(arguments.vararg) + bool(arguments.kwarg)


def test_the_epoch_loop_is_short():
    (fit,) = [n for n in ast.walk(parse(PACKAGE / "train" / "loop.py")) if getattr(n, "name", "") == "fit"]
    loops = [node for node in ast.walk(fit) if isinstance(node, ast.For)]
    assert max(loop.end_lineno - loop.lineno for loop in loops) < 50


def test_keys_of_a_checkpoint_are_spelt_once():
    """Readers use the attributes of `Checkpoint`, so no other file indexes a dict with its keys."""
    fields = {"optimizer", "scaler", "meters", "fingerprint", "images_per_pass", "launch", "schedule_start"}
    spelt = [
        f"{name_of(path)}:{node.lineno}"
        for path in (*(PACKAGE / "run").glob("*.py"), *(PACKAGE / "train").glob("*.py"))
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Subscript)
        and ast.unparse(node.value) in ("saved", "checkpoint", "state", "resumed")
        and isinstance(node.slice, ast.Constant)
        and node.slice.value in fields
    ]
    assert not spelt
