"""Maps of the evidence for a class, computed with Captum.

Each map explains a class's logit (before the softmax). Negative evidence is set to zero in every method, so that maps
of different methods can be compared. A is a layer's output [K, h, w] and g the gradient of the logit with respect to A.

- `grad-cam` (Selvaraju et al. 2017, equations 1 and 2): ReLU(sum_k mean(g_k) A_k).
- `grad-cam++` (Chattopadhay et al. 2018, equation 19): ReLU(sum_k w_k A_k), w_k = sum over pixels of
  a ReLU(g_k) with a = g_k^2 / (2 g_k^2 + sum(A_k) g_k^3).
- `layer-cam` (Jiang et al. 2021): ReLU(sum_k ReLU(g_k) A_k), pixel by pixel.
- `cam` (Zhou et al. 2016): ReLU(sum_k w_k A_k) with the classifier's weights w. It requires a classifier that is linear
  on the mean of A; there it equals Grad-CAM times the number of pixels.
- `integrated-gradients` (Sundararajan et al. 2017): 50 steps from the zero image, summed over colours.
- `occlusion` (Zeiler and Fergus 2014): decrease of the logit when a patch, a quarter of the side, is set to zero.
- `guided-grad-cam` (Selvaraju et al. 2017, section 3.2): Grad-CAM times guided backpropagation. Captum implements
  it for nn.ReLU only. On a model without ReLU, such as EfficientNet with Swish, the result would be the plain gradient,
  so the method raises ValueError.

Inputs are normalised, so the zero image is the data set's mean colour.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effnet_fast.config import CamMethod
from effnet_fast.data.resize import central_square
from effnet_fast.explain.layers import find_layer, uncompiled

METHODS: tuple[CamMethod, ...] = get_args(CamMethod)
LAYER_METHODS = ("grad-cam", "grad-cam++", "layer-cam", "guided-grad-cam")  # methods that take a layer

_INTEGRATION_STEPS = 50
_INTEGRATION_BATCH = 256  # images per pass of integrated gradients; bounds its memory


def cam(
    model: nn.Module,
    images: Tensor,
    target: Literal["predicted"] | int | Sequence[int] | Tensor = "predicted",
    *,
    method: CamMethod = "grad-cam",
    layer: str | None = None,
) -> Tensor:
    """Compute class activation maps.

    Args:
        model: [N, 3, H, W] -> logits [N, classes]. A compiled model is unwrapped. It runs in evaluation mode, and its
            mode is restored afterwards.
        images: [N, 3, H, W], normalised as in training.
        target: class to explain: the predicted one, one class for all images, or N classes.
        method: see the module's docstring.
        layer: dotted name of the module whose output Grad-CAM uses; by default the module whose output enters the
            global pooling, after the activation.

    Returns:
        float32 [N, H, W] from 0 to 1, resized bilinearly and divided by each map's maximum. A map without positive
        evidence is zero everywhere.

    Raises:
        ValueError: unknown method, layer or class, or the method does not fit the model.
    """
    raw = evidence(model, images, resolve_targets(model, images, target), method=method, layer=layer)
    return normalise(resize_maps(raw, *images.shape[-2:]))


def resolve_targets(
    model: nn.Module, images: Tensor, target: Literal["predicted"] | int | Sequence[int] | Tensor
) -> Tensor:
    """Return the class of each image, int64 [N], on the images' device; see `cam` for the arguments.

    Raises:
        ValueError: `target` is not a valid class, or there are not N of them.
    """
    with uncompiled(model) as module, torch.no_grad():
        logits = module(images)
    if isinstance(target, str):
        if target != "predicted":
            raise ValueError(f"target must be 'predicted' or class numbers, not {target!r}")
        return logits.argmax(1)
    classes = torch.as_tensor(target, dtype=torch.int64, device=images.device)
    if classes.ndim > 1 or (classes.ndim == 1 and len(classes) != len(images)):
        raise ValueError(f"target must be one class or {len(images)} of them, not {tuple(classes.shape)}")
    if ((classes < 0) | (classes >= logits.shape[1])).any():
        raise ValueError(f"target must be from 0 to {logits.shape[1] - 1}, the model's classes, not {classes.tolist()}")
    return classes.expand(len(images))


def evidence(
    model: nn.Module, images: Tensor, targets: Tensor, *, method: CamMethod = "grad-cam", layer: str | None = None
) -> Tensor:
    """Compute positive evidence for the classes `targets`, int64 [N]. Unlike `cam`, do not resize or normalise it.

    Returns:
        float32 [N, h, w]: the layer's size for methods that use a layer's output, else the images' size.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    if layer is not None and method not in LAYER_METHODS:
        raise ValueError(f"{method} takes no layer: leave it out, or use grad-cam")
    with uncompiled(model) as module, torch.enable_grad():
        raw = _ATTRIBUTIONS[method](module, images.detach().requires_grad_(), targets, layer)
    return raw.detach().float().clamp_min(0)


def normalise(maps: Tensor) -> Tensor:
    """Divide each map of [N, H, W] by its maximum; a map of zeros stays unchanged."""
    largest = maps.amax((1, 2), keepdim=True)
    return torch.where(largest > 0, maps / largest, 0)


