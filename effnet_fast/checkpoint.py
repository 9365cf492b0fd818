"""Checkpoints: their schema, atomic writes, and reads that verify checksums and run no code from the file."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from effnet_fast.faults import is_out_of_memory

FORMAT = 1
EXPORTS = (".safetensors", ".onnx", ".pt2")  # files that `effnet-fast export` writes
LAST, BEST = "last.pt", "best.pt"


Channels = tuple[float, float, float]

# Fields that `read` requires only with `resumable=True`.
_TRAINING = {"only_for_resuming": True}


@dataclass(frozen=True, kw_only=True)
class StepState:
    """State of a training step. Field names are the keys of the file.

    Attributes:
        model: state dict of the weights.
        ema: state dict of their moving average; None if the run keeps none.
        optimizer: state dict of the optimizer.
        scaler: state dict of the fp16 loss scale.
        meters: float64 [7], the running sums behind the progress line.
    """

    model: dict[str, Any]
    ema: dict[str, Any] | None
    optimizer: dict[str, Any] = field(default_factory=dict, metadata=_TRAINING)
    scaler: dict[str, Any] = field(default_factory=dict, metadata=_TRAINING)
    meters: Any = field(default=None, metadata=_TRAINING)

    def to_dict(self) -> dict[str, Any]:
        """The content of the file: the fields by name, with lists for tuples; tensors are not copied."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}


@dataclass(frozen=True, kw_only=True)
class BadStep(StepState):
    """not-finite.pt: the state before a step whose loss or gradient was not finite, and the batch of that step.

    Attributes:
        images: [N, 3, H, W], of all ranks.
        labels: int64 [N].
        epoch, step: from 0.
    """

    images: torch.Tensor
    labels: torch.Tensor
    epoch: int
    step: int


@dataclass(frozen=True, kw_only=True)
class Checkpoint(StepState):
    """A run's last.pt or best.pt. Field names are the keys of the file.

    Attributes:
        architecture: fields of the model's architecture, see `model.from_description`.
        classes: names, in the order of the logits.
        mean, std: of each channel, for pixels scaled to 0..1.
        config: fields of `config.TrainConfig`.
        fingerprint: of the data set.
        progress: fields of `train.loop.Progress`.
        result: row of the last evaluation and its `step`; empty before the first.
        ranks: a dict per rank, with its BatchNorm statistics if ranks do not share them.
        images_per_pass: images of one forward pass on one rank; None in old files.
        launch: identifier of the torchrun or Slurm job that wrote the file; None without one.
        temperatures: temperature of `ema` and `raw` weights, as far as `eval --calibrate` has fit them.
        schedule_start: step at which the learning-rate schedule starts; above 0 in a run that adds epochs to another.
    """

    architecture: dict[str, Any]
    classes: list[str]
    mean: Channels
    std: Channels
    config: dict[str, Any] = field(default_factory=dict, metadata=_TRAINING)
    fingerprint: str = field(default="", metadata=_TRAINING)
    progress: dict[str, Any] = field(default_factory=dict, metadata=_TRAINING)
    result: dict[str, Any] = field(default_factory=dict, metadata=_TRAINING)
    ranks: list[dict[str, Any]] = field(default_factory=list)
    images_per_pass: int | None = None
    launch: str | None = None
    schedule_start: int = 0
    temperatures: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, resumable: bool = False) -> Self:
        """Read a run's checkpoint. Unknown keys are ignored.

        Args:
            path: the file.
            resumable: also require the training state.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, or lacks a key.
        """
        return cls.from_dict(load(path), path, resumable)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any], path: Path, resumable: bool = False) -> Self:
        """Build a checkpoint from `state`, the content of the file at `path`; raises the errors of `read`."""
        fields = {entry.name: entry for entry in dataclasses.fields(cls)}
        required = {
            name
            for name, entry in fields.items()
            if (resumable and entry.metadata == _TRAINING)
            or (entry.default is entry.default_factory is dataclasses.MISSING)
        }
        if missing := sorted(required - state.keys()):
            use = "cannot be resumed from" if resumable else "is not the checkpoint of a run"
            raise ValueError(f"{path} {use}: it lacks {', '.join(missing)}")
        values = {name: state[name] for name in fields if name in state}
        return cls(**values | {name: _channels(path, name, values[name]) for name in ("mean", "std")})


