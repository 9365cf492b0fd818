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
_FULL = (errno.ENOSPC, errno.EDQUOT)


class QuietStream:
    """A text stream that escapes what it cannot encode, and drops what it cannot write.

    If its reader is gone, the file descriptor points to /dev/null from then on, also for C code, other threads and
    child processes. If its disk is full, only what was not yet written is lost.

    Attributes:
        lost: the error by which a full disk refused a part, or None.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file and class names may hold any bytes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._dropping():
            self._stream.flush()

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _NO_READER:
                self._silence()
            elif error.errno in _FULL:
                self.lost = error
                self._discard()
            else:
                raise

    def _discard(self) -> None:
        """Drop what is buffered; the disk may have space for what follows."""
        kept = os.dup(self._stream.fileno())
        self._silence()
        self._stream.flush()
        os.dup2(kept, self._stream.fileno())
        os.close(kept)

    def _silence(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)


@contextlib.contextmanager
def quiet_streams() -> Iterator[None]:
    """Make sys.stdout and sys.stderr quiet streams within the context.

    Raises:
        SystemExit: with status 2 in place of 0 if a part of stdout is lost; a line on stderr says so.
    """
    streams = sys.stdout, sys.stderr
    # A stream that the caller has closed is None.
    out, err = (QuietStream(stream or open(os.devnull, "w")) for stream in streams)  # noqa: SIM115
    sys.stdout, sys.stderr = out, err  # type: ignore[assignment]
    try:
        yield
    except SystemExit as end:
        out.flush()
        if out.lost is None or end.code:
            raise
        print(f"error: a part of stdout is lost ({out.lost.strerror}): free some space", file=err)
        raise SystemExit(2) from None
    finally:
        for stream in (out, err):
            stream.flush()  # otherwise Python flushes them at exit, and fails
        sys.stdout, sys.stderr = streams
