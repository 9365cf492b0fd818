"""Count the bytes that a training step of an MBConv block moves: `python op_traffic.py` prints the tables.

Records every load and store in Triton's interpreter. A program's accesses count as distinct 32-byte sectors: a GPU
moves whole sectors, and a repeated access by the same program hits the cache. A sector that several programs access
(the halo of a convolution, a layer's vectors) counts once as traffic; the further accesses are listed separately, since
the L2 cache serves most of them. PyTorch operators between the kernels count by the sizes of their tensors. The 1x1
convolutions around the op are library calls and count as each operand read or written once.
"""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpreterBuilder

from effnet_kernels import batch_norm, launch, mbconv
from effnet_kernels.block import _block

SECTOR = 32
BATCH = 512  # small batches run on fewer processors, so that a program does as much work as at this batch size


@dataclass
class Traffic:
    """Bytes by kernel. `once` counts each sector once per launch; `again` counts accesses by further programs."""

    once: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    again: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    @property
    def total(self) -> int:
        return sum(self.once.values())


class _TorchOps(TorchDispatchMode):
    """Counts the inputs and outputs of PyTorch operators, except views and allocations."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic
        self.paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not self.paused and "empty" not in name and not func.is_view and name != "detach":
            tensors = [t for t in (*args, out) if isinstance(t, torch.Tensor)]
            self.traffic.once["torch"] += sum(t.numel() * t.element_size() for t in tensors)
        return out


@contextmanager
def recorded(batch: int):
    """Yield the `Traffic` of the launches inside the block; a program does as much work as at batch size `BATCH`."""
    traffic = Traffic()
    sectors: dict[str, list[np.ndarray]] = {"load": [], "store": []}
    programs: list[tuple] = []
    originals = {
        n: getattr(InterpreterBuilder, n) for n in ("create_masked_load", "create_masked_store", "set_grid_idx")
    }

    def record(kind, ptrs, mask):
        addresses = np.asarray(ptrs.data)[np.asarray(mask.data, dtype=bool)]
        sectors[kind].append(np.unique(addresses // SECTOR))

    def load(self, ptrs, mask, *rest):
        record("load", ptrs, mask)
        return originals["create_masked_load"](self, ptrs, mask, *rest)

    def store(self, ptrs, value, mask, *rest):
        record("store", ptrs, mask)
        return originals["create_masked_store"](self, ptrs, value, mask, *rest)

    def close_program():
        for kind, touched in sectors.items():
            if touched:
                programs.append((kind, np.unique(np.concatenate(touched))))
                touched.clear()

    def start_program(self, *index):
        close_program()
        return originals["set_grid_idx"](self, *index)

    def counted_launch(op, kernel, grid, *args, **constants):
        torch_ops.paused = True
        kernel[grid](*args, **constants)
        torch_ops.paused = False
        close_program()
        for kind in ("load", "store"):
            touched = [s for k, s in programs if k == kind]
            if touched:
                distinct = len(np.unique(np.concatenate(touched)))
                traffic.once[kernel.__name__] += distinct * SECTOR
                traffic.again[kernel.__name__] += (sum(map(len, touched)) - distinct) * SECTOR
        programs.clear()

    torch_ops = _TorchOps(traffic)
    processors = launch.PROCESSORS
    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store
    InterpreterBuilder.set_grid_idx = start_program
    launch.PROCESSORS = max(processors * batch // BATCH, 1)
    launch.heuristics_launch.cache_clear()
    try:
        with launch.launches_go_to(counted_launch), torch_ops:
            yield traffic
    finally:
        for name, function in originals.items():
            setattr(InterpreterBuilder, name, function)
        launch.PROCESSORS = processors
        launch.heuristics_launch.cache_clear()


@dataclass(frozen=True)
class BlockTraffic:
    """Bytes of one training step of a block.

    Attributes:
        e, d: one pass over the map before and after the depthwise convolution.
        narrow: all passes over the block's input and output, including the 1x1 convolutions'.
        kernels: what the Triton kernels and the PyTorch operators between them move.
        library: what the two 1x1 convolutions move.
    """

    e: int
    d: int
    narrow: int
    kernels: Traffic
    library: int

    @property
    def measured(self) -> int:
        return self.kernels.total + self.library

    def plan(self, e_passes: int, d_passes: int) -> int:
        """Bytes of so many passes over E and D, plus the block's passes over its input and output."""
        return e_passes * self.e + d_passes * self.d + self.narrow


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(shape).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def block_traffic(batch: int, block: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> BlockTraffic:
    """Run mbconv and the projection's BatchNorm, forward and backward, on a block from `op_launches.blocks`."""
    inputs, outputs, size, k, stride, expansion = block
    assert expansion > 1
    c, r, pad = inputs * expansion, max(1, inputs // 4), [k // 2] * 4
    x, w = _random(batch, c, size, size, dtype=dtype), _random(c, 1, k, k)
    first, second, third = ((_random(m), _random(m)) for m in (c, c, outputs))
    se = [_random(r, c, 1, 1), _random(r), _random(c, r, 1, 1), _random(c)]
    pixels = -(-size // stride)
    dy, p, dp, skip = (_random(batch, m, pixels, pixels, dtype=dtype) for m in (c, outputs, outputs, outputs))
    scale = torch.ones(batch)
    residual = skip if stride == 1 and inputs == outputs else None
    with recorded(batch) as traffic:
        _, d, *saved = mbconv._mbconv._init_fn(x, *first, w, *second, *se, stride, pad, 1e-3, False)
        mbconv._mbconv_backward._init_fn(dy, x, d, *first, w, *second, se, saved, stride, pad, False)
        args = (residual, None if residual is None else scale, False, 1e-3, False)
        _, stats = batch_norm._batch_norm._init_fn(p, *third, *args)
        batch_norm._batch_norm_backward._init_fn(dp, p, stats, *third, args[1], False, False)
    e, d, out = (t.numel() * t.element_size() for t in (x, dy, p))
    inner = e // expansion
    # Expansion: x read, E written; backward dE read twice, x read, dx written. Projection: y read, p written; backward
    # dp read twice, y read, dy written. BatchNorm of p: p read twice and written, with the residual read; backward
    # dy and p read twice and dp written.
    library = (3 * e + 3 * inner) + (3 * d + 3 * out)
    narrow = 3 * inner + 3 * out + (8 + (residual is not None)) * out
    return BlockTraffic(e, d, narrow, traffic, library)


def forward_bytes(batch: int, shape: tuple[int, ...], *, products: bool) -> int:
    """Bytes of a block's forward pass in bf16, whose 1x1 convolutions are the library's or Triton's `products`."""
    inputs, outputs, size, k, stride, expansion = shape
    c, r, pad, dtype = inputs * expansion, max(1, inputs // 4), [k // 2] * 4, torch.bfloat16
    pixels, residual = -(-size // stride), stride == 1 and inputs == outputs
    x, e = (_random(batch, m, size, size, dtype=dtype) for m in (inputs, c))
    y, p = (_random(batch, m, pixels, pixels, dtype=dtype) for m in (c, outputs))
    expand = [_random(c, inputs, 1, 1), _random(c), _random(c)]
    conv = [_random(c, 1, k, k), _random(c), _random(c)]
    se = [_random(r, c, 1, 1), _random(r), _random(c, r, 1, 1), _random(c)]
    project, scale = [_random(outputs, c, 1, 1), _random(outputs), _random(outputs)], torch.ones(batch)
    with recorded(batch) as traffic:
        if products:
            _block._init_fn(x, expand, conv, se, project, scale, residual, stride, pad, 1e-3, False)
            return traffic.total
        mbconv._mbconv._init_fn(e, *expand[1:], conv[0], *conv[1:], *se, stride, pad, 1e-3, False)
        batch_norm._batch_norm._init_fn(p, *project[1:], x if residual else None, scale, False, 1e-3, False)
    return traffic.total + sum(t.numel() * t.element_size() for t in (x, e, y, p))


def report(batch: int, block: tuple[int, ...]) -> str:
    """A Markdown table: MB of each kernel, and of the whole block beside three plans."""
    t = block_traffic(batch, block)
    lines = ["| kernel | MB | touched again, MB |", "|---|---|---|"]
    for name in t.kernels.once:
        lines.append(f"| `{name}` | {t.kernels.once[name] / 1e6:.3f} | {t.kernels.again[name] / 1e6:.3f} |")
    lines.append(f"| the two 1x1 convolutions (library) | {t.library / 1e6:.3f} | |")
    lines.append(f"| **block, as run** | **{t.measured / 1e6:.3f}** | |")
    plans = {
        "eager": (23, 29),
        "BatchNorm and Swish fused": (16, 22),
        "the depthwise convolution too": (11, 12),
    }
    for name, passes in plans.items():
        plan = t.plan(*passes)
        lines.append(f"| {name}, {passes[0]} E + {passes[1]} D | {plan / 1e6:.3f} | as run: {t.measured / plan:.2f} |")
    without, with_products = (forward_bytes(batch, block, products=products) / 1e6 for products in (False, True))
    lines.append(f"| forward pass; with Triton's products | {without:.3f}; {with_products:.3f} | |")
    return "\n".join(lines)


if __name__ == "__main__":
    from op_launches import blocks

    for block in (blocks(0, 32, 8)[i] for i in (2, 3, 4, 6)):
        batch = 2 * max(256 // block[2] ** 2, 1)  # large enough that the maps outweigh the weights
        print(f"\nB0 at 32 px, output stride 8, block {block}, batch {batch}\n\n{report(batch, block)}")
