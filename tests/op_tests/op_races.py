"""Find races: run a launch's programs in random order in Triton's interpreter and compare the addresses they touch.

A GPU runs the programs of a launch in any order, the interpreter in a fixed one, which hides a dependence among them.
Two programs race where both store to one address, or where one loads what the other stores.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder


@dataclass
class _Accesses:
    """Addresses of one launch, and the program that touched each."""

    addresses: list[np.ndarray] = field(default_factory=list)
    programs: list[np.ndarray] = field(default_factory=list)

    def add(self, pointers, mask, program: int) -> None:
        touched = np.asarray(pointers.data, dtype=np.int64)[np.asarray(mask.data, dtype=bool)]
        self.addresses.append(touched)
        self.programs.append(np.full(touched.size, program))

    def sorted(self) -> tuple[np.ndarray, np.ndarray]:
        if not self.addresses:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        addresses, programs = np.concatenate(self.addresses), np.concatenate(self.programs)
        order = np.lexsort((programs, addresses))
        return addresses[order], programs[order]


def _races(loads: _Accesses, stores: _Accesses) -> list[str]:
    """What went wrong in a launch, in words; empty without a race."""
    stored, by = stores.sorted()
    races = []
    if ((stored[1:] == stored[:-1]) & (by[1:] != by[:-1])).any():
        races.append("two programs store to one address")
    if stored.size:
        loaded, reader = loads.sorted()
        first = np.minimum(np.searchsorted(stored, loaded), stored.size - 1)
        last = np.maximum(np.searchsorted(stored, loaded, side="right") - 1, 0)
        if ((stored[first] == loaded) & ((by[first] != reader) | (by[last] != reader))).any():
            races.append("a program loads what another one stores")
    return races


@contextmanager
def shuffled_programs(seed: int) -> Iterator[list[str]]:
    """Inside the block, launches run their programs in random order; the list fills with the races found."""
    random, races = np.random.default_rng(seed), []
    loads, stores = _Accesses(), _Accesses()
    order, grid, program = np.empty(0, int), (0, 0, 0), 0
    builder = InterpreterBuilder
    originals = {n: getattr(builder, n) for n in ("set_grid_dim", "set_grid_idx")}
    load, store = builder.create_masked_load, builder.create_masked_store

    def finish_launch() -> None:
        nonlocal loads, stores
        races.extend(_races(loads, stores))
        loads, stores = _Accesses(), _Accesses()

    def set_grid_dim(self, *shape):
        nonlocal order, grid
        finish_launch()
        grid, order = shape, random.permutation(np.prod(shape))
        return originals["set_grid_dim"](self, *shape)

    def set_grid_idx(self, *index):
        nonlocal program
        program = int(order[np.ravel_multi_index(index, grid)])
        return originals["set_grid_idx"](self, *(int(i) for i in np.unravel_index(program, grid)))

    def masked_load(self, pointers, mask, *rest):
        loads.add(pointers, mask, program)
        return load(self, pointers, mask, *rest)

    def masked_store(self, pointers, value, mask, *rest):
        stores.add(pointers, mask, program)
        return store(self, pointers, value, mask, *rest)

    with mock.patch.multiple(
        builder,
        set_grid_dim=set_grid_dim,
        set_grid_idx=set_grid_idx,
        create_masked_load=masked_load,
        create_masked_store=masked_store,
    ):
        yield races
        finish_launch()
