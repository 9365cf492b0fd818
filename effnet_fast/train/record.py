"""Record a run: metrics.jsonl, trackers, and progress lines on the console."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.progress import BarColumn, TextColumn

from effnet_fast.checkpoint import write_atomically
from effnet_fast.consoles import duration, line_console, progress_bar
from effnet_fast.train.meters import Reading
from effnet_fast.train.trackers import Trackers

T = TypeVar("T")
Moment = Any  # seconds, or a CUDA event


class Clock:
    """Time stamps of the device's work.

    On CUDA the host runs ahead of the device, so the host's clock would count waits for the device as waits for data.
    CUDA events on the training stream measure the device's own time.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def now(self) -> Moment:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Moment, end: Moment) -> float:
        """Seconds between two time stamps; waits until the device has passed the later one."""
        if not self.on_gpu:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000


class Lines:
    """Appends whole lines to a file. If the disk is full, lines are kept and written later.

    Args:
        path: the file.
        warn: prints a line about the first failure, and about lines that are lost at the end.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._file = path.open("ab", buffering=0)
        self._warn = warn
        self._warned = False
        self._unwritten = b""

    def add(self, line: str) -> None:
        self._unwritten += line.encode() + b"\n"
        error = self._write()
        if error is not None and not self._warned:
            self._say(error, "its rows are kept and written later")
            self._warned = True

    def close(self) -> None:
        error = self._write()
        if error is not None:
            self._say(error, "its last rows are lost")
        self._file.close()

    def _write(self) -> OSError | None:
        """Write all lines that are left, or none of them."""
        end = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(self._unwritten) < len(self._unwritten):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            return error
        self._unwritten = b""
        return None

    def _say(self, error: OSError, consequence: str) -> None:
        self._warn(f"warning: cannot write {self._file.name} ({error.strerror}); {consequence}")


class Recorder:
    """Writes the rows of a run. Ranks other than the main one only measure time.

    Args:
        folder: the run folder.
        main: whether this rank writes.
        device: device of the training steps.
        step: optimizer steps done so far. Rows of later steps, left by a killed run, are deleted.
        total_steps: optimizer steps of the whole run.
        steps_per_epoch: optimizer steps per epoch.
        trackers: get the figures of each row too.
        work: maps steps FIRST and END to the work of steps FIRST to END - 1, in any unit, for the estimated time.
    """

    def __init__(
        self,
        folder: Path,
        *,
        main: bool,
        device: torch.device,
        step: int,
        total_steps: int,
        steps_per_epoch: int,
        trackers: Trackers | None = None,
        work: Callable[[int, int], float] = lambda first, end: end - first,
    ) -> None:
        self.main = main
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        self._trackers = trackers
        self._work = work
        self.console = line_console()
        self._clock = Clock(device)
        self._laps: list[tuple[Moment, Moment, Moment, int]] = []  # batch requested, delivered, trained on; its images
        self._lap: tuple[Moment, Moment, int] | None = None  # of the batch that is trained on
        # Without the first step of this process, in which kernels compile.
        self._images, self._seconds, self._waited = 0, 0.0, 0.0
        self._start_time, self._start_step = time.perf_counter(), step
        self._compiles = True
        if main:
            self._open(folder, step)

    def _open(self, folder: Path, step: int) -> None:
        path = folder / "metrics.jsonl"
        rows = _rows_until(path, step)
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        self._lines = Lines(path, self.warn)
        self._bar = progress_bar(self.console, BarColumn(bar_width=10), TextColumn("{task.description}"))
        if self._bar is not None:
            self._task = self._bar.add_task("starting", total=self.total_steps, completed=step)
            self._bar.start()

    def watch(self, batches: Iterable[tuple[T, T]]) -> Iterator[tuple[T, T]]:
        """Pass batches through; measure the time spent waiting for them and the time spent on them."""
        iterator = iter(batches)
        while True:
            requested = self._clock.now()
            batch = next(iterator, None)
            if batch is None:
                return
            self._lap = (requested, self._clock.now(), len(batch[1]))  # type: ignore[arg-type]
            yield batch
            self._end_lap()

    def _end_lap(self) -> None:
        """End the lap of the current batch: when the next one is requested, or at a report, which is not training."""
        if self._lap is not None:
            requested, delivered, images = self._lap
            self._laps.append((requested, delivered, self._clock.now(), images))
            self._lap = None
            if self._compiles and len(self._laps) == 1:
                self._start_time, self._start_step = time.perf_counter(), self._start_step + 1

    def _sums(self, laps: list[tuple[Moment, Moment, Moment, int]], world: int) -> tuple[int, float, float]:
        """Images of all ranks, seconds, and seconds spent waiting for batches."""
        seconds = sum(self._clock.seconds(requested, done) for requested, _, done, _ in laps)
        waited = sum(self._clock.seconds(requested, delivered) for requested, delivered, *_ in laps)
        return sum(count for *_, count in laps) * world, seconds, waited

    def train(self, step: int, reading: Reading, learning_rate: float, world: int) -> None:
        """Write a training row: means since the last one."""
        self._end_lap()
        laps, self._laps = self._laps, []
        images, seconds, waited = self._sums(laps, world)
        compiling = self._sums(laps[: self._compiles], world)
        self._images += images - compiling[0]
        self._seconds += seconds - compiling[1]
        self._waited += waited - compiling[2]
        self._compiles = self._compiles and not laps
        seconds = max(seconds, 1e-9)
        row = {
            "kind": "train",
            "step": step,
            "epoch": round(step / self.steps_per_epoch, 4),
            "loss": reading.loss,
            "top1": reading.top1,
            "images": reading.images,
            "learning_rate": learning_rate,
            "grad_norm": reading.grad_norm,
            "skipped": reading.skipped,
            "img_per_s": images / seconds,
            "wait_share": waited / seconds,
            "seconds": seconds,
        }
        self._write(row)
        self._show(row)

    def summary(self) -> str:
        """The training speed of this process, without evaluations and the first step, which compiles, in one line."""
        if not self._images:
            return "too short to measure the speed"
        share = 100 * self._waited / self._seconds
        return f"trained at {self._images / self._seconds:.0f} img/s, {share:.0f} % of the time waiting for data"

    def evaluation(self, step: int, row: dict[str, Any]) -> None:
        """Write an evaluation row: split, loss, top1, top5, seconds, and ema_* if there is an average."""
        row = {"kind": "eval", "step": step, "epoch": round(step / self.steps_per_epoch, 4), **row}
        self._write(row)
        average = f"  EMA top-1 {row['ema_top1']:.2f} %" if "ema_top1" in row else ""
        self.say(
            f"epoch {row['epoch']:g}  {row['split']} loss {row['loss']:.4f}  top-1 {row['top1']:.2f} %"
            f"  top-5 {row['top5']:.2f} %{average}  ({row['seconds']:.1f} s)"
        )

    def say(self, text: str) -> None:
        """Print a line on the main rank, above the progress bar if there is one."""
        if self.main:
            self.console.print(text)

    @staticmethod
    def warn(text: str) -> None:
        """Print a line on stderr, above the progress bar if there is one."""
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.main:
            if self._bar is not None:
                self._bar.stop()
            self._lines.close()

    def _write(self, row: dict[str, Any]) -> None:
        if not self.main:
            return
        self._lines.add(json.dumps(row))
        if self._trackers is not None:
            group = row["split"] if row["kind"] == "eval" else "train"
            figures = {f"{group}/{name}": value for name, value in row.items() if isinstance(value, float)}
            figures.pop(f"{group}/epoch")
            self._trackers.log(figures, row["step"])

    def _show(self, row: dict[str, Any]) -> None:
        if not self.main:
            return
        left = self._time_left(row["step"])
        figures = (
            f"loss {row['loss']:.3f}  top-1 {row['top1']:.1f} %  lr {row['learning_rate']:.4f}"
            f"  {row['img_per_s']:.0f} img/s  waiting {100 * row['wait_share']:.0f} %  ETA {left}"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=row["step"], description=figures, refresh=True)
        else:
            self.say(f"step {row['step']}/{self.total_steps}  {figures}")

    def _time_left(self, step: int) -> str:
        """From the wall-clock time of the steps on images of this size, so that evaluations count too."""
        now, work = time.perf_counter(), self._work(self._start_step, step)
        left = duration(self._work(step, self.total_steps) * (now - self._start_time) / work) if work else "unknown"
        if self._work(step, step + 1) != self._work(self._start_step, self._start_step + 1):
            self._start_time, self._start_step = now, step
        return left


def _rows_until(path: Path, step: int) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
            if row["step"] <= step:
                rows.append(row)
        except (ValueError, TypeError, KeyError):  # incomplete after a kill, or damaged
            continue
    return rows
