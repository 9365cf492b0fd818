"""The DALI loader: one graph for training and evaluation, arrays and files, CPU and GPU.

The graph receives the images with their augmentation parameters, so that its batches equal those of the resident
loader. The exception is RandAugment and TrivialAugment, which DALI draws itself; `state_dict` holds DALI's state.
(E. D. Cubuk et al., "RandAugment", NeurIPS 2020; Müller and Hutter, "TrivialAugment", ICCV 2021.)

DALI's default executor never overwrites an output that is still referenced, so DLPack shares batches without a copy.
"""

# DALI defines its operators and types when it is imported, which the type checker cannot see.
# mypy: disable-error-code="attr-defined"

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, math, pipeline_def, types
from nvidia.dali.auto_aug import rand_augment, trivial_augment
from torch import Tensor

from effnet_fast.data.augment_params import Augment, draw_params
from effnet_fast.data.dataset import ArraySplit, FileSplit, Split
from effnet_fast.data.loader import Loader, LoaderSpec, Shard, labels_of
from effnet_fast.data.resize import read_image
from effnet_fast.data.rng import Purpose, stream, uniforms

_PREFETCHED = 2  # batches in DALI's queue
_STATE = "dali"
_DTYPES = {torch.float32: types.FLOAT, torch.float16: types.FLOAT16, torch.uint8: types.UINT8}

Position = tuple[int, int]  # epoch, step
Feed = dict[str, Any]  # name of an input of the graph -> one batch of it


class Source:
    """Feeds the graph batch by batch, across epochs, from a position that can be set.

    Attributes:
        next: position of the batch that DALI requests next.
        scheduled: positions of the batches in DALI's queue, oldest first.
        names: names of the graph's inputs.
        resizes: whether the images differ from the model's size.
    """

    def __init__(self, split: Split, shard: Shard, spec: LoaderSpec) -> None:
        self._split, self._shard, self._spec = split, shard, spec
        self.next: Position = (0, 0)
        self.scheduled: deque[Position] = deque()
        self.names = tuple(self._feed(0, np.empty(0, np.int64)))
        self.resizes = isinstance(split, FileSplit) or split.images.shape[1:3] != (spec.image_size,) * 2

    def __call__(self, iteration: int) -> tuple[Any, ...]:
        """Called by DALI. The argument is unused, but DALI's checkpoints require a source that takes it."""
        epoch, step = self.next
        self.scheduled.append(self.next)
        self.next = (epoch, step + 1) if step + 1 < self._shard.steps else (epoch + 1, 0)
        return tuple(self._feed(epoch, self._shard.indices(epoch)[step]).values())

    def scheduled_files(self) -> list[Path]:
        """The image files of the batches in DALI's queue, oldest first."""
        if isinstance(self._split, ArraySplit):
            return []
        return [
            self._split.paths[i] for epoch, step in self.scheduled for i in self._shard.indices(epoch)[step].clip(0)
        ]

    def _feed(self, epoch: int, indices: NDArray[np.int64]) -> Feed:
        present = indices.clip(0)
        feed: Feed = {"labels": labels_of(self._split, indices)}
        if isinstance(self._split, ArraySplit):
            feed["images"] = self._split.images[present]
        else:
            feed["paths"] = [np.frombuffer(os.fsencode(self._split.paths[i]), np.uint8) for i in present]
        if self._spec.augment is not None:
            feed |= _augmentation_feed(self._spec.augment, self._spec.seed, epoch, present, self._spec.image_size)
        return feed


def _augmentation_feed(augment: Augment, seed: int, epoch: int, indices: NDArray[np.int64], size: int) -> Feed:
    """Arguments of the graph's operators, for the augmentations that are on."""
    params, pad = draw_params(augment, seed, epoch, indices, size), augment.pad(size)
    feed: Feed = {}
    if augment.rotation:
        feed["matrix"] = params.matrices(size, pad)
    else:
        if augment.crop:
            feed["corner"] = np.stack([params.crop_y, params.crop_x], axis=1) - np.int32(pad)
        if augment.flip:
            feed["mirror"] = params.flip.astype(np.int32)
    if augment.color_jitter:
        feed |= {name: np.ascontiguousarray(getattr(params, name)) for name in ("brightness", "contrast", "saturation")}
    if augment.random_erasing:
        rectangles = params.erase.astype(np.float32)
        feed |= {"anchor": np.ascontiguousarray(rectangles[:, :2]), "shape": np.ascontiguousarray(rectangles[:, 2:])}
    return feed


