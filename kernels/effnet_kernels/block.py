"""A training step of a whole MBConv block as one op (Tan and Le, 2019), its 1x1 convolutions included.

    e = W1 x,  d = depthwise(silu(bn1(e))),  p = W3 (silu(bn2(d)) gate),  y = scale[n] bn3(p) + x

The 1x1 convolutions are matrix products over [N H W, C]; the operations before and after a product run on its tiles, so
the projection's input is not written. In passes over the map before (E) and after (D) the depthwise convolution:

Forward   E: written with its statistics, read by the convolution.  D: written with its statistics, read for the mean,
          read by the projection.
Backward  C++: D: the projection's backward reads d for the five sums and dW3, and writes dy; the depthwise
          convolution's backward reads dy and d, and computes dd from them without writing it.
          E: the depthwise convolution's backward reads e and writes dz; the expansion's backward reads dz and e.
          Triton: the products are the library's. D: dy written; dy and d read for the five sums, and the projection's
          input written with them; it is read for dW3; dy and d read and dd written; dd read by the depthwise
          convolution's backward. E: as in mbconv.py, and dx read twice by the expansion's.

In C++, for float32, that is 6 E + 7 D; in Triton 9 E + 12 D. The separate ops make 10 E + 13 D, PyTorch's operators
about 23 E + 29 D. Saved: x, e, d, p, and [N, C] or [C] vectors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from effnet_kernels import depthwise_conv as depthwise
from effnet_kernels.batch_norm import grad_apply, grad_sums, normalize, require_side_shapes
from effnet_kernels.depthwise_conv import Padding
from effnet_kernels.gate_mlp import SqueezeExcite, gate_backward, gate_forward
from effnet_kernels.launch import Kernels, channels_last, chosen, cpp_ops, custom_op, on_cpu
from effnet_kernels.pointwise import Prologue, product
from effnet_kernels.se_gate import apply_sums, gated_five_sums, squeeze
from effnet_kernels.statistics import (
    Affine,
    BatchNorm,
    batch_statistics,
    merge_moments,
    require_values,
    sum_over_ranks,
    update_running,
)

_NO_NORM: tuple[Any, ...] = (None, None, None)  # statistics, gamma and beta of a block without expansion


class ConvNorm(NamedTuple):
    """A convolution's weight and the BatchNorm after it."""

    weight: Tensor
    norm: BatchNorm

    def tensors(self) -> list[Tensor]:
        return [p.contiguous() for p in (self.weight, self.norm.weight, self.norm.bias)]


def supports(kernels: Kernels, x: Tensor, weight: Tensor) -> bool:
    """Whether `mbconv_block` replaces the separate ops, where `use_kernels`: in Triton if `kernels` is triton-block.

    In C++ it does for float32 x and weight without autocast.
    """
    choice = chosen(kernels)
    if choice in ("triton", "triton-block"):
        return choice == "triton-block"
    return on_cpu(x) and x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


def _expand(x: Tensor, weight: Tensor, eps: float, sync: bool) -> tuple[Tensor, Tensor]:
    """The expansion's output and its statistics [4, C]."""
    ops = cpp_ops(x)
    e, moments = ops.conv_moments(x, weight) if ops else product(x, weight, moments=True)
    assert moments is not None
    return e, merge_moments(moments, eps, sync)


def _project(
    d: Tensor, stats: Tensor, bn: Affine, gate: Tensor, weight: Tensor, eps: float, sync: bool
) -> tuple[Tensor, Tensor]:
    """The projection of silu(bn(d)) gate, and its statistics [4, C'].

    In Triton they take a pass over the projection, a sixth of d or less: their sums would not fit in registers beside
    the prologue.
    """
    if ops := cpp_ops(d):
        p, moments = ops.excite_conv_moments(d, stats, *bn, gate, weight)
        return p, merge_moments(moments, eps, sync)
    p, _ = product(d, weight, Prologue(stats, bn, gate), moments=False)
    return p, batch_statistics(p, eps, sync)


