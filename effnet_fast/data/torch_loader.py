"""The torch loader: a DataLoader whose workers decode and resize; augmentation runs on the device.

A batch depends on (epoch, step) only, so the number of workers changes nothing. Workers send uint8, which takes a
quarter of the shared memory that normalised images would take.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from effnet_fast.data.augment import Augmentation
from effnet_fast.data.dataset import ArraySplit, Split
from effnet_fast.data.loader import Loader, LoaderSpec, Shard, labels_of
from effnet_fast.data.replace_unreadable import SkippedFiles, read_or_replace
from effnet_fast.data.resize import resize

_SHARED_MEMORY = Path("/dev/shm")
_REMEDY = "start the container with a larger --shm-size, or use --num_workers 0"
_PREFETCHED = 2  # batches that each worker prepares ahead
_IN_USE = 2  # batches that the consumer still holds

Position = tuple[int, int]  # epoch, step
Batch = tuple[Tensor, Tensor, list[str]]


class _Positions(Sampler[Position]):
    """The positions from (epoch, start) to (epoch, end - 1)."""

    def __init__(self) -> None:
        self.epoch, self.start, self.end = 0, 0, 0

    def __iter__(self) -> Iterator[Position]:
        return iter([(self.epoch, step) for step in range(self.start, self.end)])

    def __len__(self) -> int:
        return self.end - self.start


class _Batches(Dataset[Batch | str]):
    """position -> images uint8 [B, S, S, 3], labels int64 [B], errors of files that were skipped.

    An error that ends the epoch is returned as a string: an exception would carry the worker's traceback.
    """

    def __init__(self, split: Split, shard: Shard, size: int) -> None:
        self._split, self._shard, self._size = split, shard, size

    def __getitem__(self, position: Position) -> Batch | str:
        epoch, step = position
        try:
            images, labels, errors = self._read(self._shard.indices(epoch)[step])
            if get_worker_info() is not None:
                # Allocate now: if this failed while torch sends the batch, the consumer would wait forever.
                images.share_memory_(), labels.share_memory_()
        except ValueError as error:
            return str(error)
        except RuntimeError as error:
            return f"{error}: {_REMEDY}"
        return images, labels, errors

    def _read(self, indices: NDArray[np.int64]) -> Batch:
        if isinstance(self._split, ArraySplit):
            images = torch.from_numpy(resize(self._split.images[indices.clip(0)], self._size))
            return images, torch.from_numpy(labels_of(self._split, indices)), []
        readings = [read_or_replace(self._split, i, self._size, self._shard.training) for i in indices.clip(0).tolist()]
        images = torch.from_numpy(np.stack([reading.pixels for reading in readings]))
        labels = torch.from_numpy(np.where(indices < 0, -1, [reading.label for reading in readings]))
        return images, labels, [reading.error for reading in readings if reading.error]


def _ignore_signals(worker: int) -> None:
    """Ignore signals: one to the process group must not end the workers before the main process has saved."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _kill_workers() -> None:
    """Kill the workers at exit: Python would send them SIGTERM, which they ignore, and wait for them."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


class TorchLoader(Loader):
    """Loads from arrays and from files; see `Loader`."""

    def __init__(self, split: Split, spec: LoaderSpec) -> None:
        super().__init__(split, spec)
        self._augmentation = Augmentation(spec)
        self._skipped = SkippedFiles()
        self._positions = _Positions()
        self._loader = DataLoader(
            _Batches(split, self.shard, spec.image_size),
            batch_size=None,
            sampler=self._positions,
            num_workers=spec.num_workers,
            prefetch_factor=_PREFETCHED if spec.num_workers else None,
            persistent_workers=spec.num_workers > 0,
            pin_memory=spec.device.type == "cuda",
            worker_init_fn=_ignore_signals,
        )

    def epoch(self, epoch: int, start: int = 0, end: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        if self.spec.num_workers:
            self._check_shared_memory()
            atexit.unregister(_kill_workers)  # once is enough
            atexit.register(_kill_workers)
            # A forked worker has none of DALI's threads and would wait for them if it collected an abandoned pipeline.
            gc.collect()
        positions = self._positions
        positions.epoch, positions.start, positions.end = epoch, start, self.steps if end is None else end
        for step, batch in enumerate(self._loader, start):
            if isinstance(batch, str):
                break
            images, labels, errors = batch
            self._skipped.report(errors)
            yield self._augment(images, epoch, step), labels.to(self.spec.device, non_blocking=True)
        else:
            return
        self.close()  # before the exception, whose traceback would keep the workers alive
        raise ValueError(batch)

    def _augment(self, images: Tensor, epoch: int, step: int) -> Tensor:
        canvas = self._augmentation.canvas(images.to(self.spec.device, non_blocking=True))
        parameters = self._augmentation.parameters(epoch, self.shard.indices(epoch)[step])
        return self._augmentation(canvas, torch.arange(len(images), device=self.spec.device), parameters)

    def _check_shared_memory(self) -> None:
        """Refuse to start if shared memory cannot hold the batches in flight."""
        if not _SHARED_MEMORY.is_dir():
            return
        batch = self.spec.batch_size * (3 * self.spec.image_size**2 + 8)
        needed = batch * (self.spec.num_workers * _PREFETCHED + _IN_USE)
        free = shutil.disk_usage(_SHARED_MEMORY).free
        if needed > free:
            raise ValueError(
                f"{_SHARED_MEMORY} has {free >> 20} MiB free, but {self.spec.num_workers} workers need "
                f"{(needed >> 20) + 1} MiB: {_REMEDY}"
            )

    def close(self) -> None:
        self._loader = None  # type: ignore[assignment]
