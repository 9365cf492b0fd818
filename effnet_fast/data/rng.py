"""Every random choice about the data: the order of images and the parameters of their augmentation.

A counter-based generator (Philox4x32-10; Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3",
SC 2011) maps (seed, purpose, epoch, image index) straight to numbers. There is no state, so a draw is the same in any
batch, on any rank, with any number of workers, and after any interruption.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)

# Random erasing's ranges: Zhong et al., "Random Erasing Data Augmentation", AAAI 2020, section 4.
_ERASED_AREA = (0.02, 0.33)
_ERASED_ASPECT = (0.3, 1 / 0.3)


class Purpose(IntEnum):
    """What a stream of random numbers is for; streams of different purposes are independent."""

    ORDER = 0
    AUGMENT = 1
    AUTO_AUGMENT = 2


def stream(purpose: int, epoch: int = 0) -> int:
    """Number of the stream for one purpose in one epoch, both from 0 to 2**32 - 1."""
    return purpose << 32 | epoch


def philox(counter: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Philox4x32-10: counter uint32 [..., 4] and two 32-bit key words -> uint32 [..., 4]."""
    x0, x1, x2, x3 = (counter[..., i].astype(np.uint64) for i in range(4))
    for turn in range(_ROUNDS):
        k0, k1 = (np.uint64((word + turn * weyl) & 0xFFFFFFFF) for word, weyl in zip(key, _WEYL, strict=True))
        product0, product1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0, x1, x2, x3 = (product1 >> _HALF) ^ x1 ^ k0, product1 & _LOW, (product0 >> _HALF) ^ x3 ^ k1, product0 & _LOW
    return np.stack([x0, x1, x2, x3], axis=-1).astype(np.uint32)


