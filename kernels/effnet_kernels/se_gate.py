"""Squeeze-and-excitation (Hu et al., 2018) on a raw convolution output: BatchNorm, Swish, squeeze, gate, multiply.

    a = silu(gamma (x - mean) rstd + beta),  pool = mean over h, w of a
    hidden = W1 pool + b1,  gate = sigmoid(W2 silu(hidden) + b2),  y = a gate

Forward   reads x (for the mean), reads x again and writes y: a is never written.
Backward  the five sums of bn_silu_squeeze.py from dy and x; then back through the gate to dpool; then, per block of
          channels, dW1, dW2, db1, db2 and BatchNorm's dgamma and dbeta, each summed over the images in order; then
          one pass that reads dy and x and writes dx.

The matrices are small, so a program's time is that of waiting: each product over the channels is cut into spans of
channels, whose sums the next launch adds up in order, and no program takes many turns. The products are float32 in
three TF32 products (tf32x3), which keeps float32's accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

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
from effnet_kernels.launch import (
    Kernels,
    cdiv,
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
    """`block_n` images (16 is the least a matrix product takes), `block_c` channels and `block_r` hidden values.

    Sums over the channels are cut into spans of `turns` blocks.
    """

    block_n: int
    block_c: int
    block_r: int
    num_warps: int
    turns: int = 4

    def spans(self, c: int) -> int:
        return cdiv(c, self.block_c * self.turns)

    def constants(self, c: int) -> dict[str, int]:
        blocks = {"BLOCK_N": self.block_n, "BLOCK_C": self.block_c, "BLOCK_R": self.block_r}
        return {"VEC": vector(c), "num_warps": self.num_warps, **blocks}


def gate_launch(r: int) -> GateLaunch:
    """All R hidden values at once; wide ones with fewer channels at a time, so that the tiles fit in registers."""
    block_r = max(power_of_2(r), 16)
    block_c = 64 if block_r <= 32 else 32
    return GateLaunch(16, block_c, block_r, num_warps=4 if block_r <= 64 else 8, turns=256 // block_c)


def parameters_launch(r: int) -> GateLaunch:
    """For the parameters' gradients, whose hidden values are independent of each other: at most 64 to a program."""
    return GateLaunch(16, 32, min(max(power_of_2(r), 16), 64), num_warps=4)


def gate_launch_space(r: int) -> list[GateLaunch]:
    """What an autotuner may try in place of `gate_launch`'s choice."""
    block_r = max(power_of_2(r), 16)
    blocks = [(n, c, w) for n in (16, 32) for c in (32, 64) for w in (4, 8) if c * block_r <= 8192]
    return [GateLaunch(n, c, block_r, w, turns) for n, c, w in blocks for turns in (2, 4, 8)]


@triton.jit
def _tile(N, R, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr):
    """A program's images and all hidden values: n [BLOCK_N], r [BLOCK_R], places in [N, R] and their mask."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    return n, r, n[:, None] * R + r[None, :], (n < N)[:, None] & (r < R)[None, :]


@triton.jit
def _added(
    sums_ptr,  # [spans, N, R]
    spans,
    NR,
    nr,
    nr_ok,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The spans' sums, added in order."""
    total = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for span in range(spans):
        total += tl.load(sums_ptr + span * NR + nr, mask=nr_ok, other=0.0)
    return total


