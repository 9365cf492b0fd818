"""One run of a scaled model: its training config, its score, and why it failed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch

from effnet_fast.config import TrainConfig

# Called after each evaluation with the epochs done and the row of metrics; what it raises ends the run.
OnEvaluation = Callable[[int, dict[str, Any]], None]


class Outcome(Protocol):
    """How a run ended; see `run.training.Outcome`."""

    @property
    def status(self) -> int: ...
    @property
    def finished(self) -> bool: ...
    @property
    def result(self) -> dict[str, Any]: ...


def run_config(config: TrainConfig, model: dict[str, Any], **changes: Any) -> TrainConfig:
    """The training config of one run.

    Args:
        config: of the search or the study, which has all fields of train.
        model: the fields that select the model, see `Family.settings`.
        changes: further fields.
    """
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)}
    return TrainConfig(**(shared | model | changes))


def final_top1(result: dict[str, Any]) -> float:
    """Top-1 in percent of a row of evaluation; of the averaged weights if the run keeps an average."""
    return result.get("ema_top1", result["top1"])


def failure_reason(error: BaseException) -> str | None:
    """Why this model cannot be trained although others may; None if the error is not the model's."""
    if isinstance(error, FloatingPointError):
        return f"not finite: {error}"
    out_of_memory = MemoryError, torch.OutOfMemoryError
    # train raises a ValueError with advice from the OutOfMemoryError.
    if isinstance(error, out_of_memory) or isinstance(error.__cause__, out_of_memory):
        return "out of memory"
    if isinstance(error, RuntimeError) and "not enough memory" in str(error):  # the CPU allocator's words
        return "out of memory"
    return None
