"""Folders of images: what is taken, what is left out, and the manifest."""

import io
import json
import os
import struct
import threading
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
from PIL import Image

from effnet_fast.data import examine, load_dataset
from effnet_fast.data.examine import MANIFEST, examine_file
from effnet_fast.data.folder import load_folder


def picture(seed=0, size=(12, 10), mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def save(path, **fields):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(**fields).save(path)
    return path


@pytest.fixture
def images(tmp_path):
    """Two classes with three training and two test images each, of 12 x 10 pixels."""
    for k, name in enumerate(("bee", "ant")):
        for i in range(3):
            save(tmp_path / "train" / name / f"{i}.png", seed=10 * k + i)
        for i in range(2):
            save(tmp_path / "test" / name / f"{i}.jpg", seed=10 * k + i + 5)
    return tmp_path


def test_a_folder_of_images(images):
    dataset = load_folder(images)
    assert dataset.name == images.name
    assert dataset.classes == ("ant", "bee")
    assert [path.relative_to(images / "train").as_posix() for path in dataset.train.paths] == [
        *(f"ant/{i}.png" for i in range(3)),
        *(f"bee/{i}.png" for i in range(3)),
    ]
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.test.labels.tolist() == [0, 0, 1, 1]
    assert dataset.native_size == 10
    assert dataset.val is None


def test_statistics_weight_training_images_equally(images):
    save(images / "train" / "ant" / "large.png", size=(40, 30), seed=77)
    dataset = load_folder(images)
    pixels = [np.array(Image.open(path)) / 255 for path in dataset.train.paths]
    mean = np.mean([p.mean((0, 1)) for p in pixels], axis=0)
    assert dataset.mean == pytest.approx(mean)
    assert dataset.std == pytest.approx(np.sqrt(np.mean([(p**2).mean((0, 1)) for p in pixels], axis=0) - mean**2))


def test_native_size_is_the_median_short_side_up_to_224(images):
    for i, size in enumerate([(300, 400), (500, 299), (700, 700), (900, 600), (800, 800), (330, 340), (999, 301)]):
        save(images / "train" / "ant" / f"large{i}.jpg", size=size)
    assert load_folder(images).native_size == 224


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK"])
def test_other_modes_are_converted_to_rgb(images, mode):
    ending = "jpg" if mode == "CMYK" else "png"
    path = save(images / "train" / "ant" / f"other.{ending}", mode=mode)
    dataset = load_folder(images, on_bad_image="fail")
    assert path in dataset.train.paths


def test_animated_png_counts_as_its_first_picture(images):
    path = images / "train" / "ant" / "moving.PNG"
    picture(1).save(path, save_all=True, append_images=[picture(2)])
    assert examine_file(path).mean == pytest.approx((np.array(picture(1)) / 255).mean((0, 1)))


def grey16(path):
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(path, "PNG")


def colour16(path):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\x80\x01" * 24) * 8)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


def test_16_bit_colour_is_reduced_to_8(images):
    path = images / "train" / "ant" / "deep.png"
    colour16(path)
    assert examine_file(path).mean == pytest.approx((128 / 255,) * 3)


def truncated(path):
    blob = io.BytesIO()
    picture(size=(64, 64)).save(blob, "JPEG")
    path.write_bytes(blob.getvalue()[: len(blob.getvalue()) // 2])


BAD = {
    "16-bit or float grey": grey16,
    "truncated": truncated,
    "the file is empty": lambda path: path.write_bytes(b""),
    "not an image": lambda path: path.write_text("no image"),
    "No such file": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("reason", BAD)
def test_unreadable_image(images, capsys, reason):
    good = load_folder(images)
    path = images / "train" / "ant" / "bad.JPEG"
    BAD[reason](path)
    dataset = load_folder(images)
    assert dataset.train.paths == good.train.paths
    assert dataset.fingerprint == good.fingerprint
    warnings = capsys.readouterr().err.splitlines()
    assert warnings[0].startswith(f"warning: skipped {path}: ")
    assert reason in warnings[0]
    assert warnings[1:] == ["warning: skipped 1 unreadable of 11 images"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "1")
        load_folder(images)
    assert capsys.readouterr().err == ""  # the first rank warns
    with pytest.raises(ValueError, match="is unreadable") as caught:
        load_dataset("folder", images, on_bad_image="fail")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hidden_files_are_ignored(images, capsys):
    good = load_folder(images)
    (images / "train" / "ant" / "._0.png").write_text("x")
    (images / "train" / "ant" / ".thumbnails").mkdir()
    (images / "train" / "ant" / ".thumbnails" / "0.png").write_text("x")
    (images / "train" / ".cache").mkdir()
    assert load_folder(images).train.paths == good.train.paths
    assert not capsys.readouterr().err


@pytest.mark.parametrize("ending", [".jpeg", ".JPG", ".jfif", ".PNG", ".webp", ".bmp", ".gif", ".tiff", ".TIF"])
def test_endings(images, capsys, ending):
    kind = {".jfif": "JPEG", ".JPG": "JPEG", ".TIF": "TIFF"}.get(ending, ending[1:].upper())
    path = images / "train" / "ant" / f"more{ending}"
    picture().save(path, kind)
    assert path in load_folder(images).train.paths
    assert not capsys.readouterr().err


def test_nested_and_linked_class_folders(images, tmp_path_factory):
    nested = save(images / "train" / "ant" / "day 2" / "camera" / "0.png", seed=50)
    elsewhere = save(tmp_path_factory.mktemp("elsewhere") / "deep" / "0.png", seed=51).parent
    (images / "train" / "bee" / "linked").symlink_to(elsewhere)
    dataset = load_folder(images)
    assert nested in dataset.train.paths
    assert images / "train" / "bee" / "linked" / "0.png" in dataset.train.paths
    assert len(dataset.train) == 8
    assert load_folder(images).fingerprint == dataset.fingerprint


def test_files_that_are_left_out_are_counted_and_named(images, capsys):
    good = load_folder(images)
    for name in ("ant/Thumbs.db", "ant/notes.txt", "bee/more/list.txt"):
        path = images / "train" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    save(images / "test" / "stray.png")
    assert load_folder(images).train.paths == good.train.paths
    assert sorted(capsys.readouterr().err.splitlines()) == [
        "warning: left out 1 file(s) in no class folder: test/stray.png",
        "warning: left out 3 file(s) that are not images (2 .txt, 1 .db): "
        "train/ant/Thumbs.db, train/ant/notes.txt, train/bee/more/list.txt",
    ]


def test_names_that_are_not_utf8_are_printable(images, capsys):
    name = os.fsdecode(b"caf\xe9.txt")
    (images / "train" / "ant" / name).write_text("x")
    save(images / "train" / "ant" / os.fsdecode(b"caf\xe9.png"))
    assert len(load_folder(images).train) == 7
    assert len(load_folder(images).train) == 7
    capsys.readouterr().err.encode()


@pytest.mark.parametrize("name", ["val", "valid"])
def test_train_valid_test(images, name):
    save(images / name / "bee" / "0.png", seed=99)
    dataset = load_folder(images)
    assert len(dataset.test) == 4
    assert dataset.val.labels.tolist() == [1]
    for path in (images / "test").rglob("*.jpg"):
        path.unlink()
    for folder in (images / "test" / "ant", images / "test" / "bee", images / "test"):
        folder.rmdir()
    dataset = load_folder(images)
    assert dataset.test.labels.tolist() == [1]
    assert dataset.val is None


def test_val_and_valid_are_refused(images):
    (images / "val").mkdir()
    (images / "valid").mkdir()
    with pytest.raises(ValueError, match="both val/ and valid/"):
        load_folder(images)


def test_val_without_test_is_the_test_split(images):
    (images / "test").rename(images / "val")
    dataset = load_folder(images)
    assert len(dataset.test) == 4
    assert dataset.test.paths[0].parent.parent.name == "val"
    assert dataset.val is None


def test_val_beside_test_is_the_validation_split(images):
    save(images / "val" / "bee" / "0.png", seed=99)
    dataset = load_folder(images)
    assert len(dataset.test) == 4
    assert dataset.val.labels.tolist() == [1]


def remove(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            path.unlink()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda d: (d / "train").rename(d / "other"), FileNotFoundError, "must contain train/ and test/"),
        (lambda d: (d / "test").rename(d / "other"), FileNotFoundError, "must contain train/ and test/"),
        (lambda d: save(d / "test" / "wasp" / "0.png"), ValueError, "wasp is a class without a folder"),
        (lambda d: (d / "train" / "wasp").mkdir(), ValueError, "wasp contains no readable image"),
        (lambda d: remove(d / "train" / "ant"), ValueError, "ant contains no readable image"),
        (lambda d: remove(d / "test"), ValueError, "test contains no readable image"),
        (lambda d: ((d / "train").rename(d / "t"), (d / "train").mkdir()), ValueError, "train contains no folder"),
    ],
)
def test_refused_folders(images, change, kind, message):
    change(images)
    with pytest.raises(kind, match=message) as caught:
        load_folder(images)
    assert "\n" not in str(caught.value)


# The manifest


@pytest.fixture
def examined(monkeypatch):
    """The files that were examined."""
    paths = []
    monkeypatch.setattr(examine, "examine_file", lambda path: paths.append(path) or examine_file(path))
    return paths


def test_the_second_start_examines_nothing(images, examined):
    first = load_folder(images)
    assert len(examined) == 10
    second = load_folder(images)
    assert len(examined) == 10
    assert (second.mean, second.std, second.native_size) == (first.mean, first.std, first.native_size)
    assert second.fingerprint == first.fingerprint


def test_a_changed_image_is_examined_again(images, examined):
    first = load_folder(images)
    path = images / "train" / "bee" / "1.png"
    stat = path.stat()
    save(path, seed=1234)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    second = load_folder(images)
    assert examined[10:] == [path]
    assert second.fingerprint != first.fingerprint
    assert second.mean != first.mean


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"version": 2}', '{"version": 2, "files": {"x": 3}}', '{"version": 1, "files": {}}']
)
def test_a_damaged_manifest_is_replaced(images, content):
    first = load_folder(images)
    (images / MANIFEST).write_text(content)
    assert load_folder(images).mean == first.mean
    assert len(json.loads((images / MANIFEST).read_text())["files"]) == 10


