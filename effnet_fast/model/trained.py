"""A trained model with its preprocessing, read from a run's checkpoint or from a safetensors export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from effnet_fast import distributed
from effnet_fast.checkpoint import Checkpoint
from effnet_fast.data.dataset import Channels
from effnet_fast.data.image import preprocess
from effnet_fast.faults import is_out_of_memory
from effnet_fast.model.blocks import Kernels
from effnet_fast.model.network import Network
from effnet_fast.model.serialize import fold_batch_norms
from effnet_fast.model.tta import Tempered, with_tta
from effnet_fast.model.weights import read_safetensors
from effnet_fast.model.zoo import from_description

if TYPE_CHECKING:
    from PIL import Image

    Picture = Image.Image | str | Path

WEIGHTS = ("auto", "ema", "raw")


class Prediction(NamedTuple):
    """A class and its probability, 0 to 1."""

    label: str
    probability: float


@dataclass(frozen=True)
class TrainedModel:
    """A trained model, its classes and its preprocessing.

    Attributes:
        model: in evaluation mode, on its device.
        classes: names, in the order of the logits.
        image_size: side of the model's input, in pixels.
        mean, std: of each channel, for pixels scaled to 0..1.
        folded: whether BatchNorm is folded into the convolutions, so that the model cannot be trained further.
        temperature: divides the logits before the softmax; 1 unless `eval --calibrate` has fit it.
    """

    model: Network
    classes: tuple[str, ...]
    image_size: int
    mean: Channels
    std: Channels
    folded: bool = False
    temperature: float = 1.0

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def preprocess(self, image: Picture) -> Tensor:
        """Prepare an image, or the image in a file, as evaluation does: float32 [3, image_size, image_size].

        Raises:
            ValueError: the image cannot be read.
        """
        return preprocess(image, self.image_size, self.mean, self.std)

    def prepare(self, images: Sequence[Picture]) -> Tensor:
        """Preprocess images one at a time into a channels-last batch on the model's device.

        Returns:
            float32 [N, 3, image_size, image_size].

        Raises:
            ValueError: an image cannot be read.
        """
        batch = torch.stack([self.preprocess(image) for image in images])
        return batch.contiguous(memory_format=torch.channels_last).to(self.device)

    def predict(self, images: Picture | Sequence[Picture], top: int = 5, tta: str = "none") -> list[list[Prediction]]:
        """Classify images in one batch.

        Args:
            images: PIL images or paths of image files. A single one counts as a sequence of one.
            top: classes to return of each image, at least 1.
            tta: flip averages the probabilities of each image and its mirror image, see `tta.FlipAverage`.

        Returns:
            For each image its `top` most probable classes, the most probable first.

        Raises:
            ValueError: an image cannot be read, `top` is below 1, or `tta` is neither none nor flip.
        """
        if not isinstance(images, Sequence) or isinstance(images, str):
            images = [images]
        return self.classify(self.prepare(images), top, tta) if images else []

    @torch.no_grad()
    def classify(self, batch: Tensor, top: int = 5, tta: str = "none") -> list[list[Prediction]]:
        """Classify a batch from `prepare`; see `predict`."""
        if top < 1:
            raise ValueError(f"top must be at least 1, not {top}")
        best = self.probabilities(batch, tta).topk(min(top, len(self.classes)))
        rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [[Prediction(self.classes[i], p) for i, p in zip(*row, strict=True)] for row in rows]

    @torch.no_grad()
    def probabilities(self, batch: Tensor, tta: str = "none") -> Tensor:
        """Probabilities of the classes at the model's temperature: float32 [N, K] for a batch from `prepare`."""
        with torch.cuda.device_of(batch):  # Triton launches on the current device
            # The temperature comes first: flipping averages probabilities, which it fits.
            return with_tta(Tempered(self.model, self.temperature), tta)(batch).softmax(1)


