"""Squeeze-and-excitation (Hu et al., 2018) on a raw convolution output: BatchNorm, Swish, squeeze, gate, multiply.

    z = gamma (x - mean) rstd + beta,  a = silu(z),  pool = mean over h, w of a
    gate = the two-layer perceptron of gate_mlp.py on pool,  y = a gate

Forward   Reads x for pool, then reads x again and writes y. a is never written.
Backward  The gradient at a is dy gate + dpool / HW, where gate and dpool are constant over an image's channel. One pass
          over dy and x keeps five sums per image and channel,
              dy silu(z),  dy silu'(z),  dy silu'(z) xhat,  silu'(z),  silu'(z) xhat,
          which give the gradient of the gate, dgamma, dbeta and both means of BatchNorm's backward. gate_mlp.py turns
          them into dpool and the parameters' gradients. A second pass reads dy and x and writes dx.

Programs of this file walk over all pixels of one image for a block of channels. bn_silu_squeeze.py runs them without
dy. That for the five sums loads a tile ahead, since few warps fit beside the sums. The second pass of each direction
walks back, from the last image and pixel to the first: a map that is larger than the cache has its end there.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from effnet_kernels.batch_norm import batch_norm_reference
from effnet_kernels.gate_mlp import SqueezeExcite, gate_backward, gate_forward
from effnet_kernels.launch import (
    Kernels,
    LaunchChoice,
    cdiv,
    channel_block,
    channels_last,
    cpp_ops,
    custom_op,
    kernel,
    launch,
    power_of_2,
    slots,
    tl,
    triton,
    use_kernels,
    vector,
)
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
    running_statistics,
    sum_over_ranks,
    update_running,
)


def se_gate_reference(x: Tensor, bn: BatchNorm, se: SqueezeExcite, *, training: bool = True) -> Tensor:
    """The equations above in plain PyTorch; arguments as in `se_gate`."""
    conv2d, silu = torch.nn.functional.conv2d, torch.nn.functional.silu
    a = batch_norm_reference(x, bn, training=training, activation=True)
    hidden = conv2d(a.mean((2, 3), keepdim=True), se.reduce_weight.to(a.dtype), se.reduce_bias.to(a.dtype))
    return a * torch.sigmoid(conv2d(silu(hidden), se.expand_weight.to(a.dtype), se.expand_bias.to(a.dtype)))


@dataclass(frozen=True)
class ImageLaunch:
    """Each program handles `block_c` channels of one of an image's `spans` parts, `block_m` pixels at a time."""

    block_m: int
    block_c: int
    num_warps: int
    spans: int = 1

    def grid(self, n: int, c: int) -> tuple[int, int]:
        """Programs over images and channel blocks, and over the spans."""
        return cdiv(c, self.block_c) * n, self.spans

    def span(self, hw: int) -> int:
        """Pixels of a span: whole tiles."""
        return cdiv(cdiv(hw, self.spans), self.block_m) * self.block_m

    def constants(self, c: int) -> dict[str, int]:
        """Compile-time arguments of the kernels."""
        return {"VEC": vector(c), "BLOCK_M": self.block_m, "BLOCK_C": self.block_c, "num_warps": self.num_warps}


