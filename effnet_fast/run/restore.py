"""The config of a checkpoint, and the settings in which two runs differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, TypeVar

from effnet_fast.checkpoint import Checkpoint
from effnet_fast.config import TrainConfig, identity

Config = TypeVar("Config", bound=TrainConfig)


def config_of(checkpoint: Checkpoint) -> TrainConfig:
    """The config of the run that wrote a checkpoint.

    Raises:
        ValueError: the checkpoint has no valid config.
    """
    try:
        return config_from(TrainConfig, checkpoint.config)
    except (TypeError, AttributeError) as error:
        raise ValueError("the checkpoint has no valid config of a run") from error


def config_from(kind: type[Config], settings: dict[str, Any]) -> Config:
    """Build a config from its saved fields. Removed settings are ignored, missing ones take their defaults."""
    known = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in settings.items() if name in known})


def differences(
    before: TrainConfig, now: TrainConfig, images_before: str, images_now: str, ignored: Collection[str] = ()
) -> str:
    """List the settings that affect the result and differ, and whether the data differ; empty if nothing does.

    Args:
        before, now: the two configs.
        images_before, images_now: fingerprints of the two data sets.
        ignored: settings that may differ.
    """
    old, new = identity(before), identity(now)
    changes = [
        f"{name} was {old[name]}, now {new[name]}" for name in new if new[name] != old[name] and name not in ignored
    ]
    if images_before != images_now:
        changes.append("the images or labels differ")
    return "; ".join(changes)
