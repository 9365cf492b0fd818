"""The contract of all loaders: which images, in which order, on how many ranks, in which layout."""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from effnet_fast.data.augment import Augmentation
from effnet_fast.data.augment_params import Augment, draw_params
from effnet_fast.data.choose_loader import SPEEDS, choose_loader, make_loader
from effnet_fast.data.dataset import ArraySplit, FileSplit, ImageFile, Split
from effnet_fast.data.decode import read_image
from effnet_fast.data.examine import examine_file
from effnet_fast.data.loader import Loader, LoaderSpec
from effnet_fast.data.rng import order
from plain_spec import PLAIN

KINDS = ["resident", "torch", "dali"]
N, SEED = 50, 7
CPU = torch.device("cpu")
MEAN, STD = (0.51, 0.49, 0.44), (0.26, 0.25, 0.27)
PIXELS = np.random.default_rng(1).integers(0, 256, (N, 32, 32, 3), dtype=np.uint8)
SPLIT = ArraySplit(PIXELS, np.arange(N))  # labels are indices, so they identify the images of a batch
SPEC = dataclasses.replace(PLAIN, mean=MEAN, std=STD, seed=SEED, augment=Augment())
EVAL = dataclasses.replace(SPEC, augment=None)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(kind: str, spec: LoaderSpec, split: Split = SPLIT) -> Loader:
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
        spec = dataclasses.replace(spec, num_workers=max(1, spec.num_workers))
    return make_loader(kind, split, spec)


def batches(kind: str, spec: LoaderSpec, epoch: int = 0, start: int = 0) -> list[tuple[Tensor, Tensor]]:
    return list(make(kind, spec).epoch(epoch, start))


def labels(*args: object, **kwargs: object) -> list[list[int]]:
    return [batch[1].tolist() for batch in batches(*args, **kwargs)]


