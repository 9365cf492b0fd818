"""The augmentations in PyTorch, vectorised over the batch: few kernels, no host synchronisation.

Images are uint8 [N, H, W, 3] until they are normalised. Conventions (pixel centres, luma weights, the grey that
contrast turns about) are DALI's, so that its graphs and these functions can be compared image by image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from effnet_fast.data.augment_params import AugmentParams, AutoParams, draw_auto_params, draw_params
from effnet_fast.data.auto_augment import auto_augment
from effnet_fast.data.dataset import Channels
from effnet_fast.data.loader import LoaderSpec
from effnet_fast.data.upload import upload

# RGB to YIQ as the NTSC standard rounds it: saturation scales I and Q.
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
_GREY = np.outer(np.linalg.inv(_YIQ)[:, 0], _YIQ[0])
_CONTRAST_CENTRE = 128.0


Drawn = tuple[AugmentParams, AutoParams | None]


@dataclass(frozen=True)
class AugmentTensors:
    """The augmentation parameters of N images as tensors; None where an augmentation is off.

    Attributes:
        crop: int64 [N, 2], y and x of the crop in the padded image.
        flip: bool [N, 1, 1, 1].
        warp: float32 [N, 2, 3], from pixels of the augmented image to grid_sample's coordinates (-1..1) in the source.
        colour: float32 [N, 3, 4], matrix and offset for pixel values 0..255.
        erase: int64 [N, 4], y0, x0, y1, x1.
        auto: operations of RandAugment or TrivialAugment, on the host.
    """

    crop: Tensor
    flip: Tensor | None
    warp: Tensor | None
    colour: Tensor | None
    erase: Tensor | None
    auto: AutoParams | None

    def take(self, rows: slice) -> AugmentTensors:
        """Select the parameters of some of the images."""

        def select(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[rows]

        tensors = select(self.flip), select(self.warp), select(self.colour), select(self.erase)
        return AugmentTensors(self.crop[rows], *tensors, None if self.auto is None else self.auto.take(rows))


class Normalisation:
    """Compute (x / 255 - mean) / std per channel: [B, S, S, 3] with values 0..255 -> float32, contiguous."""

    def __init__(self, size: int, mean: Channels, std: Channels, device: torch.device) -> None:
        means, stds = torch.tensor(mean), torch.tensor(std)
        # Scale and shift cover a whole row of pixels: the CPU vectorises over the row, not over three channels.
        self._scale = (1 / (255 * stds)).repeat(size).to(device)
        self._shift = (-means / stds).repeat(size).to(device)

    def __call__(self, images: Tensor) -> Tensor:
        rows = images.reshape(*images.shape[:2], -1).float()
        return torch.addcmul(self._shift, rows, self._scale).view(images.shape)


class Augmentation:
    """Turns uint8 images into the batches that a `LoaderSpec` describes.

    Pad the images once with `canvas`; each batch is then `augmentation(canvas, index, parameters)`.
    """

    def __init__(self, spec: LoaderSpec) -> None:
        self._spec = spec
        size, device = spec.image_size, spec.device
        self._normalisation = Normalisation(size, spec.mean, spec.std, device)
        self._erased = ((255 * torch.tensor(spec.mean)).round() if spec.dtype == torch.uint8 else torch.zeros(3)).to(
            device, spec.dtype
        )
        self._pixel = torch.arange(size, device=device)
        self._rotates = spec.augment is not None and spec.augment.rotation > 0
        self._pad = 0 if spec.augment is None or self._rotates else spec.augment.pad(size)

    def parameters(self, epoch: int, indices: NDArray[np.int64]) -> AugmentTensors | None:
        """Draw the parameters of the images at `indices` [N] of the split; None in evaluation."""
        return self.tensors(self.draw(epoch, indices))

    def draw(self, epoch: int, indices: NDArray[np.int64]) -> Drawn | None:
        """The part of `parameters` that the host computes; any thread may do it."""
        augment = self._spec.augment
        if augment is None:
            return None
        key = self._spec.seed, epoch, indices, self._spec.image_size
        auto = None if augment.auto_augment == "none" else draw_auto_params(augment.auto_augment, *key)
        return draw_params(augment, *key), auto

    def tensors(self, drawn: Drawn | None) -> AugmentTensors | None:
        """What `draw` returned, on the device."""
        augment, size, device = self._spec.augment, self._spec.image_size, self._spec.device
        if drawn is None or augment is None:
            return None
        params, auto = drawn
        return AugmentTensors(
            crop=upload(np.stack([params.crop_y, params.crop_x], axis=1).astype(np.int64), device),
            flip=upload(params.flip[:, None, None, None], device) if augment.flip else None,
            warp=upload(_grid_matrices(params, size, augment.pad(size)), device) if augment.rotation else None,
            colour=upload(_colour_matrices(params), device) if augment.color_jitter else None,
            erase=upload(_corners(params.erase), device) if augment.random_erasing else None,
            auto=auto,
        )

    def canvas(self, images: Tensor) -> Tensor:
        """Pad images uint8 [N, S, S, 3] with black if crops are taken from them."""
        pad = self._pad
        return F.pad(images, (0, 0, pad, pad, pad, pad)) if pad else images

    def __call__(self, canvas: Tensor, index: Tensor, parameters: AugmentTensors | None) -> Tensor:
        """Augment the images at `index` (int64 [B]) of the canvas: [B, 3, S, S] with channels-last strides."""
        if parameters is None:
            return self._normalise(canvas[index]).permute(0, 3, 1, 2)
        if parameters.warp is not None:
            images = self._rotate(canvas[index], parameters.warp)
        else:
            images = self._crop_flip(canvas, index, parameters)
        if parameters.auto is not None:
            images = auto_augment(images.to(torch.uint8), parameters.auto)
        if parameters.colour is not None:
            images = _recolour(images, parameters.colour)
        images = self._normalise(images)
        if parameters.erase is not None:
            images = self._erase(images, parameters.erase)
        return images.permute(0, 3, 1, 2)

    def _crop_flip(self, canvas: Tensor, index: Tensor, parameters: AugmentTensors) -> Tensor:
        """Crop and flip. Every crop is a view into the canvas, so one indexed read gathers the crops of a batch."""
        n, side, _, channels = canvas.shape
        size = self._spec.image_size
        image, row, column, channel = canvas.stride()
        positions = side - size + 1
        windows = canvas.as_strided(
            (n, positions, positions, size, size, channels), (image, row, column, row, column, channel)
        )
        images = windows[index, parameters.crop[:, 0], parameters.crop[:, 1]]
        return images if parameters.flip is None else torch.where(parameters.flip, images.flip(2), images)

    def _rotate(self, images: Tensor, warp: Tensor) -> Tensor:
        """Resample bilinearly, black outside the image: uint8 [B, S, S, 3] -> float32 [B, S, S, 3]."""
        centre = self._pixel + 0.5
        # Not a matrix product: TF32 would round the coordinates to a tenth of a pixel.
        along_y = warp[:, :, 1, None] * centre + warp[:, :, 2, None]
        grid = torch.addcmul(along_y[..., None], warp[:, :, 0, None, None], centre)
        source = images.permute(0, 3, 1, 2).float()
        warped = F.grid_sample(source, grid.permute(0, 2, 3, 1), padding_mode="zeros", align_corners=False)
        return warped.round_().permute(0, 2, 3, 1)

    def _normalise(self, images: Tensor) -> Tensor:
        """[B, S, S, 3] with values 0..255 -> the output dtype, contiguous; uint8 is not normalised."""
        if self._spec.dtype == torch.uint8:
            return (images.round() if images.is_floating_point() else images).to(torch.uint8).contiguous()
        return self._normalisation(images).to(self._spec.dtype)

    def _erase(self, images: Tensor, corners: Tensor) -> Tensor:
        y0, x0, y1, x1 = corners[:, :, None].unbind(1)
        inside_y = (self._pixel >= y0) & (self._pixel < y1)
        inside_x = (self._pixel >= x0) & (self._pixel < x1)
        return torch.where((inside_y[:, :, None] & inside_x[:, None, :])[..., None], self._erased, images)


def _recolour(images: Tensor, colour: Tensor) -> Tensor:
    """Apply each image's colour matrix and offset, clamp and round: -> float32 [B, S, S, 3]."""
    red, green, blue = images.float().split(1, dim=-1)
    by_red, by_green, by_blue, offset = colour[:, None, None].unbind(-1)
    mixed = torch.addcmul(torch.addcmul(torch.addcmul(offset, red, by_red), green, by_green), blue, by_blue)
    return mixed.clamp_(0, 255).round_()


def _colour_matrices(params: AugmentParams) -> NDArray[np.float32]:
    """brightness * (contrast * (saturate(x) - 128) + 128) as matrix and offset, float32 [N, 3, 4]."""
    brightness, contrast, saturation = (
        factor.astype(np.float64)[:, None, None] for factor in (params.brightness, params.contrast, params.saturation)
    )
    matrix = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * _GREY)
    offset = np.broadcast_to(brightness * (1 - contrast) * _CONTRAST_CENTRE, (len(params), 3, 1))
    return np.concatenate([matrix, offset], axis=2).astype(np.float32)


def _grid_matrices(params: AugmentParams, size: int, pad: int) -> NDArray[np.float32]:
    """`AugmentParams.matrices` in grid_sample's coordinates: -1 and 1 are the outer edges of the source."""
    matrices = params.matrices(size, pad) * np.float32(2 / size)
    matrices[:, :, 2] -= 1
    return matrices


def _corners(rectangles: NDArray[np.int32]) -> NDArray[np.int64]:
    """y0, x0, height, width -> y0, x0, y1, x1."""
    corner = rectangles[:, :2].astype(np.int64)
    return np.concatenate([corner, corner + rectangles[:, 2:]], axis=1)
