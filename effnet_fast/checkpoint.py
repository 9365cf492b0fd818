"""Checkpoints: a plain dict of tensors, numbers and strings, written whole or not at all, read without running code."""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
LAST, BEST = "last.pt", "best.pt"


@dataclass(frozen=True)
class Checkpoint:
    """What a run saves, and all that resuming, evaluating and exporting read. Each field is a key of the file.

    Attributes:
        model: state dict of the weights.
        ema: state dict of the moving average; None if the run keeps none.
        optimizer, scaler, meters: states of the optimizer, the loss scale and the running sums of the progress line.
        progress: fields of `train.loop.Progress`.
        config: fields of `config.TrainConfig`.
        architecture: fields of the model's architecture, see `model.from_description`.
        classes: names, in the order of the logits.
        mean, std: of each channel, for pixels scaled to 0..1.
        fingerprint: of the data set.
        result: row of the last evaluation; empty before the first.
        ranks: one entry a rank: the loader's state, and BatchNorm's statistics where ranks keep their own.
        images_per_pass: images of one forward pass on one rank.
        launch: identifier of the torchrun or Slurm job that wrote it; None without one.
    """

    model: dict[str, Any]
    ema: dict[str, Any] | None
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    meters: Any
    progress: dict[str, Any]
    config: dict[str, Any]
    architecture: dict[str, Any]
    classes: list[str]
    mean: list[float]
    std: list[float]
    fingerprint: str
    result: dict[str, Any]
    ranks: list[dict[str, Any]] = field(default_factory=list)
    images_per_pass: int | None = None
    launch: Any = None

    def to_dict(self) -> dict[str, Any]:
        """The content of the file."""
        return {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """Read a run's checkpoint; keys of later versions are ignored.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, or not the checkpoint of a run.
        """
        state = load(path)
        known = {entry.name for entry in dataclasses.fields(cls)}
        try:
            return cls(**{key: value for key, value in state.items() if key in known})
        except TypeError as error:
            raise ValueError(f"{path} is not the checkpoint of a run ({error})") from error


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint to a temporary file, flush it to the disk and rename it over `path`.

    Raises:
        OSError: the disk is full or the folder cannot be written; the file that was there stays as it was.
    """
    write_atomically(path, serialise(state))


def serialise(state: dict[str, Any]) -> memoryview:
    """The bytes of a checkpoint, a zip in which torch.save notes each record's CRC-32."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    return buffer.getbuffer()


def write_atomically(path: Path, data: bytes | memoryview, keep: int = 1) -> None:
    """Replace the file at `path` by `data`, or leave it as it was.

    Args:
        path: the file.
        data: all of its bytes.
        keep: files to keep; with 3, what was `last.pt` becomes `last-1.pt`, and what was that `last-2.pt`.

    Raises:
        OSError: with a line that says what to do.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _make_way(path, keep)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        kept = "; the one before it is kept" if generations(path) else ""
        advice = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check the folder"
        raise OSError(
            f"cannot write {path} ({error.strerror}){kept}: {advice} and run the same command again"
        ) from error
    _sync_folder(path.parent)


def generations(path: Path) -> list[Path]:
    """`path` and the files before it that were kept, newest first; only those that exist."""
    older = {path.with_name(f"{path.stem}-{number}{path.suffix}"): number for number in _numbers(path)}
    return [path] * path.exists() + sorted(older, key=older.__getitem__)


def _numbers(path: Path) -> list[int]:
    names = (file.name for file in path.parent.glob(f"{path.stem}-*{path.suffix}"))
    middles = (name[len(path.stem) + 1 : -len(path.suffix)] for name in names)
    return [int(middle) for middle in middles if middle.isdecimal()]


def _make_way(path: Path, keep: int) -> None:
    """Shift every generation back by one, and drop those beyond the last `keep`."""
    if keep == 1 or not path.exists():
        return
    kept = generations(path)[: keep - 1]
    for number in reversed(range(len(kept))):
        os.replace(kept[number], path.with_name(f"{path.stem}-{number + 1}{path.suffix}"))
    for number in _numbers(path):
        if number >= keep:
            path.with_name(f"{path.stem}-{number}{path.suffix}").unlink()


def _sync_folder(folder: Path) -> None:
    """A rename survives a power cut only once its folder is on the disk too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that knows it of files alone
            raise
    finally:
        os.close(descriptor)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. No code in the file can run (`weights_only`), and no flipped bit goes unseen.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or no checkpoint of this project.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    content = io.BytesIO(path.read_bytes())
    try:
        _check_records(content)
        state = torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes can raise anything
        raise ValueError(f"{path} is damaged or no checkpoint; use an older one, or train again") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is no checkpoint of effnet_fast (format {FORMAT})")
    return state


def _check_records(content: io.BytesIO) -> None:
    """torch.load passes over the CRC-32 that torch.save noted of each record."""
    with zipfile.ZipFile(content) as archive:
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise ValueError("torch.save compresses nothing")
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} does not match its checksum")
    content.seek(0)
