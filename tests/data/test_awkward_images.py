"""Awkward image files: the loaders, single images and Pillow must show the same picture."""

from __future__ import annotations

import dataclasses
import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from awkward_images import NOT_FOR_DALI, TURNED, UNCLEAR
from effnet_fast.data import examine
from effnet_fast.data.augment_params import Augment
from effnet_fast.data.choose_loader import choose_loader, make_loader
from effnet_fast.data.dataset import FileSplit, ImageFile
from effnet_fast.data.decode import load_image, read_image
from effnet_fast.data.examine import examine_file
from effnet_fast.data.folder import load_folder
from effnet_fast.data.image import preprocess
from effnet_fast.data.orientation import TURNS, read_orientation, turn_image, turn_pixels
from effnet_fast.data.resize import central_square, resize
from plain_spec import PLAIN

ALL = {**{name: content for name, (content, _) in TURNED.items()}, **UNCLEAR, **NOT_FOR_DALI}
SIZE = 24
SPEC = dataclasses.replace(
    PLAIN, batch_size=7, image_size=SIZE, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), dtype=torch.uint8
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("awkward")
    for name, content in ALL.items():
        (folder / name).write_bytes(content)
    return folder


def delivered(kind: str, split: FileSplit) -> np.ndarray:
    """All images of a split by a loader, [N, S, S, 3]."""
    loader = make_loader(kind, split, SPEC)  # type: ignore[arg-type]
    images = torch.cat([images for images, _ in loader.epoch(0)])[: len(split)]
    loader.close()
    return images.permute(0, 2, 3, 1).numpy().astype(int)


@pytest.mark.parametrize("name", TURNED)
def test_orientation(folder: Path, name: str) -> None:
    turned = TURNED[name][1]
    assert load_image(folder / name).size == ((48, 64) if turned else (64, 48))
    assert examine_file(folder / name).orientation == (6 if turned else 1)


@pytest.mark.parametrize("name", ALL)
def test_orientation_is_pillows(folder: Path, name: str) -> None:
    with warnings.catch_warnings(), Image.open(folder / name) as image:
        warnings.simplefilter("ignore")
        try:
            expected = ImageOps.exif_transpose(image).size
        except Exception:  # Pillow fails to rewrite odd metadata
            pytest.skip("Pillow cannot turn it")
    assert load_image(folder / name).size == expected


@pytest.mark.parametrize("orientation", TURNS)
def test_turns_are_pillows(orientation: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8)
    content, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(content, "PNG", exif=exif)
    image = Image.open(content)
    upright = np.asarray(ImageOps.exif_transpose(image))
    assert read_orientation(image) == orientation
    assert np.array_equal(turn_pixels(pixels, orientation), upright)
    assert np.array_equal(np.asarray(turn_image(image, orientation)), upright)


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize(("width", "height"), [(41, 30), (30, 41), (33, 33)])
def test_the_square_of_a_turned_image(tmp_path: Path, orientation: int, width: int, height: int) -> None:
    """Cropping and resizing before turning gives the same pixels as after it, also for odd margins."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png", exif=exif)
    upright = turn_pixels(pixels, orientation)
    left, top, side = central_square(upright.shape[1], upright.shape[0])
    expected = resize(upright[None, top : top + side, left : left + side], SIZE)[0]
    assert np.array_equal(read_image(tmp_path / "image.png", SIZE), expected)


def test_all_readers_agree(folder: Path) -> None:
    split = FileSplit(tuple(examine_file(folder / name).file(folder / name) for name in ALL), np.zeros(len(ALL), int))
    torch_images = delivered("torch", split)
    for name, image in zip(ALL, torch_images, strict=True):
        single = preprocess(folder / name, SIZE, (0, 0, 0), (1 / 255,) * 3).permute(1, 2, 0)
        assert np.array_equal(single.round().numpy(), image), name
        opened = preprocess(load_image(folder / name), SIZE, (0, 0, 0), (1 / 255,) * 3).permute(1, 2, 0)
        assert np.array_equal(opened.round().numpy(), image), name
    pytest.importorskip("nvidia.dali")
    errors = np.abs(delivered("dali", split) - torch_images).max((1, 2, 3))
    assert errors.max() <= 1, dict(zip(ALL, errors, strict=True))


@pytest.mark.parametrize("name", NOT_FOR_DALI)
def test_pillow_decodes_what_dali_would_not(folder: Path, name: str) -> None:
    examined = examine_file(folder / name)
    assert not examined.error
    assert not examined.plain


def test_pillow_decodes_large_jpegs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a part of their size, as no other decoder would."""
    assert examine_file(folder / "plain.jpg").plain
    monkeypatch.setattr(examine, "DRAFT_PIXELS", 100)
    assert not examine_file(folder / "plain.jpg").plain


