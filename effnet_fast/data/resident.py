"""The resident loader: all images stay on the device as uint8; batches are gathered and augmented there.

Order and augmentation parameters of an epoch are drawn in a thread during the epoch before, and copied to the device
once; after that a batch costs a few kernels and no host synchronisation. The tests compare the other loaders with this
one.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from effnet_fast.data.augment import Augmentation, Drawn, upload
from effnet_fast.data.dataset import ArraySplit
from effnet_fast.data.loader import Loader, LoaderSpec, labels_of
from effnet_fast.data.resize import resize

Plan = tuple[NDArray[np.int64], Drawn | None]  # indices [steps, B], parameters of all images


class ResidentLoader(Loader):
    """Loads from arrays; see `Loader`."""

    def __init__(self, split: ArraySplit, spec: LoaderSpec) -> None:
        super().__init__(split, spec)
        self._augmentation = Augmentation(spec)
        images = np.require(resize(split.images, spec.image_size), requirements=["C", "W"])  # writable for from_numpy
        self._canvas = self._augmentation.canvas(torch.from_numpy(images).to(spec.device))
        self._thread = ThreadPoolExecutor(1, "effnet_fast-resident")
        self._plans: dict[int, Future[Plan]] = {}  # of this epoch and the next

    def epoch(self, epoch: int, start: int = 0, end: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        indices, drawn = self._planned(epoch)
        parameters = self._augmentation.tensors(drawn)
        index = upload(indices.clip(0), self.spec.device)
        labels = upload(labels_of(self.split, indices), self.spec.device)
        for step in range(len(indices))[start:end]:
            rows = slice(step * self.spec.batch_size, (step + 1) * self.spec.batch_size)
            batch_parameters = None if parameters is None else parameters.take(rows)
            yield self._augmentation(self._canvas, index[step], batch_parameters), labels[step]

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _planned(self, epoch: int) -> Plan:
        """The plan of an epoch; in training the thread goes on with the next one's, which a GPU would wait for."""
        if self.spec.augment is None:
            return self._plan(epoch)
        known, self._plans = self._plans, {}
        for each in (epoch, epoch + 1):
            self._plans[each] = known.get(each) or self._thread.submit(self._plan, each)
        return self._plans[epoch].result()

    def _plan(self, epoch: int) -> Plan:
        indices = self.shard.indices(epoch)
        return indices, self._augmentation.draw(epoch, indices.ravel())
