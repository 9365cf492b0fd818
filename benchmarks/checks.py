"""Run tests as a part of a suite: `python benchmarks/checks.py --seconds 200 --out FILE -- tests/op_tests -n 8`.

What stands behind `--` goes to pytest. With `--sanitizer memcheck` or racecheck the tests run under NVIDIA's
compute-sanitizer, whose findings count as failures. The result holds how many tests ended in each way and names those
that failed; tests that the time did not suffice for make the status 1 as a failure does, and what was learnt is kept.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from harness import parser, result, run, write

OUTCOMES = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
ALONE = re.compile(rf"(?P<test>\S+::.*?) (?P<outcome>{OUTCOMES})\b")  # a line of pytest -v
SIDE_BY_SIDE = re.compile(rf"\[gw\d+\].*? (?P<outcome>{OUTCOMES}) (?P<test>\S+::.*)")
COLLECTION = re.compile(r"(?P<outcome>ERROR) (?P<test>\S+\.py)(?: - .*)?$")  # a file that could not be imported
SUMMARY = re.compile(r"^=+ .*\bin [\d.]+s")
FOUND = 86  # the status by which compute-sanitizer tells of findings; pytest's own are below 10


def command(sanitizer: str | None, words: list[str]) -> list[str]:
    """The command line of the tests.

    Raises:
        FileNotFoundError: compute-sanitizer is asked for and not installed.
    """
    # A file that lacks a package here shall not keep all others from running.
    pytest = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--continue-on-collection-errors", *words]
    if sanitizer is None:
        return pytest
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise FileNotFoundError("--sanitizer needs compute-sanitizer on the PATH; it comes with the CUDA toolkit")
    return [tool, "--tool", sanitizer, "--target-processes", "all", "--error-exitcode", str(FOUND), *pytest]


def outcomes(lines: Iterable[str]) -> tuple[dict[str, str], bool]:
    """{test: outcome}, and whether pytest came to its summary."""
    found, whole = {}, False
    for line in lines:
        whole = whole or SUMMARY.match(line) is not None
        if match := ALONE.match(line) or SIDE_BY_SIDE.match(line) or COLLECTION.match(line):
            found[match["test"].strip()] = match["outcome"]
    return found, whole


def family(process: int) -> list[int]:
    """A process and all below it."""
    children: list[str] = []
    with contextlib.suppress(OSError):  # one that has ended in this moment
        for path in Path(f"/proc/{process}/task").glob("*/children"):
            children += path.read_text().split()
    return [process, *(member for child in children for member in family(int(child)))]


def kill(process: int) -> None:
    """At once, with its workers and the runs that tests have started, which would be in the way of what comes next."""
    for member in family(process):
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)


def watch(words: list[str], seconds: float, environment: dict[str, str]) -> tuple[int, list[str]]:
    """Run a command, showing and keeping its lines; it is ended after so many seconds. Its status, and the lines."""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    deadline = threading.Timer(seconds, kill, [process.pid])
    deadline.start()
    lines = []
    for line in process.stdout:  # type: ignore[union-attr]
        print(line, end="", flush=True)
        lines.append(line)
    deadline.cancel()
    return process.wait(), lines


def main(argv: list[str]) -> None:
    words = parser(__doc__)
    words.add_argument("--sanitizer", choices=("memcheck", "racecheck", "initcheck", "synccheck"))
    words.add_argument("--seconds", type=float, default=600.0, help="after which the tests are ended")
    words.add_argument("tests", nargs="*", help="arguments of pytest, behind --")
    args = words.parse_args(argv)
    # Without its own allocator's slack between tensors, memcheck sees an access that leaves one.
    extra = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if args.sanitizer else {}
    begin = time.perf_counter()
    line = command(args.sanitizer, args.tests)
    status, lines = watch(line, args.seconds, os.environ | extra)
    found, whole = outcomes(lines)
    counts = Counter(found.values())
    settings = {
        "tests": args.tests,
        "sanitizer": args.sanitizer,
        "seconds": round(time.perf_counter() - begin, 1),
        "complete": whole,
        "status": status,
        "counts": dict(counts),
        "findings": [text.strip() for text in lines if text.startswith("========= ")][-20:],
    }
    wrong = [{"test": name, "outcome": outcome} for name, outcome in found.items() if outcome in ("FAILED", "ERROR")]
    write(args.out, result("checks", settings, wrong))
    if status != 0:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
