"""Find races: run a launch's programs in random order in Triton's interpreter and compare the addresses they touch.

A GPU runs the programs of a launch in any order. The interpreter's fixed order would hide a dependence between them.
Two programs race if both store to one address, or if one loads an address that the other stores to.
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
    """Addresses that one launch loads or stores, with the program of each access."""

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
    """Describe the races of a launch; an empty list if there are none."""
    stored, writer = stores.sorted()
    races = []
    if ((stored[1:] == stored[:-1]) & (writer[1:] != writer[:-1])).any():
        races.append("two programs store to one address")
    if stored.size:
        loaded, reader = loads.sorted()
        first = np.minimum(np.searchsorted(stored, loaded), stored.size - 1)
        last = np.maximum(np.searchsorted(stored, loaded, side="right") - 1, 0)
        if ((stored[first] == loaded) & ((writer[first] != reader) | (writer[last] != reader))).any():
            races.append("a program loads what another one stores")
    return races


@contextmanager
def shuffled_programs(seed: int) -> Iterator[list[str]]:
    """Run the programs of every launch inside the block in random order; yields a list that collects their races."""
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
