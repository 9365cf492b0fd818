"""Share the CPU with other processes: limit how long OpenMP threads spin, and their number.

In GNU's libgomp, a thread that waits for the others spins for some milliseconds before it sleeps. If other
processes need the cores too, a thread may spin while the thread it waits for has no core: two trainings on two cores
then run at a third of the speed that they have with one thread each. A short spin avoids this, but costs a training
that runs alone a quarter of its speed, so the spin is short only while other processes need the cores. Unlike the
number of threads, the length of the spin does not change results.

libgomp shortens the spin from 300,000 to 100 iterations while it has more threads than there are cores. While
other processes need the cores, `share_cores` therefore keeps a team of idle threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterator, MutableMapping
from pathlib import Path

POLL_SECONDS = 0.5
# The cores are contended if other processes use more than this many cores beyond those that this process leaves free.
TOLERANCE = 0.25

_SPIN_SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def limit_threads(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set OMP_NUM_THREADS to the CPU quota of the container, unless the user has set it.

    OpenMP reads the variable when torch is imported; call this before, since afterwards it does nothing.
    """
    quota = cpu_quota()
    if quota is not None and quota < _cores() and "torch" not in sys.modules:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, int(quota))))


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores that the container's cgroup (version 2 or 1) may use on average; None without a limit."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (root / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        quota, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    return None


@contextlib.contextmanager
def share_cores() -> Iterator[None]:
    """Within the context, spin briefly while other processes need the cores, unless the user has set _SPIN_SETTINGS."""
    if any(name in os.environ for name in _SPIN_SETTINGS):
        yield
        return
    done = threading.Event()
    monitor = threading.Thread(target=_monitor, args=(done,), name="share cores", daemon=True)
    monitor.start()
    try:
        yield
    finally:
        done.set()
        monitor.join()


def _monitor(done: threading.Event) -> None:
    team: IdleTeam | None = None
    load = Load()
    while not done.wait(POLL_SECONDS):
        contended = load.is_contended(_threads())
        if contended and team is None:
            team = IdleTeam.start()
        elif not contended and team is not None:
            team.stop()
            team = None
    if team is not None:
        team.stop()


class Load:
    """Measures the CPU time that other processes use on this process's cores between two calls."""

    def __init__(self) -> None:
        self._last = self._sample()

    def is_contended(self, threads: int) -> bool:
        """Whether other processes and the `threads` of this one need more cores than exist; False for one thread."""
        last, self._last = self._last, self._sample()
        seconds, busy, mine = (now - before for now, before in zip(self._last, last, strict=True))
        if seconds <= 0 or threads <= 1:
            return False
        others = (busy - mine) / seconds
        return others > max(_cores() - threads, 0) + TOLERANCE

    def _sample(self) -> tuple[float, float, float]:
        """Time, busy time of the cores, CPU time of this process; all in seconds."""
        return time.monotonic(), _busy_seconds(), time.process_time()


def _busy_seconds() -> float:
    """CPU time that all processes have used on this one's cores since boot; 0 where /proc/stat does not exist."""
    with contextlib.suppress(OSError):
        available = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        rows = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        # user, nice, system, idle, iowait, irq, softirq, steal
        ticks = [sum(map(int, row[1:4])) + sum(map(int, row[6:8])) for row in rows if row[0] in available]
        return sum(ticks) / os.sysconf("SC_CLK_TCK")
    return 0.0


class IdleTeam:
    """A sleeping libgomp team of more threads than cores, owned by a thread of its own; `stop` frees it."""

    def __init__(self, libgomp: ctypes.CDLL) -> None:
        self._libgomp = libgomp
        self._done, self._asleep = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="idle OpenMP team", daemon=True)
        self._thread.start()

    @classmethod
    def start(cls) -> IdleTeam | None:
        """The team; None if libgomp is not loaded."""
        path = _libgomp_path()
        return None if path is None else cls(ctypes.CDLL(path))

    def _run(self) -> None:
        does_nothing = ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p)
        self._libgomp.GOMP_parallel(does_nothing, None, _cores() + 1, 0)
        self._asleep.set()
        self._done.wait()

    def is_asleep(self) -> bool:
        """Whether the threads exist and have nothing to do."""
        return self._asleep.is_set()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()


def _libgomp_path() -> str | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            path = line.split(maxsplit=5)[-1]
            if Path(path).name.startswith("libgomp"):
                return path
    return None


def _threads() -> int:
    """OpenMP threads of this process's computations; 0 before torch is imported."""
    torch = sys.modules.get("torch")
    return 0 if torch is None or not hasattr(torch, "get_num_threads") else torch.get_num_threads()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