def graph(source: Source, spec: LoaderSpec) -> tuple[Any, Any]:
    """Define the graph in the current pipeline; its outputs are images [S, S, 3] and labels. See loader.py."""
    augment, gpu, size = spec.augment, spec.device.type == "cuda", spec.image_size
    layouts = ["HWC" if name == "images" else "" for name in source.names]
    outputs = fn.external_source(source, num_outputs=len(source.names), batch=True, layout=layouts)
    inputs = dict(zip(source.names, outputs))  # noqa: B905 (DALI's conversion of conditionals knows no `strict`)
    images = _decode(inputs["paths"], gpu) if "paths" in inputs else _placed(inputs["images"], gpu)
    if source.resizes:
        images = fn.resize(images, size=(size, size), antialias=True)
    if augment is not None:
        images = _geometry(images, inputs, size)
        images = _colour(images, inputs, augment, size)
    return _normalise(images, inputs, spec), _placed(inputs["labels"], gpu)


def _placed(node: Any, gpu: bool) -> Any:
    return node.gpu() if gpu else node


def _decode(paths: Any, gpu: bool) -> Any:
    encoded = fn.io.file.read(paths)
    shape = fn.peek_image_shape(encoded)
    side = fn.cast(math.min(shape[0], shape[1]), dtype=types.FLOAT)
    images = fn.decoders.image(encoded, device="mixed" if gpu else "cpu", output_type=types.RGB)
    return fn.crop(images, crop_h=side, crop_w=side, rounding="truncate")


def _geometry(images: Any, inputs: dict[str, Any], size: int) -> Any:
    if "matrix" in inputs:
        return fn.warp_affine(images, matrix=inputs["matrix"], size=(size, size), fill_value=0)
    if "corner" in inputs:
        return fn.slice(
            images,
            start=inputs["corner"],
            shape=(size, size),
            axes=(0, 1),
            out_of_bounds_policy="pad",
            fill_values=0,
        )
    return images


def _colour(images: Any, inputs: dict[str, Any], augment: Augment, size: int) -> Any:
    if augment.auto_augment == "rand":
        images = rand_augment.rand_augment(images, n=2, m=9, shape=(size, size))
    elif augment.auto_augment == "trivial":
        images = trivial_augment.trivial_augment_wide(images, shape=(size, size))
    if "brightness" in inputs:
        factors = {name: inputs[name] for name in ("brightness", "contrast", "saturation")}
        images = fn.color_twist(images, **factors)
    return images


def _normalise(images: Any, inputs: dict[str, Any], spec: LoaderSpec) -> Any:
    keep = spec.dtype == torch.uint8
    mean, std = [255 * value for value in spec.mean], [255 * value for value in spec.std]
    images = fn.crop_mirror_normalize(
        images,
        mirror=inputs.get("mirror", 0),
        mean=[0.0] if keep else mean,
        std=[1.0] if keep else std,
        dtype=_DTYPES[spec.dtype],
        output_layout="HWC",
    )
    if "anchor" in inputs:
        fill = [float(round(value)) for value in mean] if keep else 0.0
        images = fn.erase(images, anchor=inputs["anchor"], shape=inputs["shape"], axis_names="HW", fill_value=fill)
    return images