def normalised(pixels: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, 3] -> [N, 3, H, W], in float64."""
    return ((pixels / 255 - MEAN) / STD).transpose(0, 3, 1, 2)


# ------------------------------------------------------------------------------------------------ which images


@pytest.mark.parametrize("kind", KINDS)
def test_training_follows_the_order_and_drops_the_incomplete_batch(kind: str) -> None:
    loader = make(kind, SPEC)
    assert (loader.steps, loader.dropped) == (6, 2)
    for epoch in (0, 1, 5):
        seen = [batch[1].tolist() for batch in loader.epoch(epoch)]
        assert seen == order(SEED, epoch, N)[:48].reshape(6, 8).tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_batches_of_one_process(kind: str, world: int) -> None:
    alone = labels(kind, dataclasses.replace(SPEC, batch_size=8), epoch=3)
    shared = [
        labels(kind, dataclasses.replace(SPEC, batch_size=8 // world, world=world, rank=rank), epoch=3)
        for rank in range(world)
    ]
    assert [list(chain(*pieces)) for pieces in zip(*shared, strict=True)] == alone


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_every_image_once(kind: str, world: int) -> None:
    ranks = [labels(kind, dataclasses.replace(EVAL, world=world, rank=rank)) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    assert all(len(batch) == 8 for rank in ranks for batch in rank)
    seen = [label for rank in ranks for batch in rank for label in batch]
    assert sorted(label for label in seen if label >= 0) == list(range(N))
    assert set(seen) - set(range(N)) == {-1}


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_in_order_and_not_augmented(kind: str) -> None:
    images = torch.cat([images[labels >= 0] for images, labels in batches(kind, EVAL)])
    np.testing.assert_allclose(images.numpy(), normalised(PIXELS), atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [1, 4, 6])
def test_start_equals_skipping(kind: str, start: int) -> None:
    whole, rest = batches(kind, SPEC, epoch=2), batches(kind, SPEC, epoch=2, start=start)
    assert len(rest) == 6 - start
    for (image, label), (other_image, other_label) in zip(whole[start:], rest, strict=True):
        assert torch.equal(label, other_label)
        assert torch.equal(image, other_image)


@pytest.mark.parametrize("kind", KINDS)
def test_end_leaves_out_the_rest(kind: str) -> None:
    loader = make(kind, SPEC)
    whole, part = batches(kind, SPEC, epoch=2), list(loader.epoch(2, 1, end=4))
    again = list(loader.epoch(2))  # the next epoch is complete
    loader.close()
    for some, expected in ((part, whole[1:4]), (again, whole)):
        for (image, label), (other_image, other_label) in zip(expected, some, strict=True):
            assert torch.equal(label, other_label)
            assert torch.equal(image, other_image)


def test_too_few_images() -> None:
    with pytest.raises(ValueError, match=r"^--batch_size 64 is larger than the 50 training images") as caught:
        make("resident", dataclasses.replace(SPEC, batch_size=16, world=4))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no images"):
        make("resident", EVAL, SPLIT.take(np.empty(0, np.int64)))


# ------------------------------------------------------------------------------------------- how they are processed


def cropped_and_flipped(epoch: int, indices: np.ndarray) -> np.ndarray:
    """The default augmentation, one image at a time."""
    draws = draw_params(Augment(), SEED, epoch, indices, 32)
    out = np.empty((len(indices), 32, 32, 3), np.uint8)
    for i, index in enumerate(indices):
        padded = np.pad(PIXELS[index], ((4, 4), (4, 4), (0, 0)))
        crop = padded[draws.crop_y[i] : draws.crop_y[i] + 32, draws.crop_x[i] : draws.crop_x[i] + 32]
        out[i] = crop[:, ::-1] if draws.flip[i] else crop
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-6), (torch.float16, 2e-3), (torch.uint8, 0)])
def test_crop_and_flip_are_exact(kind: str, dtype: torch.dtype, atol: float) -> None:
    images, label = batches(kind, dataclasses.replace(SPEC, dtype=dtype), epoch=4)[2]
    pixels = cropped_and_flipped(4, label.numpy())
    expected = pixels.transpose(0, 3, 1, 2) if dtype == torch.uint8 else normalised(pixels)
    np.testing.assert_allclose(images.numpy(), expected, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("augment", [None, Augment(), Augment(rotation=15, color_jitter=0.3, random_erasing=0.5)])
def test_batches_are_channels_last(kind: str, augment: Augment | None) -> None:
    for dtype in (torch.float32, torch.float16, torch.uint8):
        spec = dataclasses.replace(SPEC, augment=augment, dtype=dtype, image_size=36)
        images, label = next(make(kind, spec).epoch(0))
        assert images.shape == (8, 3, 36, 36)
        assert images.stride() == (3 * 36 * 36, 1, 3 * 36, 3)
        assert (images.dtype, label.dtype) == (dtype, torch.int64)


@pytest.mark.parametrize("augment", [None, Augment(), Augment(rotation=15, color_jitter=0.3, random_erasing=0.5)])
def test_torch_does_not_depend_on_its_workers(augment: Augment | None) -> None:
    spec = dataclasses.replace(SPEC, augment=augment)
    loaders = [make("torch", dataclasses.replace(spec, num_workers=workers)) for workers in (0, 1, 2)]
    for epoch in (0, 1):  # the second time with the same workers
        runs = [list(loader.epoch(epoch)) for loader in loaders]
        for (images, label), *others in zip(*runs, strict=True):
            assert all(torch.equal(images, other) and torch.equal(label, marks) for other, marks in others)


class _Kernels(TorchDispatchMode):
    """Records the operators that run, except views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("augment", "most"),
    [(None, 4), (Augment(), 6), (Augment(rotation=15, color_jitter=0.3, random_erasing=0.5), 24)],
)
def test_a_resident_batch_is_a_few_kernels_without_synchronisation(augment: Augment | None, most: int) -> None:
    loader = make("resident", dataclasses.replace(SPEC, augment=augment)).epoch(0)
    next(loader)  # parameters of the epoch are uploaded with its first batch
    with _Kernels() as kernels:
        next(loader)
    waits = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero"}
    assert not waits & set(kernels.names)
    assert len(kernels.names) <= most, kernels.names


