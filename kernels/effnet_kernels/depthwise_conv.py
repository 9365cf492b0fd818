"""Depthwise convolution, k = 3 or 5, stride 1 or 2, any padding, fused with the BatchNorms before and after it.

    a = silu(gamma (x - mean) rstd + beta)    prologue: the BatchNorm and Swish before it; without one, a = x
    y[ho, wo] = sum over dy, dx of w[dy, dx] a[ho s + dy - top, wo s + dx - left],  a = 0 outside the map

Forward   Reads x, writes y. Epilogue: count, mean and M2 of each tile of y, so the next BatchNorm needs no pass.
Backward  da[hi, wi] = sum of w[dy, dx] g[(hi + top - dy) / s, (wi + left - dx) / s] and
          dw[dy, dx] = sum of a[hi, wi] g[same indices]. Both use the same g, so one pass reads g and x and writes dx;
          with the prologue it writes dz = da silu'(z) and the sums of dz and dz * xhat for BatchNorm's backward.

A thread holds a strip of adjacent columns of one image for one or two channels, and a program walks down the rows. The
columns of a strip are a tuple of tiles, so all arithmetic between rows and columns happens in registers.

The kernels are bound by instructions as much as by memory: an H100 issues 35 instructions in the time of 4 bytes
(calculated from its data sheet), and k * k = 25 of them are the products. So each input is loaded and activated once
(twice where two strips overlap), and products that only meet padding or that the stride skips are left out at compile
time. Channels, width, strides and padding are compile-time constants for that reason.

The forward kernel keeps ceil(k / s) rows of running sums and adds each input row to every sum it contributes to. The
backward kernel keeps k rows of activations and of dx: a row of g contributes to all of them, for dx and dw at once.
"""

# A kernel grows a tuple by tuple + tuple, since Triton does not support (*tuple, value). mypy reads kernels as Python.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc, var-annotated"

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

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
    slots,
    tl,
    triton,
    use_kernels,
)
from effnet_kernels.partial_sums import add_weight_partials
from effnet_kernels.silu import sigmoid, silu_slope
from effnet_kernels.statistics import Affine, chan_merge, load_norm, store_moments

Padding = tuple[int, int, int, int]  # left, right, top, bottom, as in torch.nn.functional.pad


def serves(k: int, stride: int) -> bool:
    """Whether there are kernels for k x k taps at this stride; PyTorch's operators serve the others."""
    return k in (3, 5) and stride in (1, 2)


def depthwise_conv_reference(x: Tensor, weight: Tensor, stride: int, padding: Padding) -> Tensor:
    """Zero padding, then torch's grouped convolution; arguments as in `depthwise_conv`."""
    weight = weight.to(x.dtype)
    left, right, top, bottom = padding
    if (left, top) == (right, bottom):
        return torch.nn.functional.conv2d(x, weight, stride=stride, padding=(top, left), groups=x.shape[1])
    return torch.nn.functional.conv2d(torch.nn.functional.pad(x, padding), weight, stride=stride, groups=x.shape[1])


@dataclass(frozen=True)
class ForwardLaunch:
    """Each program computes `band` rows of y for `block_p` strips of `strip` columns and `block_c` channels."""

    strip: int
    block_p: int
    block_c: int
    band: int
    num_warps: int


@dataclass(frozen=True)
class BackwardLaunch:
    """Each program handles `tasks` tasks in sequence.

    A task is `band` rows of x for `block_p` strips of `strip` columns and `block_c` channels. With `ahead`, a turn
    loads what the next one needs, which takes registers.
    """

    strip: int
    block_p: int
    block_c: int
    band: int
    tasks: int
    num_warps: int
    ahead: bool = False


def _strip(columns: int, widest: int, multiple: int = 1) -> int:
    """Columns per strip: as few strips as `widest` allows, as narrow as possible; strips start at a `multiple`."""
    strips = cdiv(columns, widest)
    return columns if strips == 1 else cdiv(cdiv(columns, strips), multiple) * multiple


