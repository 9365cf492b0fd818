"""Provenance of a result: machine, versions, commit, command, date."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from effnet_fast import __version__
from effnet_fast.credentials import mask_credentials

_PACKAGES = ("triton", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "numpy")
# Packages whose internals this project relies on, with the versions of constraints.txt.
TESTED = {"torch": "2.13.0", "triton": "3.7.1", "optuna": "5.0.0"}
_SOURCES = {".py", ".cpp", ".h"}


def environment() -> dict[str, Any]:
    """Machine, versions, commit, command and date as a JSON-ready dict; unknown values are None."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "effnet_fast": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        **versions(),
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "driver": driver(),
        "cpu": _cpu_name(),
        "cores": cores(),
    }


def versions() -> dict[str, str | None]:
    """Versions of the packages that affect results and speed."""
    # torch's own version includes the build tag, which the package metadata may omit.
    return {"torch": str(torch.__version__), **{name: version(name) for name in _PACKAGES}}


@cache
def source_digest() -> str:
    """A digest of the source files of effnet_fast and effnet_kernels, 16 hexadecimal digits."""
    content = hashlib.sha256()
    for folder in _source_folders():
        for path in sorted(path for path in folder.rglob("*") if path.suffix in _SOURCES):
            content.update(path.read_bytes())
    return content.hexdigest()[:16]


def _source_folders() -> list[Path]:
    specs = [find_spec(name) for name in ("effnet_fast", "effnet_kernels")]
    return [Path(spec.origin).parent for spec in specs if spec is not None and spec.origin is not None]


def _command() -> str:
    """The command line, with the interpreter and script reduced to their file names."""
    program = 3 if sys.orig_argv[1:2] == ["-m"] else 2
    arguments = [Path(part).name for part in sys.orig_argv[:program]] + sys.orig_argv[program:]
    return shlex.join(map(mask_credentials, arguments))


def version(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def newer_than_tested() -> str | None:
    """One line about packages newer than the tested versions, or None. Patch releases are ignored."""
    installed = {name: version(name) for name in TESTED}
    newer = [
        f"{name} {current} (tested: {TESTED[name]})"
        for name, current in installed.items()
        if current is not None and _release(current) > _release(TESTED[name])
    ]
    return f"newer than the tested versions: {', '.join(newer)}; constraints.txt has those" if newer else None


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def commit() -> str | None:
    """The commit of this checkout, followed by `+` if tracked files differ from it, by `?` if git does not tell.

    Outside a checkout, the value of EFFNET_FAST_COMMIT, or None.
    """
    root = Path(__file__).resolve().parents[1]
    tracked = _output(
        "git", "-C", str(root), "ls-files", "--error-unmatch", str(Path(__file__).resolve())
    )  # not in another project's .venv
    head = _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    if tracked is None or head is None:
        return os.environ.get("EFFNET_FAST_COMMIT") or None
    changed = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return head + ("?" if changed is None else "+" if changed else "")


def cores() -> int:
    """Number of CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def driver() -> str | None:
    """Version of the NVIDIA driver, or None."""
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
