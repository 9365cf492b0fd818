"""What a run goes on from, and that it is alone in its folder."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from effnet_fast import checkpoint, distributed
from effnet_fast.config import TrainConfig
from effnet_fast.run.restore import config_of, differences

# A run that was killed may leave workers that take a few seconds to notice, and they hold its lock.
PATIENCE = 10.0  # seconds

# What a checkpoint must hold to be gone on from; what not-finite.pt, say, does not.
_NEEDED = {
    "model", "ema", "optimizer", "scaler", "meters", "progress", "config", "fingerprint", "result", "architecture",
    "mean", "std",
}  # fmt: skip

Found = tuple[Path, dict[str, Any]]


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make a run's folder and keep other runs out of it until the end, however that comes.

    Raises:
        OSError: on all ranks: another run is at work there, or the folder cannot be written.
    """
    lock = FileLock(folder / ".lock")
    distributed.on_main(lambda: _acquire(lock, folder))
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: FileLock, folder: Path) -> None:
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with contextlib.suppress(NotImplementedError):  # a file system that knows no locks
                lock.acquire(timeout=PATIENCE)
        except Timeout as error:
            raise OSError(
                f"another run is at work in {folder}: wait for its end, or choose another --run_name"
            ) from error


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Say in one line what to do where a run's folder cannot be written."""
    try:
        yield
    except OSError as error:
        if error.strerror is None:  # it says so already
            raise
        raise OSError(f"cannot write to {folder} ({error.strerror}); choose another --save_dir") from error


def goes_on(config: TrainConfig, folder: Path) -> bool:
    """Whether a checkpoint has a say, and no weights or flags that a run begins with; asked before it is alone.

    Raises:
        ValueError: as `read_checkpoint`.
    """
    if config.resume == "auto":
        return bool(checkpoint.generations(folder / checkpoint.LAST))
    return config.resume != "no" or _own(folder) is not None


def read_checkpoint(config: TrainConfig, folder: Path, fingerprint: str) -> Found | None:
    """The checkpoint to go on from and its path, or None to start afresh.

    A damaged last.pt is named and the one before it taken. A run that torchrun or Slurm has started again goes on from
    its own last.pt whatever `--resume` says.

    Raises:
        FileNotFoundError, ValueError: there is none at the path asked for, none that can be read, or it is of a run
            with another config or data set.
    """
    found = _choose(str(config.resume), folder)
    if found is None:
        return None
    _refuse_another_run(*found, config, fingerprint)
    return found


def _choose(resume: str, folder: Path) -> Found | None:
    if resume == "auto":
        return _newest(folder)
    if (own := _own(folder)) or resume == "no":
        return own
    return Path(resume), checkpoint.load(Path(resume))


def _own(folder: Path) -> Found | None:
    """The newest checkpoint if it was written by this very job, which torchrun or Slurm has started again."""
    if distributed.launch():
        with contextlib.suppress(ValueError):
            newest = _newest(folder)
            if newest is not None and newest[1].get("launch") == distributed.launch():
                return newest
    return None


def _newest(folder: Path) -> Found | None:
    """The newest checkpoint of a run that can be read."""
    damage: list[ValueError] = []
    for path in checkpoint.generations(folder / checkpoint.LAST):
        try:
            saved = checkpoint.load(path)
        except ValueError as error:
            damage.append(error)
            continue
        for reason in damage:
            print(f"warning: {reason}; going on from {path}", file=sys.stderr)
        return path, saved
    if damage:
        raise ValueError(f"{damage[0]} (--resume no starts afresh)")
    return None


def _refuse_another_run(path: Path, saved: dict[str, Any], config: TrainConfig, fingerprint: str) -> None:
    if missing := _NEEDED - saved.keys():
        raise ValueError(f"{path} is no checkpoint to go on from: it holds no {', '.join(sorted(missing))}")
    found = differences(config_of(saved), config, saved["fingerprint"], fingerprint)
    if found:
        raise ValueError(
            f"{path} is of a run with another config ({found}): "
            "choose another --run_name, or --resume no to start afresh"
        )


@contextlib.contextmanager
def of_this_version(path: Path | None) -> Iterator[None]:
    """Say in one line that the checkpoint at `path` does not hold what is being taken from it; None is none."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if path is None:
            raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"{path} is of another version or no whole checkpoint ({reason})") from error


def accumulation(config: TrainConfig, world_size: int, most_images: int | None) -> int:
    """Pieces into which a rank's share of the batch is cut.

    Args:
        config: of the run.
        world_size: ranks there are now.
        most_images: what a rank had in one pass when the run began; with other numbers of ranks than then, pieces are
            the fewest that are no larger. None when it begins: as many as the config says.

    Raises:
        ValueError: the batch does not divide evenly.
    """
    share, left = divmod(config.batch_size, world_size)
    asked = config.grad_accumulation if most_images is None else 1
    if left or share % asked:
        raise ValueError(
            f"--batch_size {config.batch_size} must divide evenly among {world_size} rank(s) x {asked} accumulation "
            "step(s)"
        )
    if most_images is None:
        return asked
    return next(pieces for pieces in range(1, share + 1) if share % pieces == 0 and share // pieces <= most_images)


def clear_leftovers(folder: Path) -> None:
    """Remove files that a killed process was writing; the lock on the folder says that none is at it now."""
    for path in folder.glob(".*.tmp"):
        path.unlink()


def set_damaged_aside(folder: Path, used: Path) -> None:
    """Rename the checkpoints of a run that are newer than the one `used`: they could not be read."""
    newest_first = checkpoint.generations(folder / checkpoint.LAST)
    for path in newest_first[: newest_first.index(used)] if used in newest_first else []:
        os.replace(path, path.with_name(f"{path.name}.damaged"))
