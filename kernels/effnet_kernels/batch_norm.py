"""Training BatchNorm, with what follows it in an EfficientNet in the same pass: Swish, stochastic depth, the residual.

    xhat = (x - mean) rstd,  z = gamma xhat + beta,  y = scale[n] act(z) + residual        (Ioffe and Szegedy, 2015)

Forward   pass 1 reads x: count, mean and M2 of each tile by Welford's update, merged by Chan's formula in a fixed
          order; pass 2 reads x (and residual) and writes y. Between them the moments can be gathered from all ranks.
Backward  dz = scale[n] dy act'(z);  dbeta = sum dz;  dgamma = sum dz xhat;
          dx = gamma rstd (dz - (dbeta + xhat dgamma) / count);  dresidual = dy, which needs no pass at all.
          Pass 1 reads dy and x for the two sums, pass 2 reads both again and writes dx. Saved: x, mean and rstd.

`stats` is [4, C] float32 throughout: mean, rstd, unbiased variance, count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from effnet_kernels.launch import (
    Kernels,
    cdiv,
    channels_last,
    kernel,
    launch,
    row_launch,
    tl,
    triton,
    use_triton,
    vector,
)
from effnet_kernels.silu import sigmoid, silu_slope

Affine = tuple[Tensor, Tensor]  # weight and bias of a BatchNorm, [C] each


class BatchNorm(NamedTuple):
    """Parameters [C], buffers [C] and constants of one BatchNorm layer, as torch names them."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    momentum: float = 0.01
    eps: float = 1e-3
    sync: bool = False  # statistics over all ranks of the default process group


def batch_norm_reference(
    x: Tensor,
    bn: BatchNorm,
    *,
    training: bool = True,
    activation: bool = False,
    residual: Tensor | None = None,
    sample_scale: Tensor | None = None,
) -> Tensor:
    """The maths of this file in plain PyTorch, on one rank; arguments as in `batch_norm`."""
    assert not (training and bn.sync), "the reference knows one rank; share statistics by the model's own BatchNorm"
    y = torch.nn.functional.batch_norm(
        x, bn.running_mean, bn.running_var, bn.weight, bn.bias, training, bn.momentum, bn.eps
    )
    if activation:
        y = torch.nn.functional.silu(y)
    if sample_scale is not None:
        y = y * sample_scale.to(y.dtype).view(-1, 1, 1, 1)
    return y if residual is None else y + residual


