"""From a checkpoint back to its config, and how two runs differ."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from effnet_fast.config import TrainConfig, identity

Config = TypeVar("Config", bound=TrainConfig)


def config_of(saved: dict[str, Any]) -> TrainConfig:
    """The config of a checkpoint's run.

    Raises:
        ValueError: it holds none.
    """
    try:
        return config_from(TrainConfig, saved["config"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("the checkpoint holds no config of a run") from error


def config_from(kind: type[Config], settings: dict[str, Any]) -> Config:
    """A config that was written down; settings that no longer exist are passed over, later ones have their default."""
    known = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in settings.items() if name in known})


def differences(before: TrainConfig, now: TrainConfig, images_before: str, images_now: str) -> str:
    """What two configs would compute otherwise, and two data sets' fingerprints, for people; empty if nothing."""
    there, here = identity(before), identity(now)
    found = [f"{name} {there[name]} there, {here[name]} here" for name in here if here[name] != there[name]]
    if images_before != images_now:
        found.append("the images or labels differ")
    return "; ".join(found)
