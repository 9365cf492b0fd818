"""The gate's two-layer perceptron in squeeze-and-excitation, on [N, C] pooled values (Hu et al., 2018).

    hidden = W1 pool + b1,  gate = sigmoid(W2 silu(hidden) + b2)

Forward   `_spans_kernel` multiplies by W1, `_gate_kernel` by W2, or by both.
Backward  From the gradient at the gate, `_spans_kernel` multiplies by W2 and `_dpool_kernel` by W1, or by both. Then
          `_parameters_backward_kernel` sums dW1, dW2, db1, db2 and BatchNorm's dgamma and dbeta over splits of the
          images, and `_add_splits_kernel` adds the splits in order.

The matrices are small, so latency dominates. Each product over many channels is split into spans of channels, each a
program; the next launch adds the spans' sums in order. Over few channels, each program of that launch computes the
product itself: a launch less, and the same time on an H100. Products are float32 as three TF32 products (tf32x3), which
keeps float32's accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from effnet_kernels.launch import LaunchChoice, cdiv, cpp_ops, kernel, launch, power_of_2, slots, tl, triton, vector
from effnet_kernels.silu import sigmoid, silu_slope
from effnet_kernels.statistics import load


class SqueezeExcite(NamedTuple):
    """Weights of the two 1x1 convolutions: [R, C, 1, 1], [R], [C, R, 1, 1], [C]."""

    reduce_weight: Tensor
    reduce_bias: Tensor
    expand_weight: Tensor
    expand_bias: Tensor


MAX_SPANS = 16  # spans of the channels, and splits of the images, that the next launch adds up
MAX_SPLITS = 16
GROUP_VALUES = 64
DIRECT_CHANNELS = 256  # at most, for a product that needs no launch of its own


@dataclass(frozen=True)
class GateLaunch:
    """A program's tile: `block_n` images (at least 16, for `tl.dot`), `block_c` channels, `block_r` hidden values.

    A product over the channels is split into spans of `turns` blocks of channels, longer ones if they are too many. If
    `direct`, the kernel that needs it computes all of it instead.
    """

    block_n: int
    block_c: int
    block_r: int
    num_warps: int
    turns: int = 4
    direct: bool = False

    def span(self, c: int) -> int:
        """Channels per span of a sum over `c` channels."""
        return self.block_c * max(self.turns, cdiv(c, self.block_c * MAX_SPANS))

    @property
    def group(self) -> int:
        """Spans whose sums are loaded at once: at most GROUP_VALUES values a thread, which fit in its registers."""
        values = max(self.block_n * self.block_r // (32 * self.num_warps), 1)
        return min(max(GROUP_VALUES // values, 1), MAX_SPANS - 1)

    def constants(self, c: int) -> dict[str, int]:
        """Compile-time arguments of the kernels."""
        blocks = {"BLOCK_N": self.block_n, "BLOCK_C": self.block_c, "BLOCK_R": self.block_r}
        return {"VEC": vector(c), "num_warps": self.num_warps, **blocks}


def gate_launch(c: int, r: int) -> GateLaunch:
    """All R hidden values in one tile, with fewer channels where R is large, so that the tiles fit in registers.

    Spans of 64 channels: a program waits for memory once or twice, and `_sum_of_spans` once for all spans.
    """
    block_r = max(power_of_2(r), 16)
    block_c = 64 if block_r <= 32 else 32
    num_warps = 4 if block_r <= 64 else 8
    if c <= DIRECT_CHANNELS:
        return GateLaunch(16, block_c, block_r, num_warps, direct=True)
    return GateLaunch(16, block_c, block_r, num_warps, turns=64 // block_c)


def parameters_launch(r: int) -> GateLaunch:
    """Launch for the parameters' gradients. Their hidden values are independent: at most 64 per program."""
    return GateLaunch(16, 32, min(max(power_of_2(r), 16), 64), num_warps=4)