class _Lent:
    """Keeps CUDA batches alive until the work that the consumer has queued on them is done.

    DALI reuses a batch's memory as soon as the last reference is gone, even if that work is still pending. A consumer
    may use a batch while it requests the next one, so the event that ends a batch is recorded two requests later.
    """

    _LAG = 2
    _MOST = 8  # batches that the host may run ahead of the device, which bounds the memory

    def __init__(self) -> None:
        self._in_use: deque[tuple[Tensor, ...]] = deque()
        self._ending: deque[tuple[torch.cuda.Event, tuple[Tensor, ...]]] = deque()

    def lend(self, batch: tuple[Tensor, ...]) -> None:
        self._in_use.append(batch)
        if len(self._in_use) > self._LAG:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(batch[0].device))
            self._ending.append((event, self._in_use.popleft()))
        if len(self._ending) > self._MOST:
            self._ending[0][0].synchronize()
        while self._ending and self._ending[0][0].query():
            self._ending.popleft()


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop the deprecation warnings of DALI's RandAugment; DALI resets warning filters."""
    with warnings.catch_warnings(record=True) as caught:
        yield
    for warning in caught:
        if not issubclass(warning.category, DeprecationWarning):
            warnings.warn(warning.message, stacklevel=2)


class DaliLoader(Loader):
    """Loads from arrays and from files; see `Loader`.

    With RandAugment or TrivialAugment a batch also depends on how many batches DALI has produced. Exact resumption then
    needs the `state_dict` from between two batches, besides the position.
    """

    def __init__(self, split: Split, spec: LoaderSpec) -> None:
        super().__init__(split, spec)
        self._source = Source(split, self.shard, spec)
        self._draws_itself = spec.augment is not None and spec.augment.auto_augment != "none"
        self._checkpoint: bytes | None = None
        self._pipeline: Pipeline | None = None
        self._lent = _Lent()

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(start, self.steps):
            if step == start:
                self._seek((epoch, start))
            images, labels = self._next()
            yield images.permute(0, 3, 1, 2), labels

    def state_dict(self) -> dict[str, Any]:
        if self._draws_itself and self._pipeline is not None:
            return {_STATE: self._pipeline.checkpoint()}
        return {} if self._checkpoint is None else {_STATE: self._checkpoint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.close()
        self._checkpoint = state.get(_STATE)

    def close(self) -> None:
        self._pipeline = None
        self._source.scheduled.clear()

    def _seek(self, position: Position) -> None:
        """Make the batch at `position` the next one; usually it is, and is already in the queue."""
        elsewhere = bool(self._source.scheduled) and self._source.scheduled[0] != position
        if elsewhere and self._draws_itself:
            # A new pipeline in the state after the last delivered batch: prefetched batches must not count, as after
            # a resumption.
            self.load_state_dict(self.state_dict())
        if self._pipeline is None:
            self._source.next = position
            self._pipeline = self._define()
            self._pipeline.build()
        elif elsewhere:
            self._source.next = position
            while self._source.scheduled[0] != position:
                self._next()

    @_quiet()
    def _define(self) -> Pipeline:
        spec = self.spec
        seed = int(2**31 * uniforms(spec.seed, stream(Purpose.AUTO_AUGMENT), np.array([spec.rank]), 1)[0, 0])
        return pipeline_def(enable_conditionals=self._draws_itself)(graph)(
            self._source,
            spec,
            batch_size=spec.batch_size,
            num_threads=spec.num_workers,
            # None, not -1, keeps a CPU pipeline from touching CUDA.
            device_id=(spec.device.index or 0) if spec.device.type == "cuda" else None,
            seed=seed,
            prefetch_queue_depth=_PREFETCHED,
            enable_checkpointing=self._draws_itself,
            checkpoint=self._checkpoint,
        )

    def _next(self) -> tuple[Tensor, Tensor]:
        assert self._pipeline is not None
        try:
            images, labels = self._pipeline.run()
        except RuntimeError as error:
            files = self._source.scheduled_files()
            self.close()
            if not files:
                raise
            raise ValueError(_unreadable(files, error)) from error
        self._source.scheduled.popleft()
        batch = torch.from_dlpack(images.as_tensor()), torch.from_dlpack(labels.as_tensor())
        if self.spec.device.type == "cuda":
            self._lent.lend(batch)
        return batch


def _unreadable(files: list[Path], error: RuntimeError) -> str:
    """Name the file that DALI could not read; DALI's own message does not."""
    for file in files:
        try:
            read_image(file, 1)
        except ValueError as cause:
            return str(cause)
    reason = str(error).strip().splitlines()[0]
    return f"DALI cannot read one of {len(files)} images between {files[0]} and {files[-1]}: {reason}"
