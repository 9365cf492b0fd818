"""The sums that programs leave, added up in a fixed order, in one launch.

Many programs write few sums each. On an H100, torch's reduction over those of a projection's BatchNorm took as long as
the pass that wrote them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from effnet_kernels.launch import cdiv, kernel, launch, tl
from effnet_kernels.statistics import load


@kernel
def _add_kernel(
    partials_ptr,  # [groups, size], size = (TAPS + rows) * C
    taps_ptr,  # [C, TAPS]: the sums of the first TAPS rows, transposed
    out_ptr,  # [rows, C]: the sums of the other rows
    groups,
    size,
    C,
    TAPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK_G, BLOCK], tl.float32)
    for first in range(0, groups, BLOCK_G):
        g = first + tl.arange(0, BLOCK_G)
        total += load(partials_ptr + g[:, None] * size + i[None, :], (g < groups)[:, None] & (i < size)[None, :])
    sums = tl.sum(total, axis=0)
    if TAPS > 0:
        tl.store(taps_ptr + i % C * TAPS + i // C, sums.to(taps_ptr.dtype.element_ty), mask=i < TAPS * C)
    tl.store(out_ptr + i - TAPS * C, sums, mask=(i >= TAPS * C) & (i < size))


def _add(partials: Tensor, taps: Tensor, out: Tensor, k2: int) -> None:
    groups, size, c = len(partials), math.prod(partials.shape[1:]), partials.shape[-1]
    assert groups * size < 2**31, "offsets in the partial sums are 32-bit"
    # A program waits for memory once per block of groups. Its values fill whole 32-byte sectors.
    block_g, block = (128, 16) if k2 else (256, 8)
    launch(
        "add_partials",
        _add_kernel,
        (cdiv(size, block),),
        partials,
        taps,
        out,
        groups,
        size,
        c,
        TAPS=k2,
        BLOCK_G=block_g,
        BLOCK=block,
        num_warps=4,
    )


def add_partials(partials: Tensor) -> Tensor:
    """The sum over the first dimension of a contiguous float32 tensor [groups, ..., C]."""
    if len(partials) == 1:
        return partials[0]
    out = torch.empty_like(partials[0])
    _add(partials, out, out, 0)
    return out


def add_weight_partials(partials: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The sums over groups of [groups, k*k + rows, C]: the gradient of a weight [C, 1, k, k], and the rows after it.

    Returns:
        The gradient in the weight's shape and dtype; [rows, C] float32.
    """
    assert weight.is_contiguous(), "the gradient is written as [C, k*k]"
    k2, c = weight[0].numel(), len(weight)
    gradient, out = torch.empty_like(weight), partials.new_empty(partials.shape[1] - k2, c)
    _add(partials, gradient, out, k2)
    return gradient, out
