"""Write checkpoints in a background thread. Training waits only for the copy to host memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from effnet_fast import checkpoint

MAX_FAILURES = 2  # consecutive failed writes that stop a run


class Writer:
    """Writes a run's last.pt and best.pt atomically in a background thread.

    A state saved during a write waits; a newer one replaces it. After a failed write, a warning is printed and the next
    state is tried. After the second failure in a row, `save`, `check` and the exit of the context raise.

    A context manager, which waits on exit until everything is written.

    Args:
        folder: the run folder.
        keep: number of last.pt generations, see `checkpoint.write_atomically`.
        warn: prints a line about a failed write; called from the thread.
    """

    def __init__(self, folder: Path, keep: int, warn: Callable[[str], None]) -> None:
        self._folder, self._keep, self._warn = folder, keep, warn
        self._pending: dict[str, dict[str, Any]] = {}  # file name -> state
        self._unwritten_best: dict[str, dict[str, Any]] = {}  # a best.pt whose write failed
        self._changed = threading.Condition()
        self._closing = self._busy = False
        self._failures = 0
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="checkpoint writer", daemon=True)
        self._thread.start()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        if self._error is not None and kind is None:
            raise self._error

    def save(self, state: dict[str, Any], best: bool = False) -> None:
        """Copy a state to host memory and queue it for last.pt, and for best.pt if it is the `best` so far.

        Raises:
            OSError: two writes in a row have failed.
        """
        self.check()
        copied = snapshot(state)
        with self._changed:
            new = {checkpoint.LAST: copied} | ({checkpoint.BEST: copied} if best else {})
            self._pending = self._unwritten_best | self._pending | new
            self._changed.notify()

    def check(self) -> None:
        """Raise the error of the last write if it was the second in a row to fail."""
        if self._error is not None and self._failures >= MAX_FAILURES:
            raise self._error

    def _work(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.wait_for(lambda: self._pending or self._closing)
                jobs, self._pending, self._busy = self._pending, {}, True
            if not jobs:
                return
            try:
                self._write(jobs)
                self._failures, self._error = 0, None
            except Exception as error:  # reaches the run through check()
                self._failures, self._error = self._failures + 1, error
                with self._changed:
                    self._unwritten_best = {name: state for name, state in jobs.items() if name == checkpoint.BEST}
                if self._failures < MAX_FAILURES:
                    self._warn(f"warning: {error}; training continues, and stops if the next checkpoint fails too")

    def _write(self, jobs: dict[str, dict[str, Any]]) -> None:
        # best.pt first: last.pt contains the best score, so a kill in between must not lose best.pt.
        for name, state in sorted(jobs.items(), key=lambda job: job[0] != checkpoint.BEST):
            keep = self._keep if name == checkpoint.LAST else None
            checkpoint.write_atomically(self._folder / name, checkpoint.serialise(state), keep)
            with self._changed:
                self._unwritten_best.pop(name, None)


def snapshot(state: Any) -> Any:
    """Copy nested dicts, lists and tuples, with every tensor on the CPU.

    Copies from a GPU go to pinned memory asynchronously; the host waits once for all of them.
    """
    copied = _copy(state)
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return copied


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if value.device.type == "cpu":
            return value.detach().clone()
        return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value.detach(), non_blocking=True)
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copy(item) for item in value)
    return value
