"""A rank that no longer moves is named, with its stack, instead of being waited for."""

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
_POLLS = 8  # within the time limit
_LONGEST_POLL = 5.0  # seconds


@dataclass(frozen=True)
class Sign:
    """A rank's sign of life, as the other ranks read it.

    Attributes:
        count: signs given so far; one that stays the same is of a process that is stopped, cut off or gone.
        name: rank, host and process number.
        doing: what its training is at.
    """

    count: int
    name: str
    doing: str


class Watchdog:
    """Watches that this rank's training moves and that the other ranks' processes are alive.

    When training has not moved for `seconds`, each rank says on stderr who it is, what it was at and on which line it
    stands; the first of them also names the ranks that give no sign of life. Then the process ends, so that torchrun
    starts the ranks again. A context manager.

    Args:
        world: of the run.
        seconds: limit; 0 switches the watch off.
        board: key-value store that all ranks share, used by nothing else; None for a world of one.
        end: ends the process.
    """

    def __init__(
        self,
        world: World,
        seconds: float,
        board: dist.Store | None = None,
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self._world, self._seconds, self._board, self._end = world, seconds, board, end
        self._name = f"rank {world.rank} (host {socket.gethostname()}, process {os.getpid()})"
        self._watched = threading.get_ident()
        self._doing, self._since = "starting", time.monotonic()
        self._heard = time.monotonic()  # when the board last answered
        self._seen: dict[int, tuple[Sign, float]] = {}  # rank -> newest sign, when it was seen first
        self._done = threading.Event()
        # Two threads: where the network is cut, a word with the board never ends.
        work = (self._watch, self._exchange) if board is not None else (self._watch,)
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

    def moved(self, doing: str) -> None:
        """Training has come to something new."""
        self._doing, self._since = doing, time.monotonic()

    def watch(self, batches: Iterable[T], doing: str, number: int = 0) -> Iterator[T]:
        """Pass batches on, each a move; the first has this `number`."""
        iterator = iter(batches)
        while True:
            self.moved(f"{doing}, loading batch {number}")
            try:
                batch = next(iterator)
            except StopIteration:
                self.moved(f"the end of {doing}")
                return
            self.moved(f"{doing}, computing batch {number}")
            yield batch
            number += 1

    @property
    def _pause(self) -> float:
        return self._seconds / _POLLS

    def _watch(self) -> None:
        poll = min(self._pause, _LONGEST_POLL)
        before = time.monotonic()
        while not self._done.wait(poll):
            now = time.monotonic()
            if now - before > 3 * poll:  # this process itself was stopped for a while
                self._since = now
            before = now
            if now - self._since > self._seconds:
                self._report()
                time.sleep(2 * poll)  # the other ranks have something to say too, and would end with this one
                self._end(EXIT_STATUS)
                return

    def _exchange(self) -> None:
        """Give signs of life and read the others'."""
        assert self._board is not None
        others = [rank for rank in range(self._world.size) if rank != self._world.rank]
        for count in itertools.count():
            try:
                own = Sign(count, self._name, self._doing)
                self._board.set(_key(self._world.rank), json.dumps(dataclasses.asdict(own)))
                for rank in others:
                    if self._board.check([_key(rank)]):
                        self._see(rank, Sign(**json.loads(self._board.get(_key(rank)))))
                self._heard = time.monotonic()
            except RuntimeError:  # torch.distributed's errors are of this kind; the signs seen so far grow old
                pass
            if self._done.wait(self._pause):
                return

    def _see(self, rank: int, sign: Sign) -> None:
        if rank not in self._seen or self._seen[rank][0].count != sign.count:
            self._seen[rank] = sign, time.monotonic()

    def _report(self) -> None:
        still = time.monotonic() - self._since
        lines = [f"{self._name} has not moved for {still:.0f} s; it was at {self._doing}, and stands at:"]
        lines += [line.rstrip() for line in traceback.format_stack(sys._current_frames().get(self._watched))]
        silent = self._silent()
        alive = [rank for rank in range(self._world.size) if rank not in silent]
        if self._world.rank == alive[0]:
            lines += silent.values()
        # One call of write, so that the reports of several ranks do not mingle.
        sys.stderr.write("\n".join(lines) + "\n")
        sys.stderr.flush()

    def _silent(self) -> dict[int, str]:
        """The ranks without a sign of life for half the limit, and what is known of them."""
        if self._world.rank and time.monotonic() - self._heard > self._seconds / 2:
            return {0: "rank 0, which keeps the signs of life, does not answer; nothing is known of the others"}
        found = {}
        for rank in range(self._world.size):
            if rank == self._world.rank:
                continue
            if rank not in self._seen:
                found[rank] = f"rank {rank} gives no sign of life, and never gave one"
            elif (age := time.monotonic() - self._seen[rank][1]) > self._seconds / 2:
                sign = self._seen[rank][0]
                found[rank] = f"{sign.name} gives no sign of life for {age:.0f} s; it was last at {sign.doing}"
        return found


def _key(rank: int) -> str:
    return f"effnet_fast/sign/{rank}"


def watchdog(world: World, seconds: float) -> Watchdog:
    """The watchdog of this rank."""
    return Watchdog(world, seconds, distributed.board() if seconds > 0 else None)
