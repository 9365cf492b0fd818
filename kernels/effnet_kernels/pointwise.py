"""The 1x1 convolutions of a block as matrix products, fused with what comes before and after them; forward only.

    a = silu(gamma (x - mean) rstd + beta) gate[n]    prologue: BatchNorm, Swish and the gate; without one, a = x
    y = a W^T                                         over all pixels: [M, K] times [K, C]

Forward   Reads x, writes y. Epilogue: count, mean and M2 of each program's rows of y, so the next BatchNorm needs no
          pass. `a` is never written: it is rounded to x's dtype in registers, as a map between two ops would be.

Each program computes all its rows for one block of output channels, a tile after the other. Where the output has
several blocks of channels, their programs run side by side and the cache serves x to all but one. Products have
float32 sums; those of float32 maps are three TF32 products (tf32x3), which keeps float32's accuracy. block.py launches
them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from effnet_kernels.depthwise_conv import empty_channels_last
from effnet_kernels.launch import (
    LaunchChoice,
    cdiv,
    channel_block,
    kernel,
    launch,
    power_of_2,
    slots,
    tl,
)
from effnet_kernels.silu import sigmoid
from effnet_kernels.statistics import Affine, chan_merge, load, load_norm, rows_of, store_moments


@dataclass(frozen=True)
class Prologue:
    """What the product applies to its input: the BatchNorm of `stats` [4, K] and `affine`, Swish, and gate [N, K]."""

    stats: Tensor
    affine: Affine
    gate: Tensor


def product_reference(x: Tensor, weight: Tensor, prologue: Prologue | None = None) -> Tensor:
    """The equations above in plain PyTorch; arguments as in `product`."""
    a = x
    if prologue is not None:
        mean, rstd, gamma, beta = (v.to(x.dtype)[:, None, None] for v in (*prologue.stats[:2], *prologue.affine))
        a = torch.nn.functional.silu((x - mean) * rstd * gamma + beta) * prologue.gate.to(x.dtype)[:, :, None, None]
    return torch.nn.functional.conv2d(a, weight.to(x.dtype))


@dataclass(frozen=True)
class ProductLaunch:
    """Each program computes `rows` rows of `block_c` output channels, in tiles of `block_m` rows.

    A tile's sum over the input channels takes `block_k` of them at a time.
    """

    block_m: int
    block_c: int
    block_k: int
    rows: int
    num_warps: int

    def grid(self, m: int, c: int) -> tuple[int, int]:
        """Programs over the blocks of output channels and over the rows."""
        return cdiv(c, self.block_c), cdiv(m, self.rows)

    def constants(self) -> dict[str, int]:
        """Compile-time arguments of the kernel."""
        blocks = {"BLOCK_M": self.block_m, "BLOCK_C": self.block_c, "BLOCK_K": self.block_k}
        return {**blocks, "num_warps": self.num_warps}


def product_launch(
    m: int, k: int, c: int, block_k: int = 32, widest: int = 128, resident: int = 3, values: int = 32
) -> ProductLaunch:
    """`values` sums per thread, which leaves registers for their moments, and programs for one wave.

    There are at least 4 warps. `resident` is the number of programs per multiprocessor.
    """
    block_m = 64
    block_c = max(channel_block(c, widest, slack=1.34), 16)
    num_warps = max(block_m * block_c // (32 * values), 4)
    chunks = max(slots(resident) // cdiv(c, block_c), 1)
    rows = cdiv(cdiv(m, block_m), chunks) * block_m
    return ProductLaunch(block_m, block_c, min(max(power_of_2(k), 16), block_k), rows, num_warps)


def product_launch_space(m: int, k: int, c: int) -> list[ProductLaunch]:
    """Launches an autotuner may try in place of `product_launch`'s choice."""
    choices = itertools.product((32, 64), (32, 64, 128), (2, 3, 4, 8), (16, 32, 64))
    return list(dict.fromkeys(product_launch(m, k, c, *choice) for choice in choices))


product_choice = LaunchChoice("product", product_launch, product_launch_space)  # by (rows, k, c)


