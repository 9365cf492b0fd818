"""Depthwise convolution, k = 3 or 5, stride 1 or 2, any padding; with the BatchNorms around it in the same passes.

    a = silu(gamma (x - mean) rstd + beta)    prologue: the BatchNorm and Swish before it, else a = x
    y[ho, wo] = sum over dy, dx of w[dy, dx] a[ho s + dy - top, wo s + dx - left],  a = 0 outside

Forward   reads x, writes y. Epilogue: count, mean and M2 of each tile of y, so the next BatchNorm needs no pass.
Backward  da[hi, wi] = sum of w[dy, dx] g[(hi + top - dy) / s, (wi + left - dx) / s] and
          dw[dy, dx] = sum of a[hi, wi] g[the same place]: both meet the same g, so one pass reads g and x, and writes
          dx, or with the prologue dz = da silu'(z), with the sums of dz and dz * xhat that BatchNorm's backward needs.

Each row of a tile is one column of an image (the images' columns laid end to end, so that maps of 7 or 14 waste no
lanes) for a block of channels; a program walks down the rows. Forward, ceil(k/s) running sums are kept per column, so
that every input row is read, and passed through Swish, k times (once per horizontal tap) and not k*k times. Backward,
the s*s phases of an input pixel relative to the stride are apart, so that no tap is computed to be masked away.
"""

# Triton knows tuple + tuple, which grows a tuple in a kernel, but not (*tuple, value); mypy reads kernels as Python.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from effnet_kernels.batch_norm import Affine, chan_merge, load_norm, store_moments
from effnet_kernels.launch import (
    PROGRAMS,
    Kernels,
    cdiv,
    channel_block,
    channels_last,
    launch,
    tl,
    triton,
    use_triton,
    vector,
)
from effnet_kernels.silu import sigmoid, silu_slope

Padding = tuple[int, int, int, int]  # left, right, top, bottom, as torch.nn.functional.pad


def depthwise_conv_reference(x: Tensor, weight: Tensor, stride: int, padding: Padding) -> Tensor:
    """Zero padding, then torch's grouped convolution; arguments as in `depthwise_conv`."""
    weight = weight.to(x.dtype)
    left, right, top, bottom = padding
    if (left, top) == (right, bottom):
        return torch.nn.functional.conv2d(x, weight, stride=stride, padding=(top, left), groups=x.shape[1])
    return torch.nn.functional.conv2d(torch.nn.functional.pad(x, padding), weight, stride=stride, groups=x.shape[1])


@dataclass(frozen=True)
class ForwardLaunch:
    """A program computes `band` rows of `block_p` columns of `block_c` channels."""

    block_p: int
    block_c: int
    band: int
    num_warps: int


@dataclass(frozen=True)
class BackwardLaunch:
    """A program takes `tiles` tiles of `block_p` columns of one row (s*s pixels each) of `block_c` channels."""

    block_p: int
    block_c: int
    tiles: int
    num_warps: int


