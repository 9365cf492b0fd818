"""What a loader is: which images are in a batch, and what has been done to them.

All three loaders deliver the same batches. Their order of work, each part skipped where it is off:

1. An image file is decoded to RGB, turned as its EXIF tag says, and cut to the central square of its shorter side.
2. Bilinear resize to the model's size S, with the triangle widened by the scale when shrinking (antialiased).
3. Geometry. Crop: shift by up to `Augment.pad(S)` pixels, flip: mirror left to right; whole pixels, no interpolation.
   With rotation, crop, flip and rotation about the centre are one bilinear resampling of the image, so that corners
   show what the crop would have cut off. What lies outside of the image is black.
4. RandAugment or TrivialAugment (DALI alone).
5. Colour: saturation (blend with the grey of equal luma), contrast (about 128), brightness (a factor), as one matrix.
6. Normalisation with the data set's mean and standard deviation; with dtype uint8, none.
7. Erased rectangles take the data set's mean, which is zero after normalisation.

Up to 5, each step hands on whole values of 0..255. Without rotation DALI flips at step 6, where it costs nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from effnet_fast.data.augment_params import Augment
from effnet_fast.data.dataset import Split
from effnet_fast.data.rng import order

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LoaderSpec:
    """What a loader shall deliver.

    Attributes:
        batch_size: images per batch on this rank.
        image_size: pixels of the model's (square) input.
        mean, std: of each channel, for pixels scaled to 0..1.
        device: where batches are delivered.
        dtype: float32 or float16, normalised; or uint8, which leaves the normalisation to the step.
        seed: of the order and of the augmentation.
        rank, world: this process and how many there are.
        num_workers: threads of DALI or processes of the torch loader (there, 0 works in the calling process).
        augment: for training; None is evaluation.
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
    """Which of `images` images are in each batch of one rank.

    Training: the images of an epoch in random order are cut into global batches of batch_size * world, of which rank r
    takes the r-th piece; the tail is dropped. Evaluation: every rank-th image in order, the last batches padded so that
    all ranks have equally many.
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
        """Batches an epoch, the same on every rank."""
        return self.images // self._global_batch if self.training else -(-self.images // self._global_batch)

    @property
    def dropped(self) -> int:
        """Images that an epoch leaves out (others in every epoch), over all ranks together."""
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
    """Labels of some images, -1 where the index is padding."""
    return np.where(indices < 0, -1, split.labels[indices])


class Loader(ABC):
    """Delivers the batches of one split on one rank.

    Args:
        split: the images.
        spec: what to deliver.

    Raises:
        ValueError: a training batch (over all ranks) is larger than the split, or the split is empty.
    """

    def __init__(self, split: Split, spec: LoaderSpec) -> None:
        self.split = split
        self.spec = spec
        self.shard = Shard(
            len(split), spec.batch_size, spec.rank, spec.world, spec.seed, training=spec.augment is not None
        )

    @property
    def steps(self) -> int:
        """Batches an epoch, the same on every rank."""
        return self.shard.steps

    @property
    def dropped(self) -> int:
        """Training images left out of each epoch, over all ranks together."""
        return self.shard.dropped

    @abstractmethod
    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of an epoch from batch `start` on.

        Yields:
            images: [B, 3, S, S] with channels-last strides, in the dtype of the specification.
            labels: int64 [B]; -1 marks padding.

        Raises:
            ValueError: an image file cannot be read; the message names it.
        """

    def state_dict(self) -> dict[str, Any]:
        """What `epoch(epoch, start)` needs besides its arguments to go on exactly; plain values and bytes."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 (most loaders have no state)
        """Put back what `state_dict` gave, before the next call of `epoch`."""

    def close(self) -> None:  # noqa: B027 (not every loader has something to free)
        """Free threads, processes and memory."""
