"""Explain a batch of images with several models: predictions, maps and scores, one record per image."""

from __future__ import annotations

import itertools
import math
import statistics
import zlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from effnet_fast.config import CamConfig
from effnet_fast.explain import scores
from effnet_fast.explain.image_files import ImageFile
from effnet_fast.explain.maps import evidence, normalise, resize_maps
from effnet_fast.explain.models import ExplainedModel
from effnet_fast.explain.tables import Record, finite

# Focus and agreement are computed at one size, so that values of different models and images are comparable.
COMMON_SIZE = 64

Maps = dict[str, NDArray[np.float32]]


def explain_batch(
    models: Sequence[ExplainedModel], images: dict[ImageFile, Image.Image], config: CamConfig
) -> list[tuple[Record, Maps]]:
    """Explain N images with every model.

    Args:
        models: models on one device.
        images: RGB images of any size. The file's name seeds the noise of the image's scores. If the target is `true`,
            every file must have a label.
        config: the command's config; gives method, layer, target and scores.

    Returns:
        For each image its record and its maps, model name -> float32 [h, w] from 0 to 1 of the central square. The
        size depends on the method.

    Raises:
        ValueError: a model lacks the layer or class, or the method does not fit it.
    """
    records: list[Record] = [
        {"image": file.name, "label": file.label, "width": image.width, "height": image.height, "models": {}}
        for file, image in images.items()
    ]
    maps: dict[str, Tensor] = {}
    for model in models:
        raw, rows = _explain_by(model, model.trained.prepare(list(images.values())), list(images), config)
        maps[model.name] = normalise(raw).cpu()
        for record, row in zip(records, rows, strict=True):
            record["models"][model.name] = row
    _add_agreement(records, maps)
    return [(record, {name: m[i].numpy() for name, m in maps.items()}) for i, record in enumerate(records)]


def _explain_by(
    model: ExplainedModel, inputs: Tensor, files: Sequence[ImageFile], config: CamConfig
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Return unscaled maps [N, h, w] and, for each image, the model's prediction and scores."""
    probabilities = model.trained.probabilities(inputs)
    confidence, predicted = probabilities.max(1)
    targets = _targets(model, predicted, files, config.target)
    try:
        raw = evidence(model.trained.model, inputs, targets, method=config.method, layer=config.layer)
    except ValueError as error:
        raise ValueError(f"{model.name}: {error}") from error
    values = _scores(model, inputs, raw, targets, files, config.curve_steps)
    values |= _captum_scores(model, inputs, raw, targets, files, config)
    classes = model.trained.classes
    rows = [
        {
            "prediction": classes[predicted[i]],
            "confidence": float(confidence[i]),
            "target": classes[targets[i]],
            "target_probability": float(probabilities[i, targets[i]]),
            **{name: finite(image_values[i]) for name, image_values in values.items()},
        }
        for i in range(len(inputs))
    ]
    return raw, rows


def _targets(model: ExplainedModel, predicted: Tensor, files: Sequence[ImageFile], target: str) -> Tensor:
    if target == "predicted":
        return predicted
    names = [file.label if target == "true" else target for file in files]
    return torch.tensor([model.class_index(str(name)) for name in names], device=predicted.device)


def _scores(
    model: ExplainedModel, inputs: Tensor, raw: Tensor, targets: Tensor, files: Sequence[ImageFile], steps: int
) -> dict[str, list[float]]:
    """Compute focus and faithfulness, and the faithfulness of a random map: score name -> one value per map."""
    scaled = normalise(raw)
    common = resize_maps(scaled, COMMON_SIZE, COMMON_SIZE)
    values = {"energy_top10": scores.energy_in_top(common), "entropy": scores.entropy(common)}
    noise = scores.random_maps(raw, [_seed(file) for file in files])
    for suffix, maps in (("", scaled), ("_random", noise)):
        full = resize_maps(maps, *inputs.shape[-2:])
        values |= zip(
            (f"deletion{suffix}", f"insertion{suffix}"),
            scores.deletion_insertion(model.trained.model, inputs, full, targets, steps),
            strict=True,
        )
    return {name: value.tolist() for name, value in values.items()}


def _seed(file: ImageFile) -> int:
    """A seed that comes from the name, so that an image's scores do not depend on its batch."""
    return zlib.crc32(file.name.encode())


def _captum_scores(
    model: ExplainedModel,
    inputs: Tensor,
    raw: Tensor,
    targets: Tensor,
    files: Sequence[ImageFile],
    config: CamConfig,
) -> dict[str, list[float]]:
    """Compute the scores enabled by --infidelity and --sensitivity with Captum, one image at a time."""
    values: dict[str, list[float]] = {}
    module = model.trained.model
    full = resize_maps(raw, *inputs.shape[-2:])
    samples = [(inputs[i : i + 1], targets[i : i + 1], _seed(file)) for i, file in enumerate(files)]
    known = (raw.amax((1, 2)) > 0).tolist()  # a map without positive evidence has no scores
    if config.infidelity:
        values["infidelity"] = [
            scores.infidelity(module, image, full[i : i + 1], target, seed) if known[i] else math.nan
            for i, (image, target, seed) in enumerate(samples)
        ]
    if config.sensitivity:
        explain = partial(evidence, module, method=config.method, layer=config.layer)
        values["sensitivity"] = [
            scores.sensitivity(explain, image, target, seed) if known[i] else math.nan
            for i, (image, target, seed) in enumerate(samples)
        ]
    return values


def _add_agreement(records: list[Record], maps: dict[str, Tensor]) -> None:
    """Add Spearman's correlation of each pair of models, its mean over each model's pairs and over all pairs."""
    common = {name: resize_maps(m, COMMON_SIZE, COMMON_SIZE) for name, m in maps.items()}
    pairs = [(a, b, scores.spearman(common[a], common[b]).tolist()) for a, b in itertools.combinations(common, 2)]
    for i, record in enumerate(records):
        record["pairs"] = [(a, b, finite(values[i])) for a, b, values in pairs]
        record["agreement_with_others"] = {
            name: _mean([value for a, b, value in record["pairs"] if name in (a, b)]) for name in common
        }
        record["agreement"] = _mean([value for _, _, value in record["pairs"]])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
