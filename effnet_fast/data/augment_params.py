"""The augmentation's random parameters, keyed by (seed, epoch, image index); see rng.py for the generator."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from effnet_fast.data.rng import Purpose, stream, uniforms

# Random erasing's ranges: Zhong et al., "Random Erasing Data Augmentation", AAAI 2020, section 4.
_ERASED_AREA = (0.02, 0.33)
_ERASED_ASPECT = (0.3, 1 / 0.3)


@dataclass(frozen=True)
class Augment:
    """Which augmentations are applied to training images; loader.py gives their order.

    Attributes:
        crop: pad with black by an eighth of the image's size (4 px at 32) and crop back at a random position.
        flip: mirror left to right with probability 1/2.
        alternating_flip: draw `flip` once for each image; odd epochs do the opposite of even ones.
        rotation: largest angle in degrees, either way.
        color_jitter: largest relative change of brightness, contrast and saturation, 0 to 1.
        random_erasing: probability that a rectangle is erased, 0 to 1.
        auto_augment: RandAugment (n = 2, m = 9 of 31) or TrivialAugment Wide, as torchvision defines them.
    """

    crop: bool = True
    flip: bool = True
    alternating_flip: bool = False
    rotation: float = 0.0
    color_jitter: float = 0.0
    random_erasing: float = 0.0
    auto_augment: Literal["none", "rand", "trivial"] = "none"

    def pad(self, size: int) -> int:
        """Pixels of padding on each side of an image of `size` pixels."""
        return round(size / 8) if self.crop else 0


class Operation(IntEnum):
    """Operations of RandAugment and TrivialAugment."""

    IDENTITY = 0
    SHEAR_X = 1
    SHEAR_Y = 2
    TRANSLATE_X = 3
    TRANSLATE_Y = 4
    ROTATE = 5
    BRIGHTNESS = 6
    COLOR = 7
    CONTRAST = 8
    SHARPNESS = 9
    POSTERIZE = 10
    SOLARIZE = 11
    AUTO_CONTRAST = 12
    EQUALIZE = 13


@dataclass(frozen=True)
class AutoParams:
    """Operations of N images, applied from the first column to the last.

    Attributes:
        operations: `Operation` numbers, int64 [N, K].
        magnitudes: float64 [N, K], signed where the operation has a direction.
    """

    operations: NDArray[np.int64]
    magnitudes: NDArray[np.float64]

    def take(self, rows: slice) -> AutoParams:
        """Select the operations of some of the images."""
        return AutoParams(self.operations[rows], self.magnitudes[rows])


@dataclass(frozen=True)
class AugmentParams:
    """Augmentation parameters of N images; augmentations that are off have neutral values.

    Attributes:
        crop_y, crop_x: int32 [N], corner of the crop in the padded image, 0 to 2 * pad.
        flip: bool [N].
        angle: float32 [N], degrees counter-clockwise.
        brightness, contrast, saturation: float32 [N], factors.
        erase: int32 [N, 4], rectangle y0, x0, height, width in pixels of the finished image; height 0 means none.
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

    def matrices(self, size: int, pad: int) -> NDArray[np.float32]:
        """Crop, flip and rotation about the centre as one affine map of coordinates, float32 [N, 2, 3].

        The map takes a point (x, y) of the augmented image to the point `matrix @ (x, y, 1)` of the source image. Both
        are `size` pixels wide and high; (0, 0) is the outer corner of the first pixel.
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


def draw_params(augment: Augment, seed: int, epoch: int, indices: NDArray[np.integer], size: int) -> AugmentParams:
    """Draw the augmentation parameters of some images in one epoch.

    Args:
        augment: which augmentations are on.
        seed, epoch: key of the random numbers.
        indices: positions of the images in the training split, [N].
        size: pixels of the (square) images.
    """
    # Columns have fixed meanings, so that switching rotation on does not change crops and flips.
    count = 12 if augment.random_erasing else 7 if augment.color_jitter else 4
    u = uniforms(seed, stream(Purpose.AUGMENT, epoch), indices, count)
    crop = np.floor(u[:, :2] * (2 * augment.pad(size) + 1)).astype(np.int32)
    if augment.color_jitter:
        factors = (1 + augment.color_jitter * (2 * u[:, 4:7] - 1)).astype(np.float32)
    else:
        factors = np.ones((len(u), 3), np.float32)
    return AugmentParams(
        crop_y=crop[:, 0],
        crop_x=crop[:, 1],
        flip=_flips(augment, seed, epoch, indices, u[:, 2]),
        angle=(augment.rotation * (2 * u[:, 3] - 1)).astype(np.float32),
        brightness=factors[:, 0],
        contrast=factors[:, 1],
        saturation=factors[:, 2],
        erase=_rectangles(u[:, 7:], augment.random_erasing, size)
        if augment.random_erasing
        else np.zeros((len(u), 4), np.int32),
    )


def _flips(
    augment: Augment, seed: int, epoch: int, indices: NDArray[np.integer], u: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Which images are mirrored, [N].

    Alternating flip (Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024, section 3.6) takes the choice of
    epoch 0 in even epochs and its opposite in odd ones, so that two epochs show an image both ways.
    """
    if augment.alternating_flip:
        u = uniforms(seed, stream(Purpose.AUGMENT), indices, 3)[:, 2]
        return ((u < 0.5) ^ bool(epoch % 2)) & augment.flip
    return (u < 0.5) & augment.flip