@functools.cache
def _band(rows: int, programs: int, k: int, resident: int) -> int:
    """Rows per program: the split of `rows` whose rounds of programs take least time on an H100.

    A band costs its rows and about half of the k - 1 rows around it, which are read again.
    """

    def cost(band: int) -> float:
        return _rounds(programs * cdiv(rows, band), resident) * (band + k / 2)

    return min((cdiv(rows, bands) for bands in range(1, max(rows // k, 1) + 1)), key=cost)


@functools.cache
def _tasks(total: int, blocks: int, least: int, resident: int) -> int:
    """Tasks per program, at least `least`: the split of `total` tasks per channel block that takes least time.

    Among equals, most tasks per program: fewer programs write fewer partial sums.
    """

    def cost(tasks: int) -> tuple[int, int]:
        return _rounds(cdiv(total, tasks) * blocks, resident) * tasks, -tasks

    return min(range(least, max(cdiv(total * blocks, slots(resident)), least) + 1), key=cost)


def _rounds(programs: int, resident: int) -> int:
    """Rounds in which the multiprocessors run `programs`, `resident` at a time on each."""
    return cdiv(programs, slots(resident))


def forward_launch(
    n: int, c: int, ho: int, wo: int, k: int, elements: int | None = None, widest: int | None = None, num_warps: int = 4
) -> ForwardLaunch:
    """`elements` channels per thread, in strips of at most `widest` columns.

    A thread keeps k * k taps and ceil(k / stride) sums per column in registers, for each of its channels. To leave
    room for 12 warps or more per multiprocessor, it gets 2 channels and 8 columns at k = 3, 1 channel and 16 at k = 5.
    """
    elements, widest = elements or (2 if k == 3 else 1), widest or (8 if k == 3 else 16)
    strip = _strip(wo, widest)
    block_c = channel_block(c, widest=64)
    block_p = num_warps * 32 * elements // block_c
    programs = cdiv(n * cdiv(wo, strip), block_p) * cdiv(c, block_c)
    band = _band(ho, programs, k, resident=(16 if k == 3 else 12) // num_warps)
    return ForwardLaunch(strip, block_p, block_c, band, num_warps)


def backward_launch(
    n: int,
    c: int,
    h: int,
    w: int,
    k: int,
    stride: int,
    elements: int | None = None,
    widest: int = 4,
    num_warps: int | None = None,
    ahead: bool | None = None,
) -> BackwardLaunch:
    """As `forward_launch`, with narrower strips: dw's k * k sums and k rows of x and of dx need more registers.

    At k = 5 and stride 2, a thread of a wide map gets 1 channel, which leaves room for 16 warps instead of 8. Where
    there is room for 8 warps only, a turn loads ahead: else both warps of a scheduler wait for memory at a time.
    A program handles at least 256 pixels, so that writing its sums for dw costs little beside the maps.
    """
    elements = elements or (1 if k == 5 and stride == 2 and w > 8 else 2)
    num_warps = num_warps or (8 if k == 5 and stride == 1 else 4)
    warps = (16, 12) if k == 3 else (8, 16 if elements == 1 else 8)  # that registers leave room for, by stride
    resident = max(warps[stride - 1] // num_warps, 1)
    strip = _strip(w, widest, stride)
    block_c = channel_block(c, widest=64)
    block_p = num_warps * 32 * elements // block_c
    groups, blocks = cdiv(n * cdiv(w, strip), block_p), cdiv(c, block_c)
    band = _band(h, groups * blocks, k, resident) if groups * blocks < slots(resident) else h
    total = groups * cdiv(h, band)
    least = min(cdiv(256, block_p * strip * band), total)
    ahead = (k == 5 and elements == 2) if ahead is None else ahead
    return BackwardLaunch(strip, block_p, block_c, band, _tasks(total, blocks, least, resident), num_warps, ahead)


def forward_space(n: int, c: int, ho: int, wo: int, k: int) -> list[ForwardLaunch]:
    """Launches an autotuner may try in place of `forward_launch`'s choice."""
    choices = itertools.product((1, 2), (4, 8, 16), (2, 4, 8))
    return list(dict.fromkeys(forward_launch(n, c, ho, wo, k, *choice) for choice in choices))


def backward_space(n: int, c: int, h: int, w: int, k: int, stride: int) -> list[BackwardLaunch]:
    """Launches an autotuner may try in place of `backward_launch`'s choice."""
    choices = itertools.product((1, 2), (4, 8), (2, 4, 8), (False, True) if k == 5 else (False,))
    return list(dict.fromkeys(backward_launch(n, c, h, w, k, stride, *choice) for choice in choices))


# By (n, c, ho, wo, k, stride) and (n, c, h, w, k, stride).
forward_choice = LaunchChoice(
    "depthwise forward",
    lambda n, c, ho, wo, k, stride: forward_launch(n, c, ho, wo, k),
    lambda n, c, ho, wo, k, stride: forward_space(n, c, ho, wo, k),
)
backward_choice = LaunchChoice("depthwise backward", backward_launch, backward_space)


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
    """The K * K taps, each [1, C]."""
    taps = ()
    for tap in tl.static_range(K * K):
        taps = taps + (tl.load(w_ptr + tap * C + c, mask=c_ok, other=0.0)[None, :],)
    return taps


@triton.jit
def _column_ok(ok, first, INDEX: tl.constexpr, LAST: tl.constexpr, SIZE: tl.constexpr):
    """`ok` [P, C] restricted to strips whose column first + INDEX is inside [0, SIZE).

    `first` [P] is at most LAST; a comparison that is always true is left out.
    """
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
    C: tl.constexpr,
    BEGIN: tl.constexpr,
    LENGTH: tl.constexpr,
    LAST: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Columns first + BEGIN to first + BEGIN + LENGTH - 1 as tiles of the storage type, 0 outside the map."""
    tiles = ()
    for i in tl.static_range(LENGTH):
        if LAST == 0 and (BEGIN + i < 0 or BEGIN + i >= SIZE):
            # A single strip: this column is always padding. A tile, since a loop may carry it.
            tiles = tiles + (tl.zeros(ok.shape, row_ptr.dtype.element_ty),)
        else:
            valid = _column_ok(ok, first, BEGIN + i, LAST, SIZE)
            tiles = tiles + (tl.load(row_ptr + (BEGIN + i) * C, mask=valid, other=0.0),)
    return tiles


@triton.jit
def _activate_row(
    tiles,
    ok,
    first,
    norm,
    BEGIN: tl.constexpr,
    LENGTH: tl.constexpr,
    LAST: tl.constexpr,
    SIZE: tl.constexpr,
):
    """The tiles of `_load_row` in float32; silu((x - mean) gain + beta) if `norm` holds mean, gain and beta.

    Columns outside the map stay 0.
    """
    acts = ()
    for i in tl.static_range(LENGTH):
        if LAST == 0 and (BEGIN + i < 0 or BEGIN + i >= SIZE):
            acts = acts + (0.0,)
        else:
            act = tiles[i].to(tl.float32)
            if len(norm) > 0:
                z = (act - norm[0]) * norm[1] + norm[2]
                act = z * sigmoid(z)
                if BEGIN + i < 0 or LAST + BEGIN + i >= SIZE:
                    act = tl.where(_column_ok(ok, first, BEGIN + i, LAST, SIZE), act, 0.0)
            acts = acts + (act,)
    return acts


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
    """Add an input row to the sums of SUMS rows of y, which it meets in rows ROW, ROW + STRIDE, ... of the taps."""
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
    """Merge a row of STRIP columns into the mean and M2 of `rows` earlier rows; `columns` [P, 1] are valid (`oks`)."""
    total = tl.zeros_like(mean)
    for t in tl.static_range(STRIP):
        total += tl.where(oks[t], row[t], 0.0) if LAST + t >= SIZE else row[t]
    row_mean = total / columns
    for t in tl.static_range(STRIP):
        centered = row[t] - row_mean
        if LAST + t >= SIZE:
            centered = tl.where(oks[t], centered, 0.0)
        m2 += centered * centered
    difference = row_mean - mean
    share = 1.0 / (rows + 1).to(tl.float32)
    return mean + difference * share, m2 + difference * difference * (columns * (rows.to(tl.float32) * share))


@kernel
def _forward_kernel(
    x_ptr,  # [N, H, W, C]
    w_ptr,  # [K*K, C] float32
    stats_ptr,  # [4, C] of x if PROLOGUE
    gamma_ptr,  # [C] if PROLOGUE
    beta_ptr,  # [C] if PROLOGUE
    y_ptr,  # [N, HO, WO, C]
    moments_ptr,  # [programs, 3, C] if MOMENTS
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
    SUMS: tl.constexpr = (K + STRIDE - 1) // STRIDE  # output rows that one input row contributes to
    COLUMNS: tl.constexpr = (STRIP - 1) * STRIDE + K  # columns of x that a strip of y needs
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    # From the last images to the first: the pass before, for x's statistics, ended there.
    program = tl.num_programs(1) - 1 - tl.program_id(1)
    begin = program % bands * band
    end = tl.minimum(begin + band, HO)
    p = program // bands * BLOCK_P + tl.arange(0, BLOCK_P)
    p_ok = p < N * STRIPS
    ok = p_ok[:, None] & c_ok[None, :]
    wo = p % STRIPS * STRIP
    image = (p // STRIPS).to(tl.int64)[:, None] * C
    x_at = x_ptr + image * (H * W) + (wo * (STRIDE * C))[:, None] + c[None, :]
    y_at = y_ptr + image * (HO * WO) + (wo * C)[:, None] + c[None, :]
    norm = ()
    if PROLOGUE:
        mean, rstd, gamma, beta = load_norm(stats_ptr, gamma_ptr, beta_ptr, c, c_ok, C)
        norm = (mean, rstd * gamma, beta)
    taps = _taps(w_ptr, c, c_ok, C, K)
    oks = ()
    for t in tl.static_range(STRIP):
        oks = oks + (_column_ok(ok, wo, t, LAST, WO),)
    columns = tl.maximum(tl.minimum(WO - wo, STRIP), 1).to(tl.float32)[:, None]
    y_mean = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    y_m2 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    sums = _zeros(SUMS * STRIP, BLOCK_P, BLOCK_C)
    below = tl.minimum((end - 1) * STRIDE + K - top, H)  # end of the rows of x that the band needs
    for step in range(begin, end + SUMS - 1):
        # All loads of the turn come first: a load cannot move above a store that it may alias.
        rows = ()
        for q in tl.static_range(STRIDE):
            hi = step * STRIDE + q - top
            row_ok = ok & ((hi >= 0) & (hi < below))
            rows = rows + _load_row(x_at + hi * W * C, row_ok, wo * STRIDE, C, -LEFT, COLUMNS, LAST * STRIDE, W)
        # Add the rows of x to the sums of those rows of y to which they contribute.
        for q in tl.static_range(STRIDE):
            hi = step * STRIDE + q - top
            if (hi >= 0) & (hi < below):
                acts = _activate_row(
                    rows[q * COLUMNS : (q + 1) * COLUMNS], ok, wo * STRIDE, norm, -LEFT, COLUMNS, LAST * STRIDE, W
                )
                sums = _add_row(sums, acts, taps, q, SUMS, -LEFT, STRIP, LAST, W, K, STRIDE)
        # Row step - SUMS + 1 of y is complete.
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
        store_moments(moments_ptr + program * 3 * C, count, mean, m2, c, c_ok, C)


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
    """Add a row of g to da of the K rows of x that it meets, and to the K * K sums of dw.

    Column t of the strip and column `dx` of the taps meet column (t + LEFT - dx) / STRIDE of g, whose tiles start at
    BEGIN. Non-integral columns are skipped and, with a single strip, columns outside [0, SIZE).
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


@triton.jit
def _load_turn(
    x_at,
    g_at,
    ok,
    wi,
    ho,
    limits,  # first row of x and end of the band, rows of padding at the top, rows of g
    C: tl.constexpr,
    W: tl.constexpr,
    WO: tl.constexpr,
    BEGIN: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIP: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PROLOGUE: tl.constexpr,
):
    """What the backward kernel loads for row `ho` of g: the STRIDE rows of x that enter, the row of g, and, with the
    prologue, the rows of x that leave, for the slope of Swish: from cache, and cheaper than registers to keep them.
    """
    LAST: tl.constexpr = (W + STRIP - 1) // STRIP * STRIP - STRIP
    begin, end, top, HO = limits
    first_in, first_out = ho * STRIDE - top + K - STRIDE, ho * STRIDE - top
    tiles = ()
    for q in tl.static_range(STRIDE):
        row_ok = ok & ((first_in + q >= begin) & (first_in + q < end))
        tiles = tiles + _load_row(x_at + (first_in + q) * W * C, row_ok, wi, C, 0, STRIP, LAST, W)
    g_ok = ok & ((ho >= 0) & (ho < HO))
    tiles = tiles + _load_row(g_at + ho * WO * C, g_ok, wi // STRIDE, C, BEGIN, COLUMNS, LAST // STRIDE, WO)
    if PROLOGUE:
        for q in tl.static_range(STRIDE):
            row_ok = ok & ((first_out + q >= begin) & (first_out + q < end))
            tiles = tiles + _load_row(x_at + (first_out + q) * W * C, row_ok, wi, C, 0, STRIP, LAST, W)
    return tiles


@kernel
def _backward_kernel(
    g_ptr,  # [N, HO, WO, C], gradient at y
    x_ptr,  # [N, H, W, C]
    w_ptr,  # [K*K, C] float32
    stats_ptr,  # [4, C] of x if PROLOGUE
    gamma_ptr,  # [C] if PROLOGUE
    beta_ptr,  # [C] if PROLOGUE
    dx_ptr,  # [N, H, W, C], dz if PROLOGUE
    sums_ptr,  # [programs, K*K, C] of dw; if PROLOGUE [programs, K*K + 2, C], then the sums of dz and dz * xhat
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
    AHEAD: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    STRIPS: tl.constexpr = (W + STRIP - 1) // STRIP
    LAST: tl.constexpr = (STRIPS - 1) * STRIP
    BEGIN: tl.constexpr = -((K - 1 - LEFT) // STRIDE)  # first column of g that a strip needs, relative to its own first
    COLUMNS: tl.constexpr = (STRIP - 1 + LEFT) // STRIDE - BEGIN + 1
    KEPT: tl.constexpr = (K - STRIDE) * STRIP  # tiles of the rows to which the next row of g contributes too
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    norm = ()
    if PROLOGUE:
        mean, rstd, gamma, beta = load_norm(stats_ptr, gamma_ptr, beta_ptr, c, c_ok, C)
        norm = (mean, rstd * gamma, beta)
        sum_dz = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        sum_dz_centered = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
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
        place = image * (H * W) + (wi * C)[:, None] + c[None, :]
        x_at = x_ptr + place
        dx_at = dx_ptr + place
        g_at = g_ptr + image * (HO * WO) + (wi // STRIDE * C)[:, None] + c[None, :]
        acts = _zeros(KEPT, BLOCK_P, BLOCK_C)
        grads = _zeros(KEPT, BLOCK_P, BLOCK_C)
        # The first row of g with which a row of the band enters; shifted by K so that the division rounds down.
        start = (begin + top - K + STRIDE + K * STRIDE) // STRIDE - K
        limits = begin, end, top, HO
        following = ()
        if AHEAD:
            following = _load_turn(
                x_at, g_at, ok, wi, start, limits, C, W, WO, BEGIN, COLUMNS, STRIP, K, STRIDE, PROLOGUE
            )
        for ho in range(start, (end - 1 + top) // STRIDE + 1):
            # All loads of a turn come first: a load cannot move above a store that it may alias.
            first_in, first_out = ho * STRIDE - top + K - STRIDE, ho * STRIDE - top
            g_ok = ok & ((ho >= 0) & (ho < HO))
            turn = _load_turn(
                x_at, g_at, ok, wi, ho + AHEAD, limits, C, W, WO, BEGIN, COLUMNS, STRIP, K, STRIDE, PROLOGUE
            )
            if AHEAD:
                turn, following = following, turn
            rows_in = turn[: STRIDE * STRIP]
            g_row = turn[STRIDE * STRIP : STRIDE * STRIP + COLUMNS]
            rows_out = turn[STRIDE * STRIP + COLUMNS :]
            # Shift in STRIDE rows of x.
            for q in tl.static_range(STRIDE):
                entering = _zeros(STRIP, BLOCK_P, BLOCK_C)
                if (first_in + q >= begin) & (first_in + q < end):
                    entering = _activate_row(rows_in[q * STRIP : (q + 1) * STRIP], ok, wi, norm, 0, STRIP, LAST, W)
                acts = acts + entering
            grads = grads + _zeros(STRIDE * STRIP, BLOCK_P, BLOCK_C)
            # The row of g contributes to K rows of da, and to dw.
            if (ho >= 0) & (ho < HO):
                g = _activate_row(g_row, g_ok, wi // STRIDE, (), BEGIN, COLUMNS, LAST // STRIDE, WO)
                grads, dw = _add_row_of_g(grads, dw, g, acts, taps, BEGIN, STRIP, LAST // STRIDE, WO, LEFT, K, STRIDE)
            # The first STRIDE rows of da are complete: store them and shift them out.
            for q in tl.static_range(STRIDE):
                if (first_out + q >= begin) & (first_out + q < end):
                    for i in tl.static_range(STRIP):
                        valid = _column_ok(ok, wi, i, LAST, W)
                        da = grads[q * STRIP + i]
                        if PROLOGUE:
                            centered = rows_out[q * STRIP + i].to(tl.float32) - norm[0]
                            z = centered * norm[1] + norm[2]
                            da = tl.where(valid, da * silu_slope(z, sigmoid(z)), 0.0)
                            sum_dz += da
                            sum_dz_centered += da * centered
                        tl.store(dx_at + ((first_out + q) * W + i) * C, da.to(dx_ptr.dtype.element_ty), mask=valid)
            acts = acts[STRIDE * STRIP :]
            grads = grads[STRIDE * STRIP :]
    # Sums over the program's pixels.
    sums_ptr += tl.program_id(1) * (K * K + 2 * PROLOGUE) * C
    for tap in tl.static_range(K * K):
        tl.store(sums_ptr + tap * C + c, tl.sum(dw[tap], axis=0), mask=c_ok)
    if PROLOGUE:
        tl.store(sums_ptr + K * K * C + c, tl.sum(sum_dz, axis=0), mask=c_ok)
        tl.store(sums_ptr + (K * K + 1) * C + c, tl.sum(sum_dz_centered * rstd, axis=0), mask=c_ok)


def output_size(size: int, k: int, stride: int, before: int, after: int) -> int:
    """Output pixels along one side."""
    return (size + before + after - k) // stride + 1


def empty_channels_last(like: Tensor, n: int, c: int, h: int, w: int) -> Tensor:
    """An uninitialised channels-last tensor of `like`'s device and dtype."""
    return torch.empty((n, c, h, w), device=like.device, dtype=like.dtype, memory_format=torch.channels_last)


def taps_first(weight: Tensor) -> Tensor:
    """A copy of [C, 1, k, k] as [k*k, C] float32: the channels of a tap are contiguous."""
    return weight.detach().flatten(1).t().to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def weight_gradient(dw: Tensor, weight: Tensor) -> Tensor:
    """dw [k*k, C] float32 in the weight's shape and dtype."""
    return torch.empty_like(weight).copy_(dw.t().view(weight.shape))


def forward(
    x: Tensor, taps: Tensor, stride: int, padding: Padding, norm: tuple[Tensor, Affine] | None, *, moments: bool
) -> tuple[Tensor, Tensor | None]:
    """y, and the moments [programs, 3, C] of its tiles if `moments`.

    `taps`: of `taps_first`. `norm`: statistics [4, C] and affine parameters of x's BatchNorm, for the prologue.
    """
    if ops := cpp_ops(x):
        stats, affine = norm or (None, (None, None))
        y, out = ops.depthwise_forward(x, taps, stride, padding, stats, *affine, moments)
        return y, out if moments else None
    left, right, top, bottom = padding
    n, c, h, w = x.shape
    k = math.isqrt(taps.shape[0])
    ho, wo = output_size(h, k, stride, top, bottom), output_size(w, k, stride, left, right)
    assert c * h * w < 2**31, "offsets within an image are 32-bit"
    y = empty_channels_last(x, n, c, ho, wo)
    config = forward_choice(n, c, ho, wo, k, stride)
    bands = cdiv(ho, config.band)
    programs = cdiv(n * cdiv(wo, config.strip), config.block_p) * bands
    out = torch.empty(programs, 3, c, device=x.device, dtype=torch.float32) if moments else None
    stats, affine = norm or (taps, (taps, taps))
    launch(
        "depthwise_conv",
        _forward_kernel,
        (cdiv(c, config.block_c), programs),
        x,
        taps,
        stats,
        *affine,
        y,
        taps if out is None else out,
        n,
        h,
        ho,
        top,
        config.band,
        bands,
        C=c,
        W=w,
        WO=wo,
        LEFT=left,
        K=k,
        STRIDE=stride,
        PROLOGUE=norm is not None,
        MOMENTS=moments,
        STRIP=config.strip,
        BLOCK_P=config.block_p,
        BLOCK_C=config.block_c,
        num_warps=config.num_warps,
    )
    return y, out


def backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    taps: Tensor,
    stride: int,
    padding: Padding,
    norm: tuple[Tensor, Affine] | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dx and dw; with `norm`, dz instead of dx, and the sums [2, C] of dz and dz * xhat over this rank.

    dw has the shape and dtype of `weight` [C, 1, k, k], contiguous; other arguments as in `forward`.
    """
    if ops := cpp_ops(x):
        stats, affine = norm or (None, (None, None))
        dx, dw, sums = ops.depthwise_backward(g, x, taps, stride, padding, stats, *affine)
        return dx, weight_gradient(dw, weight), None if norm is None else sums
    left, _, top, _ = padding
    n, c, h, w = x.shape
    ho, wo = g.shape[2:]
    k = weight.shape[-1]
    assert c * h * w < 2**31, "offsets within an image are 32-bit"
    config = backward_choice(n, c, h, w, k, stride)
    bands = cdiv(h, config.band)
    programs = cdiv(cdiv(n * cdiv(w, config.strip), config.block_p) * bands, config.tasks)
    dx = torch.empty_like(x)
    rows = k * k if norm is None else k * k + 2
    partials = torch.empty(programs, rows, c, device=x.device, dtype=torch.float32)
    stats, affine = norm or (taps, (taps, taps))
    launch(
        "depthwise_conv",
        _backward_kernel,
        (cdiv(c, config.block_c), programs),
        g,
        x,
        taps,
        stats,
        *affine,
        dx,
        partials,
        n,
        h,
        ho,
        top,
        config.band,
        bands,
        config.tasks,
        C=c,
        W=w,
        WO=wo,
        LEFT=left,
        K=k,
        STRIDE=stride,
        PROLOGUE=norm is not None,
        AHEAD=config.ahead,
        STRIP=config.strip,
        BLOCK_P=config.block_p,
        BLOCK_C=config.block_c,
        num_warps=config.num_warps,
    )
    dw, sums = add_weight_partials(partials, weight)
    return dx, dw, None if norm is None else sums


@custom_op("depthwise_conv")
def _depthwise_conv(x: Tensor, weight: Tensor, stride: int, padding: list[int]) -> Tensor:
    left, right, top, bottom = padding
    return forward(x, taps_first(weight), stride, (left, right, top, bottom), None, moments=False)[0]


@_depthwise_conv.register_fake
def _(x, weight, stride, padding):
    left, right, top, bottom = padding
    n, c, h, w = x.shape
    k = weight.shape[-1]
    return empty_channels_last(x, n, c, output_size(h, k, stride, top, bottom), output_size(w, k, stride, left, right))


@custom_op("depthwise_conv_backward")
def _depthwise_conv_backward(
    g: Tensor, x: Tensor, weight: Tensor, stride: int, padding: list[int]
) -> tuple[Tensor, Tensor]:
    left, right, top, bottom = padding
    return backward(g, x, weight, taps_first(weight), stride, (left, right, top, bottom), None)[:2]


@_depthwise_conv_backward.register_fake
def _(g, x, weight, stride, padding):
    return torch.empty_like(x), torch.empty_like(weight)


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

    The weight may have another dtype and is used as float32.

    Returns:
        [N, C, HO, WO] of x's dtype, channels last.
    """
    if not (serves(weight.shape[-1], stride) and use_kernels(kernels, x)):
        return depthwise_conv_reference(x, weight, stride, padding)
    return _depthwise_conv(channels_last(x), weight.contiguous(), stride, list(padding))
