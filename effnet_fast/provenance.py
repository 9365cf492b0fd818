"""Provenance of a result: machine, versions, commit, command, date."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from effnet_fast import __version__

_PACKAGES = ("triton", "nvidia-dali-cuda120", "numpy")


def environment() -> dict[str, Any]:
    """Machine, versions, commit, command and date as a JSON-ready dict; None where something is absent."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "effnet_fast": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # includes the build tag, which the package metadata may omit
        **{name: version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "driver": driver(),
        "cpu": _cpu_name(),
        "cores": cores(),
    }


def _command() -> str:
    """The command line, with the interpreter and script reduced to their file names."""
    program = 3 if sys.orig_argv[1:2] == ["-m"] else 2
    return shlex.join([Path(word).name for word in sys.orig_argv[:program]] + sys.orig_argv[program:])


def version(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of this checkout, followed by `+` if tracked files differ from it.

    Outside a checkout, the value of EFFNET_FAST_COMMIT, or None.
    """
    root = Path(__file__).resolve().parents[1]
    head = _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    if head is None:
        return os.environ.get("EFFNET_FAST_COMMIT")
    return head + ("+" if _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no") else "")


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
