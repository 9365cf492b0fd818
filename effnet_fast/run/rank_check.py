"""Ranks that were started differently are refused before they train something that no one asked for."""

from __future__ import annotations

import hashlib
import socket
from functools import cache
from pathlib import Path
from typing import Any

import torch

import effnet_fast
from effnet_fast import data, distributed
from effnet_fast.config import TrainConfig, identity
from effnet_fast.model import Network

# What steers the ranks through their common operations without being part of what a run computes.
_STEERING = (
    "run_name", "resume", "save_every_steps", "save_every_minutes", "log_every_steps", "time_budget", "hang_timeout",
    "dry_run",
)  # fmt: skip


def agree(facts: dict[str, Any]) -> None:
    """Compare facts, comparable and printable ones, with those of the other ranks.

    Raises:
        ValueError: on all ranks, with the differences.
    """
    every = distributed.gather_objects((socket.gethostname(), facts))
    differences = [
        f"{name} is {reference} on rank 0 ({every[0][0]}) but {other.get(name)} on rank {rank} ({host})"
        for rank, (host, other) in enumerate(every)
        for name, reference in every[0][1].items()
        if other.get(name) != reference
    ]
    if differences:
        raise ValueError(f"the ranks disagree: {'; '.join(differences)}; start all of them alike")


def about_start(config: TrainConfig) -> dict[str, Any]:
    """What is known before data are read: settings and code."""
    settings = identity(config) | {name: getattr(config, name) for name in _STEERING}
    return {f"--{name}": value for name, value in settings.items()} | {
        "the code of effnet_fast": _code(),
        "torch's version": torch.__version__,
    }


def about_run(dataset: data.Dataset, model: Network, saved: dict[str, Any] | None) -> dict[str, Any]:
    """What is known before the first step: data, model, and where it goes on."""
    shapes = [(name, tuple(value.shape), str(value.dtype)) for name, value in model.state_dict().items()]
    return {
        "the data's fingerprint": dataset.fingerprint[:16],
        "the images' mean and standard deviation": (dataset.mean, dataset.std),
        "the model's digest": _digest(repr((model.architecture, shapes)).encode()),
        "the checkpoint in the run's folder, which all machines must share,": (
            "none" if saved is None else f"of step {saved['progress']['step']}"
        ),
    }


@cache
def _code() -> str:
    """A digest of the package's source files."""
    root = Path(effnet_fast.__file__).parent
    return _digest(b"".join(path.read_bytes() for path in sorted(root.rglob("*.py"))))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