def load(
    path: str | Path, weights: str = "auto", device: str | torch.device = "auto", kernels: Kernels = "auto"
) -> TrainedModel:
    """Load a trained model.

    Args:
        path: a run's checkpoint, or its safetensors export.
        weights: which weights of a checkpoint: auto (the moving average if there is one), ema or raw.
        device: auto, cpu, cuda or cuda:N; a CUDA device becomes the current one.
        kernels: auto, triton, triton-block, cpp or torch, see `blocks.Style`; forward hooks need torch.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is neither a checkpoint nor an export of this project, or another argument is invalid.

    >>> from PIL import Image
    >>> classifier = load("results/tiny/last.pt", device="cpu")
    >>> [best] = classifier.predict(Image.new("RGB", (48, 32)), top=2)
    >>> best[0].label in classifier.classes, best[0].probability >= best[1].probability
    (True, True)
    """
    path, chosen = Path(path), distributed.choose_device(str(device))
    if path.suffix != ".safetensors":
        return from_checkpoint(Checkpoint.read(path), weights, chosen, kernels)
    _check_weights(weights)
    if weights != "auto":
        raise ValueError(f"{path} is an export, which holds a single set of weights: use --weights auto, not {weights}")
    return _from_export(path, chosen, kernels)


def from_checkpoint(
    checkpoint: Checkpoint, weights: str, device: torch.device, kernels: Kernels = "auto"
) -> TrainedModel:
    """Rebuild the model of a checkpoint with its weights; see `load`.

    Raises:
        ValueError: it holds no model, or `ema` is asked for and the run kept none.
    """
    _check_weights(weights)
    if weights == "ema" and checkpoint.ema is None:
        raise ValueError("the run kept no moving average (--ema_decay 0); use --weights raw")
    try:
        # The average has parameters and running statistics only; the rest comes from the raw weights.
        used = weights_used(checkpoint, weights)
        average = (checkpoint.ema or {}) if used == "ema" else {}
        model = _build(checkpoint.architecture, {**checkpoint.model, **average}, kernels)
        trained = _trained(model, vars(checkpoint) | {"temperature": checkpoint.temperatures.get(used, 1.0)})
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError("the checkpoint holds no model, or one of another version") from error
    trained.model.to(device)
    return trained


def weights_used(checkpoint: Checkpoint, weights: str) -> str:
    """Which weights of a checkpoint `auto`, `ema` or `raw` means: `ema` or `raw`."""
    return "raw" if weights == "raw" or checkpoint.ema is None else "ema"


def _from_export(path: Path, device: torch.device, kernels: Kernels) -> TrainedModel:
    tensors, metadata = read_safetensors(path)
    if "classes" not in metadata:
        raise ValueError(
            f"{path} does not describe its model, as weights in another library's layout: export without --layout; to "
            "train from it, use --pretrained"
        )
    folded = bool(metadata["folded"])
    try:
        # The fused kernels need the BatchNorm layers that folding removes.
        model = _build(metadata["architecture"], tensors, "torch" if folded else kernels, folded)
        trained = _trained(model, metadata, folded)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{path} is damaged, or of another version: its tensors do not fit its metadata") from error
    trained.model.to(device)
    return trained


def _check_weights(weights: str) -> None:
    if weights not in WEIGHTS:
        raise ValueError(f"weights {weights!r}: choose one of {', '.join(WEIGHTS)}")


def _build(description: dict[str, Any], state: Mapping[str, Tensor], kernels: Kernels, folded: bool = False) -> Network:
    model = from_description(description, kernels)
    if folded:
        fold_batch_norms(model)
    model.load_state_dict(state)
    return model


def _trained(model: Network, metadata: Mapping[str, Any], folded: bool = False) -> TrainedModel:
    return TrainedModel(
        model.eval(),
        tuple(metadata["classes"]),
        model.architecture.image_size,
        tuple(metadata["mean"]),
        tuple(metadata["std"]),
        folded,
        float(metadata.get("temperature", 1.0)),  # files of older versions have none
    )
