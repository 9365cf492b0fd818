"""Training BatchNorm fused with what follows it in an EfficientNet: Swish, stochastic depth, the residual.

    xhat = (x - mean) rstd,  z = gamma xhat + beta,  y = scale[n] act(z) + residual        (Ioffe and Szegedy, 2015)

Forward   Pass 1 reads x for its statistics (statistics.py), over all ranks if asked. Pass 2 reads x (and residual)
          and writes y.
Backward  dz = scale[n] dy act'(z);  dbeta = sum dz;  dgamma = sum dz xhat;
          dx = gamma rstd (dz - (dbeta + xhat dgamma) / count);  dresidual = dy, which needs no pass.
          Pass 1 reads dy and x for the two sums. Pass 2 reads both again and writes dx. Saved: x, mean and rstd.

A program's second pass walks back, from its last row to the first: a map larger than the cache has its end there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effnet_kernels.launch import (
    Kernels,
    channels_last,
    cpp_ops,
    custom_op,
    kernel,
    launch,
    row_choice,
    tl,
    triton,
    use_kernels,
)
from effnet_kernels.partial_sums import add_partials
from effnet_kernels.silu import sigmoid, silu_slope
from effnet_kernels.statistics import (
    Affine,
    BatchNorm,
    batch_statistics,
    last_tile,
    load,
    load_mean_gradients,
    load_norm,
    needs_grad,
    require_values,
    row_walk,
    rows_of,
    running_statistics,
    sum_over_ranks,
    update_running,
)


def batch_norm_reference(
    x: Tensor,
    bn: BatchNorm,
    *,
    training: bool = True,
    activation: bool = False,
    residual: Tensor | None = None,
    sample_scale: Tensor | None = None,
) -> Tensor:
    """The equations above in plain PyTorch, on one rank; arguments as in `batch_norm`."""
    assert not (training and bn.sync), "the reference covers one rank; the model's own BatchNorm shares statistics"
    y = torch.nn.functional.batch_norm(
        x, bn.running_mean, bn.running_var, bn.weight, bn.bias, training, bn.momentum, bn.eps
    )
    if activation:
        y = torch.nn.functional.silu(y)
    if sample_scale is not None:
        y = y * sample_scale.to(y.dtype).view(-1, 1, 1, 1)
    return y if residual is None else y + residual


@triton.jit
def _load_scale(
    scale_ptr,  # [N]
    rows,
    end,
    HW,
):
    """The scale of each row's image, [BLOCK_M, 1]."""
    return load(scale_ptr + rows // HW, rows < end)[:, None]


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
    last = last_tile(start, end, BLOCK_M)
    base += (last - start).to(tl.int64) * C
    for m in range(last, start - 1, -BLOCK_M):
        ok = ((m + row) < end)[:, None] & c_ok[None, :]
        # Not x * gain + shift: with a mean of 1000 deviations that sum would cancel.
        y = (load(x_ptr + base + tile, ok) - mean) * gain + beta
        if ACTIVATION:
            y = y * sigmoid(y)
        if SCALE:
            y = y * _load_scale(scale_ptr, m + row, end, HW)
        if RESIDUAL:
            y += load(residual_ptr + base + tile, ok)
        tl.store(y_ptr + base + tile, y.to(y_ptr.dtype.element_ty), mask=ok)
        base -= BLOCK_M * C


@triton.jit
def _load_gradient(
    dy_ptr,  # [M, C]
    x_ptr,  # [M, C]
    scale_ptr,  # [N] if SCALE
    place,
    ok,
    rows,
    end,
    HW,
    norm,
    ACTIVATION: tl.constexpr,
    SCALE: tl.constexpr,
):
    """dz and xhat at `place`; `norm`: mean, rstd, gamma, beta."""
    mean, rstd, gamma, beta = norm
    xhat = (load(x_ptr + place, ok) - mean) * rstd
    dz = load(dy_ptr + place, ok)
    if SCALE:
        dz = dz * _load_scale(scale_ptr, rows, end, HW)
    if ACTIVATION:
        z = xhat * gamma + beta
        dz = dz * silu_slope(z, sigmoid(z))
    return dz, xhat


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
    norm = load_norm(stats_ptr, gamma_ptr, beta_ptr, c, c_ok, C)
    dbeta = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    dgamma = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for m in range(start, end, BLOCK_M):
        ok = ((m + row) < end)[:, None] & c_ok[None, :]
        dz, xhat = _load_gradient(dy_ptr, x_ptr, scale_ptr, base + tile, ok, m + row, end, HW, norm, ACTIVATION, SCALE)
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
    norm = load_norm(stats_ptr, gamma_ptr, beta_ptr, c, c_ok, C)
    mean_dz, mean_dz_xhat = load_mean_gradients(sums_ptr, stats_ptr, c, c_ok, C)
    gain = norm[2] * norm[1]
    last = last_tile(start, end, BLOCK_M)
    base += (last - start).to(tl.int64) * C
    for m in range(last, start - 1, -BLOCK_M):
        ok = ((m + row) < end)[:, None] & c_ok[None, :]
        dz, xhat = _load_gradient(dy_ptr, x_ptr, scale_ptr, base + tile, ok, m + row, end, HW, norm, ACTIVATION, SCALE)
        dx = gain * (dz - mean_dz - xhat * mean_dz_xhat)
        tl.store(dx_ptr + base + tile, dx.to(dx_ptr.dtype.element_ty), mask=ok)
        base -= BLOCK_M * C


normalize_choice = row_choice("normalize", resident=14, num_warps=2)
grad_sums_choice = row_choice("grad sums", values=8)
grad_apply_choice = row_choice("grad apply", resident=14, num_warps=2)


def normalize(x: Tensor, stats: Tensor, bn: Affine, residual: Tensor | None, scale: Tensor | None, activation: bool):
    """y from x and its statistics, in one pass."""
    if ops := cpp_ops(x):
        return ops.normalize(x, stats, *bn, residual, scale, activation)
    m, c = rows_of(x)
    config = normalize_choice(m, c)
    y = torch.empty_like(x)
    launch(
        "batch_norm",
        _apply_kernel,
        config.grid(m, c),
        x,
        stats,
        *bn,
        x if residual is None else residual,
        stats if scale is None else scale,
        y,
        m,
        c,
        m // x.shape[0],
        config.rows,
        ACTIVATION=activation,
        RESIDUAL=residual is not None,
        SCALE=scale is not None,
        **config.constants(c),
    )
    return y


def grad_sums(dy: Tensor, x: Tensor, stats: Tensor, bn: Affine, scale: Tensor | None, activation: bool) -> Tensor:
    """Sums [2, C] of dz and dz * xhat over this rank: dbeta and dgamma."""
    if ops := cpp_ops(x):
        return ops.grad_sums(dy, x, stats, *bn, scale, activation)
    m, c = rows_of(x)
    config = grad_sums_choice(m, c)
    grid = config.grid(m, c)
    sums = torch.empty(grid[1], 2, c, device=x.device, dtype=torch.float32)
    launch(
        "batch_norm",
        _grad_sums_kernel,
        grid,
        dy,
        x,
        stats,
        *bn,
        stats if scale is None else scale,
        sums,
        m,
        c,
        m // x.shape[0],
        config.rows,
        ACTIVATION=activation,
        SCALE=scale is not None,
        **config.constants(c),
    )
    return add_partials(sums)


def grad_apply(
    dy: Tensor, x: Tensor, stats: Tensor, bn: Affine, scale: Tensor | None, sums: Tensor, activation: bool
) -> Tensor:
    """dx from dy and the sums [2, C] over all ranks. A caller that has dz passes it as dy with activation=False."""
    if ops := cpp_ops(x):
        return ops.grad_apply(dy, x, stats, *bn, scale, sums, activation)
    m, c = rows_of(x)
    config = grad_apply_choice(m, c)
    dx = torch.empty_like(x)
    launch(
        "batch_norm",
        _grad_apply_kernel,
        config.grid(m, c),
        dy,
        x,
        stats,
        *bn,
        stats if scale is None else scale,
        sums,
        dx,
        m,
        c,
        m // x.shape[0],
        config.rows,
        ACTIVATION=activation,
        SCALE=scale is not None,
        **config.constants(c),
    )
    return dx


def require_side_shapes(shape: Sequence[int], residual: Tensor | None, sample_scale: Tensor | None) -> None:
    """Raise ValueError unless a residual has the shape [N, C, H, W] of the result, and a scale [N]."""
    for name, tensor, expected in (("residual", residual, shape), ("sample_scale", sample_scale, shape[:1])):
        if tensor is not None and tuple(tensor.shape) != tuple(expected):
            raise ValueError(f"{name} must be {list(expected)}, not {list(tensor.shape)}")


@custom_op("batch_norm")
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


@custom_op("batch_norm_backward")
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
    ctx.set_materialize_grads(False)  # autograd would write zeros for every saved output
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


@custom_op("batch_norm_eval")
def _batch_norm_eval(
    x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, activation: bool
) -> Tensor:
    return normalize(x, stats, (weight, bias), residual, None, activation)


@_batch_norm_eval.register_fake
def _(x, stats, weight, bias, residual, activation):
    return torch.empty_like(x)


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

    Training normalises by the batch's statistics and updates the running ones in place. Evaluation uses the running
    statistics; if a gradient is needed there, the reference runs. Parameters may have another dtype than x.

    Returns:
        x's shape and dtype, channels last.

    Raises:
        ValueError: training on one value per channel, or a shape does not fit x.
    """
    require_side_shapes(x.shape, residual, sample_scale)
    # The kernel for evaluation has neither a gradient nor stochastic depth.
    beyond = not training and (sample_scale is not None or needs_grad(x, bn.weight, bn.bias, residual))
    if not use_kernels(kernels, x) or beyond:
        return batch_norm_reference(
            x, bn, training=training, activation=activation, residual=residual, sample_scale=sample_scale
        )
    x, bn = channels_last(x), bn.contiguous()
    residual = None if residual is None else channels_last(residual.to(x.dtype))
    sample_scale = None if sample_scale is None else sample_scale.contiguous()
    if not training:
        return _batch_norm_eval(x, running_statistics(bn), bn.weight, bn.bias, residual, activation)
    require_values(x.shape, bn.sync)
    y, stats = _batch_norm(x, bn.weight, bn.bias, residual, sample_scale, activation, bn.eps, bn.sync)
    update_running(bn, stats)
    return y


def bn_silu(x: Tensor, bn: BatchNorm, *, training: bool = True, kernels: Kernels = "auto") -> Tensor:
    """`batch_norm` followed by Swish."""
    return batch_norm(x, bn, training=training, activation=True, kernels=kernels)
