"""Run tests as a part of a suite: `python benchmarks/checks.py --seconds 200 --out FILE -- tests/op_tests -n 8`.

Arguments after `--` go to pytest. `--sanitizer memcheck` (or racecheck, ...) runs the tests under NVIDIA's
compute-sanitizer and counts its findings as failures. The result counts the outcomes and lists the failed tests. If the
time runs out the tests are killed, the outcomes so far are kept, and the exit status is 1, as after a failure.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from harness import parser, result, run, write

FINDINGS_STATUS = 86  # compute-sanitizer's exit status after findings; pytest's own are below 10


def command(sanitizer: str | None, log: Path, arguments: list[str]) -> list[str]:
    """Command line of the tests, which writes a report a line into `log`.

    Raises:
        ImportError: pytest-reportlog is not installed.
        FileNotFoundError: compute-sanitizer is requested and not installed.
    """
    if importlib.util.find_spec("pytest_reportlog") is None:
        raise ImportError("checks.py needs pytest-reportlog: pip install pytest-reportlog")
    # A test file that cannot be imported, for want of a package, must not stop the others.
    options = ["-v", "-p", "no:cacheprovider", "--continue-on-collection-errors", f"--report-log={log}"]
    pytest = [sys.executable, "-m", "pytest", *options, *arguments]
    if sanitizer is None:
        return pytest
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise FileNotFoundError("--sanitizer needs compute-sanitizer on the PATH; it comes with the CUDA toolkit")
    words = [tool, "--tool", sanitizer, "--target-processes", "all", "--error-exitcode", str(FINDINGS_STATUS)]
    if sanitizer == "memcheck":
        words += ["--report-api-errors", "no"]  # calls of the CUDA API that fail as torch and Triton expect
    return [*words, *pytest]


def outcomes(lines: Iterable[str]) -> tuple[dict[str, str], bool]:
    """{test: outcome} of a report log, and whether pytest finished."""
    tests: dict[str, str] = {}
    finished = False
    for line in lines:
        try:
            report = json.loads(line)
        except ValueError:  # the last line of a killed session is torn
            continue
        finished |= report["$report_type"] == "SessionFinish"
        if outcome := outcome_of(report):
            tests[report["nodeid"]] = outcome
    return tests, finished


def outcome_of(report: dict[str, Any]) -> str | None:
    """PASSED, FAILED, ERROR, SKIPPED, XFAIL or XPASS, as pytest's summary has it; None if a report decides nothing."""
    if report["$report_type"] == "CollectReport":
        return "ERROR" if report["outcome"] == "failed" else None
    if report["$report_type"] != "TestReport" or (report["outcome"] == "passed" and report["when"] != "call"):
        return None
    if "wasxfail" in report:
        return "XFAIL" if report["outcome"] == "skipped" else "XPASS"
    if report["outcome"] == "failed" and report["when"] != "call":
        return "ERROR"
    return report["outcome"].upper()


def descendants(process: int) -> list[int]:
    """A process and all processes below it."""
    children: list[str] = []
    with contextlib.suppress(OSError):  # it has just ended
        for path in Path(f"/proc/{process}/task").glob("*/children"):
            children += path.read_text().split()
    return [process, *(member for child in children for member in descendants(int(child)))]


def kill(process: int) -> None:
    """Kill a process with its xdist workers and the runs that tests started, which would disturb the next part."""
    for member in descendants(process):
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)


def watch(command: list[str], seconds: float, environment: dict[str, str]) -> tuple[int, list[str]]:
    """Run a command, print its output and kill it after `seconds`; returns its status and its lines."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    deadline = threading.Timer(seconds, kill, [process.pid])
    deadline.start()
    lines = []
    for line in process.stdout:  # type: ignore[union-attr]
        print(line, end="", flush=True)
        lines.append(line)
    deadline.cancel()
    return process.wait(), lines


def main(argv: list[str]) -> None:
    options = parser(__doc__)
    options.add_argument("--sanitizer", choices=("memcheck", "racecheck", "initcheck", "synccheck"))
    options.add_argument("--seconds", type=float, default=600.0, help="kill the tests after this time")
    options.add_argument("tests", nargs="*", help="arguments of pytest, after --")
    args = options.parse_args(argv)
    # Without the slack of torch's caching allocator between tensors, memcheck sees an access outside of one.
    extra = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if args.sanitizer else {}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "report.jsonl"
        status, lines = watch(command(args.sanitizer, log, args.tests), args.seconds, os.environ | extra)
        tests, finished = outcomes(log.read_text().splitlines() if log.exists() else [])
    settings = {
        "tests": args.tests,
        "sanitizer": args.sanitizer,
        "seconds": round(time.perf_counter() - start, 1),
        "complete": finished,
        "status": status,
        "counts": dict(Counter(tests.values())),
        "findings": [text.strip() for text in lines if text.startswith("========= ")][-20:],
    }
    failed = [{"test": name, "outcome": outcome} for name, outcome in tests.items() if outcome in ("FAILED", "ERROR")]
    write(args.out, result("checks", settings, failed))
    if status != 0:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
