"""RandAugment's and TrivialAugment's operations on uint8 images [N, H, W, 3], as torchvision defines them.

E. D. Cubuk et al., "RandAugment", NeurIPS 2020; Müller and Hutter, "TrivialAugment", ICCV 2021. augment_params.py draws
the operations and magnitudes. Resampling takes the nearest pixel; pixels from outside the image are black.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from effnet_fast.data.augment_params import AutoParams, Operation
from effnet_fast.data.upload import upload


def auto_augment(images: Tensor, params: AutoParams) -> Tensor:
    """Apply each image's operations in turn: uint8 [N, H, W, 3] -> the same, without host synchronisation."""
    for kinds, magnitudes in zip(params.operations.T, params.magnitudes.T, strict=True):
        images = _apply(images, kinds, magnitudes)
    return images


def _apply(images: Tensor, kinds: np.ndarray, magnitudes: np.ndarray) -> Tensor:
    """One operation for each image. Images are grouped by operation; the host knows the sizes of the groups."""
    order = np.argsort(kinds, kind="stable")
    groups = np.bincount(kinds, minlength=len(Operation)).tolist()
    rows, strengths = upload(order, images.device), upload(magnitudes[order], images.device)
    changed = [
        _OPERATIONS[kind](part, strength[:, None, None, None])
        for kind, part, strength in zip(Operation, images[rows].split(groups), strengths.split(groups), strict=True)
        if len(part)
    ]
    return torch.empty_like(images).index_copy_(0, rows, torch.cat(changed))


def _identity(images: Tensor, _magnitude: Tensor) -> Tensor:
    return images


def _blend(images: Tensor, other: Tensor | float, magnitude: Tensor) -> Tensor:
    """(1 + magnitude) * images - magnitude * other in float32, truncated to uint8."""
    return ((1 + magnitude).float() * images - magnitude.float() * other).clamp_(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    red, green, blue = images.split(1, dim=-1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).to(torch.uint8)


# -- geometry


def _resample(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Take the pixel at (x, y), each broadcasting to [N, H, W], in pixels from the corner of the image."""
    n, height, width, channels = images.shape
    column, row = torch.broadcast_tensors(x.floor().long(), y.floor().long())
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    source = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
    index = source.expand(n, height, width).reshape(n, -1, 1).expand(-1, -1, channels)
    pixels = images.reshape(n, -1, channels).gather(1, index).view(images.shape)
    return pixels * inside[..., None]


def _centres(images: Tensor) -> tuple[Tensor, Tensor]:
    """x [1, 1, W] and y [1, H, 1] of the pixels' centres."""
    height, width = images.shape[1:3]
    x, y = (torch.arange(size, device=images.device) + 0.5 for size in (width, height))
    return x[None, None, :], y[None, :, None]


def _shear_x(images: Tensor, magnitude: Tensor) -> Tensor:
    x, y = _centres(images)
    return _resample(images, x + magnitude[..., 0] * y, y)


def _shear_y(images: Tensor, magnitude: Tensor) -> Tensor:
    x, y = _centres(images)
    return _resample(images, x, y + magnitude[..., 0] * x)


def _translate_x(images: Tensor, magnitude: Tensor) -> Tensor:
    x, y = _centres(images)
    return _resample(images, x - magnitude[..., 0].trunc(), y)


def _translate_y(images: Tensor, magnitude: Tensor) -> Tensor:
    x, y = _centres(images)
    return _resample(images, x, y - magnitude[..., 0].trunc())


def _rotate(images: Tensor, magnitude: Tensor) -> Tensor:
    """Rotate counter-clockwise by degrees about the centre."""
    x, y = _centres(images)
    middle_x, middle_y = images.shape[2] / 2, images.shape[1] / 2
    cos, sin = (function(magnitude[..., 0].deg2rad()) for function in (torch.cos, torch.sin))
    x, y = x - middle_x, y - middle_y
    return _resample(images, cos * x - sin * y + middle_x, sin * x + cos * y + middle_y)


# -- colour


def _brightness(images: Tensor, magnitude: Tensor) -> Tensor:
    return _blend(images, 0.0, magnitude)


def _color(images: Tensor, magnitude: Tensor) -> Tensor:
    return _blend(images, _grey(images), magnitude)


def _contrast(images: Tensor, magnitude: Tensor) -> Tensor:
    return _blend(images, _grey(images).float().mean((1, 2, 3), keepdim=True), magnitude)


def _sharpness(images: Tensor, magnitude: Tensor) -> Tensor:
    """Blend with a 3x3 average in which the centre counts five times; the border stays as it is."""
    if min(images.shape[1:3]) <= 2:
        return images
    pixels = images.float()
    rows = pixels[:, :-2] + pixels[:, 1:-1] + pixels[:, 2:]
    box = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    blurred = pixels.clone()
    blurred[:, 1:-1, 1:-1] = ((box + 4 * pixels[:, 1:-1, 1:-1]) / 13).round()
    return _blend(images, blurred, magnitude)


def _posterize(images: Tensor, magnitude: Tensor) -> Tensor:
    """Keep the upper `magnitude` bits."""
    step = torch.ones_like(magnitude, dtype=torch.int32) << (8 - magnitude).to(torch.int32)
    return (images // step * step).to(torch.uint8)


def _solarize(images: Tensor, magnitude: Tensor) -> Tensor:
    """Invert values from the threshold `magnitude` on."""
    return torch.where(images >= magnitude, 255 - images, images)


def _auto_contrast(images: Tensor, _magnitude: Tensor) -> Tensor:
    """Stretch each channel to 0..255; a channel of a single value stays as it is."""
    low, high = (bound.float() for bound in (images.amin((1, 2), keepdim=True), images.amax((1, 2), keepdim=True)))
    flat = low == high
    scale = torch.where(flat, 1.0, 255 / (high - low))
    return ((images - torch.where(flat, 0.0, low)) * scale).clamp_(0, 255).to(torch.uint8)


def _equalize(images: Tensor, _magnitude: Tensor) -> Tensor:
    """Equalise the histogram of each channel, as Pillow's ImageOps.equalize."""
    channels = images.permute(0, 3, 1, 2).flatten(2).contiguous()  # [N, 3, H * W]
    levels = torch.arange(256, device=images.device).expand(*channels.shape[:2], 256).contiguous()
    ordered = channels.int().sort(dim=2).values
    below = torch.searchsorted(ordered, levels.int())  # how many pixels are below each level
    step = below.gather(2, ordered[..., -1:].long()) // 255
    table = ((below + step // 2) // step.clamp(min=1)).clamp_(max=255)
    table[..., 0] = 0
    table = torch.where(step == 0, levels, table)
    return (
        table.gather(2, channels.long())
        .to(torch.uint8)
        .view(*channels.shape[:2], *images.shape[1:3])
        .permute(0, 2, 3, 1)
    )


_OPERATIONS: dict[Operation, Callable[[Tensor, Tensor], Tensor]] = {
    Operation.IDENTITY: _identity,
    Operation.SHEAR_X: _shear_x,
    Operation.SHEAR_Y: _shear_y,
    Operation.TRANSLATE_X: _translate_x,
    Operation.TRANSLATE_Y: _translate_y,
    Operation.ROTATE: _rotate,
    Operation.BRIGHTNESS: _brightness,
    Operation.COLOR: _color,
    Operation.CONTRAST: _contrast,
    Operation.SHARPNESS: _sharpness,
    Operation.POSTERIZE: _posterize,
    Operation.SOLARIZE: _solarize,
    Operation.AUTO_CONTRAST: _auto_contrast,
    Operation.EQUALIZE: _equalize,
}