def image_launch(
    n: int, hw: int, c: int, values: int = 16, most_warps: int = 4, widest: int = 256, cut: bool = True
) -> ImageLaunch:
    """`values` values per thread at a time, and at least 64 in all where the map has them: small maps use fewer warps.

    Blocks are wide, so that few threads share a channel and the sum over them at the end is short. Few large images are
    `cut` into spans of at least 8 tiles, so that all multiprocessors have work, for one wave at most.
    """
    block_c = channel_block(c, widest, slack=1.08)
    warps = max(hw * block_c // (32 * 64), 1)
    num_warps = min(1 << warps.bit_length() - 1, most_warps)
    block_m = min(power_of_2(hw), max(num_warps * 32 * values // block_c, 1))
    fit = slots(8) // (n * cdiv(c, block_c)) if cut else 1
    launch = ImageLaunch(block_m, block_c, num_warps, max(min(fit, cdiv(hw, block_m) // 8), 1))
    return replace(launch, spans=cdiv(hw, launch.span(hw)))  # whole tiles may need fewer


def image_launch_space(n: int, hw: int, c: int) -> list[ImageLaunch]:
    """Launches an autotuner may try in place of `image_launch`'s choice."""
    choices = itertools.product((8, 16), (1, 2, 4, 8), (128, 256), (True, False))
    return list(dict.fromkeys(image_launch(n, hw, c, *choice) for choice in choices))


@triton.jit
def _image_walk(program, part, C, HW, span, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Channels, their mask, their 64-bit offsets in [N, C], the base of the part's first tile in [N, HW, C], pixels, a
    32-bit tile, and the part's first pixel and its end.
    """
    blocks = tl.cdiv(C, BLOCK_C)
    n = (program // blocks).to(tl.int64)
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    pixel = tl.arange(0, BLOCK_M)
    tile = pixel[:, None] * C + c[None, :]
    begin = part * span
    return c, c < C, n * C + c, (n * HW + begin) * C, pixel, tile, begin, tl.minimum(begin + span, HW)


@triton.jit
def _image_walk_back(C, HW, span, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """As `_image_walk`, with the programs in reverse, the base of the last tile, and its first pixel."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    part = tl.num_programs(1) - 1 - tl.program_id(1)
    c, c_ok, nc, base, pixel, tile, begin, end = _image_walk(program, part, C, HW, span, BLOCK_M, BLOCK_C)
    last = last_tile(begin, end, BLOCK_M)
    return c, c_ok, nc, base + (last - begin).to(tl.int64) * C, pixel, tile, begin, end, last


@triton.jit
def _load_tile(ptr, pixel, end, c_ok):
    """A tile of the storage type and its mask: pixels before `end` of valid channels."""
    ok = (pixel < end)[:, None] & c_ok[None, :]
    return tl.load(ptr, mask=ok, other=0.0), ok


@kernel
def _squeeze_kernel(
    x_ptr,  # [N, HW, C]
    stats_ptr,  # [4, C]
    gamma_ptr,  # [C]
    beta_ptr,  # [C]
    pool_ptr,  # [spans, N, C], sums over a span divided by HW
    HW,
    C,
    NC,
    span,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C, NC = C // VEC * VEC, NC // VEC * VEC
    part = tl.program_id(1)
    c, c_ok, nc, base, pixel, tile, begin, end = _image_walk(tl.program_id(0), part, C, HW, span, BLOCK_M, BLOCK_C)
    mean, rstd, gamma, beta = load_norm(stats_ptr, gamma_ptr, beta_ptr, c, c_ok, C)
    gain = gamma * rstd
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for m in range(begin, end, BLOCK_M):
        ok = ((m + pixel) < end)[:, None] & c_ok[None, :]
        z = (load(x_ptr + base + tile, ok) - mean) * gain + beta
        total += tl.where(ok, z * sigmoid(z), 0.0)
        base += BLOCK_M * C
    tl.store(pool_ptr + part.to(tl.int64) * NC + nc, tl.sum(total, axis=0) / HW, mask=c_ok)


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
    span,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C = C // VEC * VEC
    c, c_ok, nc, base, pixel, tile, begin, end, last = _image_walk_back(C, HW, span, BLOCK_M, BLOCK_C)
    mean, rstd, gamma, beta = load_norm(stats_ptr, gamma_ptr, beta_ptr, c, c_ok, C)
    gain = gamma * rstd
    gate = load(gate_ptr + nc, c_ok)[None, :]
    for m in range(last, begin - 1, -BLOCK_M):
        ok = ((m + pixel) < end)[:, None] & c_ok[None, :]
        z = (load(x_ptr + base + tile, ok) - mean) * gain + beta
        tl.store(y_ptr + base + tile, (z * sigmoid(z) * gate).to(y_ptr.dtype.element_ty), mask=ok)
        base -= BLOCK_M * C


@kernel
def _five_sums_kernel(
    dy_ptr,  # [N, HW, C] if HAS_DY
    x_ptr,  # [N, HW, C]
    stats_ptr,  # [4, C]
    gamma_ptr,  # [C]
    beta_ptr,  # [C]
    gate_ptr,  # [N, C] if GATED
    sums_ptr,  # [spans, 5, N, C] if HAS_DY, else [spans, 2, N, C], the last two
    gated_ptr,  # [N, HW, C] if GATED, silu(z) gate
    HW,
    C,
    NC,
    span,
    HAS_DY: tl.constexpr,
    GATED: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C, NC = C // VEC * VEC, NC // VEC * VEC
    part = tl.program_id(1)
    c, c_ok, nc, base, pixel, tile, begin, end = _image_walk(tl.program_id(0), part, C, HW, span, BLOCK_M, BLOCK_C)
    mean, rstd, gamma, beta = load_norm(stats_ptr, gamma_ptr, beta_ptr, c, c_ok, C)
    if GATED:
        gate = load(gate_ptr + nc, c_ok)[None, :]
    sums_ptr += part.to(tl.int64) * NC * (5 if HAS_DY else 2)
    slope_sum = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    slope_xhat_sum = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    if HAS_DY:
        dy_act_sum = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        dy_slope_sum = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        dy_slope_xhat_sum = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    x, ok = _load_tile(x_ptr + base + tile, begin + pixel, end, c_ok)
    if HAS_DY:
        dy = tl.load(dy_ptr + base + tile, mask=ok, other=0.0)
    for m in range(begin, end, BLOCK_M):
        here = base + tile
        base += BLOCK_M * C
        next_x, next_ok = _load_tile(x_ptr + base + tile, m + BLOCK_M + pixel, end, c_ok)
        if HAS_DY:
            next_dy = tl.load(dy_ptr + base + tile, mask=next_ok, other=0.0)
        xhat = (x.to(tl.float32) - mean) * rstd
        z = xhat * gamma + beta
        s = sigmoid(z)
        slope = tl.where(ok, silu_slope(z, s), 0.0)
        slope_sum += slope
        slope_xhat_sum += slope * xhat
        if HAS_DY:
            g = dy.to(tl.float32)
            dy_act_sum += g * z * s
            dy_slope_sum += g * slope
            dy_slope_xhat_sum += g * slope * xhat
            dy = next_dy
        if GATED:
            tl.store(gated_ptr + here, (z * s * gate).to(gated_ptr.dtype.element_ty), mask=ok)
        x, ok = next_x, next_ok
    if HAS_DY:
        tl.store(sums_ptr + nc, tl.sum(dy_act_sum, axis=0), mask=c_ok)
        tl.store(sums_ptr + NC + nc, tl.sum(dy_slope_sum, axis=0), mask=c_ok)
        tl.store(sums_ptr + 2 * NC + nc, tl.sum(dy_slope_xhat_sum, axis=0), mask=c_ok)
        sums_ptr += 3 * NC
    tl.store(sums_ptr + nc, tl.sum(slope_sum, axis=0), mask=c_ok)
    tl.store(sums_ptr + NC + nc, tl.sum(slope_xhat_sum, axis=0), mask=c_ok)


@kernel
def _apply_sums_kernel(
    dy_ptr,  # [N, HW, C] if HAS_DY
    x_ptr,  # [N, HW, C]
    stats_ptr,  # [4, C]
    gamma_ptr,  # [C]
    beta_ptr,  # [C]
    gate_ptr,  # [N, C] if HAS_DY
    dpool_ptr,  # [N, C]
    sums_ptr,  # [2, C]: dbeta, dgamma, over all ranks
    dx_ptr,  # [N, HW, C]
    HW,
    C,
    span,
    HAS_DY: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C = C // VEC * VEC
    c, c_ok, nc, base, pixel, tile, begin, end, last = _image_walk_back(C, HW, span, BLOCK_M, BLOCK_C)
    mean, rstd, gamma, beta = load_norm(stats_ptr, gamma_ptr, beta_ptr, c, c_ok, C)
    mean_dz, mean_dz_xhat = load_mean_gradients(sums_ptr, stats_ptr, c, c_ok, C)
    gain = gamma * rstd
    from_pool = (load(dpool_ptr + nc, c_ok) / HW)[None, :]
    if HAS_DY:
        gate = load(gate_ptr + nc, c_ok)[None, :]
    for m in range(last, begin - 1, -BLOCK_M):
        ok = ((m + pixel) < end)[:, None] & c_ok[None, :]
        xhat = (load(x_ptr + base + tile, ok) - mean) * rstd
        z = xhat * gamma + beta
        dz = silu_slope(z, sigmoid(z))
        if HAS_DY:
            dy = load(dy_ptr + base + tile, ok)
            dz = dz * (dy * gate + from_pool)
        else:
            dz = dz * from_pool
        dx = gain * (dz - mean_dz - xhat * mean_dz_xhat)
        tl.store(dx_ptr + base + tile, dx.to(dx_ptr.dtype.element_ty), mask=ok)
        base -= BLOCK_M * C


def image_choice(kernel: str, **options: Any) -> LaunchChoice:
    """The choice for a pass over images, by (images, channels, pixels); `options` are those of `image_launch`."""
    return LaunchChoice(
        kernel, lambda n, c, hw: image_launch(n, hw, c, **options), lambda n, c, hw: image_launch_space(n, hw, c)
    )


# An H100 ran the two kernels that sum at half the bandwidth with blocks of 256 channels on maps of 8 x 8 pixels.
squeeze_choice = image_choice("squeeze", values=8, most_warps=8, widest=128)
excite_choice = image_choice("excite")
five_sums_choice = image_choice("five sums", values=8, widest=128)  # 16 values each would leave room for 12 warps
apply_sums_choice = image_choice("apply sums")


def _over_spans(sums: Tensor) -> Tensor:
    """The sum over the first dimension, the spans."""
    return sums[0] if len(sums) == 1 else sums.sum(0)


def squeeze(x: Tensor, stats: Tensor, bn: Affine) -> Tensor:
    """pool [N, C] float32."""
    if ops := cpp_ops(x):
        return ops.squeeze(x, stats, *bn)
    n, c, h, w = x.shape
    config = squeeze_choice(n, c, h * w)
    pool = torch.empty(config.spans, n, c, device=x.device, dtype=torch.float32)
    sizes = h * w, c, n * c, config.span(h * w)
    launch("se_gate", _squeeze_kernel, config.grid(n, c), x, stats, *bn, pool, *sizes, **config.constants(c))
    return _over_spans(pool)


def excite(x: Tensor, stats: Tensor, bn: Affine, gate: Tensor) -> Tensor:
    """silu(z) times gate [N, C], in x's shape and dtype."""
    if ops := cpp_ops(x):
        return ops.excite(x, stats, *bn, gate)
    n, c, h, w = x.shape
    config = excite_choice(n, c, h * w)
    y = torch.empty_like(x)
    sizes = h * w, c, config.span(h * w)
    launch("se_gate", _excite_kernel, config.grid(n, c), x, stats, *bn, gate, y, *sizes, **config.constants(c))
    return y


def five_sums(dy: Tensor | None, x: Tensor, stats: Tensor, bn: Affine) -> Tensor:
    """The five sums above, [5, N, C] float32; without dy the last two, [2, N, C]."""
    if ops := cpp_ops(x):
        return ops.five_sums(dy, x, stats, *bn)
    return _launch_five_sums(dy, x, stats, bn, None)[0]


def gated_five_sums(dy: Tensor, x: Tensor, stats: Tensor, bn: Affine, gate: Tensor) -> tuple[Tensor, Tensor]:
    """The five sums, and from the same pass silu(z) times gate [N, C]: what `excite` returns. In Triton only."""
    sums, gated = _launch_five_sums(dy, x, stats, bn, gate)
    assert gated is not None
    return sums, gated


def _launch_five_sums(
    dy: Tensor | None, x: Tensor, stats: Tensor, bn: Affine, gate: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    n, c, h, w = x.shape
    config = five_sums_choice(n, c, h * w)
    sums = torch.empty(config.spans, 2 if dy is None else 5, n, c, device=x.device, dtype=torch.float32)
    gated = None if gate is None else torch.empty_like(x)
    launch(
        "se_gate",
        _five_sums_kernel,
        config.grid(n, c),
        x if dy is None else dy,
        x,
        stats,
        *bn,
        sums if gate is None else gate,
        sums,
        sums if gated is None else gated,
        h * w,
        c,
        n * c,
        config.span(h * w),
        HAS_DY=dy is not None,
        GATED=gate is not None,
        **config.constants(c),
    )
    return _over_spans(sums), gated


def apply_sums(
    dy: Tensor | None, x: Tensor, stats: Tensor, bn: Affine, gate: Tensor | None, dpool: Tensor, sums: Tensor
) -> Tensor:
    """dx from the gradient dpool [N, C] at pool, and the sums [2, C] of dz and dz * xhat over all ranks."""
    if ops := cpp_ops(x):
        return ops.apply_sums(dy, x, stats, *bn, gate, dpool, sums)
    n, c, h, w = x.shape
    config = apply_sums_choice(n, c, h * w)
    dx = torch.empty_like(x)
    launch(
        "se_gate",
        _apply_sums_kernel,
        config.grid(n, c),
        x if dy is None else dy,
        x,
        stats,
        *bn,
        dpool if gate is None else gate,
        dpool,
        sums,
        dx,
        h * w,
        c,
        config.span(h * w),
        HAS_DY=dy is not None,
        **config.constants(c),
    )
    return dx


def se_forward(x: Tensor, stats: Tensor, bn: Affine, se: SqueezeExcite) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, pool, gate and hidden from x and its statistics."""
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


@custom_op("se_gate")
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


@custom_op("se_gate_backward")
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
    ctx.set_materialize_grads(False)  # autograd would write zeros for every saved output
    x, weight, bias, w1, b1, w2, b2, _, ctx.sync = inputs
    ctx.save_for_backward(x, weight, bias, w1, b1, w2, b2, *output[1:])


def _backward(ctx, dy: Tensor, *_: Tensor):
    x, weight, bias, w1, b1, w2, b2, stats, *saved = ctx.saved_tensors
    dx, sums, *grads = _se_gate_backward(
        channels_last(dy), x, stats, weight, bias, [w1, b1, w2, b2], list(saved), ctx.sync
    )
    return dx, sums[1].to(weight.dtype), sums[0].to(bias.dtype), *grads, None, None


_se_gate.register_autograd(_backward, setup_context=_setup)


@custom_op("se_gate_eval")
def _se_gate_eval(
    x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> Tensor:
    return se_forward(x, stats, (weight, bias), SqueezeExcite(w1, b1, w2, b2))[0]


@_se_gate_eval.register_fake
def _(x, stats, weight, bias, w1, b1, w2, b2):
    return torch.empty_like(x)


def se_gate(x: Tensor, bn: BatchNorm, se: SqueezeExcite, *, training: bool = True, kernels: Kernels = "auto") -> Tensor:
    """Squeeze-and-excitation of Swish of BatchNorm of `x` [N, C, H, W], a raw convolution output.

    Evaluation uses the running statistics; if a gradient is needed there, the reference runs.

    Returns:
        x's shape and dtype, channels last.

    Raises:
        ValueError: training on one value per channel.
    """
    if not use_kernels(kernels, x) or (not training and needs_grad(x, bn.weight, bn.bias, *se)):
        return se_gate_reference(x, bn, se, training=training)
    x, bn = channels_last(x), bn.contiguous()
    se = SqueezeExcite(*(p.contiguous() for p in se))
    if not training:
        return _se_gate_eval(x, running_statistics(bn), bn.weight, bn.bias, *se)
    require_values(x.shape, bn.sync)
    y, stats, *_ = _se_gate(x, bn.weight, bn.bias, *se, bn.eps, bn.sync)
    update_running(bn, stats)
    return y