def test_the_resident_loader_draws_the_next_epoch_during_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU would wait 70 ms for the draws of 50,000 images at the start of each epoch."""
    drawn = []
    draw = Augmentation.draw

    def noted(self, epoch, indices):
        if self is loader._augmentation:  # other tests' threads may still draw
            drawn.append((epoch, threading.current_thread() is threading.main_thread()))
        return draw(self, epoch, indices)

    monkeypatch.setattr(Augmentation, "draw", noted)
    loader = make("resident", SPEC)
    next(loader.epoch(0))
    loader._plans[1].result(timeout=60)
    assert drawn == [(0, False), (1, False)]
    seen = [batch[1].tolist() for batch in loader.epoch(1, 2)]  # and a start within the epoch takes it too
    assert seen == order(SEED, 1, N)[:48].reshape(6, 8)[2:].tolist()
    next(loader.epoch(1))
    loader.close()
    assert [epoch for epoch, _ in drawn] in ([0, 1], [0, 1, 2])  # the thread may not have come to the third


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("augment", [None, Augment()])
def test_read_only_arrays(kind: str, augment: Augment | None, recwarn: pytest.WarningsRecorder) -> None:
    frozen = PIXELS.copy()
    frozen.flags.writeable = False
    next(make(kind, dataclasses.replace(SPEC, augment=augment), ArraySplit(frozen, np.arange(N))).epoch(0))
    assert not [warning for warning in recwarn if "writable" in str(warning.message)]


# ---------------------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> FileSplit:
    """PNG and JPEG files: some not square, grey, transparent, or turned by their Exif orientation."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(2)
    paths = []
    for i, (height, width) in enumerate([(40, 40), (40, 61), (57, 40), (48, 31), (36, 36), (90, 120), (33, 50)]):
        smooth = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(smooth).resize((width, height), Image.Resampling.BICUBIC)
        name = f"{i}ä.jpg" if i % 2 else f"{i}ä.png"
        image = image.convert("L") if i == 2 else image.convert("RGBA") if i == 4 else image
        exif = Image.Exif()
        exif[0x0112] = 6 if i == 3 else 1  # orientation: turn by a quarter
        image.save(folder / name, exif=exif) if i % 2 else image.save(folder / name)
        paths.append(folder / name)
    return FileSplit(tuple(examine_file(path).file(path) for path in paths), np.arange(len(paths)))


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("size", [32, 48])
def test_files_are_decoded_cropped_and_resized(kind: str, size: int, files: FileSplit) -> None:
    spec = dataclasses.replace(EVAL, batch_size=4, image_size=size, dtype=torch.uint8)
    out = list(make(kind, spec, files).epoch(0))
    assert torch.cat([label for _, label in out]).tolist() == [*range(7), -1]
    for i, image in enumerate(torch.cat([images for images, _ in out])[:7]):
        expected = read_image(files.paths[i], size).transpose(2, 0, 1).astype(int)
        assert np.abs(image.numpy() - expected).max() <= 1, files.paths[i]


@pytest.mark.parametrize("kind", KINDS[1:])
def test_files_are_augmented_alike(kind: str, files: FileSplit) -> None:
    spec = dataclasses.replace(SPEC, batch_size=3, dtype=torch.uint8)
    decoded = np.stack([read_image(path, 32) for path in files.paths])
    expected = list(make("resident", spec, ArraySplit(decoded, files.labels)).epoch(1))
    for (images, label), (other, marks) in zip(make(kind, spec, files).epoch(1), expected, strict=True):
        assert torch.equal(label, marks)
        assert (images.int() - other.int()).abs().max() <= 1


