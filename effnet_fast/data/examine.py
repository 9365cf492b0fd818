"""Examine image files once: whether they can be decoded, their orientation and their statistics.

A manifest in the data folder keeps the results, also those of an examination that was stopped. The next start only
lists the files and compares sizes and times.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import struct
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock
from PIL import Image

from effnet_fast.data.dataset import ImageFile
from effnet_fast.data.decode import DRAFT_PIXELS, open_image, rgb_strips
from effnet_fast.data.orientation import read_orientation

MANIFEST = ".effnet_fast-manifest.json"

_VERSION = 3  # of the manifest's rows
_FEW = 4000  # up to this many images, starting other processes takes longer than examining
_CHUNK = 1000  # images examined between two lines of progress
_SAVE_SECONDS = 60.0  # between two versions of an unfinished manifest
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_START_OF_SCAN = 0xDA


class Examined(NamedTuple):
    """The result for one file, a row of the manifest."""

    size: int  # bytes
    mtime: int  # nanoseconds
    error: str = ""  # why the file cannot be decoded
    digest: str = ""  # of the file's content
    short_side: int = 0  # pixels
    mean: tuple[float, ...] = ()  # of each channel, scaled to 0..1
    square: tuple[float, ...] = ()  # mean of the squares
    orientation: int = 1
    plain: bool = True

    def file(self, path: Path) -> ImageFile:
        return ImageFile(path, self.orientation, self.plain)


def examine(data_dir: Path, paths: list[Path]) -> dict[Path, Examined]:
    """Examine each file, or take its row of the manifest if its size and time are the same."""
    keys = {path: path.relative_to(data_dir).as_posix() for path in paths}
    known, changed = _compare_with_manifest(data_dir, keys)
    if len(changed) <= _FEW:
        return _examine(data_dir, keys, known, changed)
    with _alone(data_dir):  # another rank of this machine may have examined them meanwhile
        return _examine(data_dir, keys, *_compare_with_manifest(data_dir, keys))


def _compare_with_manifest(data_dir: Path, keys: dict[Path, str]) -> tuple[dict[str, Examined], list[Path]]:
    """The rows of the manifest, and the files that are new or have changed."""
    known = _read_manifest(data_dir / MANIFEST)
    return known, [path for path, key in keys.items() if key not in known or known[key][:2] != _stamp(path)]


@contextlib.contextmanager
def _alone(data_dir: Path) -> Iterator[None]:
    """Wait until no other process examines this folder; where it cannot be locked, go on."""
    lock = FileLock(data_dir / f"{MANIFEST}.lock")
    with contextlib.suppress(OSError, NotImplementedError):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _examine(
    data_dir: Path, keys: dict[Path, str], known: dict[str, Examined], changed: list[Path]
) -> dict[Path, Examined]:
    saved = time.monotonic()
    for path, row in zip(changed, _examine_files(changed), strict=True):
        known[keys[path]] = row
        if time.monotonic() - saved > _SAVE_SECONDS:
            _write_manifest(data_dir / MANIFEST, known)
            saved = time.monotonic()
    examined = {path: known[key] for path, key in keys.items()}
    if any(not examined[path].error for path in changed):
        _write_manifest(data_dir / MANIFEST, {keys[path]: row for path, row in examined.items()})
    return examined


def _stamp(path: Path) -> tuple[int, int]:
    """Bytes and nanoseconds of a file; zeros for a missing file, which decoding reports."""
    try:
        stat = path.stat()
    except OSError:
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


def _examine_files(paths: list[Path]) -> Iterator[Examined]:
    if len(paths) <= _FEW:
        yield from map(examine_file, paths)
        return
    # Decoding holds the interpreter's lock, so threads would not help; a forked child could inherit a locked lock.
    try:
        with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
            yield from _with_progress(pool.map(examine_file, paths, chunksize=100), len(paths))
    except BrokenProcessPool as error:
        raise ValueError(
            'a process that examines the images ended: a Python script needs `if __name__ == "__main__":` around its '
            "call, since each process reads the script again; otherwise memory may be short"
        ) from error


def _with_progress(rows: Iterable[Examined], total: int) -> Iterator[Examined]:
    for number, row in enumerate(rows):
        if number % _CHUNK == 0:
            print(f"examining {total} images, once: {100 * number // total} %", file=sys.stderr)
        yield row


def examine_file(path: Path) -> Examined:
    """Decode a file and measure it; if that fails, `error` says why."""
    stamp = _stamp(path)
    try:
        content = path.read_bytes()
        with open_image(content) as image:
            counts, orientation = _histogram(image), read_orientation(image)
            plain = _is_plain(image, content)
            short_side = min(image.size)
    except (OSError, ValueError) as error:
        return Examined(*stamp, error=getattr(error, "strerror", None) or str(error))
    shares, levels = counts / counts.sum(1, keepdims=True), np.arange(256) / 255
    return Examined(
        *stamp,
        digest=hashlib.blake2b(content, digest_size=8).hexdigest(),
        short_side=short_side,
        mean=tuple((shares @ levels).tolist()),
        square=tuple((shares @ levels**2).tolist()),
        orientation=orientation,
        plain=plain,
    )


def _histogram(image: Image.Image) -> np.ndarray:
    """Counts of the values of each channel, [3, 256]."""
    strips = rgb_strips(image, (0, 0, *image.size))
    return np.sum([strip.histogram() for strip in strips], axis=0).reshape(3, 256)


# -- files that DALI and Pillow decode alike


def _is_plain(image: Image.Image, content: bytes) -> bool:
    """Whether DALI decodes a file as Pillow does.

    DALI refuses damaged files that Pillow repairs, turns CMYK without Adobe's marker into black, and decodes at full
    size what `read_image` does not.
    """
    if image.format == "PNG":
        return _is_sound_png(content)
    decodes_whole = image.width * image.height <= DRAFT_PIXELS
    return decodes_whole and image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB") and _is_sound_jpeg(content)


def _is_sound_png(content: bytes) -> bool:
    """Whether all chunks up to IEND are complete and their checksums right (PNG specification, section 5.3)."""
    offset = len(_PNG_SIGNATURE)
    while offset + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, offset)
        end = offset + 8 + length
        if end + 4 > len(content) or zlib.crc32(content[offset + 4 : end]) != struct.unpack_from(">I", content, end)[0]:
            return False
        if kind == b"IEND":
            return True
        offset = end + 4
    return False


def _is_sound_jpeg(content: bytes) -> bool:
    """Whether only segments lie between the start and the first scan (ITU-T T.81, section B.1.1)."""
    offset = 2
    while offset + 4 <= len(content) and content[offset] == 0xFF:
        marker = content[offset + 1]
        if marker == _START_OF_SCAN:
            return True
        # 0xFF may be repeated before a marker.
        offset += 1 if marker == 0xFF else 2 + struct.unpack_from(">H", content, offset + 2)[0]
    return False


# -- the manifest


def _read_manifest(path: Path) -> dict[str, Examined]:
    """Rows of an earlier run; none if there is no manifest of this version."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        manifest = json.loads(path.read_bytes())
        if manifest["version"] == _VERSION:
            return {key: Examined(*row) for key, row in manifest["files"].items()}
    return {}


def _write_manifest(path: Path, rows: dict[str, Examined]) -> None:
    """Store the rows. If the folder is read-only, each start examines all files again.

    Errors are not stored: a file may be unreadable only because permission is missing.
    """
    rows = {key: row for key, row in rows.items() if not row.error}
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(json.dumps({"version": _VERSION, "files": rows}))
        unfinished.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            unfinished.unlink()
