"""Functions that the commands `search` and `study` share: model family, index files, training times."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from effnet_fast.config import TrainConfig
from effnet_fast.data import Dataset
from effnet_fast.model import scaling
from effnet_fast.model.blocks import Kernels
from effnet_fast.report.curves import read_metrics
from effnet_fast.run.resolve import resolve_image_size
from effnet_fast.run.restore import config_from, differences
from effnet_fast.search.family import Family

Content = TypeVar("Content")


def family_of(config: TrainConfig, dataset: Dataset, kernels: Kernels = "auto") -> Family:
    """Return the scaled models for a data set, with the config's image size and output stride.

    Args:
        kernels: of the models that are built.
    """
    size = resolve_image_size(config.image_size, config.model, dataset.native_size)
    return Family(len(dataset.classes), size, config.output_stride or scaling.default_output_stride(size), kernels)


def read_index(
    path: Path, config: TrainConfig, fingerprint: str, parse: Callable[[dict[str, Any]], Content]
) -> Content | None:
    """Read plan.json or study.json, and check that it belongs to this command.

    Args:
        path: the file to read.
        config: the command's config.
        fingerprint: hash of the data set.
        parse: function that converts the JSON content to the result.

    Returns:
        The parsed content; None if there is no file.

    Raises:
        ValueError: the file is damaged, or has other settings or data; the message lists the differences.
    """
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        differing = differences(
            config_from(type(config), content["settings"]), config, content["fingerprint"], fingerprint
        )
        parsed = parse(content)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: choose another --run_name") from error
    if differing:
        raise ValueError(f"{path} has other settings ({differing}): choose another --run_name")
    return parsed


def training_seconds(folder: Path) -> float:
    """Return the seconds of a run's training steps, without evaluation and interruptions.

    Rows without seconds, which old versions wrote, count as 0.
    """
    return sum(row.get("seconds", 0.0) for row in read_metrics(folder).train)