@triton.jit
def row_walk(M, C, rows, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Where a program's walk over [M, C] begins: channels, rows start to end, and a 64-bit base for a 32-bit tile."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.arange(0, BLOCK_M)
    start = tl.program_id(1) * rows
    end = tl.minimum(start + rows, M)
    return c, c < C, row, start, end, start.to(tl.int64) * C, row[:, None] * C + c[None, :]


@triton.jit
def load_norm(
    stats_ptr,  # [4, C]
    gamma_ptr,  # [C]
    beta_ptr,  # [C]
    c,
    c_ok,
    C,
):
    """mean, rstd, gamma and beta of channels c, in float32."""
    mean = tl.load(stats_ptr + c, mask=c_ok, other=0.0)
    rstd = tl.load(stats_ptr + C + c, mask=c_ok, other=0.0)
    gamma = tl.load(gamma_ptr + c, mask=c_ok, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + c, mask=c_ok, other=0.0).to(tl.float32)
    return mean, rstd, gamma, beta


@triton.jit
def chan_merge(count, mean, m2):
    """Count, mean and M2 [BLOCK_C] of groups laid along axis 0 [groups, BLOCK_C] (Chan, Golub and LeVeque, 1979)."""
    total = tl.sum(count, axis=0)
    merged = tl.sum(count * mean, axis=0) / tl.maximum(total, 1.0)
    away = mean - merged[None, :]
    return total, merged, tl.sum(m2 + count * away * away, axis=0)


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
    C = C // VEC * VEC  # tells the compiler what C is a multiple of
    c, c_ok, row, start, end, base, tile = row_walk(M, C, rows, BLOCK_M, BLOCK_C)
    # Welford's update, each lane of the tile for itself: no reduction between threads until the end.
    count = tl.zeros([BLOCK_M, 1], tl.float32)
    mean = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for m in range(start, end, BLOCK_M):
        row_ok = ((m + row) < end)[:, None]
        x = tl.load(x_ptr + base + tile, mask=row_ok & c_ok[None, :], other=0.0).to(tl.float32)
        count += row_ok.to(tl.float32)
        away = tl.where(row_ok, x - mean, 0.0)
        mean += away * (1.0 / tl.maximum(count, 1.0))
        m2 += away * (x - mean)
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
        at = moments_ptr + g[:, None] * 3 * C + c[None, :]
        ok = (g < groups)[:, None] & c_ok[None, :]
        count_i = tl.load(at, mask=ok, other=0.0)
        mean_i = tl.load(at + C, mask=ok, other=0.0)
        m2_i = tl.load(at + 2 * C, mask=ok, other=0.0)
        count_i, mean_i, m2_i = chan_merge(count_i, mean_i, m2_i)
        away = mean_i - mean
        share = count_i / tl.maximum(count + count_i, 1.0)
        mean += away * share
        m2 += m2_i + away * away * count * share
        count += count_i
    if FINAL:
        tl.store(out_ptr + c, mean, mask=c_ok)
        tl.store(out_ptr + C + c, 1.0 / tl.sqrt(m2 / tl.maximum(count, 1.0) + eps), mask=c_ok)
        tl.store(out_ptr + 2 * C + c, m2 / tl.maximum(count - 1.0, 1.0), mask=c_ok)
        tl.store(out_ptr + 3 * C + c, count, mask=c_ok)
    else:
        store_moments(out_ptr, count, mean, m2, c, c_ok, C)


@kernel
def _apply_kernel(
    x_ptr,  # [M, C]
    stats_ptr,  # [4, C]
    gamma_ptr,  # [C]
    beta_ptr,  # [C]
    residual_ptr,  # [M, C] if RESIDUAL
    scale_ptr,  # [N] if SCALE
    y_ptr,  # [M, C]
    M,
    C,
    HW,
    rows,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SCALE: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C = C // VEC * VEC
    c, c_ok, row, start, end, base, tile = row_walk(M, C, rows, BLOCK_M, BLOCK_C)
    mean, rstd, gamma, beta = load_norm(stats_ptr, gamma_ptr, beta_ptr, c, c_ok, C)
    gain = rstd * gamma
    for m in range(start, end, BLOCK_M):
        ok = ((m + row) < end)[:, None] & c_ok[None, :]
        # Not x * gain + shift: with a mean of 1000 deviations the difference must be taken first.
        away = tl.load(x_ptr + base + tile, mask=ok, other=0.0).to(tl.float32) - mean[None, :]
        y = away * gain[None, :] + beta[None, :]
        if ACTIVATION:
            y = y * sigmoid(y)
        if SCALE:
            y = y * tl.load(scale_ptr + (m + row) // HW, mask=(m + row) < end, other=0.0).to(tl.float32)[:, None]
        if RESIDUAL:
            y += tl.load(residual_ptr + base + tile, mask=ok, other=0.0).to(tl.float32)
        tl.store(y_ptr + base + tile, y.to(y_ptr.dtype.element_ty), mask=ok)
        base += BLOCK_M * C


@triton.jit
def _grad_z(dy, xhat, gamma, beta, ACTIVATION: tl.constexpr):
    """Gradient at z = gamma xhat + beta."""
    if ACTIVATION:
        z = xhat * gamma[None, :] + beta[None, :]
        dy = dy * silu_slope(z, sigmoid(z))
    return dy


@kernel
def _grad_sums_kernel(
    dy_ptr,  # [M, C]
    x_ptr,  # [M, C]
    stats_ptr,  # [4, C]
    gamma_ptr,  # [C]
    beta_ptr,  # [C]
    scale_ptr,  # [N] if SCALE
    sums_ptr,  # [programs, 2, C]: dbeta, dgamma
    M,
    C,
    HW,
    rows,
    ACTIVATION: tl.constexpr,
    SCALE: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C = C // VEC * VEC
    c, c_ok, row, start, end, base, tile = row_walk(M, C, rows, BLOCK_M, BLOCK_C)
    mean, rstd, gamma, beta = load_norm(stats_ptr, gamma_ptr, beta_ptr, c, c_ok, C)
    dbeta = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    dgamma = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for m in range(start, end, BLOCK_M):
        ok = ((m + row) < end)[:, None] & c_ok[None, :]
        xhat = (tl.load(x_ptr + base + tile, mask=ok, other=0.0).to(tl.float32) - mean[None, :]) * rstd[None, :]
        dy = tl.load(dy_ptr + base + tile, mask=ok, other=0.0).to(tl.float32)
        if SCALE:
            dy = dy * tl.load(scale_ptr + (m + row) // HW, mask=(m + row) < end, other=0.0).to(tl.float32)[:, None]
        dz = _grad_z(dy, xhat, gamma, beta, ACTIVATION)
        dbeta += dz
        dgamma += dz * xhat
        base += BLOCK_M * C
    sums_ptr += tl.program_id(1) * 2 * C
    tl.store(sums_ptr + c, tl.sum(dbeta, axis=0), mask=c_ok)
    tl.store(sums_ptr + C + c, tl.sum(dgamma, axis=0), mask=c_ok)


@kernel
def _grad_apply_kernel(
    dy_ptr,  # [M, C]
    x_ptr,  # [M, C]
    stats_ptr,  # [4, C]
    gamma_ptr,  # [C]
    beta_ptr,  # [C]
    scale_ptr,  # [N] if SCALE
    sums_ptr,  # [2, C]: dbeta, dgamma, over all ranks
    dx_ptr,  # [M, C]
    M,
    C,
    HW,
    rows,
    ACTIVATION: tl.constexpr,
    SCALE: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C = C // VEC * VEC
    c, c_ok, row, start, end, base, tile = row_walk(M, C, rows, BLOCK_M, BLOCK_C)
    mean, rstd, gamma, beta = load_norm(stats_ptr, gamma_ptr, beta_ptr, c, c_ok, C)
    count = tl.load(stats_ptr + 3 * C + c, mask=c_ok, other=1.0)
    mean_dz = tl.load(sums_ptr + c, mask=c_ok, other=0.0) / count
    mean_dz_xhat = tl.load(sums_ptr + C + c, mask=c_ok, other=0.0) / count
    gain = gamma * rstd
    for m in range(start, end, BLOCK_M):
        ok = ((m + row) < end)[:, None] & c_ok[None, :]
        xhat = (tl.load(x_ptr + base + tile, mask=ok, other=0.0).to(tl.float32) - mean[None, :]) * rstd[None, :]
        dy = tl.load(dy_ptr + base + tile, mask=ok, other=0.0).to(tl.float32)
        if SCALE:
            dy = dy * tl.load(scale_ptr + (m + row) // HW, mask=(m + row) < end, other=0.0).to(tl.float32)[:, None]
        dz = _grad_z(dy, xhat, gamma, beta, ACTIVATION)
        dx = gain[None, :] * (dz - mean_dz[None, :] - xhat * mean_dz_xhat[None, :])
        tl.store(dx_ptr + base + tile, dx.to(dx_ptr.dtype.element_ty), mask=ok)
        base += BLOCK_M * C


def rows_of(x: Tensor) -> tuple[int, int]:
    """(N*H*W, C) of a channels-last tensor [N, C, H, W]."""
    n, c, h, w = x.shape
    assert n * h * w < 2**31, "row numbers are 32-bit"
    return n * h * w, c


def merge_moments(moments: Tensor, eps: float, sync: bool) -> Tensor:
    """Statistics [4, C] from per-program moments [programs, 3, C] of this rank, and of all ranks if `sync`."""
    if sync and dist.is_initialized():
        local = _merge(moments, moments.new_empty(3, moments.shape[2]), eps, final=False)
        gathered = local.new_empty(dist.get_world_size() * 3, moments.shape[2])
        dist.all_gather_into_tensor(gathered, local)
        moments = gathered.view(-1, *local.shape)
    return _merge(moments, moments.new_empty(4, moments.shape[2]), eps, final=True)


def _merge(moments: Tensor, out: Tensor, eps: float, *, final: bool) -> Tensor:
    groups, _, c = moments.shape
    block_c = 8  # a sector; few groups a turn would leave the kernel waiting for memory many times over
    launch(
        "batch_norm",
        _merge_kernel,
        (cdiv(c, block_c),),
        *(moments, out, groups, c, eps),
        FINAL=final,
        VEC=vector(c),
        BLOCK_G=256,
        BLOCK_C=block_c,
        num_warps=4,
    )
    return out


def batch_statistics(x: Tensor, eps: float, sync: bool) -> Tensor:
    """Statistics [4, C] of a channels-last tensor, in one pass over it."""
    m, c = rows_of(x)
    cut = row_launch(m, c)
    grid = cut.grid(m, c)
    moments = torch.empty(grid[1], 3, c, device=x.device, dtype=torch.float32)
    launch("batch_norm", _moments_kernel, grid, x, moments, m, c, cut.rows, **cut.constants(c))
    return merge_moments(moments, eps, sync)


def sum_over_ranks(sums: Tensor, sync: bool) -> Tensor:
    """`sums` added up over all ranks in a new tensor if `sync`, else `sums` itself."""
    if sync and dist.is_initialized():
        sums = sums.clone()
        dist.all_reduce(sums)
    return sums


def normalize(x: Tensor, stats: Tensor, bn: Affine, residual: Tensor | None, scale: Tensor | None, activation: bool):
    """y from x and its statistics, in one pass."""
    m, c = rows_of(x)
    cut = row_launch(m, c)
    y = torch.empty_like(x)
    launch(
        "batch_norm",
        _apply_kernel,
        cut.grid(m, c),
        *(x, stats, *bn, x if residual is None else residual, stats if scale is None else scale, y),
        *(m, c, m // x.shape[0], cut.rows),
        ACTIVATION=activation,
        RESIDUAL=residual is not None,
        SCALE=scale is not None,
        **cut.constants(c),
    )
    return y


def grad_sums(dy: Tensor, x: Tensor, stats: Tensor, bn: Affine, scale: Tensor | None, activation: bool) -> Tensor:
    """Sums [2, C] of dz and dz * xhat over this rank: dbeta and dgamma."""
    m, c = rows_of(x)
    cut = row_launch(m, c)
    grid = cut.grid(m, c)
    sums = torch.empty(grid[1], 2, c, device=x.device, dtype=torch.float32)
    launch(
        "batch_norm",
        _grad_sums_kernel,
        grid,
        *(dy, x, stats, *bn, stats if scale is None else scale, sums, m, c, m // x.shape[0], cut.rows),
        ACTIVATION=activation,
        SCALE=scale is not None,
        **cut.constants(c),
    )
    return sums.sum(0)


def grad_apply(
    dy: Tensor, x: Tensor, stats: Tensor, bn: Affine, scale: Tensor | None, sums: Tensor, activation: bool
) -> Tensor:
    """dx from dy (from dz itself if it is at hand: activation=False), and the sums [2, C] over all ranks."""
    m, c = rows_of(x)
    cut = row_launch(m, c)
    dx = torch.empty_like(x)
    launch(
        "batch_norm",
        _grad_apply_kernel,
        cut.grid(m, c),
        *(dy, x, stats, *bn, stats if scale is None else scale, sums, dx, m, c, m // x.shape[0], cut.rows),
        ACTIVATION=activation,
        SCALE=scale is not None,
        **cut.constants(c),
    )
    return dx


@torch.library.custom_op("effnet_kernels::batch_norm", mutates_args=())
def _batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    sample_scale: Tensor | None,
    activation: bool,
    eps: float,
    sync: bool,
) -> tuple[Tensor, Tensor]:
    stats = batch_statistics(x, eps, sync)
    return normalize(x, stats, (weight, bias), residual, sample_scale, activation), stats


@_batch_norm.register_fake
def _(x, weight, bias, residual, sample_scale, activation, eps, sync):
    return torch.empty_like(x), x.new_empty(4, x.shape[1], dtype=torch.float32)


@torch.library.custom_op("effnet_kernels::batch_norm_backward", mutates_args=())
def _batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor,
    bias: Tensor,
    sample_scale: Tensor | None,
    activation: bool,
    sync: bool,
) -> tuple[Tensor, Tensor]:
    bn = (weight, bias)
    sums = grad_sums(dy, x, stats, bn, sample_scale, activation)
    return grad_apply(dy, x, stats, bn, sample_scale, sum_over_ranks(sums, sync), activation), sums


@_batch_norm_backward.register_fake
def _(dy, x, stats, weight, bias, sample_scale, activation, sync):
    return torch.empty_like(x), torch.empty_like(stats[:2])


def _setup(ctx, inputs, output) -> None:
    x, weight, bias, residual, sample_scale, ctx.activation, _, ctx.sync = inputs
    ctx.has_residual = residual is not None
    ctx.save_for_backward(x, output[1], weight, bias, sample_scale)


def _backward(ctx, dy: Tensor, _: Tensor):
    x, stats, weight, bias, sample_scale = ctx.saved_tensors
    dy = channels_last(dy)
    dx, sums = _batch_norm_backward(dy, x, stats, weight, bias, sample_scale, ctx.activation, ctx.sync)
    dbeta, dgamma = sums[0].to(bias.dtype), sums[1].to(weight.dtype)
    return dx, dgamma, dbeta, dy if ctx.has_residual else None, None, None, None, None


_batch_norm.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("effnet_kernels::batch_norm_eval", mutates_args=())
def _batch_norm_eval(
    x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, activation: bool
) -> Tensor:
    return normalize(x, stats, (weight, bias), residual, None, activation)


@_batch_norm_eval.register_fake
def _(x, stats, weight, bias, residual, activation):
    return torch.empty_like(x)


def running_statistics(bn: BatchNorm) -> Tensor:
    """The running mean and variance as `stats` [4, C]; its count is never read in evaluation."""
    mean, var = bn.running_mean.float(), bn.running_var.float()
    return torch.stack((mean, torch.rsqrt(var + bn.eps), var, torch.ones_like(mean)))


def update_running(bn: BatchNorm, stats: Tensor) -> None:
    """running += momentum * (batch - running), with the unbiased variance, as torch does; in one launch."""
    with torch.no_grad():
        mean, _, var, _ = stats.detach().unbind()
        torch._foreach_lerp_([bn.running_mean, bn.running_var], [mean, var], bn.momentum)


def require_values(shape: Sequence[int], sync: bool) -> None:
    """Raise torch's ValueError where a training BatchNorm over [N, C, ...] would see one value per channel."""
    if not sync and math.prod(shape) == shape[1]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {torch.Size(shape)}")


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an op on any of `tensors`."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def batch_norm(
    x: Tensor,
    bn: BatchNorm,
    *,
    training: bool = True,
    activation: bool = False,
    residual: Tensor | None = None,
    sample_scale: Tensor | None = None,
    kernels: Kernels = "auto",
) -> Tensor:
    """BatchNorm of `x` [N, C, H, W], then Swish if `activation`, times `sample_scale` [N], plus `residual` (as x).

    Training normalises by the batch and updates the running statistics in place; evaluation uses those, and takes
    the reference when a gradient is wanted. Returns x's shape and type, channels last. Parameters may be of another
    type than x. Raises ValueError for one value per channel in training.
    """
    if not use_triton(kernels, x) or (not training and needs_grad(x, bn.weight, bn.bias, residual)):
        return batch_norm_reference(
            x, bn, training=training, activation=activation, residual=residual, sample_scale=sample_scale
        )
    x = channels_last(x)
    residual = None if residual is None else channels_last(residual.to(x.dtype))
    if not training:
        assert sample_scale is None, "stochastic depth is for training"
        return _batch_norm_eval(x, running_statistics(bn), bn.weight, bn.bias, residual, activation)
    require_values(x.shape, bn.sync)
    y, stats = _batch_norm(x, bn.weight, bn.bias, residual, sample_scale, activation, bn.eps, bn.sync)
    update_running(bn, stats)
    return y


def bn_silu(x: Tensor, bn: BatchNorm, *, training: bool = True, kernels: Kernels = "auto") -> Tensor:
    """`batch_norm` followed by Swish."""
    return batch_norm(x, bn, training=training, activation=True, kernels=kernels)