@kernel
def _spans_kernel(
    x_ptr,  # [N, C]: pool, or the gradient at the gate if BACKWARD
    gate_ptr,  # [N, C], if BACKWARD
    w_ptr,  # [R, C], or [C, R] if BACKWARD
    sums_ptr,  # [spans, N, R]: of the hidden values, or of the gradient at their Swish
    N,
    C,
    R,
    span,
    BACKWARD: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    C = C // VEC * VEC
    n, r, nr, nr_ok = _tile(N, R, BLOCK_N, BLOCK_R)
    sums = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    start = tl.program_id(1) * span
    for first in range(start, tl.minimum(start + span, C), BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        nc = n[:, None] * C + c[None, :]
        nc_ok = (n < N)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + nc, mask=nc_ok, other=0.0)
        if BACKWARD:
            gate = tl.load(gate_ptr + nc, mask=nc_ok, other=0.0)
            x = x * gate * (1.0 - gate)
            at = w_ptr + c[:, None] * R + r[None, :]
        else:
            at = w_ptr + r[None, :] * C + c[:, None]
        w = tl.load(at, mask=(c < C)[:, None] & (r < R)[None, :], other=0.0).to(tl.float32)
        sums = tl.dot(x, w, sums, input_precision="tf32x3")
    tl.store(sums_ptr + tl.program_id(1) * N * R + nr, sums, mask=nr_ok)


@kernel
def _gate_kernel(
    sums_ptr,  # [spans, N, R]
    b1_ptr,  # [R]
    w2_ptr,  # [C, R]
    b2_ptr,  # [C]
    hidden_ptr,  # [N, R]
    gate_ptr,  # [N, C]
    N,
    C,
    R,
    spans,
    VEC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    C = C // VEC * VEC
    n, r, nr, nr_ok = _tile(N, R, BLOCK_N, BLOCK_R)
    hidden = _added(sums_ptr, spans, N * R, nr, nr_ok, BLOCK_N, BLOCK_R)
    hidden += tl.load(b1_ptr + r, mask=r < R, other=0.0).to(tl.float32)[None, :]
    # Every program of these images has the same hidden values; the first one stores them.
    tl.store(hidden_ptr + nr, hidden, mask=nr_ok & (tl.program_id(1) == 0))
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    rc_ok = (r < R)[:, None] & (c < C)[None, :]
    w2 = tl.load(w2_ptr + c[None, :] * R + r[:, None], mask=rc_ok, other=0.0).to(tl.float32)
    logit = tl.dot(hidden * sigmoid(hidden), w2, input_precision="tf32x3")
    logit += tl.load(b2_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    tl.store(gate_ptr + n[:, None] * C + c[None, :], sigmoid(logit), mask=(n < N)[:, None] & (c < C)[None, :])


@kernel
def _dpool_kernel(
    sums_ptr,  # [spans, N, R]
    hidden_ptr,  # [N, R]
    w1_ptr,  # [R, C]
    dhidden_ptr,  # [N, R]
    dpool_ptr,  # [N, C]
    N,
    C,
    R,
    spans,
    VEC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    C = C // VEC * VEC
    n, r, nr, nr_ok = _tile(N, R, BLOCK_N, BLOCK_R)
    hidden = tl.load(hidden_ptr + nr, mask=nr_ok, other=0.0)
    dhidden = _added(sums_ptr, spans, N * R, nr, nr_ok, BLOCK_N, BLOCK_R) * silu_slope(hidden, sigmoid(hidden))
    tl.store(dhidden_ptr + nr, dhidden, mask=nr_ok & (tl.program_id(1) == 0))
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    rc_ok = (r < R)[:, None] & (c < C)[None, :]
    w1 = tl.load(w1_ptr + r[:, None] * C + c[None, :], mask=rc_ok, other=0.0).to(tl.float32)
    dpool = tl.dot(dhidden, w1, input_precision="tf32x3")
    tl.store(dpool_ptr + n[:, None] * C + c[None, :], dpool, mask=(n < N)[:, None] & (c < C)[None, :])


@kernel
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
    C, NC = C // VEC * VEC, NC // VEC * VEC
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


def _over_channels(x: Tensor, gate: Tensor | None, w: Tensor, r: int, finish: Any, rest: tuple[Tensor, ...]) -> None:
    """The sums over spans of the channels of x [N, C] (backward, where there is a gate), then the kernel `finish`."""
    n, c = x.shape[-2:]
    assert 5 * n * c < 2**31, "places in [5, N, C] are 32-bit"
    cut = gate_launch(r)
    sums = x.new_empty(cut.spans(c), n, r)
    images, constants = cdiv(n, cut.block_n), cut.constants(c)
    args = (x, x if gate is None else gate, w, sums, n, c, r, cut.block_c * cut.turns)
    launch("se_gate", _spans_kernel, (images, len(sums)), *args, BACKWARD=gate is not None, **constants)
    launch("se_gate", finish, (images, cdiv(c, cut.block_c)), sums, *rest, n, c, r, len(sums), **constants)


def gate_forward(pool: Tensor, se: SqueezeExcite) -> tuple[Tensor, Tensor]:
    """gate [N, C] and hidden [N, R] (before its Swish), float32."""
    r = se.reduce_weight.shape[0]
    hidden, gate = pool.new_empty(len(pool), r), torch.empty_like(pool)
    rest = (se.reduce_bias, se.expand_weight, se.expand_bias, hidden, gate)
    _over_channels(pool, None, se.reduce_weight, r, _gate_kernel, rest)
    return gate, hidden


def gate_backward(
    sums: Tensor, gate: Tensor, pool: Tensor, hidden: Tensor, se: SqueezeExcite, hw: int
) -> tuple[Tensor, Tensor, SqueezeExcite]:
    """dpool [N, C], BatchNorm's [dbeta, dgamma] over this rank, and the gradients of `se`, from the five sums."""
    n, c = pool.shape
    r = hidden.shape[1]
    dhidden, dpool = torch.empty_like(hidden), torch.empty_like(pool)
    _over_channels(sums, gate, se.expand_weight, r, _dpool_kernel, (hidden, se.reduce_weight, dhidden, dpool))
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
