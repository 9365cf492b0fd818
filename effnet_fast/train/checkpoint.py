"""Checkpoints: a plain dict of tensors, numbers and strings, written whole or not at all, read without running code."""

from __future__ import annotations

import errno
import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch

FORMAT = 1


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint to a temporary file, flush it to the disk and rename it over `path`.

    Raises:
        OSError: the disk is full or the folder cannot be written; the file that was there stays as it was.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    write_atomically(path, buffer.getbuffer())


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Replace the file at `path` by `data`, or leave it as it was.

    Raises:
        OSError: with a line that says what to do.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        kept = "; the one before it is kept" if path.exists() else ""
        advice = "free some space" if error.errno == errno.ENOSPC else "check the folder"
        raise OSError(
            f"cannot write {path} ({error.strerror}){kept}: {advice} and run the same command again"
        ) from error
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """A rename survives a power cut only once its folder is on the disk too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. No code in the file can run (`weights_only`).

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or no checkpoint of this project.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint; use an older one, or train again") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is no checkpoint of effnet_fast (format {FORMAT})")
    return state
