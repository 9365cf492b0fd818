"""Training BatchNorm, Swish and the spatial mean, without writing the activation: the "squeeze" (Hu et al., 2018).

    z = gamma (x - mean) rstd + beta,  pool[n, c] = mean over h, w of silu(z)

Forward   one pass for the statistics (none if the depthwise convolution brings them), one pass that reads x.
Backward  The gradient at silu(z) is, in general, dy gate + dpool / HW: dy comes where the activation was also used
          (scaled by gate in squeeze-and-excitation), and gate and dpool are constants of an image's channel. So one
          pass that keeps, per image and channel, the five sums of
              dy silu(z),  dy silu'(z),  dy silu'(z) xhat,  silu'(z),  silu'(z) xhat
          serves the gradient of the gate, dgamma, dbeta and both means of BatchNorm's backward; one more pass
          applies them. It reads dy and x twice and writes dx. Alone, as here, dy is absent and x is read twice.

A program walks over all pixels of one image for a block of channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effnet_kernels.batch_norm import (
    Affine,
    BatchNorm,
    batch_norm_reference,
    batch_statistics,
    load_norm,
    needs_grad,
    require_values,
    running_statistics,
    sum_over_ranks,
    update_running,
)
from effnet_kernels.launch import (
    Kernels,
    cdiv,
    channel_block,
    channels_last,
    kernel,
    launch,
    power_of_2,
    tl,
    triton,
    use_triton,
    vector,
)
from effnet_kernels.silu import sigmoid, silu_slope


def bn_silu_squeeze_reference(x: Tensor, bn: BatchNorm, *, training: bool = True) -> Tensor:
    """BatchNorm, Swish and spatial mean in plain PyTorch: [N, C, H, W] to [N, C]."""
    return batch_norm_reference(x, bn, training=training, activation=True).mean((2, 3))


@dataclass(frozen=True)
class ImageLaunch:
    """A program takes one image's `block_c` channels, `block_m` pixels at a time."""

    block_m: int
    block_c: int
    num_warps: int

    def grid(self, n: int, c: int) -> tuple[int]:
        return (cdiv(c, self.block_c) * n,)

    def constants(self, c: int) -> dict[str, int]:
        return {"VEC": vector(c), "BLOCK_M": self.block_m, "BLOCK_C": self.block_c, "num_warps": self.num_warps}


