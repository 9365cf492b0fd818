"""Preprocess single images as the loaders do in evaluation, for prediction and class activation maps."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from effnet_fast.data.augment import Normalisation
from effnet_fast.data.dataset import Channels
from effnet_fast.data.decode import load_image, read_image, read_square
from effnet_fast.data.orientation import read_orientation

__all__ = ["load_image", "preprocess"]


def preprocess(image: Image.Image | str | Path, size: int, mean: Channels, std: Channels) -> Tensor:
    """Turn an image upright, crop its central square, resize and normalise it, as evaluation does.

    Args:
        image: a file, or an image of any size and mode. A large file needs less memory than the same image decoded.
        size: pixels of the model's input.
        mean, std: of each channel, for pixels scaled to 0..1.

    Returns:
        float32 [3, size, size] on the CPU, with channels-last strides.

    Raises:
        ValueError: the file cannot be read, or the image is 16-bit or float grey.
    """
    if isinstance(image, Image.Image):
        if image.mode.startswith(("I", "F")):
            raise ValueError("16-bit or float grey: convert it to 8 bits")
        pixels = read_square(image, size, read_orientation(image))
    else:
        pixels = read_image(Path(image), size)
    normalisation = Normalisation(size, mean, std, torch.device("cpu"))
    return normalisation(torch.from_numpy(pixels.copy())[None])[0].permute(2, 0, 1)
