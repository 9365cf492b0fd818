"""The resident loader: all images stay on the device as uint8; batches are gathered and augmented there.

Order and augmentation parameters of an epoch are drawn and copied to the device once; after that a batch costs a few
kernels and no host synchronisation. The tests compare the other loaders with this one.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from effnet_fast.data.augment import Augmentation, upload
from effnet_fast.data.dataset import ArraySplit
from effnet_fast.data.loader import Loader, LoaderSpec, labels_of
from effnet_fast.data.resize import resize


class ResidentLoader(Loader):
    """Loads from arrays; see `Loader`."""

    def __init__(self, split: ArraySplit, spec: LoaderSpec) -> None:
        super().__init__(split, spec)
        self._augmentation = Augmentation(spec)
        images = np.require(resize(split.images, spec.image_size), requirements=["C", "W"])  # writable for from_numpy
        self._canvas = self._augmentation.canvas(torch.from_numpy(images).to(spec.device))

    def epoch(self, epoch: int, start: int = 0, end: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        indices = self.shard.indices(epoch)[start:end]
        parameters = self._augmentation.parameters(epoch, indices.ravel())
        index = upload(indices.clip(0), self.spec.device)
        labels = upload(labels_of(self.split, indices), self.spec.device)
        for step in range(len(indices)):
            rows = slice(step * self.spec.batch_size, (step + 1) * self.spec.batch_size)
            batch_parameters = None if parameters is None else parameters.take(rows)
            yield self._augmentation(self._canvas, index[step], batch_parameters), labels[step]