def forward_launch(n: int, c: int, ho: int, wo: int, elements: int = 8) -> ForwardLaunch:
    """`elements` values per thread; bands of at most 16 rows, shorter where that would leave too few programs."""
    num_warps = 4
    block_c = channel_block(c, widest=64)
    block_p = num_warps * 32 * elements // block_c
    bands = max(cdiv(ho, 16), min(PROGRAMS // (cdiv(n * wo, block_p) * cdiv(c, block_c)), cdiv(ho, 4)))
    return ForwardLaunch(block_p, block_c, cdiv(ho, bands), num_warps)


def backward_launch(
    c: int, k: int, stride: int, row_steps: int, columns: int, elements: int | None = None
) -> BackwardLaunch:
    """k * k sums of dw stay in registers for each of a thread's `elements` values: 8 at k = 3 and stride 1, else 4.

    At least 16 tiles per program, so that writing those sums out stays small beside the tiles.
    """
    num_warps = 4
    block_c = channel_block(c, widest=64)
    block_p = num_warps * 32 * (elements or (8 if (k, stride) == (3, 1) else 4)) // block_c
    tiles = cdiv(columns, block_p) * row_steps
    return BackwardLaunch(block_p, block_c, max(cdiv(tiles * cdiv(c, block_c), PROGRAMS), min(tiles, 16)), num_warps)


def launch_space(n: int, c: int, ho: int, wo: int, k: int) -> tuple[list[ForwardLaunch], list[BackwardLaunch]]:
    """What an autotuner may try in place of the two choices above (stride 1)."""
    forward = [forward_launch(n, c, ho, wo, elements) for elements in (4, 8, 16)]
    return forward, [backward_launch(c, k, 1, ho, n * wo, elements) for elements in (4, 8)]


@triton.jit
def _replaced(values, INDEX: tl.constexpr, value, LENGTH: tl.constexpr):
    """The tuple `values` with `value` at INDEX."""
    out = ()
    for t in tl.static_range(LENGTH):
        out = out + (value if t == INDEX else values[t],)
    return out


@triton.jit
def _forward_kernel(
    x_ptr,  # [N, H, W, C]
    w_ptr,  # [K*K, C] float32
    stats_ptr,  # [4, C] of x, if PROLOGUE
    gamma_ptr,  # [C], if PROLOGUE
    beta_ptr,  # [C], if PROLOGUE
    y_ptr,  # [N, HO, WO, C]
    moments_ptr,  # [programs, 3, C], if MOMENTS
    N,
    H,
    W,
    C,
    HO,
    WO,
    left,
    top,
    band,
    bands,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PROLOGUE: tl.constexpr,
    MOMENTS: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C = C // VEC * VEC
    SUMS: tl.constexpr = (K + STRIDE - 1) // STRIDE  # output rows that one input row reaches
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    first = tl.program_id(1) % bands * band
    end = tl.minimum(first + band, HO)
    p = tl.program_id(1) // bands * BLOCK_P + tl.arange(0, BLOCK_P)
    p_ok = p < N * WO
    wo = p % WO
    image = (p // WO).to(tl.int64)[:, None] * C
    x_image = x_ptr + image * (H * W) + c[None, :]
    y_image = y_ptr + image * (HO * WO) + c[None, :]
    if PROLOGUE:
        mean, rstd, gamma, beta = load_norm(stats_ptr, gamma_ptr, beta_ptr, c, c_ok, C)
        gain = rstd * gamma
    sums = ()
    for _ in tl.static_range(SUMS):
        sums = sums + (tl.zeros([BLOCK_P, BLOCK_C], tl.float32),)
    tile_mean = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    tile_m2 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for step in range(first, end + SUMS - 1):
        for q in tl.static_range(STRIDE):
            hi = step * STRIDE + q - top
            row_ok = (hi >= 0) & (hi < H) & (hi < (end - 1) * STRIDE + K - top)
            for dx in range(K):
                wi = wo * STRIDE + dx - left
                ok = (p_ok & row_ok & (wi >= 0) & (wi < W))[:, None] & c_ok[None, :]
                a = tl.load(x_image + ((hi * W + wi) * C)[:, None], mask=ok, other=0.0).to(tl.float32)
                if PROLOGUE:
                    z = (a - mean[None, :]) * gain[None, :] + beta[None, :]
                    a = tl.where(ok, z * sigmoid(z), 0.0)
                for j in tl.static_range(SUMS):
                    if q + j * STRIDE < K:
                        w = tl.load(w_ptr + ((q + j * STRIDE) * K + dx) * C + c, mask=c_ok, other=0.0)
                        sums = _replaced(sums, j, sums[j] + a * w[None, :], SUMS)
        # The oldest sum has met its last input row: row `step - SUMS + 1` of the output is done.
        ho = step - (SUMS - 1)
        y = sums[SUMS - 1].to(y_ptr.dtype.element_ty)
        done = p_ok & (ho >= first)
        tl.store(y_image + ((ho * WO + wo) * C)[:, None], y, mask=done[:, None] & c_ok[None, :])
        if MOMENTS:  # of y as stored, by Welford's update in each lane
            y = y.to(tl.float32)
            away = tl.where(done[:, None], y - tile_mean, 0.0)
            tile_mean += away / tl.maximum(ho - first + 1, 1).to(tl.float32)
            tile_m2 += away * (y - tile_mean)
        shifted = (tl.zeros([BLOCK_P, BLOCK_C], tl.float32),)
        for j in tl.static_range(SUMS - 1):
            shifted = shifted + (sums[j],)
        sums = shifted
    if MOMENTS:
        count = tl.where(p_ok, (end - first).to(tl.float32), 0.0)
        count, mean, m2 = chan_merge(tl.broadcast_to(count[:, None], [BLOCK_P, BLOCK_C]), tile_mean, tile_m2)
        store_moments(moments_ptr + tl.program_id(1) * 3 * C, count, mean, m2, c, c_ok, C)


@triton.jit
def _backward_kernel(
    g_ptr,  # [N, HO, WO, C], gradient at y
    x_ptr,  # [N, H, W, C]
    w_ptr,  # [K*K, C] float32
    stats_ptr,  # [4, C] of x, if PROLOGUE
    gamma_ptr,  # [C], if PROLOGUE
    beta_ptr,  # [C], if PROLOGUE
    dx_ptr,  # [N, H, W, C]: dz if PROLOGUE
    dw_ptr,  # [programs, K*K, C]
    sums_ptr,  # [programs, 2, C], sums of dz and dz * xhat, if PROLOGUE
    N,
    H,
    W,
    C,
    HO,
    WO,
    left,
    top,
    row_steps,
    column_steps,
    tiles,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PROLOGUE: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Input pixel (step * s + q - top, u * s + r - left) and output pixel (step - j, u - i) meet in the tap
    # (dy, dx) = (q + j s, r + i s): with the phases q, r < s static, every tap of the loops below is a real one.
    C = C // VEC * VEC
    REACH: tl.constexpr = (K + STRIDE - 1) // STRIDE
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    if PROLOGUE:
        mean, rstd, gamma, beta = load_norm(stats_ptr, gamma_ptr, beta_ptr, c, c_ok, C)
        sum_dz = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        sum_dz_xhat = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    dw = ()
    for _ in tl.static_range(K * K):
        dw = dw + (tl.zeros([BLOCK_P, BLOCK_C], tl.float32),)
    tile = tl.program_id(1) * tiles
    last = tl.minimum(tile + tiles, tl.cdiv(N * column_steps, BLOCK_P) * row_steps)
    for t in range(tile, last):
        step = t % row_steps
        p = t // row_steps * BLOCK_P + tl.arange(0, BLOCK_P)
        p_ok = p < N * column_steps
        u = p % column_steps
        image = (p // column_steps).to(tl.int64)[:, None] * C
        x_at = image * (H * W) + c[None, :]
        g_image = g_ptr + image * (HO * WO) + c[None, :]
        acts = ()
        xs = ()
        grads = ()
        for phase in tl.static_range(STRIDE * STRIDE):
            hi = step * STRIDE + phase // STRIDE - top
            wi = u * STRIDE + phase % STRIDE - left
            ok = (p_ok & (hi >= 0) & (hi < H) & (wi >= 0) & (wi < W))[:, None] & c_ok[None, :]
            x = tl.load(x_ptr + x_at + ((hi * W + wi) * C)[:, None], mask=ok, other=0.0).to(tl.float32)
            a = x
            if PROLOGUE:
                x = (x - mean[None, :]) * rstd[None, :]
                z = x * gamma[None, :] + beta[None, :]
                a = tl.where(ok, z * sigmoid(z), 0.0)
            xs = xs + (x,)
            acts = acts + (a,)
            grads = grads + (tl.zeros([BLOCK_P, BLOCK_C], tl.float32),)
        # dx and dw in two sweeps over the same taps, the second from cache: in one they do not fit the registers.
        for j in range(REACH):
            ho = step - j
            for i in tl.static_range(REACH):
                wo = u - i
                ok = (p_ok & (ho >= 0) & (ho < HO) & (wo >= 0) & (wo < WO))[:, None] & c_ok[None, :]
                g = tl.load(g_image + ((ho * WO + wo) * C)[:, None], mask=ok, other=0.0).to(tl.float32)
                for q in tl.static_range(STRIDE):
                    dy = q + j * STRIDE
                    for r in tl.static_range(STRIDE):
                        if r + i * STRIDE < K:
                            at = w_ptr + (dy * K + r + i * STRIDE) * C + c
                            w = tl.load(at, mask=c_ok & (dy < K), other=0.0)[None, :]
                            grads = _replaced(grads, q * STRIDE + r, grads[q * STRIDE + r] + g * w, STRIDE * STRIDE)
        for phase in tl.static_range(STRIDE * STRIDE):
            hi = step * STRIDE + phase // STRIDE - top
            wi = u * STRIDE + phase % STRIDE - left
            ok = (p_ok & (hi >= 0) & (hi < H) & (wi >= 0) & (wi < W))[:, None] & c_ok[None, :]
            da = grads[phase]
            if PROLOGUE:
                z = xs[phase] * gamma[None, :] + beta[None, :]
                da = tl.where(ok, da * silu_slope(z, sigmoid(z)), 0.0)
                sum_dz += da
                sum_dz_xhat += da * xs[phase]
            tl.store(dx_ptr + x_at + ((hi * W + wi) * C)[:, None], da.to(dx_ptr.dtype.element_ty), mask=ok)
        for dy in tl.static_range(K):
            ho = step - dy // STRIDE
            for dx in tl.static_range(K):
                wo = u - dx // STRIDE
                ok = (p_ok & (ho >= 0) & (ho < HO) & (wo >= 0) & (wo < WO))[:, None] & c_ok[None, :]
                g = tl.load(g_image + ((ho * WO + wo) * C)[:, None], mask=ok, other=0.0).to(tl.float32)
                a = acts[dy % STRIDE * STRIDE + dx % STRIDE]
                dw = _replaced(dw, dy * K + dx, dw[dy * K + dx] + g * a, K * K)
    for tap in tl.static_range(K * K):
        at = (tl.program_id(1) * (K * K) + tap) * C
        tl.store(dw_ptr + at + c, tl.sum(dw[tap], axis=0), mask=c_ok)
    if PROLOGUE:
        sums_ptr += tl.program_id(1) * 2 * C
        tl.store(sums_ptr + c, tl.sum(sum_dz, axis=0), mask=c_ok)
        tl.store(sums_ptr + C + c, tl.sum(sum_dz_xhat, axis=0), mask=c_ok)


def output_size(size: int, k: int, stride: int, before: int, after: int) -> int:
    """Pixels along one side after the convolution."""
    return (size + before + after - k) // stride + 1


def empty_channels_last(like: Tensor, n: int, c: int, h: int, w: int) -> Tensor:
    return torch.empty((n, c, h, w), device=like.device, dtype=like.dtype, memory_format=torch.channels_last)


def taps_first(weight: Tensor) -> Tensor:
    """[C, 1, k, k] as [k*k, C] float32, so that a program reads the channels of a tap side by side."""
    return weight.detach().flatten(1).t().to(torch.float32).contiguous()


def forward(
    x: Tensor, taps: Tensor, stride: int, padding: Padding, norm: tuple[Tensor, Affine] | None, *, moments: bool
) -> tuple[Tensor, Tensor | None]:
    """y, and the moments [programs, 3, C] of its tiles if asked for. `norm`: statistics and affine of x's BatchNorm."""
    left, right, top, bottom = padding
    n, c, h, w = x.shape
    k = math.isqrt(taps.shape[0])
    ho, wo = output_size(h, k, stride, top, bottom), output_size(w, k, stride, left, right)
    y = empty_channels_last(x, n, c, ho, wo)
    cut = forward_launch(n, c, ho, wo)
    bands = cdiv(ho, cut.band)
    programs = cdiv(n * wo, cut.block_p) * bands
    out = torch.empty(programs, 3, c, device=x.device, dtype=torch.float32) if moments else None
    stats, affine = norm or (taps, (taps, taps))
    launch(
        "depthwise_conv",
        _forward_kernel,
        (cdiv(c, cut.block_c), programs),
        *(x, taps, stats, *affine, y, taps if out is None else out),
        *(n, h, w, c, ho, wo, left, top, cut.band, bands),
        K=k,
        STRIDE=stride,
        PROLOGUE=norm is not None,
        MOMENTS=moments,
        VEC=vector(c),
        BLOCK_P=cut.block_p,
        BLOCK_C=cut.block_c,
        num_warps=cut.num_warps,
    )
    return y, out


def backward(
    g: Tensor, x: Tensor, taps: Tensor, stride: int, padding: Padding, norm: tuple[Tensor, Affine] | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dx and dw [k*k, C]; with `norm`, dz in place of dx, and the sums [2, C] of dz and dz * xhat over this rank."""
    left, _, top, _ = padding
    n, c, h, w = x.shape
    ho, wo = g.shape[2:]
    k = math.isqrt(taps.shape[0])
    row_steps, column_steps = cdiv(h + top, stride), cdiv(w + left, stride)
    cut = backward_launch(c, k, stride, row_steps, n * column_steps)
    programs = cdiv(cdiv(n * column_steps, cut.block_p) * row_steps, cut.tiles)
    dx = torch.empty_like(x)
    dw = torch.empty(programs, k * k, c, device=x.device, dtype=torch.float32)
    sums = None if norm is None else dw.new_empty(programs, 2, c)
    stats, affine = norm or (taps, (taps, taps))
    launch(
        "depthwise_conv",
        _backward_kernel,
        (cdiv(c, cut.block_c), programs),
        *(g, x, taps, stats, *affine, dx, dw, taps if sums is None else sums),
        *(n, h, w, c, ho, wo, left, top, row_steps, column_steps, cut.tiles),
        K=k,
        STRIDE=stride,
        PROLOGUE=norm is not None,
        VEC=vector(c),
        BLOCK_P=cut.block_p,
        BLOCK_C=cut.block_c,
        num_warps=cut.num_warps,
    )
    return dx, dw.sum(0), None if sums is None else sums.sum(0)


@torch.library.custom_op("effnet_kernels::depthwise_conv", mutates_args=())
def _depthwise_conv(x: Tensor, weight: Tensor, stride: int, padding: list[int]) -> Tensor:
    left, right, top, bottom = padding
    return forward(x, taps_first(weight), stride, (left, right, top, bottom), None, moments=False)[0]


@_depthwise_conv.register_fake
def _(x, weight, stride, padding):
    left, right, top, bottom = padding
    n, c, h, w = x.shape
    k = weight.shape[-1]
    return empty_channels_last(x, n, c, output_size(h, k, stride, top, bottom), output_size(w, k, stride, left, right))


@torch.library.custom_op("effnet_kernels::depthwise_conv_backward", mutates_args=())
def _depthwise_conv_backward(
    g: Tensor, x: Tensor, weight: Tensor, stride: int, padding: list[int]
) -> tuple[Tensor, Tensor]:
    left, right, top, bottom = padding
    dx, dw, _ = backward(g, x, taps_first(weight), stride, (left, right, top, bottom), None)
    return dx, weight_gradient(dw, weight)


@_depthwise_conv_backward.register_fake
def _(g, x, weight, stride, padding):
    return torch.empty_like(x), torch.empty_like(weight)


def weight_gradient(dw: Tensor, weight: Tensor) -> Tensor:
    """dw [k*k, C] float32 in the shape and type of the weight."""
    return torch.empty_like(weight).copy_(dw.t().view(weight.shape))


def _setup(ctx, inputs, output) -> None:
    x, weight, ctx.stride, ctx.padding = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, g: Tensor):
    x, weight = ctx.saved_tensors
    return *_depthwise_conv_backward(channels_last(g), x, weight, ctx.stride, ctx.padding), None, None


_depthwise_conv.register_autograd(_backward, setup_context=_setup)


def depthwise_conv(
    x: Tensor, weight: Tensor, stride: int = 1, padding: Padding = (1, 1, 1, 1), *, kernels: Kernels = "auto"
) -> Tensor:
    """Depthwise convolution of `x` [N, C, H, W] with `weight` [C, 1, k, k], zero-padded by (left, right, top, bottom).

    Returns [N, C, HO, WO] of x's type, channels last; the weight may be of another type and enters as float32.
    """
    if not use_triton(kernels, x):
        return depthwise_conv_reference(x, weight, stride, padding)
    return _depthwise_conv(channels_last(x), weight, stride, list(padding))
