"""Single images as evaluation sees them, for prediction and for maps of what a model looks at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from effnet_fast.data.augment import Normalisation
from effnet_fast.data.dataset import Channels
from effnet_fast.data.resize import load_image, square, upright

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["load_image", "preprocess"]


def preprocess(image: Image.Image, size: int, mean: Channels, std: Channels) -> Tensor:
    """What an evaluation's loader makes of an image: turned upright, RGB, central square, resized, normalised.

    Args:
        image: of any size and mode.
        size: pixels of the model's input.
        mean, std: of each channel, for pixels scaled to 0..1.

    Returns:
        float32 [3, size, size] on the CPU, with channels-last strides.

    Raises:
        ValueError: a mode that cannot be read as RGB.
    """
    pixels = torch.from_numpy(square(upright(image), size).copy())
    return Normalisation(size, mean, std, torch.device("cpu"))(pixels[None])[0].permute(2, 0, 1)
