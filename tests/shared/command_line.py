"""The command line, called in this process."""

from __future__ import annotations

import pytest

from effnet_fast import cli


def run(line: str, expected: int = 0) -> None:
    """Run `effnet-fast LINE`, which must end with the `expected` status."""
    with pytest.raises(SystemExit) as done:
        cli.main(line.split())
    assert done.value.code == expected