def test_a_read_only_folder_is_examined_each_time(images):
    (images / MANIFEST).mkdir()
    (images / MANIFEST / "in the way").touch()
    assert load_folder(images).mean == load_folder(images).mean
    assert {path.name for path in images.iterdir()} == {"train", "test", MANIFEST}


def test_an_interrupted_examination_goes_on(images, examined, monkeypatch):
    monkeypatch.setattr(examine, "_SAVE_SECONDS", -1.0)
    real = examine.examine_file

    def interrupted(path):
        if len(examined) == 6:
            raise KeyboardInterrupt
        return real(path)

    monkeypatch.setattr(examine, "examine_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_folder(images)
    monkeypatch.setattr(examine, "examine_file", real)
    dataset = load_folder(images)
    assert len(examined) == len(set(examined)) == 10
    (images / MANIFEST).unlink()
    assert load_folder(images).fingerprint == dataset.fingerprint


def test_ranks_that_start_together_examine_once(images, monkeypatch):
    monkeypatch.setattr(examine, "_FEW", 0)
    paths, missing = [], threading.Barrier(3)
    alone = examine._alone

    def examine_each(files):
        paths.extend(files)
        yield from map(examine_file, files)

    def alone_after_all_have_looked(data_dir):
        missing.wait(timeout=60)  # each rank has found that the manifest is missing
        return alone(data_dir)

    monkeypatch.setattr(examine, "_examine_files", examine_each)
    monkeypatch.setattr(examine, "_alone", alone_after_all_have_looked)
    with ThreadPoolExecutor(3) as pool:
        ranks = [pool.submit(load_folder, images) for _ in range(3)]
        assert len({rank.result().fingerprint for rank in ranks}) == 1
    assert len(paths) == 10


def test_unreadable_images_are_not_stored(images):
    path = images / "train" / "ant" / "bad.png"
    path.write_text("no image")
    load_folder(images)
    load_folder(images)
    assert len(json.loads((images / MANIFEST).read_text())["files"]) == 10


def test_examination_in_processes(images, monkeypatch, capsys):
    (images / "test" / "ant" / "bad.png").write_text("no image")
    serial = load_folder(images)
    (images / MANIFEST).unlink()
    monkeypatch.setattr(examine, "_FEW", 0)
    parallel = load_folder(images)
    assert "examining 11 images, once" in capsys.readouterr().err
    assert parallel.fingerprint == serial.fingerprint
    assert (parallel.mean, parallel.std) == (serial.mean, serial.std)


def test_examination_whose_process_dies_is_one_line(images, monkeypatch):
    def dead(pool, *arguments, **settings):
        raise BrokenProcessPool("A process in the process pool was terminated abruptly")

    monkeypatch.setattr(examine, "_FEW", 0)
    monkeypatch.setattr(ProcessPoolExecutor, "map", dead)
    with pytest.raises(ValueError, match='needs `if __name__ == "__main__":`') as error:
        load_folder(images)
    assert "\n" not in str(error.value)


def test_fingerprint_depends_on_content_and_labels(images, tmp_path_factory):
    first = load_folder(images)
    moved = images.rename(tmp_path_factory.mktemp("elsewhere") / "moved")
    for path in moved.rglob("*.png"):
        os.utime(path, (0, 0))
    assert load_folder(moved).fingerprint == first.fingerprint
    (moved / "train" / "ant" / "0.png").rename(moved / "train" / "bee" / "9.png")
    assert load_folder(moved).fingerprint != first.fingerprint
