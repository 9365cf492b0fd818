"""Squeeze-and-excitation (Hu et al., 2018) on a raw convolution output: BatchNorm, Swish, squeeze, gate, multiply.

    a = silu(gamma (x - mean) rstd + beta),  pool = mean over h, w of a
    hidden = W1 pool + b1,  gate = sigmoid(W2 silu(hidden) + b2),  y = a gate

Forward   reads x (for the mean), reads x again and writes y: a is never written. The two small matrix products and
          what lies between them are one launch over blocks of images.
Backward  the five sums of bn_silu_squeeze.py from dy and x; then, per block of images, back through the gate to
          dpool; then, per block of channels, dW1, dW2, db1, db2 and BatchNorm's dgamma and dbeta, each summed over
          the images in order; then one pass that reads dy and x and writes dx.

The matrix products are float32 in three TF32 products (tf32x3), which keeps float32's accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from effnet_kernels.batch_norm import (
    Affine,
    BatchNorm,
    batch_norm_reference,
    batch_statistics,
    needs_grad,
    require_values,
    running_statistics,
    sum_over_ranks,
    update_running,
)
from effnet_kernels.bn_silu_squeeze import apply_sums, excite, five_sums, squeeze
from effnet_kernels.launch import Kernels, cdiv, channels_last, launch, power_of_2, tl, triton, use_triton, vector
from effnet_kernels.silu import sigmoid, silu_slope


class SqueezeExcite(NamedTuple):
    """Weights of the two 1x1 convolutions: [R, C, 1, 1], [R], [C, R, 1, 1], [C]."""

    reduce_weight: Tensor
    reduce_bias: Tensor
    expand_weight: Tensor
    expand_bias: Tensor


def se_gate_reference(x: Tensor, bn: BatchNorm, se: SqueezeExcite, *, training: bool = True) -> Tensor:
    """The maths of this file in plain PyTorch; arguments as in `se_gate`."""
    conv2d, silu = torch.nn.functional.conv2d, torch.nn.functional.silu
    a = batch_norm_reference(x, bn, training=training, activation=True)
    hidden = conv2d(a.mean((2, 3), keepdim=True), se.reduce_weight.to(a.dtype), se.reduce_bias.to(a.dtype))
    return a * torch.sigmoid(conv2d(silu(hidden), se.expand_weight.to(a.dtype), se.expand_bias.to(a.dtype)))


@dataclass(frozen=True)
class GateLaunch:
    """`block_n` images (16 is the least a matrix product takes), `block_c` channels and `block_r` hidden values."""

    block_n: int
    block_c: int
    block_r: int
    num_warps: int

    def constants(self, c: int) -> dict[str, int]:
        blocks = {"BLOCK_N": self.block_n, "BLOCK_C": self.block_c, "BLOCK_R": self.block_r}
        return {"VEC": vector(c), "num_warps": self.num_warps, **blocks}


def gate_launch(r: int) -> GateLaunch:
    """All R hidden values at once; wide ones with fewer channels at a time, so that the tiles fit in registers."""
    block_r = max(power_of_2(r), 16)
    return GateLaunch(16, 64, block_r, num_warps=4) if block_r <= 64 else GateLaunch(16, 32, block_r, num_warps=8)


def parameters_launch(r: int) -> GateLaunch:
    """For the parameters' gradients, whose hidden values are independent of each other: at most 64 to a program."""
    return GateLaunch(16, 32, min(max(power_of_2(r), 16), 64), num_warps=4)


def gate_launch_space(r: int) -> list[GateLaunch]:
    """What an autotuner may try in place of `gate_launch`'s choice."""
    block_r = max(power_of_2(r), 16)
    return [GateLaunch(n, c, block_r, w) for n in (16, 32) for c in (32, 64) for w in (4, 8) if c * block_r <= 8192]


