"""A training step of a whole MBConv block as one CPU op, in float32 (Tan and Le, 2019).

    e = W1 x,  d = depthwise(silu(bn1(e))),  p = W3 (silu(bn2(d)) gate),  y = scale[n] bn3(p) + x

The 1x1 convolutions are matrix products over [N H W, C], computed tile by tile; the operations before and after a
product run while its tile is in the cache. In passes over the map before (E) and after (D) the depthwise convolution:

Forward   E: written with its statistics, read by the convolution.  D: written with its statistics, read for the mean,
          read by the projection, whose input is never written.
Backward  D: the projection's backward reads d for the five sums and dW3, and writes dy; the depthwise convolution's
          backward reads dy and d, and computes dd from them without writing it.
          E: the depthwise convolution's backward reads e and writes dz; the expansion's backward reads dz and e.

That is 6 E + 7 D. The separate ops make 10 E + 13 D, PyTorch's operators about 23 E + 29 D. Saved: x, e, d, p, and
[N, C] or [C] vectors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from effnet_kernels import depthwise_conv as depthwise
from effnet_kernels.cpu import build
from effnet_kernels.depthwise_conv import Padding
from effnet_kernels.gate_mlp import SqueezeExcite
from effnet_kernels.launch import channels_last, on_cpu
from effnet_kernels.statistics import BatchNorm, merge_moments, require_values, sum_over_ranks, update_running

_NO_NORM: tuple[Any, ...] = (None, None, None)  # statistics, gamma and beta of a block without expansion


class ConvNorm(NamedTuple):
    """A convolution's weight and the BatchNorm after it."""

    weight: Tensor
    norm: BatchNorm

    def tensors(self) -> list[Tensor]:
        return [self.weight, self.norm.weight, self.norm.bias]


def supports(x: Tensor, weight: Tensor) -> bool:
    """Whether `mbconv_block` can replace the separate ops: x and weight are float32 on the CPU, without autocast."""
    return on_cpu(x) and x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


@torch.library.custom_op("effnet_kernels::cpu_block", mutates_args=())
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
    ops = build.library()
    assert ops is not None
    e, norm1 = x, _NO_NORM
    if expand:
        e, moments = ops.conv_moments(x, expand[0])
        norm1 = (merge_moments(moments, eps, sync), *expand[1:])
    d, moments = ops.depthwise_forward(e, depthwise.taps_first(conv[0]), stride, padding, *norm1, True)
    stats2 = merge_moments(moments, eps, sync)
    pool = ops.squeeze(d, stats2, *conv[1:])
    gate, hidden = ops.gate_forward(pool, *se)
    p, moments = ops.excite_conv_moments(d, stats2, *conv[1:], gate, project[0])
    stats3 = merge_moments(moments, eps, sync)
    y = ops.normalize(p, stats3, *project[1:], x if residual else None, sample_scale, False)
    saved = [d, p, stats2, stats3, pool, gate, hidden]
    return [y, *saved, *([e, norm1[0]] if expand else [])]


@_block.register_fake
def _(x, expand, conv, se, project, sample_scale, residual, stride, padding, eps, sync):
    left, right, top, bottom = padding
    n, _, h, w = x.shape
    c, k, outputs = conv[0].shape[0], conv[0].shape[-1], project[0].shape[0]
    ho = depthwise.output_size(h, k, stride, top, bottom)
    wo = depthwise.output_size(w, k, stride, left, right)
    y, d, p = (depthwise.empty_channels_last(x, n, channels, ho, wo) for channels in (outputs, c, outputs))
    vectors = [x.new_empty(shape) for shape in ((4, c), (4, outputs), (n, c), (n, c), (n, se[0].shape[0]))]
    first = [depthwise.empty_channels_last(x, n, c, h, w), x.new_empty(4, c)] if expand else []
    return [y, d, p, *vectors, *first]


@torch.library.custom_op("effnet_kernels::cpu_block_backward", mutates_args=())
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
    ops = build.library()
    assert ops is not None
    d, p, stats2, stats3, pool, gate, hidden, *first = saved
    e, norm1 = (first[0], (first[1], *expand[1:])) if expand else (x, _NO_NORM)
    bn2, bn3 = conv[1:], project[1:]
    sums3 = ops.grad_sums(dy, p, stats3, *bn3, sample_scale, False)
    total3 = sum_over_ranks(sums3, sync)
    dgated, dw3, five = ops.project_backward(
        dy, p, stats3, *bn3, sample_scale, total3, project[0], d, stats2, *bn2, gate
    )
    dpool, sums2, *dse = ops.gate_backward(five, gate, pool, hidden, se[0], se[2], d.shape[2] * d.shape[3])
    total2 = sum_over_ranks(sums2, sync)
    dz, dtaps, sums1 = ops.gated_depthwise_backward(
        *(dgated, d, stats2, *bn2, gate, dpool, total2),
        *(e, depthwise.taps_first(conv[0]), stride, padding, *norm1),
    )
    del dgated
    dconv = [depthwise.weight_gradient(dtaps, conv[0]), *_affine(sums2)]
    dse = [g.view_as(t) for g, t in zip(dse, se, strict=True)]
    dproject = [dw3.view_as(project[0]), *_affine(sums3)]
    if not expand:
        return [dz.add_(dy) if residual else dz, *dconv, *dse, *dproject]
    total1 = sum_over_ranks(sums1, sync)
    dx, dw1 = ops.expand_backward(dz, e, *norm1, total1, x, expand[0], dy if residual else None)
    return [dx, dw1.view_as(expand[0]), *_affine(sums1), *dconv, *dse, *dproject]


def _affine(sums: Tensor) -> list[Tensor]:
    """dgamma and dbeta from [dbeta, dgamma]; copies, since results of a custom op must not share memory."""
    return [sums[1].clone(), sums[0].clone()]


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
    """An MBConv block in training: `x` [N, C, H, W] float32 to [N, C', HO, WO]; updates the running statistics.

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
        ValueError: there is only one value per channel.
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
    outputs = _block(
        channels_last(x),
        [] if expand is None else expand.tensors(),
        conv.tensors(),
        list(se),
        project.tensors(),
        sample_scale,
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
