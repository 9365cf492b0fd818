"""A folder of images, one folder per class: DATA_DIR/{train,test}/CLASS/*.{jpg,jpeg,png}.

Every image is decoded once before it is used, so that a broken one is known by name before a run starts. What was found
is kept in a manifest beside the images: the next start only lists the files and looks at their sizes and times.

JPEG and PNG are told by their content, and all of them become RGB: grey is repeated, CMYK and palettes are converted,
transparency is dropped, of an animated PNG the first picture counts, and colours of 16 bits are cut to 8. Grey of
16 bits counts as unreadable, since decoders disagree about it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import sys
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from effnet_fast.data.dataset import Dataset, FileSplit, channels, deviation

MANIFEST = ".effnet_fast-manifest.json"

_VERSION = 1  # of the manifest's rows
_EXTENSIONS = {".jpg", ".jpeg", ".png"}
_LARGEST_NATIVE_SIZE = 224
_FEW = 4000  # images that are examined sooner than further processes start


class _Found(NamedTuple):
    """One examined file, a row of the manifest."""

    size: int  # bytes
    mtime: int  # nanoseconds
    error: str = ""  # why it is unreadable
    digest: str = ""  # of the file's content
    short_side: int = 0  # pixels
    mean: tuple[float, ...] = ()  # of each channel, scaled to 0..1
    square: tuple[float, ...] = ()  # mean of the squares


def load_folder(data_dir: Path, on_bad_image: Literal["skip", "fail"] = "skip") -> Dataset:
    """A data set of files.

    Classes are the folders of train/, sorted by name. The test images are in test/ or, without one, in val/; with both,
    val/ becomes the validation split. Mean and standard deviation are over all training images, each of the same
    weight; native_size is the median of their shorter sides, 224 at most.

    Args:
        data_dir: holds train/ and test/ or val/.
        on_bad_image: `skip` names unreadable images on stderr and leaves them out; `fail` refuses the folder.

    Raises:
        FileNotFoundError: train/ is missing, or both test/ and val/.
        ValueError: no classes; a class without a training image; test classes that train/ has not; a bad image.
    """
    folders = _split_folders(data_dir)
    listings = {split: _listing(folder) for split, folder in folders.items()}
    classes = tuple(sorted(listings["train"]))
    for split, listing in listings.items():
        if unknown := sorted(set(listing) - set(classes)):
            raise ValueError(f"{folders[split] / unknown[0]} is a class that {folders['train']} has not: move it away")
    found = _examine(data_dir, [path for listing in listings.values() for paths in listing.values() for path in paths])
    _report(found, on_bad_image)
    splits = {split: _split(listing, classes, found) for split, listing in listings.items()}
    _check(splits, classes, folders)

    train = [found[path] for path in splits["train"].paths]
    mean, square = np.mean([f.mean for f in train], axis=0), np.mean([f.square for f in train], axis=0)
    digest = hashlib.sha256("\n".join(classes).encode())
    for images in splits.values():
        digest.update("".join(found[path].digest for path in images.paths).encode())
        digest.update(images.labels.tobytes())
    return Dataset(
        name=data_dir.resolve().name,
        classes=classes,
        mean=channels(mean),
        std=deviation(mean, square),
        native_size=min(_LARGEST_NATIVE_SIZE, int(np.median([f.short_side for f in train]))),
        fingerprint=digest.hexdigest(),
        **splits,
    )


def _split_folders(data_dir: Path) -> dict[str, Path]:
    train, test, val = (data_dir / name for name in ("train", "test", "val"))
    if not train.is_dir() or not (test.is_dir() or val.is_dir()):
        raise FileNotFoundError(f"{data_dir} must hold train/ and test/ (or val/), each with one folder per class")
    if not test.is_dir():
        return {"train": train, "test": val}
    return {"train": train, "test": test} | ({"val": val} if val.is_dir() else {})


def _listing(folder: Path) -> dict[str, list[Path]]:
    """Class -> its image files, sorted; hidden files and folders do not count."""
    classes = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    if not classes:
        raise ValueError(f"{folder} holds no folder: put the images of each class into one")
    return {
        path.name: sorted(p for p in path.iterdir() if p.suffix.lower() in _EXTENSIONS and not p.name.startswith("."))
        for path in classes
    }


def _split(listing: dict[str, list[Path]], classes: tuple[str, ...], found: dict[Path, _Found]) -> FileSplit:
    readable = [
        (path, label) for label, name in enumerate(classes) for path in listing.get(name, []) if not found[path].error
    ]
    return FileSplit(tuple(path for path, _ in readable), np.array([label for _, label in readable], np.int64))


def _check(splits: dict[str, FileSplit], classes: tuple[str, ...], folders: dict[str, Path]) -> None:
    for split, images in splits.items():
        if not len(images):
            raise ValueError(f"{folders[split]} holds no readable JPEG or PNG in its class folders")
    empty = np.flatnonzero(np.bincount(splits["train"].labels, minlength=len(classes)) == 0)
    if len(empty):
        raise ValueError(f"{folders['train'] / classes[empty[0]]} holds no readable JPEG or PNG: add some or remove it")


def _report(found: dict[Path, _Found], on_bad_image: str) -> None:
    bad = {path: f.error for path, f in found.items() if f.error}
    if bad and on_bad_image == "fail":
        path, error = next(iter(bad.items()))
        raise ValueError(
            f"{path} is unreadable ({error}), one of {len(bad)} bad among {len(found)} images: remove them, "
            f"or leave them out with --on_bad_image skip"
        )
    for path, error in bad.items():
        print(f"warning: skipped {path}: {error}", file=sys.stderr)
    if bad:
        print(f"warning: skipped {len(bad)} unreadable of {len(found)} images", file=sys.stderr)


def _examine(data_dir: Path, paths: list[Path]) -> dict[Path, _Found]:
    """Examine each file, or take what the manifest has of it if its size and time are the same."""
    known = _read_manifest(data_dir / MANIFEST)
    keys = {path: path.relative_to(data_dir).as_posix() for path in paths}
    changed = [path for path, key in keys.items() if key not in known or known[key][:2] != _stamp(path)]
    known |= zip((keys[path] for path in changed), _examine_files(changed), strict=True)
    found = {path: known[key] for path, key in keys.items()}
    # What was unreadable may have been a matter of permission, so it is not remembered.
    if any(not found[path].error for path in changed):
        _write_manifest(data_dir / MANIFEST, {keys[path]: f for path, f in found.items() if not f.error})
    return found


def _stamp(path: Path) -> tuple[int, int]:
    """Bytes and nanoseconds of a file; a file that is not there is named by whoever reads it."""
    try:
        stat = path.stat()
    except OSError:
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


def _examine_files(paths: list[Path]) -> Iterable[_Found]:
    if len(paths) <= _FEW:
        return [_examine_file(path) for path in paths]
    print(f"examining {len(paths)} images, once", file=sys.stderr)
    # Decoding holds the interpreter's lock, so threads would not help; a forked child could inherit a held lock.
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_examine_file, paths, chunksize=100))


def _examine_file(path: Path) -> _Found:
    stamp = _stamp(path)
    try:
        content = path.read_bytes()
        image = _decode(content)
    except UnidentifiedImageError:
        return _Found(*stamp, error="neither JPEG nor PNG" if content else "empty")
    except Exception as error:  # a broken image can raise anything
        return _Found(*stamp, error=" ".join(str(error).split()) or type(error).__name__)
    shares = np.array(image.histogram()).reshape(3, 256) / (image.width * image.height)
    levels = np.arange(256) / 255
    return _Found(
        *stamp,
        digest=hashlib.blake2b(content, digest_size=8).hexdigest(),
        short_side=min(image.size),
        mean=tuple((shares @ levels).tolist()),
        square=tuple((shares @ levels**2).tolist()),
    )


def _decode(content: bytes) -> Image.Image:
    with warnings.catch_warnings(), Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
        warnings.simplefilter("ignore")
        if image.mode.startswith("I"):
            raise ValueError("grey of 16 bits: save it with 8")
        return image.convert("RGB")


def _read_manifest(path: Path) -> dict[str, _Found]:
    """What an earlier run found; nothing, if there is no manifest that can be understood."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        manifest = json.loads(path.read_bytes())
        if manifest["version"] == _VERSION:
            return {key: _Found(*row) for key, row in manifest["files"].items()}
    return {}


def _write_manifest(path: Path, found: dict[str, _Found]) -> None:
    """Keep the findings; a folder that cannot be written is examined anew each time."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(json.dumps({"version": _VERSION, "files": found}))
        unfinished.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            unfinished.unlink()
