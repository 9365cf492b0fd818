"""The command line, called in this process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from effnet_fast import cli


def run(line: str, expected: int = 0) -> None:
    """Run `effnet-fast LINE`, which must end with the `expected` status."""
    with pytest.raises(SystemExit) as done:
        cli.main(line.split())
    assert done.value.code == expected


def at_step(number: int, action: str | int) -> dict[str, str]:
    """Environment in which training does something before a step: "hold", "crawl RANKS" or a signal.

    See at_step/sitecustomize.py.
    """
    folders = [str(Path(__file__).with_name("at_step")), *filter(None, [os.environ.get("PYTHONPATH")])]
    what = action if isinstance(action, str) else int(action)
    return {"AT_STEP": f"{number} {what}", "PYTHONPATH": os.pathsep.join(folders)}