@pytest.mark.parametrize("name", sorted(TURNED.keys() | UNCLEAR.keys() - {"exif.webp"}))
def test_odd_metadata_does_not_keep_dali_from_decoding(folder: Path, name: str) -> None:
    assert examine_file(folder / name).plain == (not name.endswith(".webp"))


def test_auto_takes_torch_if_pillow_decodes_most_images(folder: Path) -> None:
    pytest.importorskip("nvidia.dali")
    odd, plain = ImageFile(folder / "picture.gif", plain=False), ImageFile(folder / "exif.jpg")
    labels = np.zeros(3, int)
    assert choose_loader("auto", FileSplit((odd, plain, plain), labels), SPEC.device)[0] == "dali"
    kind, reason = choose_loader("auto", FileSplit((odd, odd, plain), labels), SPEC.device)
    assert (kind, reason) == ("torch", "Pillow has to decode 2 of 3 images")


# Files that become unreadable after their examination


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of 8 training and 3 test images."""
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 3)):
        for name in ("ant", "bee"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (30, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("kind", ["torch", "dali"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_file_that_fails_later_is_skipped(images: Path, kind: str, damage: str, capfd) -> None:
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
    dataset = load_folder(images)
    lost = [images / "train" / "ant" / "7.png", images / "test" / "bee" / "1.png"]
    for path in lost:
        path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:200])
    train = dataclasses.replace(SPEC, batch_size=4, augment=Augment(crop=False, flip=False))
    loader = make_loader(kind, dataset.train, train)  # type: ignore[arg-type]
    seen = [(images, labels) for epoch in (0, 1) for images, labels in loader.epoch(epoch)]
    # The next image, the first bee, replaces the lost ant.
    labels = torch.cat([labels for _, labels in seen]).tolist()
    assert [labels.count(0), labels.count(1)] == [14, 18]
    replacement = read_image(images / "train" / "bee" / "0.png", SIZE).astype(int)
    pixels = torch.cat([images for images, _ in seen]).permute(0, 2, 3, 1).numpy()
    assert (np.abs(pixels - replacement).max((1, 2, 3)) <= 1).sum() == 4  # twice in each epoch
    loader.close()

    loader = make_loader(kind, dataset.test, dataclasses.replace(SPEC, batch_size=3))  # type: ignore[arg-type]
    assert torch.cat([labels for _, labels in loader.epoch(0)]).tolist() == [0, 0, 0, 1, -1, 1]
    loader.close()
    messages = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: skipped: ")]
    assert len(messages) == 2
    for path, line in zip(lost, messages, strict=True):
        assert str(path) in line
        assert line.endswith("(1 so far)")


def test_a_file_that_fails_in_a_batch_that_nobody_asked_for(images: Path) -> None:
    """DALI has prefetched it when the loader starts at another batch."""
    pytest.importorskip("nvidia.dali")
    dataset = load_folder(images)
    (images / "test" / "bee" / "0.png").write_bytes(b"no image")  # in batch 3
    loader = make_loader("dali", dataset.test, dataclasses.replace(SPEC, batch_size=1))
    for _ in range(2):
        assert torch.cat([labels for _, labels in loader.epoch(0, end=3)]).tolist() == [0, 0, 0]
    loader.close()


@pytest.mark.parametrize("kind", ["torch", "dali"])
def test_a_file_that_fails_later_ends_the_run_if_asked(images: Path, kind: str) -> None:
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
    dataset = load_folder(images, on_bad_image="fail")
    (images / "test" / "bee" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"bee/1\.png") as caught:
        list(make_loader(kind, dataset.test, SPEC).epoch(0))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["torch", "dali"])
def test_a_lost_folder_is_an_error(images: Path, kind: str) -> None:
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
    dataset = load_folder(images)
    (images / "test").rename(images / "elsewhere")
    with pytest.raises(ValueError, match="is the folder still there"):
        list(make_loader(kind, dataset.test, SPEC).epoch(0))  # type: ignore[arg-type]


def test_files_that_dali_refuses_are_left_to_pillow(folder: Path, capfd) -> None:
    """As when a GPU's decoder refuses a file that passed the examination."""
    pytest.importorskip("nvidia.dali")
    names = ["exif.jpg", "without-end.png", "stray-byte.jpg", "long.jpg", "exif-chunk.png", "picture.gif", "plain.jpg"]
    files = tuple(examine_file(folder / name).file(folder / name) for name in names)
    expected = delivered("torch", FileSplit(files, np.arange(7)))
    believed = FileSplit(tuple(file._replace(plain=True) for file in files), np.arange(7))
    assert np.abs(delivered("dali", believed) - expected).max() <= 1
    warned = [line for line in capfd.readouterr().err.splitlines() if "DALI cannot decode" in line]
    assert len(warned) == 3
    assert all(any(name in line for line in warned) for name in ("without-end.png", "stray-byte.jpg", "picture.gif"))
