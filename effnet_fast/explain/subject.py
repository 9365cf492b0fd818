"""A model under examination, and what it and its peers say of a batch of images."""

from __future__ import annotations

import difflib
import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from effnet_fast.data.image import preprocess
from effnet_fast.explain import scores
from effnet_fast.explain.maps import Method, evidence, normalise, resize_maps
from effnet_fast.explain.tables import Record, finite

# Focus and agreement are measured on maps brought to one size, so that they compare between models and images.
COMMON_SIZE = 64

Maps = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Settings:
    """How maps are made and scored; see config.CamConfig for the fields of the same names."""

    method: Method
    layer: str | None
    target: str
    curve_steps: int
    infidelity: bool
    sensitivity: bool


@dataclass(frozen=True)
class Subject:
    """A trained model with all that its evaluation needs.

    Attributes:
        name: short and unique, e.g. compound.
        label: what people call it.
        model: the uncompiled module on `device`, with kernels="torch": a fused path would pass hooks by.
        classes: names of its outputs.
        image_size: pixels of its input.
        mean, std: of each channel, for pixels scaled to 0..1.
        device: where it computes.
        digest: of its checkpoint's file.
    """

    name: str
    label: str
    model: nn.Module
    classes: tuple[str, ...]
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    device: torch.device
    digest: str

    def prepare(self, images: Sequence[Image.Image]) -> Tensor:
        """Images of any size as this model's evaluation sees them: float32 [N, 3, S, S] on its device."""
        batch = torch.stack([preprocess(image, self.image_size, self.mean, self.std) for image in images])
        return batch.to(self.device)

    def class_index(self, name: str) -> int:
        """The output that stands for a class.

        Raises:
            ValueError: the model does not know it; the message says the nearest names.
        """
        if name not in self.classes:
            near = difflib.get_close_matches(name, self.classes, n=3, cutoff=0.4) or self.classes[:3]
            raise ValueError(f"{self.name} has no class {name!r}; did you mean {', '.join(near)}?")
        return self.classes.index(name)


def examine(
    subjects: Sequence[Subject],
    names: Sequence[str],
    images: Sequence[Image.Image],
    labels: Sequence[str | None],
    settings: Settings,
) -> list[tuple[Record, Maps]]:
    """Explain N images by every model.

    Args:
        subjects: the models.
        names: of the images; each seeds its image's noise.
        images: RGB, of any size.
        labels: true classes where known; all are where the target is `true`.
        settings: how.

    Returns:
        For each image its record (tables.map_rows reads it) and each model's map float32 [h, w] from 0 to 1 of the
        central square, at the size at which the method gives it.

    Raises:
        ValueError: a method, layer or class that a model does not have.
    """
    records: list[Record] = [
        {"image": name, "label": label, "width": image.width, "height": image.height, "models": {}}
        for name, image, label in zip(names, images, labels, strict=True)
    ]
    maps: dict[str, Tensor] = {}
    for subject in subjects:
        inputs = subject.prepare(images)
        raw, facts = _examine_by(subject, inputs, names, labels, settings)
        maps[subject.name] = normalise(raw).cpu()
        for record, row in zip(records, facts, strict=True):
            record["models"][subject.name] = row
    _add_agreement(records, maps)
    return [(record, {name: m[i].numpy() for name, m in maps.items()}) for i, record in enumerate(records)]


def _examine_by(
    subject: Subject, inputs: Tensor, names: Sequence[str], labels: Sequence[str | None], settings: Settings
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Maps [N, h, w], not scaled, and a row of facts for each image."""
    with torch.no_grad():
        probabilities = subject.model(inputs).float().softmax(1)
    confidence, predicted = probabilities.max(1)
    targets = _targets(subject, predicted, labels, settings.target)
    explain = partial(evidence, subject.model, method=settings.method, layer=settings.layer)
    try:
        raw = explain(inputs, targets)
    except ValueError as error:
        raise ValueError(f"{subject.name}: {error}") from error
    found = _scores(subject, inputs, raw, targets, settings)
    seeds = [zlib.crc32(name.encode()) for name in names]
    if settings.infidelity:
        full = resize_maps(raw, *inputs.shape[-2:])
        found["infidelity"] = [
            scores.infidelity(subject.model, inputs[i : i + 1], full[i : i + 1], targets[i : i + 1], seed)
            for i, seed in enumerate(seeds)
        ]
    if settings.sensitivity:
        found["sensitivity"] = [
            scores.sensitivity(explain, inputs[i : i + 1], targets[i : i + 1], seed) for i, seed in enumerate(seeds)
        ]
    rows = [
        {
            "prediction": subject.classes[predicted[i]],
            "confidence": float(confidence[i]),
            "target": subject.classes[targets[i]],
            "target_probability": float(probabilities[i, targets[i]]),
            **{name: finite(values[i]) for name, values in found.items()},
        }
        for i in range(len(inputs))
    ]
    return raw, rows


def _targets(subject: Subject, predicted: Tensor, labels: Sequence[str | None], target: str) -> Tensor:
    if target == "predicted":
        return predicted
    chosen = [label if target == "true" else target for label in labels]
    return torch.tensor([subject.class_index(str(name)) for name in chosen], device=predicted.device)


def _scores(
    subject: Subject, inputs: Tensor, raw: Tensor, targets: Tensor, settings: Settings
) -> dict[str, list[float]]:
    common = resize_maps(normalise(raw), COMMON_SIZE, COMMON_SIZE)
    full = resize_maps(normalise(raw), *inputs.shape[-2:])
    deletion, insertion = scores.deletion_insertion(subject.model, inputs, full, targets, settings.curve_steps)
    return {
        "energy_top10": scores.energy_in_top(common).tolist(),
        "entropy": scores.entropy(common).tolist(),
        "deletion": deletion.tolist(),
        "insertion": insertion.tolist(),
    }


def _add_agreement(records: list[Record], maps: dict[str, Tensor]) -> None:
    """Spearman's correlation of each pair of models, each model's mean over its pairs, and the mean over all."""
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
    return sum(known) / len(known) if known else None
