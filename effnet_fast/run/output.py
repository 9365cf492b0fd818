"""Check the folder of an output before the work starts."""

from __future__ import annotations

import tempfile
from pathlib import Path

from effnet_fast.checkpoint import writing_to


def check_writable(folder: Path, flag: str, create: bool = False) -> None:
    """Check that files can be written to a folder.

    Args:
        folder: folder of the output.
        flag: option with which the user can choose another folder; the error names it.
        create: create the folder if it is missing.

    Raises:
        OSError: the folder is missing, read-only or not permitted; the message names the flag.
    """
    with writing_to(folder, flag):
        if create:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
