"""DALI in particular: memory, the running pipeline, files that DALI refuses, the graph for a GPU."""

from __future__ import annotations

import dataclasses
import resource
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from effnet_fast.data.augment_params import Augment
from effnet_fast.data.dataset import ArraySplit
from marks import on_gpu
from plain_spec import PLAIN

dali = pytest.importorskip("nvidia.dali")

from nvidia.dali import fn, types  # noqa: E402 (needs DALI)

from effnet_fast.data.dali import DaliLoader, graph  # noqa: E402

N, STEPS = 48, 6
PIXELS = np.random.default_rng(4).integers(0, 256, (N, 32, 32, 3), dtype=np.uint8)
SPLIT = ArraySplit(PIXELS, np.arange(N))
SPEC = dataclasses.replace(
    PLAIN, mean=(0.51, 0.49, 0.44), std=(0.26, 0.25, 0.27), seed=5, num_workers=2, augment=Augment()
)


def test_a_kept_batch_is_not_overwritten() -> None:
    """Batches share DALI's memory, which DALI must not reuse while they are referenced."""
    loader = DaliLoader(SPLIT, SPEC)
    kept, copies = [], []
    for epoch in range(3):
        for images, labels in loader.epoch(epoch):
            kept.append((images, labels))
            copies.append((images.clone(), labels.clone()))
    assert len(kept) == 18
    loader.close()
    for (images, labels), (image_copy, label_copy) in zip(kept, copies, strict=True):
        assert torch.equal(images, image_copy)
        assert torch.equal(labels, label_copy)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def test_released_memory_is_reused() -> None:
    loader = DaliLoader(SPLIT, SPEC)
    list(loader.epoch(0))
    before, delivered = resident_bytes(), 0
    for epoch in range(1, 101):
        for images, _ in loader.epoch(epoch):
            delivered += images.nbytes
    assert resident_bytes() - before < delivered / 4  # of 59 MB


def test_the_pipeline_continues_across_epochs() -> None:
    loader = DaliLoader(SPLIT, SPEC)
    fresh = [DaliLoader(SPLIT, SPEC) for _ in range(3)]
    list(loader.epoch(0))
    pipeline = loader._pipeline
    for epoch, other in enumerate(fresh):
        start = 2 if epoch == 2 else 0  # not the batch that was prefetched
        for (images, labels), (expected, marks) in zip(
            loader.epoch(epoch, start), other.epoch(epoch, start), strict=True
        ):
            assert torch.equal(labels, marks)
            assert torch.equal(images, expected)
    assert loader._pipeline is pipeline


def test_leaving_an_epoch_early() -> None:
    loader = DaliLoader(SPLIT, SPEC)
    next(loader.epoch(0))
    images, labels = next(loader.epoch(3, 4))
    expected, marks = next(DaliLoader(SPLIT, SPEC).epoch(3, 4))
    assert torch.equal(labels, marks)
    assert torch.equal(images, expected)


def test_building_gives_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for augment in (None, Augment(), Augment(rotation=15, random_erasing=0.5), Augment(auto_augment="rand")):
            next(DaliLoader(SPLIT, dataclasses.replace(SPEC, augment=augment)).epoch(0))


@pytest.mark.parametrize("augment", [None, Augment(), Augment(rotation=15, color_jitter=0.3, random_erasing=0.5)])
@pytest.mark.parametrize("size", [32, 40])
def test_the_gpu_graph_delivers_on_the_gpu(augment: Augment | None, size: int) -> None:
    """Only defines the graph; building it needs a GPU."""
    spec = dataclasses.replace(SPEC, augment=augment, image_size=size, device=torch.device("cuda", 0))
    loader = DaliLoader(SPLIT, spec)
    with dali.Pipeline(batch_size=8, num_threads=1, device_id=0):
        outputs = graph(loader._source, spec)
    assert [node.device for node in outputs] == ["gpu", "gpu"]


@pytest.mark.parametrize(("erases", "expected"), [(0.5, types.FLOAT), (0.0, types.FLOAT16)])
def test_erasing_gets_no_float16(monkeypatch: pytest.MonkeyPatch, erases: float, expected: types.DALIDataType) -> None:
    """DALI's operator takes none on a GPU."""
    spec = dataclasses.replace(SPEC, augment=Augment(random_erasing=erases), dtype=torch.float16)
    loader, asked, normalise = DaliLoader(SPLIT, spec), [], fn.crop_mirror_normalize

    def record(*inputs, **options):
        asked.append(options["dtype"])
        return normalise(*inputs, **options)

    monkeypatch.setattr(fn, "crop_mirror_normalize", record)
    with dali.Pipeline(batch_size=8, num_threads=1, device_id=0):
        graph(loader._source, dataclasses.replace(spec, device=torch.device("cuda", 0)))
    assert asked == [expected]


@on_gpu
@pytest.mark.parametrize("augment", [None, Augment(), Augment(rotation=15, color_jitter=0.3, random_erasing=0.5)])
def test_gpu_batches_equal_cpu_batches(augment: Augment | None) -> None:
    spec = dataclasses.replace(SPEC, augment=augment)
    on_gpu = dataclasses.replace(spec, device=torch.device("cuda", 0))
    for (images, labels), (expected, marks) in zip(
        DaliLoader(SPLIT, on_gpu).epoch(0), DaliLoader(SPLIT, spec).epoch(0), strict=True
    ):
        assert images.is_cuda
        assert torch.equal(labels.cpu(), marks)
        error = (images.cpu() - expected).abs() * 255 * torch.tensor(spec.std).view(3, 1, 1)
        assert error.max() <= 3
        assert error.mean() < 0.01