@pytest.mark.parametrize(("kind", "workers"), [("torch", 0), ("torch", 1), ("dali", 1)])
@pytest.mark.parametrize("damage", ["text", "truncated", "missing"])
def test_an_unreadable_file_is_named(kind: str, workers: int, damage: str, files: FileSplit, tmp_path: Path) -> None:
    bad = tmp_path / "bad one.png"
    if damage != "missing":
        bad.write_bytes(b"no image" if damage == "text" else files.paths[0].read_bytes()[:-300])
    split = FileSplit((*files.files[:2], ImageFile(bad), *files.files[3:]), files.labels)
    spec = dataclasses.replace(EVAL, batch_size=2, num_workers=workers)
    with pytest.raises(ValueError, match=r"bad one\.png") as caught:
        list(make(kind, spec, split).epoch(0))
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------- choosing the loader


@pytest.fixture
def speeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty record of speeds, for the test to write."""
    path = tmp_path / "speeds.json"
    path.write_text("{}")
    monkeypatch.setattr("effnet_fast.data.choose_loader.SPEEDS", path)
    return path


def test_auto_takes_dali_where_nothing_is_recorded(speeds: Path, files: FileSplit) -> None:
    dali = pytest.importorskip("nvidia.dali")
    said = f"DALI {dali.__version__} is installed"
    assert choose_loader("auto", SPLIT, CPU) == ("dali", f"{said}; no speeds are recorded for this device")
    assert choose_loader("auto", files, CPU) == ("dali", said)


RECORD = {"torch": 4000, "commit": "0123456789ab", "date": "2026-01-31"}


@pytest.mark.parametrize(("dali", "resident", "faster"), [(1000, 2000, "resident"), (30000, 2000, "dali")])
def test_auto_follows_the_record(speeds: Path, files: FileSplit, dali: int, resident: int, faster: str) -> None:
    pytest.importorskip("nvidia.dali")
    speeds.write_text(json.dumps({"cpu": {"dali": dali, "resident": resident, **RECORD}}))
    kind, reason = choose_loader("auto", SPLIT, CPU)
    assert kind == faster
    for words in (f"{dali:,} img/s" if faster == "dali" else f"dali {dali:,}", "on cpu", "2026-01-31, 0123456789ab"):
        assert words in reason
    assert choose_loader("auto", files, CPU)[0] == "dali"


def test_auto_needs_both_speeds(speeds: Path) -> None:
    pytest.importorskip("nvidia.dali")
    speeds.write_text(json.dumps({"cpu": {"resident": 9000, **RECORD}, "NVIDIA H100": {"dali": 1, "resident": 2}}))
    assert choose_loader("auto", SPLIT, CPU)[0] == "dali"


def test_records_state_their_origin() -> None:
    for device, entry in json.loads(SPEEDS.read_text()).items():
        assert {"dali", "resident", "commit", "date", "torch_version", "dali_version"} <= entry.keys(), device


def test_auto_without_dali(monkeypatch: pytest.MonkeyPatch, files: FileSplit) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert choose_loader("auto", SPLIT, CPU)[0] == "resident"
    assert choose_loader("auto", files, CPU)[0] == "torch"
    assert "pip install nvidia-dali-cuda120" in choose_loader("auto", SPLIT, CPU)[1]
    with pytest.raises(ValueError, match=r"^--loader dali needs NVIDIA DALI: pip install nvidia-dali-cuda120$"):
        choose_loader("dali", SPLIT, CPU)


def test_explicit_loaders(files: FileSplit) -> None:
    assert choose_loader("resident", SPLIT, CPU) == ("resident", "--loader resident")
    assert choose_loader("torch", files, CPU) == ("torch", "--loader torch")
    with pytest.raises(ValueError, match=r"^--loader resident needs images in memory"):
        choose_loader("resident", files, CPU)


def test_rotation_by_zero_equals_the_crop() -> None:
    """At angle zero, resampling gives the same pixels as the whole-pixel crop."""
    augmentation = Augmentation(dataclasses.replace(SPEC, augment=Augment(rotation=1e-30)))
    indices = np.arange(10)
    canvas = augmentation.canvas(torch.from_numpy(PIXELS))
    images = augmentation(canvas, torch.from_numpy(indices), augmentation.parameters(0, indices))
    np.testing.assert_allclose(images.numpy(), normalised(cropped_and_flipped(0, indices)), atol=2e-6)
