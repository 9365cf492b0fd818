"""From a checkpoint back to its config and its model."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from effnet_fast.config import TrainConfig
from effnet_fast.model import Network, from_description
from effnet_fast.model.blocks import Kernels


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