def _convolution_backward(dy: Tensor, x: Tensor, weight: Tensor, *, of_input: bool) -> Tensor:
    """The library's gradient of a 1x1 convolution, at its input or its weight; x's values serve the weight's only."""
    constants = (None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    mask = [of_input, not of_input, False]
    dx, dw, _ = torch.ops.aten.convolution_backward(dy, x, weight.to(x.dtype), *constants, mask)
    return channels_last(dx) if of_input else dw.to(weight.dtype)


def _project_backward(
    dy: Tensor,
    p: Tensor,
    norm3: tuple[Tensor, Tensor, Tensor],
    scale: Tensor | None,
    sums3: Tensor,
    weight: Tensor,
    d: Tensor,
    norm2: tuple[Tensor, Tensor, Tensor],
    gate: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients at the projection's input and weight, and the five sums of se_gate.py. A norm: statistics, affine."""
    if ops := cpp_ops(d):
        return ops.project_backward(dy, p, *norm3, scale, sums3, weight, d, *norm2, gate)
    dp = grad_apply(dy, p, norm3[0], norm3[1:], scale, sums3, activation=False)
    dgated = _convolution_backward(dp, d, weight, of_input=True)
    five, gated = gated_five_sums(dgated, d, norm2[0], norm2[1:], gate)
    return dgated, _convolution_backward(dp, gated, weight, of_input=False), five


def _depthwise_backward(
    dgated: Tensor,
    d: Tensor,
    norm2: tuple[Tensor, Tensor, Tensor],
    gate: Tensor,
    dpool: Tensor,
    sums2: Tensor,
    e: Tensor,
    weight: Tensor,
    stride: int,
    padding: Padding,
    norm1: tuple[Any, ...],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """From the gradient after the gate: dz (without expansion dx), the weight's gradient, and the sums of dz."""
    taps = depthwise.taps_first(weight)
    if ops := cpp_ops(d):
        dz, dw, sums = ops.gated_depthwise_backward(
            dgated, d, *norm2, gate, dpool, sums2, e, taps, stride, padding, *norm1
        )
        return dz, depthwise.weight_gradient(dw, weight), sums
    dd = apply_sums(dgated, d, norm2[0], norm2[1:], gate, dpool, sums2)
    prologue = None if norm1[0] is None else (norm1[0], norm1[1:])
    return depthwise.backward(dd, e, weight, taps, stride, padding, prologue)


def _expand_backward(
    dz: Tensor,
    e: Tensor,
    norm1: tuple[Tensor, Tensor, Tensor],
    sums1: Tensor,
    x: Tensor,
    weight: Tensor,
    shortcut: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """dx, plus the shortcut's gradient, and the expansion's weight gradient."""
    if ops := cpp_ops(x):
        dx, dw = ops.expand_backward(dz, e, *norm1, sums1, x, weight, shortcut)
        return dx, dw.view_as(weight)
    de = grad_apply(dz, e, norm1[0], norm1[1:], None, sums1, activation=False)
    dx, dw = (_convolution_backward(de, x, weight, of_input=of_input) for of_input in (True, False))
    return dx if shortcut is None else dx.add_(shortcut), dw


@custom_op("block")
def _block(
    x: Tensor,
    expand: list[Tensor],
    conv: list[Tensor],
    se: list[Tensor],
    project: list[Tensor],
    sample_scale: Tensor | None,
    residual: bool,
    stride: int,
    padding: list[int],
    eps: float,
    sync: bool,
) -> list[Tensor]:
    left, right, top, bottom = padding
    first = list(_expand(x, expand[0], eps, sync)) if expand else []
    e, norm1 = (first[0], (first[1], _affine(expand))) if expand else (x, None)
    taps = depthwise.taps_first(conv[0])
    d, moments = depthwise.forward(e, taps, stride, (left, right, top, bottom), norm1, moments=True)
    assert moments is not None
    stats2 = merge_moments(moments, eps, sync)
    pool = squeeze(d, stats2, _affine(conv))
    gate, hidden = gate_forward(pool, SqueezeExcite(*se))
    p, stats3 = _project(d, stats2, _affine(conv), gate, project[0], eps, sync)
    y = normalize(p, stats3, _affine(project), x if residual else None, sample_scale, activation=False)
    return [y, d, p, stats2, stats3, pool, gate, hidden, *first]


def _affine(layer: list[Tensor]) -> Affine:
    """Weight and bias of the BatchNorm of a layer [convolution's weight, gamma, beta]."""
    return layer[1], layer[2]


@_block.register_fake
def _(x, expand, conv, se, project, sample_scale, residual, stride, padding, eps, sync):
    left, right, top, bottom = padding
    n, _, h, w = x.shape
    c, k, outputs = conv[0].shape[0], conv[0].shape[-1], project[0].shape[0]
    ho = depthwise.output_size(h, k, stride, top, bottom)
    wo = depthwise.output_size(w, k, stride, left, right)
    y, d, p = (depthwise.empty_channels_last(x, n, channels, ho, wo) for channels in (outputs, c, outputs))
    shapes = ((4, c), (4, outputs), (n, c), (n, c), (n, se[0].shape[0]))
    vectors = [x.new_empty(shape, dtype=torch.float32) for shape in shapes]
    first = [depthwise.empty_channels_last(x, n, c, h, w), x.new_empty(4, c, dtype=torch.float32)] if expand else []
    return [y, d, p, *vectors, *first]


@custom_op("block_backward")
def _block_backward(
    dy: Tensor,
    x: Tensor,
    expand: list[Tensor],
    conv: list[Tensor],
    se: list[Tensor],
    project: list[Tensor],
    saved: list[Tensor],
    sample_scale: Tensor | None,
    residual: bool,
    stride: int,
    padding: list[int],
    sync: bool,
) -> list[Tensor]:
    """Returns dx and the gradients of expand, conv, se and project, in this order."""
    left, right, top, bottom = padding
    d, p, stats2, stats3, pool, gate, hidden, *first = saved
    e, norm1 = (first[0], (first[1], *_affine(expand))) if expand else (x, _NO_NORM)
    norm2, norm3 = (stats2, *_affine(conv)), (stats3, *_affine(project))
    sums3 = grad_sums(dy, p, stats3, _affine(project), sample_scale, activation=False)
    total3 = sum_over_ranks(sums3, sync)
    dgated, dw3, five = _project_backward(dy, p, norm3, sample_scale, total3, project[0], d, norm2, gate)
    dpool, sums2, dse = gate_backward(five, gate, pool, hidden, SqueezeExcite(*se), d.shape[2] * d.shape[3])
    total2 = sum_over_ranks(sums2, sync)
    dz, dw2, sums1 = _depthwise_backward(
        dgated, d, norm2, gate, dpool, total2, e, conv[0], stride, (left, right, top, bottom), norm1
    )
    del dgated
    rest = [dw2, *_affine_gradients(sums2, conv), *dse, dw3.view_as(project[0]), *_affine_gradients(sums3, project)]
    if not expand:
        return [dz.add_(dy) if residual else dz, *rest]
    assert sums1 is not None
    total1 = sum_over_ranks(sums1, sync)
    dx, dw1 = _expand_backward(dz, e, norm1, total1, x, expand[0], dy if residual else None)
    return [dx, dw1, *_affine_gradients(sums1, expand), *rest]


def _affine_gradients(sums: Tensor, layer: list[Tensor]) -> list[Tensor]:
    """dgamma and dbeta from [dbeta, dgamma]; copies, since results of a custom op must not share memory."""
    return [sums[i].to(like.dtype, copy=True) for i, like in ((1, layer[1]), (0, layer[2]))]


@_block_backward.register_fake
def _(dy, x, expand, conv, se, project, saved, sample_scale, residual, stride, padding, sync):
    return [torch.empty_like(t) for t in (x, *expand, *conv, *se, *project)]


def _setup(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # autograd would write zeros for every saved output
    x, expand, conv, se, project, sample_scale, ctx.residual, ctx.stride, ctx.padding, _, ctx.sync = inputs
    ctx.expanded = bool(expand)
    ctx.save_for_backward(x, sample_scale, *expand, *conv, *se, *project, *output[1:])


def _backward(ctx, grads: list[Tensor]):
    x, sample_scale, *rest = ctx.saved_tensors
    first = 3 if ctx.expanded else 0
    ends = (first, first + 3, first + 7, first + 10)
    expand, conv, se, project, saved = (rest[a:b] for a, b in zip((0, *ends), (*ends, len(rest)), strict=True))
    dx, *gradients = _block_backward(
        channels_last(grads[0]),
        x,
        expand,
        conv,
        se,
        project,
        saved,
        sample_scale,
        ctx.residual,
        ctx.stride,
        ctx.padding,
        ctx.sync,
    )
    parts = [gradients[a:b] for a, b in zip((0, *ends[:3]), ends, strict=True)]
    return dx, *parts, None, None, None, None, None, None


_block.register_autograd(_backward, setup_context=_setup)


def mbconv_block(
    x: Tensor,
    expand: ConvNorm | None,
    conv: ConvNorm,
    stride: int,
    padding: Padding,
    se: SqueezeExcite,
    project: ConvNorm,
    *,
    sample_scale: Tensor | None = None,
    residual: bool = False,
) -> Tensor:
    """An MBConv block in training: `x` [N, C, H, W] to [N, C', HO, WO]; updates the running statistics.

    Args:
        x: the block's input.
        expand: the 1x1 expansion [C E, C, 1, 1], or None.
        conv: the depthwise convolution [C E, 1, k, k], k 3 or 5.
        stride, padding: of the depthwise convolution; padding as (left, right, top, bottom).
        se: the gate's weights.
        project: the 1x1 projection [C', C E, 1, 1]. All three BatchNorms must have the same eps and sync.
        sample_scale: [N], stochastic depth.
        residual: add x.

    Raises:
        ValueError: there is only one value per channel, a shape does not fit, or the C++ kernels get another dtype than
            float32.
    """
    norms = [layer.norm for layer in (expand, conv, project) if layer is not None]
    eps, sync = project.norm.eps, project.norm.sync
    assert all((norm.eps, norm.sync) == (eps, sync) for norm in norms)
    left, right, top, bottom = padding
    n, _, h, w = x.shape
    k, c = conv.weight.shape[-1], conv.weight.shape[0]
    if expand is not None:
        require_values((n, c, h, w), sync)
    ho, wo = depthwise.output_size(h, k, stride, top, bottom), depthwise.output_size(w, k, stride, left, right)
    require_values((n, c, ho, wo), sync)
    require_side_shapes((n, project.weight.shape[0], ho, wo), x if residual else None, sample_scale)
    if on_cpu(x) and not x.dtype == conv.weight.dtype == torch.float32:
        raise ValueError(f"the C++ block takes float32, not {x.dtype} with weights of {conv.weight.dtype}")
    outputs = _block(
        channels_last(x),
        [] if expand is None else expand.tensors(),
        conv.tensors(),
        [p.contiguous() for p in se],
        project.tensors(),
        None if sample_scale is None else sample_scale.contiguous(),
        residual,
        stride,
        list(padding),
        eps,
        sync,
    )
    y, _, _, stats2, stats3, _, _, _, *first = outputs
    if expand is not None:
        update_running(expand.norm, first[1])
    update_running(conv.norm, stats2)
    update_running(project.norm, stats3)
    return y
