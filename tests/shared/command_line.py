"""The command line, called in this process, and commands run by several ranks."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from effnet_fast import cli


def run(line: str, expected: int = 0, curves: bool = False) -> None:
    """Run `effnet-fast LINE`, which must end with the `expected` status.

    Without `curves`, a training does not draw curves.png, which takes longer than a small training itself.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not curves:
            patch.setattr("effnet_fast.run.training._Training._draw_curves", lambda self: None)
        with pytest.raises(SystemExit) as done:
            cli.main(line.split())
    assert done.value.code == expected


def mistake(capsys: pytest.CaptureFixture[str], line: str) -> str:
    """Run `effnet-fast LINE`, which must end with status 2 and one line on stderr, which is returned.

    A training that fails after its start may have warned of versions that are newer than the tested ones.
    """
    capsys.readouterr()  # of earlier commands
    run(line, expected=2)
    printed = capsys.readouterr().err.splitlines(keepends=True)
    (error,) = [line for line in printed if not line.startswith("warning: newer than the tested versions")]
    assert error.startswith("error: ")
    assert error.endswith("\n")
    return error


def run_ranks(command: Sequence[str | Path], ranks: int, **environment: str) -> str:
    """Run a command on each of several ranks, as torchrun would, but without its process, which takes seconds to start.

    All must end with status 0. Returns what they printed, rank after rank.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    processes = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), **environment},
        )
        for rank in range(ranks)
    ]
    printed = "".join(process.communicate()[0] for process in processes)
    assert [process.returncode for process in processes] == [0] * ranks, printed[-5000:]
    return printed


def at_step(number: int, action: str | int) -> dict[str, str]:
    """Environment in which training does something before a step: "hold", "crawl RANKS" or a signal.

    See at_step/sitecustomize.py.
    """
    folders = [str(Path(__file__).with_name("at_step")), *filter(None, [os.environ.get("PYTHONPATH")])]
    what = action if isinstance(action, str) else int(action)
    return {"AT_STEP": f"{number} {what}", "PYTHONPATH": os.pathsep.join(folders)}
