"""Show the progress of a search: a live table on a terminal or in a notebook, plain lines otherwise."""

from __future__ import annotations

import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from effnet_fast.consoles import duration, line_console, live_console

MAX_ROWS = 24  # rows of the live table


class TrialState(Protocol):
    """The fields of `search.trials.State` that the table shows."""

    @property
    def run(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def epochs(self) -> int: ...
    @property
    def top1(self) -> float | None: ...
    @property
    def seconds(self) -> float | None: ...
    @property
    def attrs(self) -> dict[str, Any]: ...


class Board:
    """Context manager that shows the trials of all workers of a search.

    Args:
        states: function that returns the trials; called repeatedly, also from another thread.
        epochs: number of epochs of a complete trial.
    """

    def __init__(self, states: Callable[[], Sequence[TrialState]], epochs: int) -> None:
        self.states = states
        self.epochs = epochs
        # Bind the terminal now, because the worker redirects sys.stdout to a log file during training.
        self.console = line_console(sys.stdout)
        self._live: Live | None = None
        if (console := live_console(self.console)) is not None:
            self._live = Live(
                get_renderable=self._render,
                console=console,
                auto_refresh=not console.is_jupyter,
                refresh_per_second=0.5,
                redirect_stdout=False,
                redirect_stderr=False,
            )

    def __enter__(self) -> Board:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """Print the text and the summary as a line; if there is a live table, refresh it instead."""
        if self._live is None:
            self.console.print(f"{text}  ({summary(self.states(), self.epochs)})")
        else:
            self._live.refresh()

    def _render(self) -> Group:
        states = self.states()
        return Group(trial_table(states, self.epochs), Text(summary(states, self.epochs)))


def trial_table(states: Sequence[TrialState], epochs: int) -> Table:
    """Return a table of running trials, followed by ended trials, each sorted by accuracy, best first."""
    table = Table("trial", "state", "epoch", "val top-1 %", "time", "")
    for column in table.columns[2:5]:
        column.justify = "right"
    started = [state for state in states if state.state != "WAITING"]
    for state in sorted(started, key=lambda s: (s.state != "RUNNING", -(s.top1 or 0)))[:MAX_ROWS]:
        table.add_row(
            state.run,
            state.state.lower(),
            f"{state.epochs}/{epochs}",
            "-" if state.top1 is None else f"{state.top1:.2f}",
            "-" if state.seconds is None else duration(state.seconds),
            state.attrs.get("reason", ""),
        )
    return table


def summary(states: Sequence[TrialState], epochs: int) -> str:
    """Return e.g. `3 of 12 done, 2 running, ETA 0:04:10`.

    The ETA assumes the mean pace of the completed trials and the current number of workers.
    """
    counts = Counter(state.state for state in states)
    done = len(states) - counts["WAITING"] - counts["RUNNING"]
    parts = [
        f"{done} of {len(states)} done",
        *(f"{counts[s]} {s.lower()}" for s in ("RUNNING", "PRUNED", "FAIL") if counts[s]),
    ]
    eta = _seconds_left(states, epochs, max(1, counts["RUNNING"]))
    return ", ".join([*parts, *([f"ETA {duration(eta)}"] if eta is not None else [])])


def _seconds_left(states: Sequence[TrialState], epochs: int, workers: int) -> float | None:
    paces = [s.seconds / s.epochs for s in states if s.state == "COMPLETE" and s.seconds and s.epochs]
    if not paces:
        return None
    remaining = sum(epochs - s.epochs for s in states if s.state in ("WAITING", "RUNNING"))
    return statistics.fmean(paces) * remaining / workers
