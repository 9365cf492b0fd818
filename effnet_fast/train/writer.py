"""Checkpoints written behind the back of training: a step waits for the copy to the host's memory alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from effnet_fast import checkpoint

MOST_FAILURES = 2  # in a row, after which a run that cannot save stops


class Writer:
    """Writes a run's last.pt and best.pt in a thread of its own, each whole or not at all.

    A state that comes while another is being written waits; a still newer one takes its place. A write that fails is
    warned about and the next one tried; after the second failure in a row `save`, `check` and the end raise.

    A context manager: its end waits until everything is written.

    Args:
        folder: of the run.
        keep: see `checkpoint.write_atomically`.
        warn: takes the line about a failed write; called from the thread.
    """

    def __init__(self, folder: Path, keep: int, warn: Callable[[str], None]) -> None:
        self._folder, self._keep, self._warn = folder, keep, warn
        self._pending: dict[str, dict[str, Any]] = {}  # file name -> state
        self._owed: dict[str, dict[str, Any]] = {}  # a best.pt that could not be written
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
        """Copy a state to the host's memory and have it written, as best.pt too if it is the `best`.

        Raises:
            OSError: two writes in a row have failed.
        """
        self.check()
        copied = snapshot(state)
        with self._changed:
            new = {checkpoint.LAST: copied} | ({checkpoint.BEST: copied} if best else {})
            self._pending = self._owed | self._pending | new
            self._changed.notify()

    def check(self) -> None:
        """Raise the error of the last write if it was not the first in a row to fail."""
        if self._error is not None and self._failures >= MOST_FAILURES:
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
            except Exception as error:  # whatever it is must reach the run, not end with the thread
                self._failures, self._error = self._failures + 1, error
                with self._changed:
                    self._owed = {name: state for name, state in jobs.items() if name == checkpoint.BEST}
                if self._failures < MOST_FAILURES:
                    self._warn(f"warning: {error}; training goes on, and stops if the next checkpoint fails too")

    def _write(self, jobs: dict[str, dict[str, Any]]) -> None:
        # The best first: a last.pt already says that there is no better one to write.
        for name, state in sorted(jobs.items(), key=lambda job: job[0] != checkpoint.BEST):
            keep = self._keep if name == checkpoint.LAST else 1
            checkpoint.write_atomically(self._folder / name, checkpoint.serialise(state), keep)
            with self._changed:
                self._owed.pop(name, None)


def snapshot(state: Any) -> Any:
    """A copy of nested dicts, lists and tuples with every tensor on the CPU; what comes later does not change it.

    Copies from a GPU go to pinned memory side by side, and the host waits once.
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
