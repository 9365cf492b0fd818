"""The DALI loader: one graph for training and evaluation, arrays and files, CPU and GPU.

The graph receives the images with their augmentation parameters, so that its batches equal those of the resident
loader. With RandAugment or TrivialAugment, DALI decodes and resizes, and augment.py does the rest.

DALI's default executor never overwrites an output that is still referenced, so DLPack shares batches without a copy.
"""

# DALI defines its operators and types when it is imported, which the type checker cannot see.
# mypy: disable-error-code="attr-defined"

from __future__ import annotations

import dataclasses
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, math, pipeline_def, types
from torch import Tensor

from effnet_fast.data.augment import Augmentation
from effnet_fast.data.augment_params import Augment, draw_params
from effnet_fast.data.dataset import FileSplit, Split
from effnet_fast.data.listing import printable
from effnet_fast.data.loader import Loader, LoaderSpec, Shard, labels_of
from effnet_fast.data.orientation import stored_mirrors, turn_matrix
from effnet_fast.data.replace_unreadable import SkippedFiles, read_or_replace

_PREFETCHED = 2  # batches in DALI's queue
_DTYPES = {torch.float32: types.FLOAT, torch.float16: types.FLOAT16, torch.uint8: types.UINT8}

Position = tuple[int, int]  # epoch, step
Feed = dict[str, Any]  # name of an input of the graph -> one batch of it


class Source:
    """Feeds the graph batch by batch, across epochs, from a position that can be set.

    Attributes:
        next: position of the batch that DALI requests next.
        scheduled: positions of the batches in DALI's queue, oldest first.
        by_pillow: indices of the image files that Pillow decodes rather than DALI.
    """

    def __init__(self, split: Split, shard: Shard, spec: LoaderSpec) -> None:
        self._split, self._shard, self._spec = split, shard, spec
        self.next: Position = (0, 0)
        self.scheduled: deque[Position] = deque()
        self.by_pillow: set[int] = set()
        self._turned = False
        if isinstance(split, FileSplit):
            self.by_pillow |= {index for index, file in enumerate(split.files) if not file.plain}
            self._turned = any(file.orientation != 1 for file in split.files)
        self._skipped = SkippedFiles()
        self._threads = ThreadPoolExecutor(max(1, spec.num_workers))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the graph's inputs."""
        return tuple(self._feed(0, np.empty(0, np.int64)))

    @property
    def resizes(self) -> bool:
        """Whether the images differ from the model's size."""
        return isinstance(self._split, FileSplit) or self._split.images.shape[1:3] != (self._spec.image_size,) * 2

    def __call__(self) -> tuple[Any, ...]:
        """Called by DALI."""
        epoch, step = self.next
        self.scheduled.append(self.next)
        self.next = (epoch, step + 1) if step + 1 < self._shard.steps else (epoch + 1, 0)
        return tuple(self._feed(epoch, self._shard.indices(epoch)[step]).values())

    def scheduled_files(self) -> list[int]:
        """Indices of the files that DALI decodes for the batches in its queue."""
        if not isinstance(self._split, FileSplit):
            return []
        visited = {i for epoch, step in self.scheduled for i in self._shard.indices(epoch)[step].clip(0).tolist()}
        return sorted(visited - self.by_pillow)

    def path(self, index: int) -> Path:
        assert isinstance(self._split, FileSplit)
        return self._split.files[index].path

    def _feed(self, epoch: int, indices: NDArray[np.int64]) -> Feed:
        present = indices.clip(0)
        feed: Feed = {"labels": labels_of(self._split, indices)}
        if isinstance(self._split, FileSplit):
            feed |= self._file_feed(self._split, indices, feed["labels"])
        else:
            feed["images"] = self._split.images[present]
        if self._spec.augment is not None:
            feed |= _augmentation_feed(self._spec.augment, self._spec.seed, epoch, present, self._spec.image_size)
        return feed

    def _file_feed(self, split: FileSplit, indices: NDArray[np.int64], labels: NDArray[np.int64]) -> Feed:
        files = [split.files[i] for i in indices.clip(0)]
        feed: Feed = {"paths": [encoded_path(file.path) for file in files]}
        if self._turned:
            feed["mirrors"] = np.array([stored_mirrors(file.orientation) for file in files], np.int32).reshape(-1, 2)
            feed["turn"] = np.array(
                [turn_matrix(file.orientation, self._spec.image_size) for file in files], np.float32
            ).reshape(-1, 2, 3)
        if self.by_pillow:
            feed |= self._pillow_feed(split, indices, labels)
        return feed

    def _pillow_feed(self, split: FileSplit, indices: NDArray[np.int64], labels: NDArray[np.int64]) -> Feed:
        """Images that Pillow decodes, at the model's size; the rows that DALI decodes hold a single black pixel."""
        by_pillow = np.array([i in self.by_pillow for i in indices.clip(0).tolist()], bool)
        pixels = [np.zeros((1, 1, 3), np.uint8)] * len(indices)
        rows = np.flatnonzero(by_pillow)

        def read(row: int) -> Any:
            return read_or_replace(split, max(0, int(indices[row])), self._spec.image_size, self._shard.training)

        for row, reading in zip(rows, self._threads.map(read, rows), strict=True):
            pixels[row] = np.ascontiguousarray(reading.pixels)
            if indices[row] >= 0:
                labels[row] = reading.label
            self._skipped.report([reading.error])
        return {"by_pillow": by_pillow, "pixels": pixels}


