"""Report a rank that makes no progress, with its stack, and end the process."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from effnet_fast import distributed
from effnet_fast.distributed import World

T = TypeVar("T")

EXIT_STATUS = 70  # EX_SOFTWARE of sysexits.h
_POLLS = 8  # polls within the time limit
_LONGEST_POLL = 5.0  # seconds


@dataclass(frozen=True)
class Heartbeat:
    """What each rank publishes for the others.

    Attributes:
        count: number of heartbeats so far; if it stops rising, the process is stopped, disconnected or dead.
        name: rank, host and process number.
        activity: what the rank's training is doing.
    """

    count: int
    name: str
    activity: str


class Watchdog:
    """Monitors the progress of this rank and the heartbeats of the others. A context manager.

    After `seconds` without progress, each rank prints its name, its activity and its stack to stderr. The first living
    rank also lists the ranks without a heartbeat. Then the process exits, so that torchrun restarts the ranks.

    Args:
        world: rank, size and device.
        seconds: limit; 0 turns the watchdog off.
        store: key-value store shared by all ranks and used for nothing else; None with one rank.
        exit_process: called with EXIT_STATUS.
    """

    def __init__(
        self,
        world: World,
        seconds: float,
        store: dist.Store | None = None,
        exit_process: Callable[[int], Any] = os._exit,
    ) -> None:
        self._world, self._seconds, self._store, self._exit_process = world, seconds, store, exit_process
        self._name = f"rank {world.rank} (host {socket.gethostname()}, process {os.getpid()})"
        self._thread_id = threading.get_ident()  # the training thread
        self._activity, self._since = "starting", time.monotonic()
        self._store_answered = time.monotonic()  # when the store last answered
        self._heartbeats: dict[int, tuple[Heartbeat, float]] = {}  # rank -> newest heartbeat, time it was first seen
        self._done = threading.Event()
        # Two threads, since a call to the store blocks forever if the network is down.
        work = (self._watch, self._exchange) if store is not None else (self._watch,)
        self._threads = [threading.Thread(target=target, name="watchdog", daemon=True) for target in work]

    def __enter__(self) -> Watchdog:
        if self._seconds > 0:
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._seconds > 0:
            for thread in self._threads:
                thread.join(timeout=1.0)

    def progress(self, activity: str) -> None:
        """Note that training has progressed to a new activity."""
        self._activity, self._since = activity, time.monotonic()

    def watch(self, batches: Iterable[T], activity: str, number: int = 0) -> Iterator[T]:
        """Pass batches through; each counts as progress. The first has this `number`."""
        iterator = iter(batches)
        while True:
            self.progress(f"{activity}, loading batch {number}")
            try:
                batch = next(iterator)
            except StopIteration:
                self.progress(f"the end of {activity}")
                return
            self.progress(f"{activity}, computing batch {number}")
            yield batch
            number += 1

    @property
    def _pause(self) -> float:
        return self._seconds / _POLLS

    def _watch(self) -> None:
        poll = min(self._pause, _LONGEST_POLL)
        last_poll = time.monotonic()
        while not self._done.wait(poll):
            now = time.monotonic()
            if now - last_poll > 3 * poll:  # this process itself was stopped for a while
                self._since = now
            last_poll = now
            if now - self._since > self._seconds:
                self._report()
                time.sleep(2 * poll)  # torchrun ends all ranks with this one: let the others report first
                self._exit_process(EXIT_STATUS)
                return

    def _exchange(self) -> None:
        """Publish heartbeats and read those of the other ranks."""
        assert self._store is not None
        others = [rank for rank in range(self._world.size) if rank != self._world.rank]
        for count in itertools.count():
            try:
                heartbeat = Heartbeat(count, self._name, self._activity)
                self._store.set(_key(self._world.rank), json.dumps(dataclasses.asdict(heartbeat)))
                for rank in others:
                    if self._store.check([_key(rank)]):
                        self._receive(rank, Heartbeat(**json.loads(self._store.get(_key(rank)))))
                self._store_answered = time.monotonic()
            except RuntimeError:  # the base class of torch.distributed's errors; the last heartbeats stay as they are
                pass
            if self._done.wait(self._pause):
                return

    def _receive(self, rank: int, heartbeat: Heartbeat) -> None:
        if rank not in self._heartbeats or self._heartbeats[rank][0].count != heartbeat.count:
            self._heartbeats[rank] = heartbeat, time.monotonic()

    def _report(self) -> None:
        seconds = time.monotonic() - self._since
        lines = [f"{self._name} has made no progress for {seconds:.0f} s, at {self._activity}; its stack:"]
        lines += [line.rstrip() for line in traceback.format_stack(sys._current_frames().get(self._thread_id))]
        silent = self._silent()
        alive = [rank for rank in range(self._world.size) if rank not in silent]
        if self._world.rank == alive[0]:
            lines += silent.values()
        # A single write, so that the reports of several ranks do not interleave.
        sys.stderr.write("\n".join(lines) + "\n")
        sys.stderr.flush()

    def _silent(self) -> dict[int, str]:
        """Ranks without a heartbeat for half the limit, with a line about each."""
        if self._world.rank and time.monotonic() - self._store_answered > self._seconds / 2:
            return {0: "rank 0, which stores the heartbeats, does not answer; the state of the others is unknown"}
        silent = {}
        for rank in range(self._world.size):
            if rank == self._world.rank:
                continue
            if rank not in self._heartbeats:
                silent[rank] = f"rank {rank} has sent no heartbeat at all"
            elif (age := time.monotonic() - self._heartbeats[rank][1]) > self._seconds / 2:
                heartbeat = self._heartbeats[rank][0]
                silent[rank] = f"{heartbeat.name} has sent no heartbeat for {age:.0f} s; it was at {heartbeat.activity}"
        return silent


def _key(rank: int) -> str:
    return f"effnet_fast/heartbeat/{rank}"


def watchdog(world: World, seconds: float) -> Watchdog:
    """Create this rank's watchdog, which exchanges heartbeats through the ranks' key-value store."""
    return Watchdog(world, seconds, distributed.key_value_store() if seconds > 0 else None)
