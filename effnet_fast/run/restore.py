"""From a checkpoint back to its config and its model, and what another run changed."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from effnet_fast.config import TrainConfig
from effnet_fast.model import EfficientNet, from_description


def config_of(saved: dict[str, Any]) -> TrainConfig:
    """The config of a checkpoint's run; settings that no longer exist are passed over.

    Raises:
        ValueError: it holds none.
    """
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    try:
        return TrainConfig(**{name: value for name, value in saved["config"].items() if name in known})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("the checkpoint holds no config of a run") from error


def differences(before: dict[str, Any], asked: dict[str, Any], images_before: str, images_now: str) -> str:
    """What differs between two configs' `identity` and two data sets' fingerprints, for people; empty if nothing."""
    found = [
        f"{name} {before.get(name)} there, {asked[name]} here" for name in asked if asked[name] != before.get(name)
    ]
    if images_before != images_now:
        found.append("the images or labels differ")
    return "; ".join(found)


def load_model(saved: dict[str, Any], weights: str, device: torch.device) -> EfficientNet:
    """The model of a checkpoint with its weights: auto (the moving average where there is one), ema or raw.

    Raises:
        ValueError: it holds no model, or ema is asked for and the run kept none.
    """
    if weights == "ema" and saved.get("ema") is None:
        raise ValueError("the run kept no moving average (--ema_decay 0); use --weights raw")
    try:
        model = from_description(saved["architecture"])
        model.load_state_dict(saved["model"])
        if weights != "raw" and saved["ema"] is not None:
            model.load_state_dict(saved["ema"], strict=False)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError("the checkpoint holds no model, or one of another version") from error
    return model.to(device)