def encoded_path(path: Path) -> NDArray[np.uint8]:
    return np.frombuffer(os.fsencode(path), np.uint8)


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
    gpu, size = spec.device.type == "cuda", spec.image_size
    names = source.names
    layouts = ["HWC" if name in ("images", "pixels") else "" for name in names]
    outputs = fn.external_source(source, num_outputs=len(names), batch=True, layout=layouts)
    inputs = dict(zip(names, outputs))  # noqa: B905 (DALI's conversion of conditionals knows no `strict`)
    if "by_pillow" in inputs:
        if inputs["by_pillow"]:  # noqa: SIM108 (DALI converts if statements only)
            images = _placed(inputs["pixels"], gpu)
        else:
            images = _decode(inputs, gpu, size)
    elif "paths" in inputs:
        images = _decode(inputs, gpu, size)
    else:
        images = _placed(inputs["images"], gpu)
        if source.resizes:
            images = fn.resize(images, size=(size, size), antialias=True)
    images = _geometry(images, inputs, size)
    images = _colour(images, inputs)
    return _normalise(images, inputs, spec), _placed(inputs["labels"], gpu)


def _placed(node: Any, gpu: bool) -> Any:
    return node.gpu() if gpu else node


def decoded(paths: Any, gpu: bool) -> tuple[Any, Any]:
    """Decode image files without turning them; return the pixels and the stored shapes."""
    encoded = fn.io.file.read(paths)
    shape = fn.peek_image_shape(encoded, adjust_orientation=False)
    device = "mixed" if gpu else "cpu"
    # On a GPU too, colours at half resolution are interpolated, as Pillow and DALI's CPU decoder do.
    options = {"output_type": types.RGB, "adjust_orientation": False, "jpeg_fancy_upsampling": True}
    return fn.decoders.image(encoded, device=device, **options), shape


def _decode(inputs: dict[str, Any], gpu: bool, size: int) -> Any:
    """The central square of each file, resized and upright, as in `decode.read_square`."""
    stored, shape = decoded(inputs["paths"], gpu)
    sides = fn.cast(fn.slice(shape, start=0, shape=2, axes=[0]), dtype=types.INT32)
    side = math.min(sides[0], sides[1])
    margins = sides - side
    if "mirrors" in inputs:
        margins = margins + inputs["mirrors"]
    images: Any = fn.slice(stored, start=margins // 2, shape=fn.stack(side, side), axes=(0, 1))
    images = fn.resize(images, size=(size, size), antialias=True)
    if "turn" in inputs:
        images = fn.warp_affine(images, matrix=inputs["turn"], size=(size, size), interp_type=types.INTERP_NN)
    return images


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


def _colour(images: Any, inputs: dict[str, Any]) -> Any:
    if "brightness" in inputs:
        factors = {name: inputs[name] for name in ("brightness", "contrast", "saturation")}
        images = fn.color_twist(images, **factors)
    return images


def _normalise(images: Any, inputs: dict[str, Any], spec: LoaderSpec) -> Any:
    is_uint8, erases = spec.dtype == torch.uint8, "anchor" in inputs
    mean, std = [255 * value for value in spec.mean], [255 * value for value in spec.std]
    # On a GPU, erase takes no float16.
    is_cast = erases and spec.dtype == torch.float16
    images = fn.crop_mirror_normalize(
        images,
        mirror=inputs.get("mirror", 0),
        mean=[0.0] if is_uint8 else mean,
        std=[1.0] if is_uint8 else std,
        dtype=_DTYPES[torch.float32 if is_cast else spec.dtype],
        output_layout="HWC",
    )
    if erases:
        fill = [float(round(value)) for value in mean] if is_uint8 else 0.0
        images = fn.erase(images, anchor=inputs["anchor"], shape=inputs["shape"], axis_names="HW", fill_value=fill)
    return fn.cast(images, dtype=_DTYPES[spec.dtype]) if is_cast else images


class _HeldBatches:
    """Keeps CUDA batches alive until the work that the consumer has queued on them is done.

    DALI reuses a batch's memory as soon as the last reference is gone, even if that work is still pending. A consumer
    may use a batch while it requests the next one, so the event that marks the end of a batch's use is recorded two
    requests later.
    """

    _LAG = 2
    _MOST = 8  # batches that the host may run ahead of the device, which bounds the memory

    def __init__(self) -> None:
        self._in_use: deque[tuple[Tensor, ...]] = deque()
        self._ending: deque[tuple[torch.cuda.Event, tuple[Tensor, ...]]] = deque()

    def add(self, batch: tuple[Tensor, ...]) -> None:
        self._in_use.append(batch)
        if len(self._in_use) > self._LAG:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(batch[0].device))
            self._ending.append((event, self._in_use.popleft()))
        if len(self._ending) > self._MOST:
            self._ending[0][0].synchronize()
        while self._ending and self._ending[0][0].query():
            self._ending.popleft()


