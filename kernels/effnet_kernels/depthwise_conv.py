"""Depthwise convolution, k = 3 or 5, stride 1 or 2, any padding; with the BatchNorms around it in the same passes.

    a = silu(gamma (x - mean) rstd + beta)    prologue: the BatchNorm and Swish before it, else a = x
    y[ho, wo] = sum over dy, dx of w[dy, dx] a[ho s + dy - top, wo s + dx - left],  a = 0 outside

Forward   reads x, writes y. Epilogue: count, mean and M2 of each tile of y, so the next BatchNorm needs no pass.
Backward  da[hi, wi] = sum of w[dy, dx] g[(hi + top - dy) / s, (wi + left - dx) / s] and
          dw[dy, dx] = sum of a[hi, wi] g[the same place]: both meet the same g, so one pass reads g and x, and writes
          dx, or with the prologue dz = da silu'(z), with the sums of dz and dz * xhat that BatchNorm's backward needs.

A lane of a tile is a strip of adjacent columns of one image for one channel, and a program walks down the rows: the
columns of a strip are a tuple of tiles, so that columns and rows meet in registers. What limits a depthwise convolution
in bf16 is not memory alone: while an H100 moves 4 bytes it issues 35 instructions (calculated from its data sheet), and
k * k = 25 of them are the products. So each input is loaded and passed through Swish once, and once more where two
strips meet, and no product is computed to be masked away: taps that meet only padding, or that the stride passes by,
are left out when compiling. Shapes are compile-time constants for that.

Forward, ceil(k/s) rows of running sums are kept; an input row is added to all that it reaches. Backward, k rows of
activations and of dx are kept, all of which a row of g meets, for dx and dw at once.
"""

# Triton knows tuple + tuple, which grows a tuple in a kernel, but not (*tuple, value); mypy reads kernels as Python.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc, var-annotated"

from __future__ import annotations

import itertools
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
    kernel,
    launch,
    tl,
    triton,
    use_triton,
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
    """A program computes `band` rows of `block_p` strips of `strip` columns, of `block_c` channels."""

    strip: int
    block_p: int
    block_c: int
    band: int
    num_warps: int


@dataclass(frozen=True)
class BackwardLaunch:
    """A program takes `tasks` times `band` rows of `block_p` strips of `strip` columns of x, of `block_c` channels."""

    strip: int
    block_p: int
    block_c: int
    band: int
    tasks: int
    num_warps: int


def _strip(columns: int, widest: int, multiple: int = 1) -> int:
    """Columns a strip: as few strips as `widest` allows, as narrow as they can be; several begin at a `multiple`."""
    strips = cdiv(columns, widest)
    return columns if strips == 1 else cdiv(cdiv(columns, strips), multiple) * multiple