def _rectangles(u: NDArray[np.float64], probability: float, size: int) -> NDArray[np.int32]:
    """Rectangles y0, x0, height, width [N, 4] from u [N, 5].

    The area is uniform; the aspect ratio is log-uniform, so that tall is as likely as wide. The paper redraws until a
    rectangle fits; drawing the ratio from those that fit (area <= ratio <= 1 / area) needs no second draw.
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


# -- RandAugment and TrivialAugment

_BINS = 31  # magnitudes of each operation
_RAND_OPERATIONS, _RAND_BIN = 2, 9


def draw_auto_params(
    policy: Literal["rand", "trivial"], seed: int, epoch: int, indices: NDArray[np.integer], size: int
) -> AutoParams:
    """Draw the operations of RandAugment (2 of them, magnitude 9 of 31) or of TrivialAugment Wide (1, any magnitude).

    Args:
        policy: which of the two.
        seed, epoch: key of the random numbers.
        indices: positions of the images in the training split, [N].
        size: pixels of the (square) images.
    """
    count = _RAND_OPERATIONS if policy == "rand" else 1
    u = uniforms(seed, stream(Purpose.AUTO_AUGMENT, epoch), indices, 3 * count).reshape(len(indices), count, 3)
    operations = (u[..., 0] * len(Operation)).astype(np.int64)
    bins = _RAND_BIN if policy == "rand" else (u[..., 1] * _BINS).astype(np.int64)
    magnitudes, signed = _magnitudes(policy, size)
    signs = np.where(signed[operations] & (u[..., 2] < 0.5), -1.0, 1.0)
    return AutoParams(operations, signs * magnitudes[operations, bins])


def _magnitudes(policy: Literal["rand", "trivial"], size: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Magnitudes [14, 31] of each operation, and whether they get a random sign [14]; torchvision's values."""
    shear, translation, rotation, factor, bits = (
        (0.3, 150 / 331 * size, 30.0, 0.9, 4) if policy == "rand" else (0.99, 32.0, 135.0, 0.99, 6)
    )
    directed = {
        Operation.SHEAR_X: shear,
        Operation.SHEAR_Y: shear,
        Operation.TRANSLATE_X: translation,
        Operation.TRANSLATE_Y: translation,
        Operation.ROTATE: rotation,
        Operation.BRIGHTNESS: factor,
        Operation.COLOR: factor,
        Operation.CONTRAST: factor,
        Operation.SHARPNESS: factor,
    }
    magnitudes, signed = np.zeros((len(Operation), _BINS)), np.zeros(len(Operation), bool)
    for operation, largest in directed.items():
        magnitudes[operation], signed[operation] = np.linspace(0, largest, _BINS), True
    magnitudes[Operation.POSTERIZE] = 8 - np.rint(np.arange(_BINS) / ((_BINS - 1) / bits))
    magnitudes[Operation.SOLARIZE] = np.linspace(255, 0, _BINS)
    return magnitudes, signed