@triton.jit
def _gate_kernel(
    pool_ptr,  # [N, C]
    w1_ptr,  # [R, C]
    b1_ptr,  # [R]
    w2_ptr,  # [C, R]
    b2_ptr,  # [C]
    hidden_ptr,  # [N, R]
    gate_ptr,  # [N, C]
    N,
    C,
    R,
    VEC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    C = C // VEC * VEC
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    hidden = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        nc_ok = (n < N)[:, None] & (c < C)[None, :]
        cr_ok = (c < C)[:, None] & (r < R)[None, :]
        pool = tl.load(pool_ptr + n[:, None] * C + c[None, :], mask=nc_ok, other=0.0)
        w1 = tl.load(w1_ptr + r[None, :] * C + c[:, None], mask=cr_ok, other=0.0).to(tl.float32)
        hidden = tl.dot(pool, w1, hidden, input_precision="tf32x3")
    hidden += tl.load(b1_ptr + r, mask=r < R, other=0.0).to(tl.float32)[None, :]
    nr_ok = (n < N)[:, None] & (r < R)[None, :]
    tl.store(hidden_ptr + n[:, None] * R + r[None, :], hidden, mask=nr_ok)
    a = hidden * sigmoid(hidden)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        nc_ok = (n < N)[:, None] & (c < C)[None, :]
        rc_ok = (r < R)[:, None] & (c < C)[None, :]
        w2 = tl.load(w2_ptr + c[None, :] * R + r[:, None], mask=rc_ok, other=0.0).to(tl.float32)
        logit = tl.dot(a, w2, input_precision="tf32x3")
        logit += tl.load(b2_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        tl.store(gate_ptr + n[:, None] * C + c[None, :], sigmoid(logit), mask=nc_ok)


@triton.jit
def _gate_backward_kernel(
    dgate_ptr,  # [N, C]
    gate_ptr,  # [N, C]
    hidden_ptr,  # [N, R]
    w1_ptr,  # [R, C]
    w2_ptr,  # [C, R]
    dhidden_ptr,  # [N, R]
    dpool_ptr,  # [N, C]
    N,
    C,
    R,
    VEC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    C = C // VEC * VEC
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    da = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        nc_ok = (n < N)[:, None] & (c < C)[None, :]
        cr_ok = (c < C)[:, None] & (r < R)[None, :]
        gate = tl.load(gate_ptr + n[:, None] * C + c[None, :], mask=nc_ok, other=0.0)
        dlogit = tl.load(dgate_ptr + n[:, None] * C + c[None, :], mask=nc_ok, other=0.0) * gate * (1.0 - gate)
        w2 = tl.load(w2_ptr + c[:, None] * R + r[None, :], mask=cr_ok, other=0.0).to(tl.float32)
        da = tl.dot(dlogit, w2, da, input_precision="tf32x3")
    nr_ok = (n < N)[:, None] & (r < R)[None, :]
    hidden = tl.load(hidden_ptr + n[:, None] * R + r[None, :], mask=nr_ok, other=0.0)
    dhidden = da * silu_slope(hidden, sigmoid(hidden))
    tl.store(dhidden_ptr + n[:, None] * R + r[None, :], dhidden, mask=nr_ok)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        nc_ok = (n < N)[:, None] & (c < C)[None, :]
        rc_ok = (r < R)[:, None] & (c < C)[None, :]
        w1 = tl.load(w1_ptr + r[:, None] * C + c[None, :], mask=rc_ok, other=0.0).to(tl.float32)
        dpool = tl.dot(dhidden, w1, input_precision="tf32x3")
        tl.store(dpool_ptr + n[:, None] * C + c[None, :], dpool, mask=nc_ok)


@triton.jit
def _parameters_backward_kernel(
    sums_ptr,  # [5, N, C], of bn_silu_squeeze.py; the first is dgate
    gate_ptr,  # [N, C]
    pool_ptr,  # [N, C]
    dpool_ptr,  # [N, C]
    hidden_ptr,  # [N, R]
    dhidden_ptr,  # [N, R]
    dw1_ptr,  # [R, C]
    db1_ptr,  # [R]
    dw2_ptr,  # [C, R]
    db2_ptr,  # [C]
    bn_ptr,  # [2, C]: dbeta, dgamma
    N,
    C,
    R,
    NC,
    HW,
    VEC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    C = C // VEC * VEC
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    dw1 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    dw2 = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
    db1 = tl.zeros([BLOCK_R], tl.float32)
    db2 = tl.zeros([BLOCK_C], tl.float32)
    dbeta = tl.zeros([BLOCK_C], tl.float32)
    dgamma = tl.zeros([BLOCK_C], tl.float32)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        nc = n[:, None] * C + c[None, :]
        nc_ok = (n < N)[:, None] & (c < C)[None, :]
        nr = n[:, None] * R + r[None, :]
        nr_ok = (n < N)[:, None] & (r < R)[None, :]
        gate = tl.load(gate_ptr + nc, mask=nc_ok, other=0.0)
        dlogit = tl.load(sums_ptr + nc, mask=nc_ok, other=0.0) * gate * (1.0 - gate)
        hidden = tl.load(hidden_ptr + nr, mask=nr_ok, other=0.0)
        dw2 = tl.dot(tl.trans(dlogit), hidden * sigmoid(hidden), dw2, input_precision="tf32x3")
        db2 += tl.sum(dlogit, axis=0)
        dhidden = tl.load(dhidden_ptr + nr, mask=nr_ok, other=0.0)
        pool = tl.load(pool_ptr + nc, mask=nc_ok, other=0.0)
        dw1 = tl.dot(tl.trans(dhidden), pool, dw1, input_precision="tf32x3")
        db1 += tl.sum(dhidden, axis=0)
        from_pool = tl.load(dpool_ptr + nc, mask=nc_ok, other=0.0) / HW
        dy_slope = tl.load(sums_ptr + NC + nc, mask=nc_ok, other=0.0)
        dy_slope_xhat = tl.load(sums_ptr + 2 * NC + nc, mask=nc_ok, other=0.0)
        slope = tl.load(sums_ptr + 3 * NC + nc, mask=nc_ok, other=0.0)
        slope_xhat = tl.load(sums_ptr + 4 * NC + nc, mask=nc_ok, other=0.0)
        dbeta += tl.sum(gate * dy_slope + from_pool * slope, axis=0)
        dgamma += tl.sum(gate * dy_slope_xhat + from_pool * slope_xhat, axis=0)
    c_ok = c < C
    # Every program of a row or a column has the same sums; the first one stores them.
    once = c_ok & (tl.program_id(1) == 0)
    tl.store(dw1_ptr + r[:, None] * C + c[None, :], dw1, mask=(r < R)[:, None] & c_ok[None, :])
    tl.store(dw2_ptr + c[:, None] * R + r[None, :], dw2, mask=c_ok[:, None] & (r < R)[None, :])
    tl.store(db1_ptr + r, db1, mask=(r < R) & (tl.program_id(0) == 0))
    tl.store(db2_ptr + c, db2, mask=once)
    tl.store(bn_ptr + c, dbeta, mask=once)
    tl.store(bn_ptr + C + c, dgamma, mask=once)


def gate_forward(pool: Tensor, se: SqueezeExcite) -> tuple[Tensor, Tensor]:
    """gate [N, C] and hidden [N, R] (before its Swish), float32."""
    n, c = pool.shape
    r = se.reduce_weight.shape[0]
    assert 5 * n * c < 2**31, "places in [5, N, C] are 32-bit"
    cut = gate_launch(r)
    hidden, gate = pool.new_empty(n, r), torch.empty_like(pool)
    args = (pool, *se, hidden, gate, n, c, r)
    launch("se_gate", _gate_kernel, (cdiv(n, cut.block_n),), *args, **cut.constants(c))
    return gate, hidden


def gate_backward(
    sums: Tensor, gate: Tensor, pool: Tensor, hidden: Tensor, se: SqueezeExcite, hw: int
) -> tuple[Tensor, Tensor, SqueezeExcite]:
    """dpool [N, C], BatchNorm's [dbeta, dgamma] over this rank, and the gradients of `se`, from the five sums."""
    n, c = pool.shape
    r = hidden.shape[1]
    cut = gate_launch(r)
    dhidden, dpool = torch.empty_like(hidden), torch.empty_like(pool)
    args = (sums, gate, hidden, se.reduce_weight, se.expand_weight, dhidden, dpool, n, c, r)
    launch("se_gate", _gate_backward_kernel, (cdiv(n, cut.block_n),), *args, **cut.constants(c))
    grads = SqueezeExcite(*(torch.empty_like(p) for p in se))
    bn = pool.new_empty(2, c)
    cut = parameters_launch(r)
    tensors = (sums, gate, pool, dpool, hidden, dhidden, *grads, bn)
    grid = (cdiv(c, cut.block_c), cdiv(r, cut.block_r))
    launch("se_gate", _parameters_backward_kernel, grid, *tensors, n, c, r, n * c, hw, **cut.constants(c))
    return dpool, bn, grads


def se_forward(x: Tensor, stats: Tensor, bn: Affine, se: SqueezeExcite) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, pool, gate and hidden, given x's statistics."""
    pool = squeeze(x, stats, bn)
    gate, hidden = gate_forward(pool, se)
    return excite(x, stats, bn, gate), pool, gate, hidden


def se_backward(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    bn: Affine,
    se: SqueezeExcite,
    saved: tuple[Tensor, Tensor, Tensor],
    sync: bool,
) -> tuple[Tensor, Tensor, SqueezeExcite]:
    """dx, BatchNorm's [dbeta, dgamma] over this rank, and the gradients of `se`. `saved`: pool, gate, hidden."""
    pool, gate, hidden = saved
    sums = five_sums(dy, x, stats, bn)
    dpool, bn_sums, grads = gate_backward(sums, gate, pool, hidden, se, x.shape[2] * x.shape[3])
    return apply_sums(dy, x, stats, bn, gate, dpool, sum_over_ranks(bn_sums, sync)), bn_sums, grads


@torch.library.custom_op("effnet_kernels::se_gate", mutates_args=())
def _se_gate(
    x: Tensor, weight: Tensor, bias: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, eps: float, sync: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    stats = batch_statistics(x, eps, sync)
    y, pool, gate, hidden = se_forward(x, stats, (weight, bias), SqueezeExcite(w1, b1, w2, b2))
    return y, stats, pool, gate, hidden


@_se_gate.register_fake
def _(x, weight, bias, w1, b1, w2, b2, eps, sync):
    n, c = x.shape[:2]
    shapes = ((4, c), (n, c), (n, c), (n, w1.shape[0]))
    return torch.empty_like(x), *(x.new_empty(s, dtype=torch.float32) for s in shapes)


@torch.library.custom_op("effnet_kernels::se_gate_backward", mutates_args=())
def _se_gate_backward(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor,
    bias: Tensor,
    se: list[Tensor],
    saved: list[Tensor],
    sync: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    pool, gate, hidden = saved
    dx, sums, grads = se_backward(dy, x, stats, (weight, bias), SqueezeExcite(*se), (pool, gate, hidden), sync)
    return dx, sums, *grads


@_se_gate_backward.register_fake
def _(dy, x, stats, weight, bias, se, saved, sync):
    return torch.empty_like(x), torch.empty_like(stats[:2]), *(torch.empty_like(p) for p in se)


def _setup(ctx, inputs, output) -> None:
    x, weight, bias, w1, b1, w2, b2, _, ctx.sync = inputs
    ctx.save_for_backward(x, weight, bias, w1, b1, w2, b2, *output[1:])


def _backward(ctx, dy: Tensor, *_: Tensor):
    x, weight, bias, w1, b1, w2, b2, stats, *saved = ctx.saved_tensors
    dx, sums, *grads = _se_gate_backward(
        channels_last(dy), x, stats, weight, bias, [w1, b1, w2, b2], list(saved), ctx.sync
    )
    return dx, sums[1].to(weight.dtype), sums[0].to(bias.dtype), *grads, None, None


_se_gate.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("effnet_kernels::se_gate_eval", mutates_args=())
def _se_gate_eval(
    x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> Tensor:
    return se_forward(x, stats, (weight, bias), SqueezeExcite(w1, b1, w2, b2))[0]


@_se_gate_eval.register_fake
def _(x, stats, weight, bias, w1, b1, w2, b2):
    return torch.empty_like(x)


def se_gate(x: Tensor, bn: BatchNorm, se: SqueezeExcite, *, training: bool = True, kernels: Kernels = "auto") -> Tensor:
    """Squeeze-and-excitation of Swish of BatchNorm of `x` [N, C, H, W], a raw convolution output; same shape and type.

    Evaluation uses the running statistics, and takes the reference when a gradient is wanted. Raises ValueError for
    one value per channel in training.
    """
    if not use_triton(kernels, x) or (not training and needs_grad(x, bn.weight, bn.bias, *se)):
        return se_gate_reference(x, bn, se, training=training)
    x = channels_last(x)
    se = SqueezeExcite(*(p.contiguous() for p in se))
    if not training:
        return _se_gate_eval(x, running_statistics(bn), bn.weight, bn.bias, *se)
    require_values(x.shape, bn.sync)
    y, stats, *_ = _se_gate(x, bn.weight, bn.bias, *se, bn.eps, bn.sync)
    update_running(bn, stats)
    return y
