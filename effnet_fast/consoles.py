"""Where to print lines and where to show live displays (a terminal, a notebook, or a file), and how to write times."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import IO

from rich.console import Console
from rich.progress import Progress, ProgressColumn


def line_console(file: IO[str] | None = None, stderr: bool = False) -> Console:
    """A console for lines, by default on stdout. In a notebook too they are text, which a file can take."""
    stream = file or (sys.stderr if stderr else sys.stdout)
    # Not rich's guess: notebooks set FORCE_COLOR, which makes it take a file for a terminal.
    terminal = stream.isatty()
    return Console(
        file=file,
        stderr=stderr,
        markup=False,  # names may hold [brackets] and :colons:
        emoji=False,
        highlight=False,
        soft_wrap=True,
        force_jupyter=False,
        force_terminal=terminal,
    )


def live_console(lines: Console) -> Console | None:
    """The console for a live display: the terminal that `lines` prints to, or the notebook; else None.

    In a notebook rich needs ipywidgets: `pip install 'effnet-fast[notebook]'`.
    """
    if _is_cell_output(lines.file):
        return Console(force_jupyter=True) if find_spec("ipywidgets") else None
    return lines if lines.is_terminal else None


def duration(seconds: float) -> str:
    """Format seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def progress_bar(lines: Console, *columns: ProgressColumn) -> Progress | None:
    """A bar, not started yet, that disappears when it stops; None if `lines` has to show the progress instead.

    Call `update(..., refresh=True)`: in a notebook no thread refreshes the bar, since what the cell prints meanwhile
    would be printed into it.
    """
    console = live_console(lines)
    if console is None:
        return None
    return Progress(
        *columns,
        console=console,
        transient=True,
        auto_refresh=not console.is_jupyter,
        # What is printed to the terminal meanwhile has to appear above the bar; nothing else has.
        redirect_stdout=sys.stdout.isatty() and not console.is_jupyter,
        redirect_stderr=sys.stderr.isatty() and not console.is_jupyter,
    )


def _is_cell_output(file: IO[str]) -> bool:
    """Whether a stream prints below a notebook's cell. Such a stream claims to be a terminal."""
    ipykernel = sys.modules.get("ipykernel.iostream")
    return ipykernel is not None and isinstance(file, ipykernel.OutStream)