def _channels(path: Path, name: str, values: Any) -> Channels:
    if not isinstance(values, list | tuple) or len(values) != 3:
        raise ValueError(f"{path} is damaged: {name} must be three numbers, not {values!r}")
    return values[0], values[1], values[2]


def save(path: Path, state: dict[str, Any]) -> None:
    """Serialise a checkpoint and write it with `write_atomically`; raises its errors."""
    write_atomically(path, serialise(state))


def store_temperature(path: Path, weights: str, temperature: float) -> None:
    """Store the temperature of the `ema` or `raw` weights in a checkpoint; the rest of its content stays.

    Raises:
        FileNotFoundError, ValueError, OSError: see `load` and `write_atomically`.
    """
    state = load(path)
    save(path, state | {"temperatures": state.get("temperatures", {}) | {weights: temperature}})


def serialise(state: dict[str, Any]) -> memoryview:
    """Serialise a checkpoint into the zip file of torch.save, with a CRC-32 for each record."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    return buffer.getbuffer()


def write_atomically(path: Path, data: bytes | memoryview, keep: int | None = None) -> None:
    """Write a temporary file, flush it to disk and rename it to `path`. On failure, the old file stays.

    Args:
        path: the file.
        data: its content.
        keep: number of files to keep; None touches no other file. With 3, last.pt becomes last-1.pt, and last-1.pt
            becomes last-2.pt.

    Raises:
        OSError: the disk is full or the folder is not writable; the message says what to do.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None:
            _shift_generations(path, keep)
        os.replace(temporary, path)
        if keep is not None:  # only now: until here the oldest may be the only one
            _delete_generations(path, keep)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        kept = "; the one before it is kept" if generations(path) else ""
        advice = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check the folder"
        raise OSError(
            f"cannot write {path} ({error.strerror}){kept}: {advice} and run the same command again"
        ) from error
    _sync_folder(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Write JSON with `write_atomically`."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


@contextmanager
def writing_to(folder: Path, flag: str = "--save_dir") -> Iterator[None]:
    """Turn an OSError into one line: the folder is not writable, and `flag` chooses another."""
    try:
        yield
    except OSError as error:
        if error.strerror is None:  # the error already has a one-line message
            raise
        raise OSError(f"cannot write to {folder} ({error.strerror}): choose another {flag}") from error


def generations(path: Path) -> list[Path]:
    """`path` and its older versions (last-1.pt, last-2.pt, ...) that exist, newest first."""
    older = {path.with_name(f"{path.stem}-{number}{path.suffix}"): number for number in _numbers(path)}
    return [path] * path.exists() + sorted(older, key=older.__getitem__)


def _numbers(path: Path) -> list[int]:
    names = (file.name for file in path.parent.glob(f"{path.stem}-*{path.suffix}"))
    middles = (name[len(path.stem) + 1 : -len(path.suffix)] for name in names)
    return [int(middle) for middle in middles if middle.isdecimal()]


def _shift_generations(path: Path, keep: int) -> None:
    """Rename each of the last `keep` - 1 versions to the next older one."""
    kept = generations(path)[: keep - 1]
    for number in reversed(range(len(kept))):
        os.replace(kept[number], path.with_name(f"{path.stem}-{number + 1}{path.suffix}"))


def _delete_generations(path: Path, keep: int) -> None:
    """Delete the versions beyond the last `keep`."""
    for number in _numbers(path):
        if number >= keep:
            path.with_name(f"{path.stem}-{number}{path.suffix}").unlink()


def _sync_folder(folder: Path) -> None:
    """Flush a folder, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # this file system flushes files only
            raise
    finally:
        os.close(descriptor)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, with `weights_only=True` and all checksums verified.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or not a checkpoint of this project.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    if path.suffix in EXPORTS:
        raise ValueError(f"{path} is an export, not a run's checkpoint: name a run's last.pt or best.pt")
    content = io.BytesIO(path.read_bytes())
    try:
        _verify_checksums(content)
        state = torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes can raise anything
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{path} is damaged or not a checkpoint: use an older one, or train again") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of effnet_fast (format {FORMAT})")
    return state


def _verify_checksums(content: io.BytesIO) -> None:
    """Verify the CRC-32 of each record, which torch.save writes and torch.load ignores."""
    with zipfile.ZipFile(content) as archive:
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise ValueError("torch.save compresses nothing")
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} does not match its checksum")
    content.seek(0)