class DaliLoader(Loader):
    """Loads from arrays and from files; see `Loader`."""

    def __init__(self, split: Split, spec: LoaderSpec) -> None:
        super().__init__(split, spec)
        self._augmentation: Augmentation | None = None
        self._graph_spec = spec
        if spec.augment is not None and spec.augment.auto_augment != "none":
            self._augmentation = Augmentation(spec)
            self._graph_spec = dataclasses.replace(spec, augment=None, dtype=torch.uint8)
        self._source = Source(split, self.shard, self._graph_spec)
        self._pipeline: Pipeline | None = None
        self._held = _HeldBatches()

    def epoch(self, epoch: int, start: int = 0, end: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(start, self.steps if end is None else end):
            if step == start:
                self._seek((epoch, start))
            images, labels = self._next()
            yield self._finish(images, epoch, step), labels

    def close(self) -> None:
        self._pipeline = None
        self._source.scheduled.clear()

    def _finish(self, images: Tensor, epoch: int, step: int) -> Tensor:
        if self._augmentation is None:
            return images.permute(0, 3, 1, 2)
        parameters = self._augmentation.parameters(epoch, self.shard.indices(epoch)[step])
        index = torch.arange(len(images), device=images.device)
        return self._augmentation(self._augmentation.canvas(images), index, parameters)

    def _seek(self, position: Position) -> None:
        """Make the batch at `position` the next one; usually it is already first in the queue."""
        if self._pipeline is None:
            self._open(position)
        elif self._source.scheduled and self._source.scheduled[0] != position:
            self._source.next = position
            try:
                while self._source.scheduled[0] != position:
                    self._pipeline.run()
                    self._source.scheduled.popleft()
            except (RuntimeError, ValueError):  # a file of a batch that nobody asked for cannot be decoded
                self.close()
                self._open(position)

    def _open(self, position: Position) -> None:
        self._source.next = position
        self._pipeline = self._build(graph, self._source, self._graph_spec, batch_size=self.spec.batch_size)

    def _build(self, definition: Any, *args: Any, batch_size: int) -> Pipeline:
        device = self.spec.device
        pipeline = pipeline_def(enable_conditionals=True)(definition)(
            *args,
            batch_size=batch_size,
            num_threads=max(1, self.spec.num_workers),
            # None, not -1, keeps a CPU pipeline from touching CUDA.
            device_id=(device.index or 0) if device.type == "cuda" else None,
            prefetch_queue_depth=_PREFETCHED,
        )
        pipeline.build()
        return pipeline

    def _next(self) -> tuple[Tensor, Tensor]:
        assert self._pipeline is not None
        try:
            images, labels = self._pipeline.run()
        except ValueError:  # from the source
            self.close()
            raise
        except RuntimeError as error:
            self._recover(error)
            return self._next()
        self._source.scheduled.popleft()
        batch = torch.from_dlpack(images.as_tensor()), torch.from_dlpack(labels.as_tensor())
        if self.spec.device.type == "cuda":
            self._held.add(batch)
        return batch

    # -- files that DALI cannot decode

    def _recover(self, error: RuntimeError) -> None:
        """Leave the files that DALI cannot decode to Pillow, and start the pipeline again at the batch that failed.

        Raises:
            ValueError: DALI can decode each file, so that the error has another cause.
        """
        position, files = self._source.scheduled[0], self._source.scheduled_files()
        self.close()
        refused = self._refused(files)
        if not refused:
            if not files:
                raise error
            raise ValueError(f"DALI failed: {_first_line(error)}") from error
        for index in refused:
            print(f"warning: DALI cannot decode {printable(self._source.path(index))}; trying Pillow", file=sys.stderr)
        self._source.by_pillow |= set(refused)
        self._open(position)

    def _refused(self, files: Sequence[int]) -> list[int]:
        """Files that DALI cannot decode, by bisection: its errors do not say which file of a batch failed."""
        if not files or self._can_decode(files):
            return []
        if len(files) == 1:
            return list(files)
        half = len(files) // 2
        return self._refused(files[:half]) + self._refused(files[half:])

    def _can_decode(self, files: Sequence[int]) -> bool:
        paths = [encoded_path(self._source.path(index)) for index in files]
        gpu = self.spec.device.type == "cuda"

        def attempt() -> Any:
            return decoded(fn.external_source(lambda: paths, batch=True), gpu)

        try:
            self._build(attempt, batch_size=len(files)).run()
        except RuntimeError:
            return False
        return True


def _first_line(error: RuntimeError) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