def image_launch(hw: int, c: int, elements: int = 2048) -> ImageLaunch:
    """16 values to a thread at a time, and at least 64 in all where the map has them: small maps take fewer threads.

    The fewer threads share a channel, the shorter is the sum over them at the end, so blocks are wide.
    """
    block_c = channel_block(c, widest=256, slack=1.08)
    warps = max(hw * block_c // (32 * 64), 1)
    num_warps = min(1 << warps.bit_length() - 1, elements // 512)
    return ImageLaunch(min(power_of_2(hw), max(num_warps * 512 // block_c, 1)), block_c, num_warps)


def image_launch_space(hw: int, c: int) -> list[ImageLaunch]:
    """What an autotuner may try in place of `image_launch`'s choice."""
    return [image_launch(hw, c, elements) for elements in (512, 1024, 2048, 4096)]


@triton.jit
def _image_walk(C, HW, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Channels, their mask, the 64-bit place of the channels in [N, C], the base in [N, HW, C], and a 32-bit tile."""
    blocks = tl.cdiv(C, BLOCK_C)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    pixel = tl.arange(0, BLOCK_M)
    return c, c < C, n * C + c, n * HW * C, pixel, pixel[:, None] * C + c[None, :]


@kernel
def _squeeze_kernel(
    x_ptr,  # [N, HW, C]
    stats_ptr,  # [4, C]
    gamma_ptr,  # [C]
    beta_ptr,  # [C]
    pool_ptr,  # [N, C]
    HW,
    C,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C = C // VEC * VEC
    c, c_ok, nc, base, pixel, tile = _image_walk(C, HW, BLOCK_M, BLOCK_C)
    mean, rstd, gamma, beta = load_norm(stats_ptr, gamma_ptr, beta_ptr, c, c_ok, C)
    gain = gamma * rstd
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for m in range(0, HW, BLOCK_M):
        ok = ((m + pixel) < HW)[:, None] & c_ok[None, :]
        z = (tl.load(x_ptr + base + tile, mask=ok, other=0.0).to(tl.float32) - mean[None, :]) * gain[None, :]
        z += beta[None, :]
        total += tl.where(ok, z * sigmoid(z), 0.0)
        base += BLOCK_M * C
    tl.store(pool_ptr + nc, tl.sum(total, axis=0) / HW, mask=c_ok)


@kernel
def _excite_kernel(
    x_ptr,  # [N, HW, C]
    stats_ptr,  # [4, C]
    gamma_ptr,  # [C]
    beta_ptr,  # [C]
    gate_ptr,  # [N, C]
    y_ptr,  # [N, HW, C]
    HW,
    C,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C = C // VEC * VEC
    c, c_ok, nc, base, pixel, tile = _image_walk(C, HW, BLOCK_M, BLOCK_C)
    mean, rstd, gamma, beta = load_norm(stats_ptr, gamma_ptr, beta_ptr, c, c_ok, C)
    gain = gamma * rstd
    gate = tl.load(gate_ptr + nc, mask=c_ok, other=0.0)
    for m in range(0, HW, BLOCK_M):
        ok = ((m + pixel) < HW)[:, None] & c_ok[None, :]
        z = (tl.load(x_ptr + base + tile, mask=ok, other=0.0).to(tl.float32) - mean[None, :]) * gain[None, :]
        z += beta[None, :]
        tl.store(y_ptr + base + tile, (z * sigmoid(z) * gate[None, :]).to(y_ptr.dtype.element_ty), mask=ok)
        base += BLOCK_M * C


@kernel
def _five_sums_kernel(
    dy_ptr,  # [N, HW, C], if HAS_DY
    x_ptr,  # [N, HW, C]
    stats_ptr,  # [4, C]
    gamma_ptr,  # [C]
    beta_ptr,  # [C]
    sums_ptr,  # [5, N, C], if HAS_DY, else the last two alone: [2, N, C]
    HW,
    C,
    NC,
    HAS_DY: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C, NC = C // VEC * VEC, NC // VEC * VEC
    c, c_ok, nc, base, pixel, tile = _image_walk(C, HW, BLOCK_M, BLOCK_C)
    mean, rstd, gamma, beta = load_norm(stats_ptr, gamma_ptr, beta_ptr, c, c_ok, C)
    slope_sum = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    slope_xhat_sum = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    if HAS_DY:
        dy_act_sum = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        dy_slope_sum = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        dy_slope_xhat_sum = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for m in range(0, HW, BLOCK_M):
        ok = ((m + pixel) < HW)[:, None] & c_ok[None, :]
        xhat = (tl.load(x_ptr + base + tile, mask=ok, other=0.0).to(tl.float32) - mean[None, :]) * rstd[None, :]
        z = xhat * gamma[None, :] + beta[None, :]
        s = sigmoid(z)
        slope = tl.where(ok, silu_slope(z, s), 0.0)
        slope_sum += slope
        slope_xhat_sum += slope * xhat
        if HAS_DY:
            dy = tl.load(dy_ptr + base + tile, mask=ok, other=0.0).to(tl.float32)
            dy_act_sum += dy * z * s
            dy_slope_sum += dy * slope
            dy_slope_xhat_sum += dy * slope * xhat
        base += BLOCK_M * C
    if HAS_DY:
        tl.store(sums_ptr + nc, tl.sum(dy_act_sum, axis=0), mask=c_ok)
        tl.store(sums_ptr + NC + nc, tl.sum(dy_slope_sum, axis=0), mask=c_ok)
        tl.store(sums_ptr + 2 * NC + nc, tl.sum(dy_slope_xhat_sum, axis=0), mask=c_ok)
        sums_ptr += 3 * NC
    tl.store(sums_ptr + nc, tl.sum(slope_sum, axis=0), mask=c_ok)
    tl.store(sums_ptr + NC + nc, tl.sum(slope_xhat_sum, axis=0), mask=c_ok)


@kernel
def _apply_sums_kernel(
    dy_ptr,  # [N, HW, C], if HAS_DY
    x_ptr,  # [N, HW, C]
    stats_ptr,  # [4, C]
    gamma_ptr,  # [C]
    beta_ptr,  # [C]
    gate_ptr,  # [N, C], if HAS_DY
    dpool_ptr,  # [N, C]
    sums_ptr,  # [2, C]: dbeta, dgamma, over all ranks
    dx_ptr,  # [N, HW, C]
    HW,
    C,
    HAS_DY: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C = C // VEC * VEC
    c, c_ok, nc, base, pixel, tile = _image_walk(C, HW, BLOCK_M, BLOCK_C)
    mean, rstd, gamma, beta = load_norm(stats_ptr, gamma_ptr, beta_ptr, c, c_ok, C)
    count = tl.load(stats_ptr + 3 * C + c, mask=c_ok, other=1.0)
    mean_dz = tl.load(sums_ptr + c, mask=c_ok, other=0.0) / count
    mean_dz_xhat = tl.load(sums_ptr + C + c, mask=c_ok, other=0.0) / count
    gain = gamma * rstd
    from_pool = tl.load(dpool_ptr + nc, mask=c_ok, other=0.0) / HW
    if HAS_DY:
        gate = tl.load(gate_ptr + nc, mask=c_ok, other=0.0)
    for m in range(0, HW, BLOCK_M):
        ok = ((m + pixel) < HW)[:, None] & c_ok[None, :]
        xhat = (tl.load(x_ptr + base + tile, mask=ok, other=0.0).to(tl.float32) - mean[None, :]) * rstd[None, :]
        z = xhat * gamma[None, :] + beta[None, :]
        dz = silu_slope(z, sigmoid(z))
        if HAS_DY:
            dy = tl.load(dy_ptr + base + tile, mask=ok, other=0.0).to(tl.float32)
            dz = dz * (dy * gate[None, :] + from_pool[None, :])
        else:
            dz = dz * from_pool[None, :]
        dx = gain[None, :] * (dz - mean_dz[None, :] - xhat * mean_dz_xhat[None, :])
        tl.store(dx_ptr + base + tile, dx.to(dx_ptr.dtype.element_ty), mask=ok)
        base += BLOCK_M * C


def _launch(function, x: Tensor, args: tuple, **constants) -> None:
    n, c, h, w = x.shape
    cut = image_launch(h * w, c)
    launch("bn_silu_squeeze", function, cut.grid(n, c), *args, **constants, **cut.constants(c))


def squeeze(x: Tensor, stats: Tensor, bn: Affine) -> Tensor:
    """pool [N, C] float32."""
    n, c, h, w = x.shape
    pool = torch.empty(n, c, device=x.device, dtype=torch.float32)
    _launch(_squeeze_kernel, x, (x, stats, *bn, pool, h * w, c))
    return pool


def excite(x: Tensor, stats: Tensor, bn: Affine, gate: Tensor) -> Tensor:
    """silu(z) times gate [N, C], as x."""
    y = torch.empty_like(x)
    _launch(_excite_kernel, x, (x, stats, *bn, gate, y, x.shape[2] * x.shape[3], x.shape[1]))
    return y


def five_sums(dy: Tensor | None, x: Tensor, stats: Tensor, bn: Affine) -> Tensor:
    """The sums of this file's head, [5, N, C] float32; [2, N, C], the last two, without dy."""
    n, c, h, w = x.shape
    sums = torch.empty(2 if dy is None else 5, n, c, device=x.device, dtype=torch.float32)
    first = x if dy is None else dy
    _launch(_five_sums_kernel, x, (first, x, stats, *bn, sums, h * w, c, n * c), HAS_DY=dy is not None)
    return sums


def apply_sums(
    dy: Tensor | None, x: Tensor, stats: Tensor, bn: Affine, gate: Tensor | None, dpool: Tensor, sums: Tensor
) -> Tensor:
    """dx, given the gradient dpool [N, C] at the mean, and sums [2, C] of dz and dz * xhat over all ranks."""
    dx = torch.empty_like(x)
    args = (x if dy is None else dy, x, stats, *bn, dpool if gate is None else gate, dpool, sums, dx)
    _launch(_apply_sums_kernel, x, (*args, x.shape[2] * x.shape[3], x.shape[1]), HAS_DY=dy is not None)
    return dx


@torch.library.custom_op("effnet_kernels::bn_silu_squeeze", mutates_args=())
def _bn_silu_squeeze(x: Tensor, weight: Tensor, bias: Tensor, eps: float, sync: bool) -> tuple[Tensor, Tensor]:
    stats = batch_statistics(x, eps, sync)
    return squeeze(x, stats, (weight, bias)).to(x.dtype), stats


@_bn_silu_squeeze.register_fake
def _(x, weight, bias, eps, sync):
    return x.new_empty(x.shape[:2]), x.new_empty(4, x.shape[1], dtype=torch.float32)


@torch.library.custom_op("effnet_kernels::bn_silu_squeeze_backward", mutates_args=())
def _bn_silu_squeeze_backward(
    dpool: Tensor, x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, sync: bool
) -> tuple[Tensor, Tensor]:
    bn = (weight, bias)
    dpool = dpool.float().contiguous()
    sums = (five_sums(None, x, stats, bn) * (dpool / (x.shape[2] * x.shape[3]))).sum(1)
    return apply_sums(None, x, stats, bn, None, dpool, sum_over_ranks(sums, sync)), sums


@_bn_silu_squeeze_backward.register_fake
def _(dpool, x, stats, weight, bias, sync):
    return torch.empty_like(x), torch.empty_like(stats[:2])


def _setup(ctx, inputs, output) -> None:
    x, weight, bias, _, ctx.sync = inputs
    ctx.save_for_backward(x, output[1], weight, bias)


def _backward(ctx, dpool: Tensor, _: Tensor):
    x, stats, weight, bias = ctx.saved_tensors
    dx, sums = _bn_silu_squeeze_backward(dpool, x, stats, weight, bias, ctx.sync)
    return dx, sums[1].to(weight.dtype), sums[0].to(bias.dtype), None, None


_bn_silu_squeeze.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("effnet_kernels::bn_silu_squeeze_eval", mutates_args=())
def _bn_silu_squeeze_eval(x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return squeeze(x, stats, (weight, bias)).to(x.dtype)


@_bn_silu_squeeze_eval.register_fake
def _(x, stats, weight, bias):
    return x.new_empty(x.shape[:2])


def bn_silu_squeeze(x: Tensor, bn: BatchNorm, *, training: bool = True, kernels: Kernels = "auto") -> Tensor:
    """Spatial mean [N, C] of Swish of BatchNorm of `x` [N, C, H, W], e.g. an EfficientNet's head; x's type.

    Evaluation uses the running statistics, and takes the reference when a gradient is wanted. Raises ValueError for
    one value per channel in training.
    """
    if not use_triton(kernels, x) or (not training and needs_grad(x, bn.weight, bn.bias)):
        return bn_silu_squeeze_reference(x, bn, training=training)
    x = channels_last(x)
    if not training:
        return _bn_silu_squeeze_eval(x, running_statistics(bn), bn.weight, bn.bias)
    require_values(x.shape, bn.sync)
    pool, stats = _bn_silu_squeeze(x, bn.weight, bn.bias, bn.eps, bn.sync)
    update_running(bn, stats)
    return pool
