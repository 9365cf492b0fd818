"""From a checkpoint back to its config and its model, and what another run changed."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch

from effnet_fast.config import TrainConfig, identity
from effnet_fast.model import Network, from_description
from effnet_fast.model.blocks import Kernels

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


def load_model(saved: dict[str, Any], weights: str, device: torch.device, kernels: Kernels = "auto") -> Network:
    """The model of a checkpoint with its weights: auto (the moving average where there is one), ema or raw.

    Raises:
        ValueError: it holds no model, or ema is asked for and the run kept none.
    """
    if weights == "ema" and saved.get("ema") is None:
        raise ValueError("the run kept no moving average (--ema_decay 0); use --weights raw")
    try:
        model = from_description(saved["architecture"], kernels)
        model.load_state_dict(saved["model"])
        if weights != "raw" and saved["ema"] is not None:
            model.load_state_dict(saved["ema"], strict=False)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError("the checkpoint holds no model, or one of another version") from error
    return model.to(device)
