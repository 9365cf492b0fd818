"""BatchNorm statistics of a channels-last map, which three ops share: tiles' moments, their merge, running averages.

A moment is (count, mean, M2), M2 the sum of squared deviations. Each thread updates its own by Welford's formula;
Chan's formula merges them in a fixed order (Chan, Golub and LeVeque, 1979), so a mean of a thousand standard deviations
loses no accuracy and two runs return the same bits.

`stats` is [4, C] float32 throughout the package: mean, rstd = 1 / sqrt(variance + eps), unbiased variance, count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from effnet_kernels.launch import cdiv, cpp_ops, kernel, launch, row_choice, tl, triton, vector

Affine = tuple[Tensor, Tensor]  # weight and bias of a BatchNorm, [C] each


class BatchNorm(NamedTuple):
    """Parameters [C], buffers [C] and constants of one BatchNorm layer, named as in torch.nn.BatchNorm2d."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    momentum: float = 0.01
    eps: float = 1e-3
    sync: bool = False  # statistics over all ranks of the default process group

    def contiguous(self) -> BatchNorm:
        """With parameters as the kernels read them; no copy if they are contiguous already."""
        return self._replace(weight=self.weight.contiguous(), bias=self.bias.contiguous())


@triton.jit
def row_walk(M, C, rows, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """A program's walk over [M, C]: channels and their mask, row offsets, first and last row, 64-bit base, tile."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.arange(0, BLOCK_M)
    start = tl.program_id(1) * rows
    end = tl.minimum(start + rows, M)
    return c, c < C, row, start, end, start.to(tl.int64) * C, row[:, None] * C + c[None, :]


@triton.jit
def last_tile(start, end, BLOCK_M: tl.constexpr):
    """First row of the last tile of the rows from `start` to before `end`."""
    return start + (end - 1 - start) // BLOCK_M * BLOCK_M


@triton.jit
def load(ptr, mask):
    """Values in float32, 0 where the mask is False."""
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_norm(
    stats_ptr,  # [4, C]
    gamma_ptr,  # [C]
    beta_ptr,  # [C]
    c,
    c_ok,
    C,
):
    """mean, rstd, gamma and beta of channels c, each [1, BLOCK_C] float32."""
    mean = load(stats_ptr + c, c_ok)
    rstd = load(stats_ptr + C + c, c_ok)
    gamma = load(gamma_ptr + c, c_ok)
    beta = load(beta_ptr + c, c_ok)
    return mean[None, :], rstd[None, :], gamma[None, :], beta[None, :]


@triton.jit
def load_mean_gradients(
    sums_ptr,  # [2, C]: dbeta, dgamma, over all ranks
    stats_ptr,  # [4, C]
    c,
    c_ok,
    C,
):
    """Means of dz and of dz * xhat over all pixels of all ranks, each [1, BLOCK_C]."""
    count = tl.load(stats_ptr + 3 * C + c, mask=c_ok, other=1.0)
    return (load(sums_ptr + c, c_ok) / count)[None, :], (load(sums_ptr + C + c, c_ok) / count)[None, :]


@triton.jit
def chan_merge(count, mean, m2):
    """Merge moments [groups, BLOCK_C] along axis 0."""
    total = tl.sum(count, axis=0)
    merged = tl.sum(count * mean, axis=0) / tl.maximum(total, 1.0)
    centered = mean - merged[None, :]
    return total, merged, tl.sum(m2 + count * centered * centered, axis=0)


@triton.jit
def store_moments(
    moments_ptr,  # [3, C], one program's row of [programs, 3, C]
    count,
    mean,
    m2,
    c,
    c_ok,
    C,
):
    tl.store(moments_ptr + c, count, mask=c_ok)
    tl.store(moments_ptr + C + c, mean, mask=c_ok)
    tl.store(moments_ptr + 2 * C + c, m2, mask=c_ok)


@kernel
def _moments_kernel(
    x_ptr,  # [M, C]
    moments_ptr,  # [programs, 3, C]
    M,
    C,
    rows,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C = C // VEC * VEC  # lets the compiler see what C is a multiple of
    c, c_ok, row, start, end, base, tile = row_walk(M, C, rows, BLOCK_M, BLOCK_C)
    # Each thread updates its own values: threads exchange nothing until the end.
    count = tl.zeros([BLOCK_M, 1], tl.float32)
    mean = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for m in range(start, end, BLOCK_M):
        row_ok = ((m + row) < end)[:, None]
        x = load(x_ptr + base + tile, row_ok & c_ok[None, :])
        count += row_ok.to(tl.float32)
        centered = tl.where(row_ok, x - mean, 0.0)
        mean += centered * (1.0 / tl.maximum(count, 1.0))
        m2 += centered * (x - mean)
        base += BLOCK_M * C
    count, mean, m2 = chan_merge(tl.broadcast_to(count, [BLOCK_M, BLOCK_C]), mean, m2)
    store_moments(moments_ptr + tl.program_id(1) * 3 * C, count, mean, m2, c, c_ok, C)


@kernel
def _merge_kernel(
    moments_ptr,  # [groups, 3, C]
    out_ptr,  # [4, C] statistics if FINAL, else [3, C] moments
    groups,
    C,
    eps,
    FINAL: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C = C // VEC * VEC
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    count = tl.zeros([BLOCK_C], tl.float32)
    mean = tl.zeros([BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_C], tl.float32)
    for first in range(0, groups, BLOCK_G):
        g = first + tl.arange(0, BLOCK_G)
        group_ptr = moments_ptr + g[:, None] * 3 * C + c[None, :]
        ok = (g < groups)[:, None] & c_ok[None, :]
        # Merge the groups of this turn, then merge the result into the total.
        count_i, mean_i, m2_i = chan_merge(load(group_ptr, ok), load(group_ptr + C, ok), load(group_ptr + 2 * C, ok))
        difference = mean_i - mean
        share = count_i / tl.maximum(count + count_i, 1.0)
        mean += difference * share
        m2 += m2_i + difference * difference * count * share
        count += count_i
    if FINAL:
        tl.store(out_ptr + c, mean, mask=c_ok)
        tl.store(out_ptr + C + c, 1.0 / tl.sqrt(m2 / tl.maximum(count, 1.0) + eps), mask=c_ok)
        tl.store(out_ptr + 2 * C + c, m2 / tl.maximum(count - 1.0, 1.0), mask=c_ok)
        tl.store(out_ptr + 3 * C + c, count, mask=c_ok)
    else:
        store_moments(out_ptr, count, mean, m2, c, c_ok, C)


def rows_of(x: Tensor) -> tuple[int, int]:
    """(N*H*W, C) of a channels-last tensor [N, C, H, W]."""
    n, c, h, w = x.shape
    assert n * h * w < 2**31, "row numbers are 32-bit"
    return n * h * w, c


def merge_moments(moments: Tensor, eps: float, sync: bool) -> Tensor:
    """Statistics [4, C] from the programs' moments [programs, 3, C] of this rank, of all ranks if `sync`."""
    if sync and dist.is_initialized():
        local = _merge(moments, moments.new_empty(3, moments.shape[2]), eps, final=False)
        gathered = local.new_empty(dist.get_world_size() * 3, moments.shape[2])
        # torch 2.13 has renamed it.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(gathered, local)
        moments = gathered.view(-1, *local.shape)
    return _merge(moments, moments.new_empty(4, moments.shape[2]), eps, final=True)


def _merge(moments: Tensor, out: Tensor, eps: float, *, final: bool) -> Tensor:
    if ops := cpp_ops(moments):
        return ops.merge_moments(moments, eps, final)
    groups, _, c = moments.shape
    block_c = 8  # 8 float32 values fill a 32-byte sector
    launch(
        "batch_norm",
        _merge_kernel,
        (cdiv(c, block_c),),
        moments,
        out,
        groups,
        c,
        eps,
        FINAL=final,
        VEC=vector(c),
        BLOCK_G=256,  # many groups a turn: each turn waits for memory once
        BLOCK_C=block_c,
        num_warps=4,
    )
    return out


statistics_choice = row_choice("statistics")


def batch_statistics(x: Tensor, eps: float, sync: bool) -> Tensor:
    """Statistics [4, C] of a channels-last tensor, in one pass over it."""
    if ops := cpp_ops(x):
        return merge_moments(ops.moments(x), eps, sync)
    m, c = rows_of(x)
    config = statistics_choice(m, c)
    grid = config.grid(m, c)
    moments = torch.empty(grid[1], 3, c, device=x.device, dtype=torch.float32)
    launch("batch_norm", _moments_kernel, grid, x, moments, m, c, config.rows, **config.constants(c))
    return merge_moments(moments, eps, sync)


def sum_over_ranks(sums: Tensor, sync: bool) -> Tensor:
    """`sums` added over all ranks in a new tensor if `sync`, else `sums` itself."""
    if sync and dist.is_initialized():
        sums = sums.clone()
        dist.all_reduce(sums)
    return sums


def running_statistics(bn: BatchNorm) -> Tensor:
    """The running mean and variance as `stats` [4, C]; evaluation never reads the count."""
    mean, var = bn.running_mean.float(), bn.running_var.float()
    return torch.stack((mean, torch.rsqrt(var + bn.eps), var, torch.ones_like(mean)))


def update_running(bn: BatchNorm, stats: Tensor) -> None:
    """running += momentum * (batch - running) with the unbiased variance, as torch does, in one launch."""
    with torch.no_grad():
        mean, _, var, _ = stats.detach().to(bn.running_mean.dtype).unbind()
        torch._foreach_lerp_([bn.running_mean, bn.running_var], [mean, var], bn.momentum)


def require_values(shape: Sequence[int], sync: bool) -> None:
    """Check that a training BatchNorm over [N, C, ...] gets more than one value per channel.

    Raises:
        ValueError: it gets one, with torch's message.
    """
    if not sync and math.prod(shape) == shape[1]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {torch.Size(shape)}")


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an op on any of `tensors`."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
