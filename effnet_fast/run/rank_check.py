"""Refuse ranks that were started with different settings, code, data or checkpoints."""

from __future__ import annotations

import hashlib
import socket
from typing import Any

import torch

from effnet_fast import distributed, provenance
from effnet_fast.checkpoint import Checkpoint
from effnet_fast.config import TrainConfig, identity
from effnet_fast.data import Dataset
from effnet_fast.model import Network
from effnet_fast.model.blocks import Kernels, kernels_in_use

# Settings that do not affect the result, but determine which collective operations a rank calls.
_COLLECTIVE_SETTINGS = (
    "run_name", "resume", "save_every_steps", "save_every_minutes", "log_every_steps", "time_budget", "hang_timeout",
    "dry_run", "step", "compile", "kernels", "loader", "activation_checkpointing", "seeds",
)  # fmt: skip


def compare_ranks(values: dict[str, Any]) -> None:
    """Compare values by name with those of the other ranks.

    Raises:
        ValueError: on all ranks, with the differences.
    """
    values_of_ranks = distributed.gather_objects((socket.gethostname(), values))
    first_host, reference = values_of_ranks[0]
    differences = [
        f"{name} is {value} on rank 0 ({first_host}) but {other.get(name)} on rank {rank} ({host})"
        for rank, (host, other) in enumerate(values_of_ranks)
        for name, value in reference.items()
        if other.get(name) != value
    ]
    if differences:
        raise ValueError(f"the ranks disagree: {'; '.join(differences)}; start all of them alike")


def about_start(config: TrainConfig) -> dict[str, Any]:
    """Values known before data is read: settings and code."""
    settings = identity(config) | {name: getattr(config, name, None) for name in _COLLECTIVE_SETTINGS}
    return {f"--{name}": value for name, value in settings.items()} | {
        "the code of effnet_fast": provenance.source_digest(),
        **{f"{package}'s version": version for package, version in provenance.versions().items()},
    }


def about_data(dataset: Dataset, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """Values known once the run is planned: the data and the checkpoint to resume."""
    return {
        "the data's fingerprint": dataset.fingerprint[:16],
        "the images' mean and standard deviation": (dataset.mean, dataset.std),
        "the checkpoint in the run's folder, which all machines must share,": (
            "none" if checkpoint is None else f"of step {checkpoint.progress['step']}"
        ),
    }


def about_model(model: Network, kernels: Kernels, device: torch.device) -> dict[str, Any]:
    """Values known once the model is built; its kernels, since they share BatchNorm statistics in different ways."""
    shapes = [(name, tuple(value.shape), str(value.dtype)) for name, value in model.state_dict().items()]
    return {
        "the model's digest": _digest(repr((model.architecture, shapes)).encode()),
        "what --kernels chooses": kernels_in_use(kernels, device),
    }


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