def images_per_split(n: int, blocks: int, block_n: int) -> int:
    """Images per split of the parameters' gradients: at least two blocks of them, for about one wave of programs.

    A single program over all images would wait for memory once per block of images. `blocks`: programs per split.
    """
    splits = max(min(slots(2) // blocks, cdiv(n, 2 * block_n), MAX_SPLITS), 1)
    return cdiv(cdiv(n, splits), block_n) * block_n


def gate_launch_space(r: int) -> list[GateLaunch]:
    """Launches an autotuner may try in place of `gate_launch`'s choice."""
    block_r = max(power_of_2(r), 16)
    blocks = [(n, c, block_r, w) for n in (16, 32) for c in (32, 64) for w in (4, 8) if c * block_r <= 8192]
    spans = [GateLaunch(*block, turns) for block in blocks for turns in (1, 2, 4, 8)]
    return spans + [GateLaunch(*block, direct=True) for block in blocks]


def gate_choice(kernel: str) -> LaunchChoice:
    """The choice for a gate's two products, by (images, channels, hidden values)."""
    return LaunchChoice(kernel, lambda n, c, r: gate_launch(c, r), lambda n, c, r: gate_launch_space(r))


forward_choice = gate_choice("gate")
backward_choice = gate_choice("gate backward")


@triton.jit
def _tile(N, R, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr):
    """A program's images n [BLOCK_N], all hidden values r [BLOCK_R], their offsets in [N, R] and mask."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    return n, r, n[:, None] * R + r[None, :], (n < N)[:, None] & (r < R)[None, :]


@triton.jit
def _sum_of_spans(
    sums_ptr,  # [spans, N, R]
    spans,
    NR,
    nr,
    nr_ok,
    GROUP: tl.constexpr,
):
    """Add the spans' sums in order: [BLOCK_N, BLOCK_R]. The loads of a group of spans wait for memory at once."""
    total = load(sums_ptr + nr, nr_ok)
    for first in range(1, spans, GROUP):
        for i in tl.static_range(GROUP):
            total += load(sums_ptr + (first + i) * NR + nr, nr_ok & (first + i < spans))
    return total


@triton.jit
def _product(
    x_ptr,  # [N, C]: pool; the gradient at the gate if BACKWARD
    gate_ptr,  # [N, C], if BACKWARD
    w_ptr,  # [R, C]; [C, R] if BACKWARD
    n,
    r,
    start,
    end,
    N,
    C,
    R,
    BACKWARD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The product over the channels from `start` to before `end`, [BLOCK_N, BLOCK_R].

    That is the hidden values without bias; the gradient at their Swish if BACKWARD.
    """
    sums = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for first in range(start, end, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        nc = n[:, None] * C + c[None, :]
        nc_ok = (n < N)[:, None] & (c < C)[None, :]
        x = load(x_ptr + nc, nc_ok)
        cr_ok = (c < C)[:, None] & (r < R)[None, :]
        if BACKWARD:
            gate = load(gate_ptr + nc, nc_ok)
            x = x * gate * (1.0 - gate)  # the gradient before the sigmoid
            w = load(w_ptr + c[:, None] * R + r[None, :], cr_ok)
        else:
            w = load(w_ptr + r[None, :] * C + c[:, None], cr_ok)
        sums = tl.dot(x, w, sums, input_precision="tf32x3")
    return sums


@kernel
def _spans_kernel(
    x_ptr,  # as in `_product`
    gate_ptr,
    w_ptr,
    sums_ptr,  # [spans, N, R]
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
    start = tl.program_id(1) * span
    end = tl.minimum(start + span, C)
    sums = _product(x_ptr, gate_ptr, w_ptr, n, r, start, end, N, C, R, BACKWARD, BLOCK_N, BLOCK_C, BLOCK_R)
    tl.store(sums_ptr + tl.program_id(1) * N * R + nr, sums, mask=nr_ok)


@kernel
def _gate_kernel(
    input_ptr,  # the spans' sums [spans, N, R]; pool [N, C] if DIRECT
    w1_ptr,  # [R, C], if DIRECT
    b1_ptr,  # [R]
    w2_ptr,  # [C, R]
    b2_ptr,  # [C]
    hidden_ptr,  # [N, R]
    gate_ptr,  # [N, C]
    N,
    C,
    R,
    spans,
    DIRECT: tl.constexpr,
    GROUP: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    C = C // VEC * VEC
    n, r, nr, nr_ok = _tile(N, R, BLOCK_N, BLOCK_R)
    if DIRECT:
        hidden = _product(input_ptr, input_ptr, w1_ptr, n, r, 0, C, N, C, R, False, BLOCK_N, BLOCK_C, BLOCK_R)
    else:
        hidden = _sum_of_spans(input_ptr, spans, N * R, nr, nr_ok, GROUP)
    hidden += load(b1_ptr + r, r < R)[None, :]
    # All programs of these images compute the same hidden values; the first one stores them.
    tl.store(hidden_ptr + nr, hidden, mask=nr_ok & (tl.program_id(1) == 0))
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    rc_ok = (r < R)[:, None] & (c < C)[None, :]
    w2 = load(w2_ptr + c[None, :] * R + r[:, None], rc_ok)
    logit = tl.dot(hidden * sigmoid(hidden), w2, input_precision="tf32x3")
    logit += load(b2_ptr + c, c < C)[None, :]
    tl.store(gate_ptr + n[:, None] * C + c[None, :], sigmoid(logit), mask=(n < N)[:, None] & (c < C)[None, :])


@kernel
def _dpool_kernel(
    input_ptr,  # the spans' sums [spans, N, R]; the gradient at the gate [N, C] if DIRECT
    gate_ptr,  # [N, C], if DIRECT
    w2_ptr,  # [C, R], if DIRECT
    hidden_ptr,  # [N, R]
    w1_ptr,  # [R, C]
    dhidden_ptr,  # [N, R]
    dpool_ptr,  # [N, C]
    N,
    C,
    R,
    spans,
    DIRECT: tl.constexpr,
    GROUP: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    C = C // VEC * VEC
    n, r, nr, nr_ok = _tile(N, R, BLOCK_N, BLOCK_R)
    if DIRECT:
        dact = _product(input_ptr, gate_ptr, w2_ptr, n, r, 0, C, N, C, R, True, BLOCK_N, BLOCK_C, BLOCK_R)
    else:
        dact = _sum_of_spans(input_ptr, spans, N * R, nr, nr_ok, GROUP)
    hidden = load(hidden_ptr + nr, nr_ok)
    dhidden = dact * silu_slope(hidden, sigmoid(hidden))
    tl.store(dhidden_ptr + nr, dhidden, mask=nr_ok & (tl.program_id(1) == 0))
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    rc_ok = (r < R)[:, None] & (c < C)[None, :]
    w1 = load(w1_ptr + r[:, None] * C + c[None, :], rc_ok)
    dpool = tl.dot(dhidden, w1, input_precision="tf32x3")
    tl.store(dpool_ptr + n[:, None] * C + c[None, :], dpool, mask=(n < N)[:, None] & (c < C)[None, :])


@kernel
def _parameters_backward_kernel(
    sums_ptr,  # [5, N, C], of se_gate.five_sums; the first is the gradient at the gate
    gate_ptr,  # [N, C]
    pool_ptr,  # [N, C]
    dpool_ptr,  # [N, C]
    hidden_ptr,  # [N, R]
    dhidden_ptr,  # [N, R]
    partials_ptr,  # [splits, 2*R*C + 3*C + R]: dw1 [R, C], dw2 [C, R], db2 [C], dbeta [C], dgamma [C], db1 [R]
    N,
    C,
    R,
    NC,
    HW,
    images,
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
    start = tl.program_id(2) * images
    for first in range(start, tl.minimum(start + images, N), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        nc = n[:, None] * C + c[None, :]
        nc_ok = (n < N)[:, None] & (c < C)[None, :]
        nr = n[:, None] * R + r[None, :]
        nr_ok = (n < N)[:, None] & (r < R)[None, :]
        # The second layer.
        gate = load(gate_ptr + nc, nc_ok)
        dlogit = load(sums_ptr + nc, nc_ok) * gate * (1.0 - gate)
        hidden = load(hidden_ptr + nr, nr_ok)
        dw2 = tl.dot(tl.trans(dlogit), hidden * sigmoid(hidden), dw2, input_precision="tf32x3")
        db2 += tl.sum(dlogit, axis=0)
        # The first layer.
        dhidden = load(dhidden_ptr + nr, nr_ok)
        pool = load(pool_ptr + nc, nc_ok)
        dw1 = tl.dot(tl.trans(dhidden), pool, dw1, input_precision="tf32x3")
        db1 += tl.sum(dhidden, axis=0)
        # BatchNorm: dz is (dy gate + dpool / HW) silu'(z).
        from_pool = load(dpool_ptr + nc, nc_ok) / HW
        dy_slope = load(sums_ptr + NC + nc, nc_ok)
        dy_slope_xhat = load(sums_ptr + 2 * NC + nc, nc_ok)
        slope = load(sums_ptr + 3 * NC + nc, nc_ok)
        slope_xhat = load(sums_ptr + 4 * NC + nc, nc_ok)
        dbeta += tl.sum(gate * dy_slope + from_pool * slope, axis=0)
        dgamma += tl.sum(gate * dy_slope_xhat + from_pool * slope_xhat, axis=0)
    c_ok = c < C
    # All programs of a grid row or column compute the same vectors; the first one stores them.
    once = c_ok & (tl.program_id(1) == 0)
    RC = R * C
    partials_ptr += tl.program_id(2).to(tl.int64) * (2 * RC + 3 * C + R)
    tl.store(partials_ptr + r[:, None] * C + c[None, :], dw1, mask=(r < R)[:, None] & c_ok[None, :])
    tl.store(partials_ptr + RC + c[:, None] * R + r[None, :], dw2, mask=c_ok[:, None] & (r < R)[None, :])
    vectors_ptr = partials_ptr + 2 * RC
    tl.store(vectors_ptr + c, db2, mask=once)
    tl.store(vectors_ptr + C + c, dbeta, mask=once)
    tl.store(vectors_ptr + 2 * C + c, dgamma, mask=once)
    tl.store(vectors_ptr + 3 * C + r, db1, mask=(r < R) & (tl.program_id(0) == 0))


@kernel
def _add_splits_kernel(
    partials_ptr,  # [splits, 2*R*C + 3*C + R], as above, at most MAX_SPLITS
    dw1_ptr,  # [R, C]
    dw2_ptr,  # [C, R]
    db2_ptr,  # [C]
    bn_ptr,  # [2, C]: dbeta, dgamma
    db1_ptr,  # [R]
    C,
    R,
    splits,
    MAX_SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    RC = R * C
    size = 2 * RC + 3 * C + R
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(MAX_SPLITS):  # unrolled, so that all loads wait for memory at once
        total += load(partials_ptr + i, (i < size) & (split < splits))
        partials_ptr += size
    # Each value goes to the tensor its index falls in.
    dw2_at, db2_at, bn_at, db1_at = RC, 2 * RC, 2 * RC + C, 2 * RC + 3 * C
    tl.store(dw1_ptr + i, total.to(dw1_ptr.dtype.element_ty), mask=i < dw2_at)
    tl.store(dw2_ptr + i - dw2_at, total.to(dw2_ptr.dtype.element_ty), mask=(i >= dw2_at) & (i < db2_at))
    tl.store(db2_ptr + i - db2_at, total.to(db2_ptr.dtype.element_ty), mask=(i >= db2_at) & (i < bn_at))
    tl.store(bn_ptr + i - bn_at, total, mask=(i >= bn_at) & (i < db1_at))
    tl.store(db1_ptr + i - db1_at, total.to(db1_ptr.dtype.element_ty), mask=(i >= db1_at) & (i < size))


def _second_input(x: Tensor, gate: Tensor | None, w: Tensor, r: int, config: GateLaunch) -> Tensor:
    """What the kernel of the second product reads: x [N, C] if the launch is direct.

    Else sums [spans, N, R] over spans of the channels of x times `w`; with `gate`, of the backward pass.
    """
    n, c = x.shape[-2:]
    assert 5 * n * c < 2**31, "offsets in [5, N, C] are 32-bit"
    if config.direct:
        return x
    span = config.span(c)
    sums = x.new_empty(cdiv(c, span), n, r)
    launch(
        "se_gate",
        _spans_kernel,
        (cdiv(n, config.block_n), len(sums)),
        x,
        x if gate is None else gate,
        w,
        sums,
        n,
        c,
        r,
        span,
        BACKWARD=gate is not None,
        **config.constants(c),
    )
    return sums


def gate_forward(pool: Tensor, se: SqueezeExcite) -> tuple[Tensor, Tensor]:
    """gate [N, C] and hidden [N, R] (before its Swish) from pool [N, C], float32."""
    if ops := cpp_ops(pool):
        return ops.gate_forward(pool, *se)
    n, c = pool.shape
    r = se.reduce_weight.shape[0]
    config = forward_choice(n, c, r)
    first = _second_input(pool, None, se.reduce_weight, r, config)
    hidden, gate = pool.new_empty(n, r), torch.empty_like(pool)
    launch(
        "se_gate",
        _gate_kernel,
        (cdiv(n, config.block_n), cdiv(c, config.block_c)),
        first,
        se.reduce_weight,
        se.reduce_bias,
        se.expand_weight,
        se.expand_bias,
        hidden,
        gate,
        n,
        c,
        r,
        len(first),
        DIRECT=config.direct,
        GROUP=config.group,
        **config.constants(c),
    )
    return gate, hidden


def gate_backward(
    sums: Tensor, gate: Tensor, pool: Tensor, hidden: Tensor, se: SqueezeExcite, hw: int
) -> tuple[Tensor, Tensor, SqueezeExcite]:
    """dpool [N, C], BatchNorm's [dbeta, dgamma] over this rank, and the gradients of `se`.

    `sums` [5, N, C] are those of `se_gate.five_sums`; maps have `hw` pixels.
    """
    if ops := cpp_ops(pool):
        dpool, bn, *grads = ops.gate_backward(sums, gate, pool, hidden, se.reduce_weight, se.expand_weight, hw)
        return dpool, bn, SqueezeExcite(*(g.view_as(p).to(p.dtype) for g, p in zip(grads, se, strict=True)))
    dpool, dhidden = _dpool(sums, gate, hidden, se)
    return dpool, *_parameters_backward(sums, gate, pool, dpool, hidden, dhidden, se, hw)


def _dpool(sums: Tensor, gate: Tensor, hidden: Tensor, se: SqueezeExcite) -> tuple[Tensor, Tensor]:
    """Gradients at pool [N, C] and at hidden [N, R]."""
    n, c = gate.shape
    r = hidden.shape[1]
    config = backward_choice(n, c, r)
    first = _second_input(sums, gate, se.expand_weight, r, config)
    dhidden, dpool = torch.empty_like(hidden), torch.empty_like(gate)
    launch(
        "se_gate",
        _dpool_kernel,
        (cdiv(n, config.block_n), cdiv(c, config.block_c)),
        first,
        gate,
        se.expand_weight,
        hidden,
        se.reduce_weight,
        dhidden,
        dpool,
        n,
        c,
        r,
        len(first),
        DIRECT=config.direct,
        GROUP=config.group,
        **config.constants(c),
    )
    return dpool, dhidden


def _parameters_backward(
    sums: Tensor,
    gate: Tensor,
    pool: Tensor,
    dpool: Tensor,
    hidden: Tensor,
    dhidden: Tensor,
    se: SqueezeExcite,
    hw: int,
) -> tuple[Tensor, SqueezeExcite]:
    """BatchNorm's [dbeta, dgamma] [2, C] over this rank, and the gradients of `se`."""
    n, c = gate.shape
    r = hidden.shape[1]
    config = parameters_launch(r)
    blocks = cdiv(c, config.block_c), cdiv(r, config.block_r)
    images = images_per_split(n, blocks[0] * blocks[1], config.block_n)
    partials = pool.new_empty(cdiv(n, images), 2 * r * c + 3 * c + r)
    launch(
        "se_gate",
        _parameters_backward_kernel,
        (*blocks, len(partials)),
        sums,
        gate,
        pool,
        dpool,
        hidden,
        dhidden,
        partials,
        n,
        c,
        r,
        n * c,
        hw,
        images,
        **config.constants(c),
    )
    grads = SqueezeExcite(*(torch.empty_like(p) for p in se))
    bn = pool.new_empty(2, c)
    block = 256
    launch(
        "se_gate",
        _add_splits_kernel,
        (cdiv(partials.shape[1], block),),
        partials,
        grads.reduce_weight,
        grads.expand_weight,
        grads.expand_bias,
        bn,
        grads.reduce_bias,
        c,
        r,
        len(partials),
        MAX_SPLITS=MAX_SPLITS,
        BLOCK=block,
        num_warps=4,
    )
    return bn, grads