def resize_maps(maps: Tensor, height: int, width: int) -> Tensor:
    """Resize [N, h, w] to [N, height, width], bilinear, with antialiasing when shrinking."""
    return F.interpolate(maps[:, None], (height, width), mode="bilinear", antialias=True)[:, 0].clamp_min(0)


def place(square: Tensor, height: int, width: int) -> Tensor:
    """Resize a map [h, w] of the central square and pad it to the whole image, [height, width].

    The padding is zero, because the model only saw the central square of the shorter side.
    """
    left, top, side = central_square(width, height)
    whole = square.new_zeros(height, width)
    whole[top : top + side, left : left + side] = resize_maps(square[None], side, side)[0]
    return whole


# -- methods: (model, images, targets, layer) -> [N, h, w]


def _grad_cam(model: nn.Module, images: Tensor, targets: Tensor, layer: str | None) -> Tensor:
    from captum.attr import LayerGradCam

    method = LayerGradCam(model, find_layer(model, layer, images))
    return method.attribute(images, targets, relu_attributions=True)[:, 0]  # Captum's default omits the ReLU


def _grad_cam_plus_plus(model: nn.Module, images: Tensor, targets: Tensor, layer: str | None) -> Tensor:
    activation, gradient = _activation_and_gradient(model, images, targets, layer)
    denominator = 2 * gradient**2 + activation.sum((2, 3), keepdim=True) * gradient**3
    weight = torch.where(denominator != 0, gradient**2 / denominator, 0)
    return ((weight * gradient.relu()).sum((2, 3), keepdim=True) * activation).sum(1)


def _layer_cam(model: nn.Module, images: Tensor, targets: Tensor, layer: str | None) -> Tensor:
    activation, gradient = _activation_and_gradient(model, images, targets, layer)
    return (gradient.relu() * activation).sum(1)


def _activation_and_gradient(
    model: nn.Module, images: Tensor, targets: Tensor, layer: str | None
) -> tuple[Tensor, Tensor]:
    """Return a layer's output and the gradient of the targets' logits with respect to it, float64 [N, K, h, w] each.

    Grad-CAM++ divides by differences that float32 would round.
    """
    from captum.attr import LayerActivation, LayerGradientXActivation

    module = find_layer(model, layer, images)
    activation = LayerActivation(model, module).attribute(images)
    gradient = LayerGradientXActivation(model, module, multiply_by_inputs=False).attribute(images, targets)
    return activation.detach().double(), gradient.detach().double()


def _class_weights_cam(model: nn.Module, images: Tensor, targets: Tensor, layer: str | None) -> Tensor:
    from captum.attr import LayerActivation

    features = LayerActivation(model, find_layer(model, layer, images)).attribute(images).detach()
    classifier = _classifier(model)
    with torch.no_grad():
        logits = classifier(features.mean((2, 3))) if features.shape[1] == classifier.in_features else None
        if logits is None or not torch.allclose(logits.float(), model(images).float(), rtol=1e-2, atol=1e-2):
            raise ValueError(
                "the model's classifier is not linear on its pooled map, so CAM does not fit: use grad-cam"
            )
    return torch.einsum("nk,nkhw->nhw", classifier.weight[targets].float(), features.float())


def _classifier(model: nn.Module) -> nn.Linear:
    named = getattr(model, "classifier", None)
    linear = [named] if isinstance(named, nn.Linear) else [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise ValueError("the model has no linear classifier, so CAM does not fit: use grad-cam")
    return linear[-1]


def _integrated_gradients(model: nn.Module, images: Tensor, targets: Tensor, layer: str | None) -> Tensor:
    from captum.attr import IntegratedGradients

    batch = max(_INTEGRATION_BATCH, len(images))
    attributions = IntegratedGradients(model).attribute(
        images, target=targets, n_steps=_INTEGRATION_STEPS, internal_batch_size=batch
    )
    return attributions.sum(1)


def _occlusion(model: nn.Module, images: Tensor, targets: Tensor, layer: str | None) -> Tensor:
    from captum.attr import Occlusion

    _, channels, height, width = images.shape
    patch, step = max(1, min(height, width) // 4), max(1, min(height, width) // 8)
    with torch.no_grad():
        drops = Occlusion(model).attribute(
            images, (channels, patch, patch), strides=(channels, step, step), target=targets
        )
    return drops[:, 0]  # the patch covers all colours, so they are equal


def _guided_grad_cam(model: nn.Module, images: Tensor, targets: Tensor, layer: str | None) -> Tensor:
    from captum.attr import GuidedGradCam

    if not any(isinstance(module, nn.ReLU) for module in model.modules()):
        raise ValueError("guided-grad-cam needs a model with ReLU modules, and this one has none: use grad-cam")
    method = GuidedGradCam(model, find_layer(model, layer, images))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting backward hooks")
        return method.attribute(images, targets, interpolate_mode="bilinear").sum(1)


_ATTRIBUTIONS: dict[str, Callable[[nn.Module, Tensor, Tensor, str | None], Tensor]] = {
    "grad-cam": _grad_cam,
    "grad-cam++": _grad_cam_plus_plus,
    "layer-cam": _layer_cam,
    "cam": _class_weights_cam,
    "integrated-gradients": _integrated_gradients,
    "occlusion": _occlusion,
    "guided-grad-cam": _guided_grad_cam,
}
