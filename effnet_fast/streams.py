"""Make stdout and stderr discard output, rather than fail, once their reader is gone."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

# EPIPE: the reader has closed the pipe; EIO: the terminal was closed.
_NO_READER = (errno.EPIPE, errno.EIO)


class QuietStream:
    """A text stream that escapes what it cannot encode, and drops what it cannot write because its reader is gone.

    From then on the file descriptor points to /dev/null, also for C code, other threads and child processes.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file and class names may hold any bytes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._silent_without_reader():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._silent_without_reader():
            self._stream.flush()

    @contextlib.contextmanager
    def _silent_without_reader(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _NO_READER:
                raise
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)


@contextlib.contextmanager
def quiet_streams() -> Iterator[None]:
    """Make sys.stdout and sys.stderr quiet streams within the context."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = quiet = tuple(map(QuietStream, streams))  # type: ignore[assignment]
    try:
        yield
    finally:
        for stream in quiet:
            stream.flush()  # otherwise Python flushes them at exit, and fails
        sys.stdout, sys.stderr = streams