def _band(rows: int, programs: int, k: int) -> int:
    """Rows a program: all, or fewer where that gives too few programs; the rows around a band are read twice."""
    return cdiv(rows, max(min(cdiv(2 * PROGRAMS, programs), rows // (4 * k)), 1))


def forward_launch(
    n: int, c: int, ho: int, wo: int, k: int, elements: int | None = None, widest: int | None = None, num_warps: int = 4
) -> ForwardLaunch:
    """`elements` channels to a thread, in strips of at most `widest` columns.

    A thread keeps k * k taps and ceil(k / stride) sums a column for each of its channels in registers. What leaves
    room for 12 warps and more on a processor is 2 channels and 8 columns at k = 3, 1 channel and 16 at k = 5.
    """
    elements, widest = elements or (2 if k == 3 else 1), widest or (8 if k == 3 else 16)
    strip = _strip(wo, widest)
    block_c = channel_block(c, widest=64)
    block_p = num_warps * 32 * elements // block_c
    programs = cdiv(n * cdiv(wo, strip), block_p) * cdiv(c, block_c)
    return ForwardLaunch(strip, block_p, block_c, _band(ho, programs, k), num_warps)


def backward_launch(
    n: int, c: int, h: int, w: int, k: int, stride: int, elements: int = 2, widest: int = 4, num_warps: int = 4
) -> BackwardLaunch:
    """As `forward_launch`; the k * k sums of dw, and k rows of x beside k rows of dx, need more registers.

    At least 256 pixels a program, so that writing dw's sums out stays small beside the maps.
    """
    strip = _strip(w, widest, stride)
    block_c = channel_block(c, widest=64)
    block_p = num_warps * 32 * elements // block_c
    groups = cdiv(n * cdiv(w, strip), block_p)
    band = _band(h, groups * cdiv(c, block_c), k)
    total = groups * cdiv(h, band)
    tasks = max(cdiv(total * cdiv(c, block_c), PROGRAMS), min(cdiv(256, block_p * strip * band), total))
    return BackwardLaunch(strip, block_p, block_c, band, tasks, num_warps)


def forward_space(n: int, c: int, ho: int, wo: int, k: int) -> list[ForwardLaunch]:
    """What an autotuner may try in place of `forward_launch`'s choice."""
    choices = itertools.product((1, 2), (4, 8, 16), (2, 4, 8))
    return list(dict.fromkeys(forward_launch(n, c, ho, wo, k, *choice) for choice in choices))


def backward_space(n: int, c: int, h: int, w: int, k: int, stride: int) -> list[BackwardLaunch]:
    """What an autotuner may try in place of `backward_launch`'s choice."""
    choices = itertools.product((1, 2), (4, 8), (2, 4, 8))
    return list(dict.fromkeys(backward_launch(n, c, h, w, k, stride, *choice) for choice in choices))


@triton.jit
def _zeros(LENGTH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """A tuple of LENGTH tiles of zeros."""
    tiles = ()
    for _ in tl.static_range(LENGTH):
        tiles = tiles + (tl.zeros([BLOCK_P, BLOCK_C], tl.float32),)
    return tiles


@triton.jit
def _taps(
    w_ptr,  # [K*K, C] float32
    c,
    c_ok,
    C: tl.constexpr,
    K: tl.constexpr,
):
    """The K * K taps, [1, C] each."""
    taps = ()
    for tap in tl.static_range(K * K):
        taps = taps + (tl.load(w_ptr + tap * C + c, mask=c_ok, other=0.0)[None, :],)
    return taps


@triton.jit
def _column_ok(ok, first, INDEX: tl.constexpr, LAST: tl.constexpr, SIZE: tl.constexpr):
    """`ok` [P, C] where column first + INDEX is one of SIZE; `first` [P] is at most LAST. Computes what may fail."""
    if INDEX < 0:
        ok = ok & (first + INDEX >= 0)[:, None]
    if LAST + INDEX >= SIZE:
        ok = ok & (first + INDEX < SIZE)[:, None]
    return ok


@triton.jit
def _load_row(
    row_ptr,  # [P, C]: column `first` of a row, [SIZE, C], of each strip
    ok,
    first,
    norm,
    C: tl.constexpr,
    BEGIN: tl.constexpr,
    LENGTH: tl.constexpr,
    LAST: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Columns first + BEGIN and on, as tiles in float32: silu((x - mean) gain + beta) if `norm` has those three.

    0 outside of the map.
    """
    tiles = ()
    for i in tl.static_range(LENGTH):
        if LAST == 0 and (BEGIN + i < 0 or BEGIN + i >= SIZE):
            tiles = tiles + (0.0,)  # there is only one strip: never read
        else:
            here = _column_ok(ok, first, BEGIN + i, LAST, SIZE)
            tile = tl.load(row_ptr + (BEGIN + i) * C, mask=here, other=0.0).to(tl.float32)
            if len(norm) > 0:
                z = (tile - norm[0]) * norm[1] + norm[2]
                tile = z * sigmoid(z)
                if BEGIN + i < 0 or LAST + BEGIN + i >= SIZE:
                    tile = tl.where(here, tile, 0.0)
            tiles = tiles + (tile,)
    return tiles


@triton.jit
def _add_row(
    sums,
    acts,
    taps,
    ROW: tl.constexpr,
    SUMS: tl.constexpr,
    BEGIN: tl.constexpr,
    STRIP: tl.constexpr,
    LAST: tl.constexpr,
    SIZE: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """The sums of SUMS rows of y, after an input row that they meet in the rows ROW, ROW + STRIDE, ... of the taps."""
    out = ()
    for j in tl.static_range(SUMS):
        for t in tl.static_range(STRIP):
            total = sums[j * STRIP + t]
            if ROW + j * STRIDE < K:
                for dx in tl.static_range(K):
                    if LAST > 0 or (BEGIN + t * STRIDE + dx >= 0 and BEGIN + t * STRIDE + dx < SIZE):
                        total += acts[t * STRIDE + dx] * taps[(ROW + j * STRIDE) * K + dx]
            out = out + (total,)
    return out


@triton.jit
def _add_moments(mean, m2, row, oks, columns, rows, STRIP: tl.constexpr, LAST: tl.constexpr, SIZE: tl.constexpr):
    """Mean and M2 of `rows` earlier rows and one more of STRIP columns, of which [P, 1] `columns` are `oks`."""
    total = tl.zeros_like(mean)
    for t in tl.static_range(STRIP):
        total += tl.where(oks[t], row[t], 0.0) if LAST + t >= SIZE else row[t]
    row_mean = total / columns
    for t in tl.static_range(STRIP):
        away = row[t] - row_mean
        if LAST + t >= SIZE:
            away = tl.where(oks[t], away, 0.0)
        m2 += away * away
    away = row_mean - mean
    share = 1.0 / (rows + 1).to(tl.float32)
    return mean + away * share, m2 + away * away * (columns * (rows.to(tl.float32) * share))


@kernel
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
    HO,
    top,
    band,
    bands,
    C: tl.constexpr,
    W: tl.constexpr,
    WO: tl.constexpr,
    LEFT: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PROLOGUE: tl.constexpr,
    MOMENTS: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    STRIPS: tl.constexpr = (WO + STRIP - 1) // STRIP
    LAST: tl.constexpr = (STRIPS - 1) * STRIP
    SUMS: tl.constexpr = (K + STRIDE - 1) // STRIDE  # output rows that one input row reaches
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    begin = tl.program_id(1) % bands * band
    end = tl.minimum(begin + band, HO)
    p = tl.program_id(1) // bands * BLOCK_P + tl.arange(0, BLOCK_P)
    p_ok = p < N * STRIPS
    ok = p_ok[:, None] & c_ok[None, :]
    wo = p % STRIPS * STRIP
    image = (p // STRIPS).to(tl.int64)[:, None] * C
    x_at = x_ptr + image * (H * W) + (wo * (STRIDE * C))[:, None] + c[None, :]
    y_at = y_ptr + image * (HO * WO) + (wo * C)[:, None] + c[None, :]
    norm = ()
    if PROLOGUE:
        mean, rstd, gamma, beta = load_norm(stats_ptr, gamma_ptr, beta_ptr, c, c_ok, C)
        norm = (mean[None, :], (rstd * gamma)[None, :], beta[None, :])
    taps = _taps(w_ptr, c, c_ok, C, K)
    oks = ()
    for t in tl.static_range(STRIP):
        oks = oks + (_column_ok(ok, wo, t, LAST, WO),)
    columns = tl.maximum(tl.minimum(WO - wo, STRIP), 1).to(tl.float32)[:, None]
    y_mean = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    y_m2 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    sums = _zeros(SUMS * STRIP, BLOCK_P, BLOCK_C)
    below = tl.minimum((end - 1) * STRIDE + K - top, H)  # the rows of x that the band meets
    for step in range(begin, end + SUMS - 1):
        for q in tl.static_range(STRIDE):
            hi = step * STRIDE + q - top
            if (hi >= 0) & (hi < below):
                acts = _load_row(
                    x_at + hi * W * C, ok, wo * STRIDE, norm, C, -LEFT, (STRIP - 1) * STRIDE + K, LAST * STRIDE, W
                )
                sums = _add_row(sums, acts, taps, q, SUMS, -LEFT, STRIP, LAST, W, K, STRIDE)
        # The oldest sums have met their last input row: row `step - SUMS + 1` of the output is done.
        ho = step - (SUMS - 1)
        if ho >= begin:
            row = ()
            for t in tl.static_range(STRIP):
                y = sums[(SUMS - 1) * STRIP + t].to(y_ptr.dtype.element_ty)
                tl.store(y_at + (ho * WO + t) * C, y, mask=oks[t])
                row = row + (y.to(tl.float32),)
            if MOMENTS:  # of y as stored
                y_mean, y_m2 = _add_moments(y_mean, y_m2, row, oks, columns, ho - begin, STRIP, LAST, WO)
        sums = _zeros(STRIP, BLOCK_P, BLOCK_C) + sums[: (SUMS - 1) * STRIP]
    if MOMENTS:
        count = tl.where(ok, columns * (end - begin).to(tl.float32), 0.0)
        count, mean, m2 = chan_merge(count, y_mean, tl.where(ok, y_m2, 0.0))
        store_moments(moments_ptr + tl.program_id(1) * 3 * C, count, mean, m2, c, c_ok, C)


@triton.jit
def _add_row_of_g(
    grads,
    dw,
    g,
    acts,
    taps,
    BEGIN: tl.constexpr,
    STRIP: tl.constexpr,
    LAST: tl.constexpr,
    SIZE: tl.constexpr,
    LEFT: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """da of K rows of x, and the K * K sums of dw, after a row of g that meets all these rows.

    Column t of the strip and column `dx` of the taps meet column (t + LEFT - dx) / STRIDE of g, whose tiles begin at
    BEGIN, if that is a whole number and, where there is only one strip, one of SIZE.
    """
    more_grads = ()
    for dy in tl.static_range(K):
        for t in tl.static_range(STRIP):
            total = grads[dy * STRIP + t]
            for dx in tl.static_range(K):
                met = LAST > 0 or (t + LEFT - dx >= 0 and t + LEFT - dx < SIZE * STRIDE)
                if met and (t + LEFT - dx) % STRIDE == 0:
                    total += g[(t + LEFT - dx) // STRIDE - BEGIN] * taps[dy * K + dx]
            more_grads = more_grads + (total,)
    more_dw = ()
    for dy in tl.static_range(K):
        for dx in tl.static_range(K):
            total = dw[dy * K + dx]
            for t in tl.static_range(STRIP):
                met = LAST > 0 or (t + LEFT - dx >= 0 and t + LEFT - dx < SIZE * STRIDE)
                if met and (t + LEFT - dx) % STRIDE == 0:
                    total += g[(t + LEFT - dx) // STRIDE - BEGIN] * acts[dy * STRIP + t]
            more_dw = more_dw + (total,)
    return more_grads, more_dw


@kernel
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
    HO,
    top,
    band,
    bands,
    tasks,
    C: tl.constexpr,
    W: tl.constexpr,
    WO: tl.constexpr,
    LEFT: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PROLOGUE: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    STRIPS: tl.constexpr = (W + STRIP - 1) // STRIP
    LAST: tl.constexpr = (STRIPS - 1) * STRIP
    BEGIN: tl.constexpr = -((K - 1 - LEFT) // STRIDE)  # of the columns of g that a strip meets, from its own
    COLUMNS: tl.constexpr = (STRIP - 1 + LEFT) // STRIDE - BEGIN + 1
    KEPT: tl.constexpr = (K - STRIDE) * STRIP  # tiles of the rows that the next row of g meets too
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    norm = ()
    if PROLOGUE:
        mean, rstd, gamma, beta = load_norm(stats_ptr, gamma_ptr, beta_ptr, c, c_ok, C)
        norm = (mean[None, :], (rstd * gamma)[None, :], beta[None, :])
        sum_dz = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        sum_dz_away = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    taps = _taps(w_ptr, c, c_ok, C, K)
    dw = _zeros(K * K, BLOCK_P, BLOCK_C)
    task = tl.program_id(1) * tasks
    for t in range(task, tl.minimum(task + tasks, tl.cdiv(N * STRIPS, BLOCK_P) * bands)):
        begin = t % bands * band
        end = tl.minimum(begin + band, H)
        p = t // bands * BLOCK_P + tl.arange(0, BLOCK_P)
        ok = (p < N * STRIPS)[:, None] & c_ok[None, :]
        wi = p % STRIPS * STRIP
        image = (p // STRIPS).to(tl.int64)[:, None] * C
        at = image * (H * W) + (wi * C)[:, None] + c[None, :]
        g_at = g_ptr + image * (HO * WO) + (wi // STRIDE * C)[:, None] + c[None, :]
        acts = _zeros(KEPT, BLOCK_P, BLOCK_C)
        grads = _zeros(KEPT, BLOCK_P, BLOCK_C)
        # The first row of g after which a row of the band enters; shifted by K so that it is rounded down.
        start = (begin + top - K + STRIDE + K * STRIDE) // STRIDE - K
        for ho in range(start, (end - 1 + top) // STRIDE + 1):
            for q in tl.static_range(STRIDE):
                hi = ho * STRIDE - top + K - STRIDE + q
                entering = _zeros(STRIP, BLOCK_P, BLOCK_C)
                if (hi >= begin) & (hi < end):
                    entering = _load_row(x_ptr + at + hi * W * C, ok, wi, norm, C, 0, STRIP, LAST, W)
                acts = acts + entering
            grads = grads + _zeros(STRIDE * STRIP, BLOCK_P, BLOCK_C)
            if (ho >= 0) & (ho < HO):
                g = _load_row(g_at + ho * WO * C, ok, wi // STRIDE, (), C, BEGIN, COLUMNS, LAST // STRIDE, WO)
                grads, dw = _add_row_of_g(grads, dw, g, acts, taps, BEGIN, STRIP, LAST // STRIDE, WO, LEFT, K, STRIDE)
            # The first rows have met their last row of g.
            for q in tl.static_range(STRIDE):
                hi = ho * STRIDE - top + q
                if (hi >= begin) & (hi < end):
                    for i in tl.static_range(STRIP):
                        here = _column_ok(ok, wi, i, LAST, W)
                        place = at + (hi * W + i) * C
                        da = grads[q * STRIP + i]
                        if PROLOGUE:
                            away = tl.load(x_ptr + place, mask=here, other=0.0).to(tl.float32) - norm[0]
                            z = away * norm[1] + norm[2]
                            da = tl.where(here, da * silu_slope(z, sigmoid(z)), 0.0)
                            sum_dz += da
                            sum_dz_away += da * away
                        tl.store(dx_ptr + place, da.to(dx_ptr.dtype.element_ty), mask=here)
            acts = acts[STRIDE * STRIP :]
            grads = grads[STRIDE * STRIP :]
    for tap in tl.static_range(K * K):
        tap_ptr = dw_ptr + (tl.program_id(1) * (K * K) + tap) * C
        tl.store(tap_ptr + c, tl.sum(dw[tap], axis=0), mask=c_ok)
    if PROLOGUE:
        sums_ptr += tl.program_id(1) * 2 * C
        tl.store(sums_ptr + c, tl.sum(sum_dz, axis=0), mask=c_ok)
        tl.store(sums_ptr + C + c, tl.sum(sum_dz_away, axis=0) * rstd, mask=c_ok)


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
    cut = forward_launch(n, c, ho, wo, k)
    bands = cdiv(ho, cut.band)
    programs = cdiv(n * cdiv(wo, cut.strip), cut.block_p) * bands
    out = torch.empty(programs, 3, c, device=x.device, dtype=torch.float32) if moments else None
    stats, affine = norm or (taps, (taps, taps))
    launch(
        "depthwise_conv",
        _forward_kernel,
        (cdiv(c, cut.block_c), programs),
        *(x, taps, stats, *affine, y, taps if out is None else out),
        *(n, h, ho, top, cut.band, bands),
        C=c,
        W=w,
        WO=wo,
        LEFT=left,
        K=k,
        STRIDE=stride,
        PROLOGUE=norm is not None,
        MOMENTS=moments,
        STRIP=cut.strip,
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
    cut = backward_launch(n, c, h, w, k, stride)
    bands = cdiv(h, cut.band)
    programs = cdiv(cdiv(n * cdiv(w, cut.strip), cut.block_p) * bands, cut.tasks)
    dx = torch.empty_like(x)
    dw = torch.empty(programs, k * k, c, device=x.device, dtype=torch.float32)
    sums = None if norm is None else dw.new_empty(programs, 2, c)
    stats, affine = norm or (taps, (taps, taps))
    launch(
        "depthwise_conv",
        _backward_kernel,
        (cdiv(c, cut.block_c), programs),
        *(g, x, taps, stats, *affine, dx, dw, taps if sums is None else sums),
        *(n, h, ho, top, cut.band, bands, cut.tasks),
        C=c,
        W=w,
        WO=wo,
        LEFT=left,
        K=k,
        STRIDE=stride,
        PROLOGUE=norm is not None,
        STRIP=cut.strip,
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
