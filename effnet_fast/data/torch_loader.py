"""The torch loader: an ordinary DataLoader, for where neither DALI nor the resident loader can serve.

Each worker makes whole batches, and a batch depends on (epoch, step) alone, so nothing depends on their number.
"""

from __future__ import annotations

import dataclasses
import gc
import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from effnet_fast.data.augment import Augmentation
from effnet_fast.data.dataset import ArraySplit, Split
from effnet_fast.data.loader import Loader, LoaderSpec, Shard, labels_of
from effnet_fast.data.resize import read_image, resize

Position = tuple[int, int]  # epoch, step
Batch = tuple[Tensor, Tensor]


class _Positions(Sampler[Position]):
    """The positions from (epoch, start) to the end of the epoch."""

    def __init__(self, steps: int) -> None:
        self.epoch, self.start, self.steps = 0, 0, steps

    def __iter__(self) -> Iterator[Position]:
        return iter([(self.epoch, step) for step in range(self.start, self.steps)])

    def __len__(self) -> int:
        return self.steps - self.start


class _Batches(Dataset[Batch | str]):
    """position -> images [B, S, S, 3] (contiguous: pinning would lose channels-last strides), labels int64 [B].

    An unreadable file gives the message instead: an exception would arrive wrapped in the worker's traceback.
    """

    def __init__(self, split: Split, shard: Shard, spec: LoaderSpec) -> None:
        self._split, self._shard, self._size = split, shard, spec.image_size
        self._augmentation = Augmentation(spec)

    def __getitem__(self, position: Position) -> Batch | str:
        epoch, step = position
        indices = self._shard.indices(epoch)[step]
        try:
            images = self._augmentation.canvas(torch.from_numpy(self._read(indices.clip(0))))
        except ValueError as error:
            return str(error)
        parameters = self._augmentation.parameters(epoch, indices)
        batch = self._augmentation(images, torch.arange(len(indices)), parameters)
        return batch.permute(0, 2, 3, 1), torch.from_numpy(labels_of(self._split, indices))

    def _read(self, indices: np.ndarray) -> np.ndarray:
        if isinstance(self._split, ArraySplit):
            return resize(self._split.images[indices], self._size)
        return np.stack([read_image(self._split.paths[i], self._size) for i in indices])


def _leave_signals(worker: int) -> None:
    """A signal to the whole process group is the run's, which still needs its workers to stop in good order."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


class TorchLoader(Loader):
    """Loads from arrays and from files; see `Loader`."""

    def __init__(self, split: Split, spec: LoaderSpec) -> None:
        super().__init__(split, spec)
        on_cpu = dataclasses.replace(spec, device=torch.device("cpu"))
        self._positions = _Positions(self.steps)
        self._loader = DataLoader(
            _Batches(split, self.shard, on_cpu),
            batch_size=None,
            sampler=self._positions,
            num_workers=spec.num_workers,
            persistent_workers=spec.num_workers > 0,
            pin_memory=spec.device.type == "cuda",
            worker_init_fn=_leave_signals,
        )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        self._positions.epoch, self._positions.start = epoch, start
        # Workers are forked: one that collected an abandoned DALI pipeline would wait for threads it does not have.
        gc.collect()
        for batch in self._loader:
            if isinstance(batch, str):
                break
            images, labels = (tensor.to(self.spec.device, non_blocking=True) for tensor in batch)
            yield images.permute(0, 3, 1, 2), labels
        else:
            return
        self.close()  # now: the traceback would keep the workers until it is collected
        raise ValueError(batch)

    def close(self) -> None:
        self._loader = None  # type: ignore[assignment]
