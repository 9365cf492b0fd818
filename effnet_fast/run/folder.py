"""The run folder: lock it and prepare it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from effnet_fast import checkpoint, distributed, provenance
from effnet_fast.config import TrainConfig
from effnet_fast.outcome import FolderInUse
from effnet_fast.train import trackers

# Worker processes of a killed run hold its lock until they notice and exit, which takes a few seconds.
PATIENCE = 10.0  # seconds


@contextlib.contextmanager
def locked(folder: Path, advice: str = "choose another --run_name") -> Iterator[None]:
    """Create and lock the run folder; on exit, remove it again if the run wrote nothing.

    Args:
        folder: the run folder.
        advice: what to do instead of waiting if another run holds the lock.

    Raises:
        FolderInUse, OSError: on all ranks, if another run holds the lock, or the folder is not writable.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = FileLock(folder / ".lock")
    distributed.on_main(lambda: _acquire(lock, folder, advice))
    try:
        yield
    finally:
        if distributed.is_main():
            _remove_unused(created, Path(lock.lock_file))
        lock.release()


def _acquire(lock: FileLock, folder: Path, advice: str) -> None:
    with checkpoint.writing_to(folder), contextlib.suppress(NotImplementedError):  # a file system without locks
        try:
            while not lock.is_locked or not Path(lock.lock_file).exists():  # another run may just have removed it
                lock.release()
                folder.mkdir(parents=True, exist_ok=True)
                lock.acquire(timeout=PATIENCE)
        except Timeout as error:
            raise FolderInUse(f"another run is at work in {folder}: wait for its end, or {advice}") from error


def _remove_unused(created: list[Path], lock_file: Path) -> None:
    with contextlib.suppress(OSError):  # not empty: the run has written something
        if created and os.listdir(created[0]) == [lock_file.name]:
            lock_file.unlink()
        for path in created:
            path.rmdir()


def prepare(folder: Path, config: TrainConfig, resumed: Path | None) -> None:
    """Write config.yaml and environment.json; remove the files of an earlier run unless this one resumes it.

    Args:
        folder: the locked run folder.
        config: the run's config.
        resumed: path of the checkpoint to resume, or None.
    """
    with checkpoint.writing_to(folder):
        for path in folder.glob(".*.tmp"):  # left by a killed process
            path.unlink()
        if resumed is None or resumed.resolve().parent != folder.resolve():
            _remove_earlier_run(folder)
        else:
            _set_aside(folder, resumed)
        # A run with --config FOLDER/config.yaml must not start this one over.
        settings = dataclasses.asdict(config) | ({"resume": "auto"} if config.resume == "no" else {})
        checkpoint.write_atomically(folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False).encode())
        checkpoint.write_json(folder / "environment.json", provenance.environment())


def _remove_earlier_run(folder: Path) -> None:
    old = checkpoint.generations(folder / checkpoint.LAST)
    for path in [*old, *(folder / name for name in (checkpoint.BEST, "metrics.jsonl", trackers.IDS))]:
        path.unlink(missing_ok=True)
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)


def _set_aside(folder: Path, resumed: Path) -> None:
    """Rename checkpoints newer than the resumed one to *.unused: they are damaged, or `--resume` names an older one."""
    newest_first = checkpoint.generations(folder / checkpoint.LAST)
    names = [path.resolve() for path in newest_first]
    newer = names.index(resumed.resolve()) if resumed.resolve() in names else len(names)  # best.pt is older than all
    for path in newest_first[:newer]:
        os.replace(path, path.with_name(f"{path.name}.unused"))
