"""One run of a scaled model: its training config, and why it failed."""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import torch

from effnet_fast.config import TrainConfig
from effnet_fast.faults import is_out_of_memory


def run_config(config: TrainConfig, model: dict[str, Any], **changes: Any) -> TrainConfig:
    """Return the training config of one run.

    Args:
        config: a SearchConfig or StudyConfig, which has all fields of TrainConfig.
        model: the fields that select the model; see `Family.settings`.
        changes: other fields to replace.
    """
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)}
    return TrainConfig(**(shared | model | changes))


def free_memory() -> None:
    """Free what the last model left: models are parts of reference cycles, and torch keeps the GPU's memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def failure_reason(error: BaseException) -> str | None:
    """Return why this model cannot be trained, or None if the error would also stop other models."""
    if isinstance(error, FloatingPointError):
        return f"not finite: {error}"
    # Training wraps the error in a ValueError that adds advice; look at its cause.
    return "out of memory" if is_out_of_memory(error) or is_out_of_memory(error.__cause__) else None