@kernel
def _product_kernel(
    x_ptr,  # [M, K]
    w_ptr,  # [C, K]
    stats_ptr,  # [4, K] if PROLOGUE
    gamma_ptr,  # [K] if PROLOGUE
    beta_ptr,  # [K] if PROLOGUE
    gate_ptr,  # [N, K] if PROLOGUE
    y_ptr,  # [M, C]
    moments_ptr,  # [programs, 3, C] if MOMENTS
    M,
    HW,
    rows,
    K: tl.constexpr,
    C: tl.constexpr,
    PROLOGUE: tl.constexpr,
    ONE_IMAGE: tl.constexpr,  # a tile's rows belong to one image
    MOMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    row = tl.arange(0, BLOCK_M)
    start = tl.program_id(1) * rows
    end = tl.minimum(start + rows, M)
    x_at = x_ptr + start.to(tl.int64) * K + row[:, None] * K
    y_at = y_ptr + start.to(tl.int64) * C + row[:, None] * C + c[None, :]
    if MOMENTS:  # each thread updates its own values' by Welford's formula: threads exchange nothing until the end
        count = tl.zeros([BLOCK_M, 1], tl.float32)
        mean = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        m2 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for m in range(start, end, BLOCK_M):
        row_ok = ((m + row) < end)[:, None]
        total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        for first in range(0, K, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            k_ok = k < K
            a = tl.load(x_at + k[None, :], mask=row_ok & k_ok[None, :], other=0.0)
            w = tl.load(w_ptr + c[None, :] * K + k[:, None], mask=k_ok[:, None] & c_ok[None, :], other=0.0)
            if PROLOGUE:
                x_mean, rstd, gamma, beta = load_norm(stats_ptr, gamma_ptr, beta_ptr, k, k_ok, K)
                if ONE_IMAGE:
                    gate = load(gate_ptr + m // HW * K + k, k_ok)[None, :]
                else:
                    gate = load(gate_ptr + ((m + row) // HW)[:, None] * K + k[None, :], row_ok & k_ok[None, :])
                z = (a.to(tl.float32) - x_mean) * (rstd * gamma) + beta
                a = (z * sigmoid(z) * gate).to(x_ptr.dtype.element_ty)
            total = tl.dot(a, w, total, input_precision="tf32x3")
        y = total.to(y_ptr.dtype.element_ty)
        tl.store(y_at, y, mask=row_ok & c_ok[None, :])
        if MOMENTS:  # of y as stored
            value = y.to(tl.float32)
            count += row_ok.to(tl.float32)
            centered = tl.where(row_ok, value - mean, 0.0)
            mean += centered * (1.0 / tl.maximum(count, 1.0))
            m2 += centered * (value - mean)
        x_at += BLOCK_M * K
        y_at += BLOCK_M * C
    if MOMENTS:
        count, mean, m2 = chan_merge(tl.broadcast_to(count, [BLOCK_M, BLOCK_C]), mean, m2)
        store_moments(moments_ptr + tl.program_id(1) * 3 * C, count, mean, m2, c, c_ok, C)


def product(
    x: Tensor, weight: Tensor, prologue: Prologue | None = None, *, moments: bool
) -> tuple[Tensor, Tensor | None]:
    """The 1x1 convolution of x [N, K, H, W] with `weight` [C, K, 1, 1], which is rounded to x's dtype.

    Returns:
        y [N, C, H, W] of x's dtype, channels last, and the moments [programs, 3, C] of its rows if `moments`.
    """
    (m, k), c = rows_of(x), weight.shape[0]
    n, _, h, w = x.shape
    config = product_choice(m, k, c)
    grid = config.grid(m, c)
    y = empty_channels_last(x, n, c, h, w)
    out = torch.empty(grid[1], 3, c, device=x.device, dtype=torch.float32) if moments else None
    taps = weight.detach().to(x.dtype).contiguous()
    vectors = (taps,) * 4 if prologue is None else (prologue.stats, *prologue.affine, prologue.gate)
    launch(
        "block",
        _product_kernel,
        grid,
        x,
        taps,
        *vectors,
        y,
        taps if out is None else out,
        m,
        h * w,
        config.rows,
        K=k,
        C=c,
        PROLOGUE=prologue is not None,
        ONE_IMAGE=h * w % config.block_m == 0,
        MOMENTS=moments,
        **config.constants(),
    )
    return y, out
