"""Runs of scaled models, as the study and the search train them: their configs, their folders, what they measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from effnet_fast.checkpoint import write_atomically
from effnet_fast.config import TrainConfig
from effnet_fast.data import Dataset
from effnet_fast.model import scaling
from effnet_fast.report.curves import read_metrics
from effnet_fast.run.resolve import resolve_image_size
from effnet_fast.run.restore import config_from, differences
from effnet_fast.search.family import Family


def family_of(config: TrainConfig, dataset: Dataset) -> Family:
    """Every model that the baseline can be scaled to, for this data set."""
    size = resolve_image_size(config.image_size, config.model, dataset.native_size)
    return Family(len(dataset.classes), size, config.output_stride or scaling.default_output_stride(size))


def run_config(config: TrainConfig, model: dict[str, Any], **changes: Any) -> TrainConfig:
    """The config of one run: all that train knows, the model as `Family.settings` has it, and `changes`."""
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)}
    return TrainConfig(**(shared | model | changes))


def claim_folder(path: Path, config: TrainConfig, dataset: Dataset) -> dict[str, Any] | None:
    """What the JSON at `path` says, if it is there and of the same settings and data.

    Raises:
        ValueError: of other settings or data, which the line names; or damaged.
    """
    if not path.exists():
        return None
    try:
        kept = json.loads(path.read_text())
        found = differences(
            config_from(type(config), kept["settings"]), config, kept["fingerprint"], dataset.fingerprint
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: choose another --run_name") from error
    if found:
        raise ValueError(f"{path} is of other settings ({found}): choose another --run_name")
    return kept


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all, making the folder.

    Raises:
        OSError: with a line that says what to do.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot write to {path.parent} ({error.strerror}); choose another --save_dir") from error
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def final_top1(result: dict[str, Any]) -> float:
    """Percent, of the averaged weights where there are any."""
    return result.get("ema_top1", result["top1"])


def training_seconds(folder: Path) -> float:
    """Seconds of training steps over all interruptions of a run; rows of versions that kept none count 0."""
    return sum(row.get("seconds", 0.0) for row in read_metrics(folder).train)


def failure_reason(error: BaseException) -> str | None:
    """Why one model could not be trained, where others may; None where the fault is not the model's."""
    if isinstance(error, FloatingPointError):
        return "not finite: " + str(error)
    short_of_memory = MemoryError, torch.OutOfMemoryError  # the latter is told by train as the cause of its advice
    if isinstance(error, short_of_memory) or isinstance(error.__cause__, short_of_memory):
        return "out of memory"
    if isinstance(error, RuntimeError) and "not enough memory" in str(error):
        return "out of memory"
    return None
