"""The contract of the three loaders: which images are in a batch, and how they are processed.

All three loaders deliver the same batches. Each applies these steps in order and skips those that are off:

1. Decode an image file to RGB, turn it upright, crop the central square of its shorter side.
2. Resize bilinearly to the model's size S, antialiased when shrinking (the triangle widens by the scale).
3. Geometry. Crop: shift by up to `Augment.pad(S)` pixels. Flip: mirror left to right. Both move whole pixels. With
   rotation, crop, flip and rotation about the centre are one bilinear resampling, so that corners show image content
   that a separate crop would have lost. Pixels from outside the image are black.
4. RandAugment or TrivialAugment.
5. Colour: saturation (blend with the grey of equal luma), contrast (about 128), brightness (a factor), as one matrix.
6. Normalise with the data set's mean and standard deviation; not with dtype uint8.
7. Erase rectangles: fill them with the data set's mean, which is zero after normalisation.

Steps 1 to 5 round to whole values 0..255. Without rotation, DALI flips in step 6, where it costs nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from effnet_fast.data.augment_params import Augment
from effnet_fast.data.dataset import Split
from effnet_fast.data.rng import order

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LoaderSpec:
    """What a loader delivers.

    Attributes:
        batch_size: images in a batch on this rank.
        image_size: pixels of the model's (square) input.
        mean, std: of each channel, for pixels scaled to 0..1.
        device: where batches are delivered.
        dtype: float32 or float16, normalised; or uint8, not normalised.
        seed: seed of the order and of the augmentation.
        rank, world: number of this process and of all processes.
        num_workers: threads of DALI, or processes of the torch loader; 0 loads in the calling process.
        augment: augmentations for training; None means evaluation.
    """

    batch_size: int
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    device: torch.device
    dtype: torch.dtype
    seed: int
    rank: int
    world: int
    num_workers: int
    augment: Augment | None


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    return order(seed, epoch, n)


@dataclass(frozen=True)
class Shard:
    """Assigns images to the batches of one rank.

    Training: shuffle the images, split them into global batches of batch_size * world, and give rank r the r-th piece
    of each; the incomplete last batch is dropped. Evaluation: rank r takes images r, r + world, ... in order; the last
    batch is padded so that all ranks have the same number of batches.
    """

    images: int
    batch_size: int
    rank: int
    world: int
    seed: int
    training: bool

    def __post_init__(self) -> None:
        if self.images == 0:
            raise ValueError("there are no images to load: check --data_dir and the limits on images")
        if self.training and self._global_batch > self.images:
            raise ValueError(
                f"--batch_size {self._global_batch} is larger than the {self.images} training images: lower it"
            )

    @property
    def _global_batch(self) -> int:
        return self.batch_size * self.world

    @property
    def steps(self) -> int:
        """Batches per epoch, the same on every rank."""
        return self.images // self._global_batch if self.training else -(-self.images // self._global_batch)

    @property
    def dropped(self) -> int:
        """Images dropped at the end of each shuffled epoch, over all ranks together."""
        return self.images - self.steps * self._global_batch if self.training else 0

    def indices(self, epoch: int) -> NDArray[np.int64]:
        """Positions in the split, int64 [steps, batch_size]; -1 is padding."""
        if self.training:
            visited = _order(self.seed, epoch, self.images)[: self.steps * self._global_batch]
            return visited.reshape(self.steps, self.world, self.batch_size)[:, self.rank]
        padded = np.full(self.steps * self._global_batch, -1, np.int64)
        padded[: self.images] = np.arange(self.images)
        return padded[self.rank :: self.world].reshape(self.steps, self.batch_size)


def labels_of(split: Split, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Labels of the images at `indices`; -1 where the index is padding."""
    return np.where(indices < 0, -1, split.labels[indices])


class Loader(ABC):
    """Delivers the batches of one split on one rank. A batch depends on its epoch and position only: there is no state.

    Args:
        split: the images.
        spec: what to deliver.

    Raises:
        ValueError: a training batch over all ranks is larger than the split, or the split is empty.
    """

    def __init__(self, split: Split, spec: LoaderSpec) -> None:
        self.split = split
        self.spec = spec
        self.shard = Shard(
            len(split), spec.batch_size, spec.rank, spec.world, spec.seed, training=spec.augment is not None
        )

    @property
    def steps(self) -> int:
        """Batches per epoch, the same on every rank."""
        return self.shard.steps

    @property
    def dropped(self) -> int:
        """Training images dropped in each epoch, over all ranks together."""
        return self.shard.dropped

    @abstractmethod
    def epoch(self, epoch: int, start: int = 0, end: int | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Iterate over the batches of an epoch, from batch `start` to batch `end` - 1; the default is the last one.

        Batches that a caller leaves out at the end stay in memory; with `end` they are not loaded.

        Yields:
            images: [B, 3, S, S] with channels-last strides, in `spec.dtype`.
            labels: int64 [B]; -1 marks padding.

        Raises:
            ValueError: an image file cannot be read; the message names it.
        """

    def close(self) -> None:  # noqa: B027 (not every loader has something to free)
        """Free threads, processes and memory."""