def _words(seed: int, stream: int, indices: NDArray[np.integer], count: int) -> NDArray[np.uint32]:
    """uint32 [N, count]; word j of an index does not depend on `count`, nor on the other indices."""
    indices = np.asarray(indices)
    assert indices.size == 0 or 0 <= indices.min() <= indices.max() < 2**32
    blocks = -(-count // 4)
    counter = np.empty((len(indices), blocks, 4), np.uint32)
    counter[..., 0] = np.arange(blocks)
    counter[..., 1] = indices[:, None]
    counter[..., 2] = stream & 0xFFFFFFFF
    counter[..., 3] = stream >> 32
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    return words.reshape(len(indices), 4 * blocks)[:, :count]


def uniforms(seed: int, stream: int, indices: NDArray[np.integer], count: int) -> NDArray[np.float64]:
    """Uniform numbers for each index.

    Args:
        seed: 64 bits of it count.
        stream: from `stream(purpose, epoch)`.
        indices: integers [N] from 0 to 2**32 - 1.
        count: numbers for each index.

    Returns:
        float64 [N, count] in [0, 1), in steps of 2**-32. Row i depends on (seed, stream, indices[i]) alone, and a
        larger count only appends to it.
    """
    return _words(seed, stream, indices, count).astype(np.float64) * 2.0**-32


def order(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """The permutation int64 [n] in which epoch `epoch` visits n images."""
    words = _words(seed, stream(Purpose.ORDER, epoch), np.arange(n), 2).astype(np.uint64)
    return np.argsort(words[:, 0] << _HALF | words[:, 1], kind="stable").astype(np.int64)


@dataclass(frozen=True)
class Augment:
    """Which augmentations training images go through; the loaders' common order of them is told in loader.py.

    Attributes:
        crop: pad with black by an eighth of the image's size (4 px at 32) and crop back at random.
        flip: mirror left to right with probability 1/2.
        rotation: largest angle in degrees, either way.
        color_jitter: largest relative change of brightness, contrast and saturation, 0 to 1.
        random_erasing: probability that a rectangle is blanked, 0 to 1.
        auto_augment: RandAugment (n = 2, m = 9 of 31) or TrivialAugment Wide, drawn and done by DALI alone.
    """

    crop: bool = True
    flip: bool = True
    rotation: float = 0.0
    color_jitter: float = 0.0
    random_erasing: float = 0.0
    auto_augment: Literal["none", "rand", "trivial"] = "none"

    def pad(self, size: int) -> int:
        """Pixels of padding on each side of an image of `size` pixels."""
        return round(size / 8) if self.crop else 0


@dataclass(frozen=True)
class Draws:
    """Augmentation parameters of N images; what is switched off has its neutral value.

    Attributes:
        crop_y, crop_x: int32 [N], corner of the crop in the padded image, 0 to 2 * pad.
        flip: bool [N].
        angle: float32 [N], degrees counter-clockwise.
        brightness, contrast, saturation: float32 [N], factors.
        erase: int32 [N, 4], rectangle y0, x0, height, width in pixels of the finished image; height 0 is none.
    """

    crop_y: NDArray[np.int32]
    crop_x: NDArray[np.int32]
    flip: NDArray[np.bool_]
    angle: NDArray[np.float32]
    brightness: NDArray[np.float32]
    contrast: NDArray[np.float32]
    saturation: NDArray[np.float32]
    erase: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.flip)

    def take(self, rows: slice) -> Draws:
        """The draws of some of the images."""
        return Draws(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def matrices(self, size: int, pad: int) -> NDArray[np.float32]:
        """Crop, flip and rotation about the centre as one map of coordinates, float32 [N, 2, 3].

        A point (x, y) of the finished image shows the point `matrix @ (x, y, 1)` of the source image, both `size`
        pixels wide and high, with (0, 0) the outer corner of the first pixel.
        """
        angle = np.deg2rad(self.angle.astype(np.float64))
        mirror = np.where(self.flip, -1.0, 1.0)
        matrix = np.empty((len(self), 2, 3))
        matrix[:, 0, 0], matrix[:, 0, 1] = mirror * np.cos(angle), -mirror * np.sin(angle)
        matrix[:, 1, 0], matrix[:, 1, 1] = np.sin(angle), np.cos(angle)
        centre = size / 2
        shift = np.stack([self.crop_x, self.crop_y], axis=1) - pad + centre
        matrix[:, :, 2] = shift - centre * matrix[:, :, :2].sum(axis=2)
        return matrix.astype(np.float32)


def draw(augment: Augment, seed: int, epoch: int, indices: NDArray[np.integer], size: int) -> Draws:
    """Draw the augmentation of some images in one epoch.

    Args:
        augment: what is switched on.
        seed, epoch: key of the draws.
        indices: positions of the images in the training split, [N].
        size: pixels of the (square) images.
    """
    # A column has the same meaning whatever is switched on: switching rotation on leaves crops and flips as they are.
    count = 12 if augment.random_erasing else 7 if augment.color_jitter else 4
    u = uniforms(seed, stream(Purpose.AUGMENT, epoch), indices, count)
    crop = np.floor(u[:, :2] * (2 * augment.pad(size) + 1)).astype(np.int32)
    if augment.color_jitter:
        factors = (1 + augment.color_jitter * (2 * u[:, 4:7] - 1)).astype(np.float32)
    else:
        factors = np.ones((len(u), 3), np.float32)
    return Draws(
        crop_y=crop[:, 0],
        crop_x=crop[:, 1],
        flip=(u[:, 2] < 0.5) & augment.flip,
        angle=(augment.rotation * (2 * u[:, 3] - 1)).astype(np.float32),
        brightness=factors[:, 0],
        contrast=factors[:, 1],
        saturation=factors[:, 2],
        erase=_rectangles(u[:, 7:], augment.random_erasing, size)
        if augment.random_erasing
        else np.zeros((len(u), 4), np.int32),
    )


def _rectangles(u: NDArray[np.float64], probability: float, size: int) -> NDArray[np.int32]:
    """Rectangles y0, x0, height, width [N, 4] from u [N, 5].

    Area uniform, aspect ratio log-uniform so that tall is as likely as wide. The paper draws again until a rectangle
    fits; drawing the ratio from those that fit (area <= ratio <= 1 / area) needs no second draw.
    """
    low, high = _ERASED_AREA
    area = low + (high - low) * u[:, 1]
    low_log = np.log(np.maximum(_ERASED_ASPECT[0], area))
    high_log = np.log(np.minimum(_ERASED_ASPECT[1], 1 / area))
    aspect = np.exp(low_log + (high_log - low_log) * u[:, 2])
    shape = np.rint(size * np.sqrt(np.stack([area * aspect, area / aspect], axis=1))).clip(1, size)
    corner = np.floor(u[:, 3:5] * (size - shape + 1))
    rectangle = np.concatenate([corner, shape], axis=1).astype(np.int32)
    rectangle[u[:, 0] >= probability] = 0
    return rectangle
