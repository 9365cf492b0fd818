"""Maps of the evidence for a class, by Captum.

Every map is of the class's logit (before the softmax) and keeps positive evidence only, so that the methods compare:

- `grad-cam` (Selvaraju et al. 2017, equations 1 and 2): ReLU(sum_k a_k A_k), where A [K, h, w] is a layer's output and
  a_k the mean over its pixels of the logit's gradient by A_k. Captum's LayerGradCam leaves the ReLU out unless told.
- `cam` (Zhou et al. 2016): sum_k w_k A_k with the classifier's weights w, exact where the classifier is linear on the
  mean of A; refused elsewhere. There it is Grad-CAM times the number of pixels.
- `integrated-gradients` (Sundararajan et al. 2017): 50 steps from the zero image, summed over the colours.
- `occlusion` (Zeiler and Fergus 2014): how far the logit falls under a zero patch of a quarter of the side.
- `guided-grad-cam`: Grad-CAM times guided backpropagation. Captum guides nn.ReLU only; on a model without one (an
  EfficientNet has Swish) it would be the plain gradient under a false name, and is refused.

The zero image is the data set's mean colour, since a model's input is normalised.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effnet_fast.data.resize import central_square

Method = Literal["grad-cam", "cam", "integrated-gradients", "occlusion", "guided-grad-cam"]
METHODS: tuple[Method, ...] = ("grad-cam", "cam", "integrated-gradients", "occlusion", "guided-grad-cam")

_INTEGRATION_STEPS = 50
_INTEGRATION_BATCH = 256  # images in one pass of integrated gradients, to bound its memory
_LISTED_DEPTH = 2  # of the module names that a wrong layer's message lists


def cam(
    model: nn.Module,
    images: Tensor,
    target: Literal["predicted"] | int | Sequence[int] | Tensor = "predicted",
    *,
    method: Method = "grad-cam",
    layer: str | None = None,
) -> Tensor:
    """Where in each image the evidence for a class lies.

    Args:
        model: [N, 3, H, W] -> logits [N, classes]; a compiled one is unwrapped. It computes in evaluation mode and is
            given back in the mode it was in.
        images: [N, 3, H, W], normalised as the model was trained.
        target: each image's class: the predicted one, one number for all, or N numbers.
        method: see the module's docstring.
        layer: for Grad-CAM and guided Grad-CAM, the dotted name of a module whose output is a map; by default what the
            global pooling sees, after the activation.

    Returns:
        float32 [N, H, W] from 0 to 1: bilinearly enlarged, each map divided by its maximum. A map without positive
        evidence is zero everywhere.

    Raises:
        ValueError: an unknown method, layer or class, or a method that does not fit the model.
    """
    raw = evidence(model, images, targets_of(model, images, target), method=method, layer=layer)
    return normalise(resize_maps(raw, *images.shape[-2:]))


def targets_of(model: nn.Module, images: Tensor, target: Literal["predicted"] | int | Sequence[int] | Tensor) -> Tensor:
    """The class of each image as int64 [N], on the images' device; raises ValueError for what cannot be one."""
    with uncompiled(model) as module, torch.no_grad():
        logits = module(images)
    if isinstance(target, str):
        if target != "predicted":
            raise ValueError(f"target must be 'predicted' or class numbers, not {target!r}")
        return logits.argmax(1)
    chosen = torch.as_tensor(target, dtype=torch.int64, device=images.device)
    if chosen.ndim > 1 or (chosen.ndim == 1 and len(chosen) != len(images)):
        raise ValueError(f"target must be one class or {len(images)} of them, not {tuple(chosen.shape)}")
    if ((chosen < 0) | (chosen >= logits.shape[1])).any():
        raise ValueError(f"target must be from 0 to {logits.shape[1] - 1}, the model's classes, not {chosen.tolist()}")
    return chosen.expand(len(images))


def evidence(
    model: nn.Module, images: Tensor, targets: Tensor, *, method: Method = "grad-cam", layer: str | None = None
) -> Tensor:
    """Positive evidence for the classes `targets` int64 [N], not scaled: float32 [N, h, w].

    h and w are the layer's own for Grad-CAM and CAM, the images' for the other methods. Otherwise as `cam`.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    if layer is not None and method not in ("grad-cam", "guided-grad-cam"):
        raise ValueError(f"{method} takes no layer: leave it out, or use grad-cam")
    with uncompiled(model) as module, torch.enable_grad():
        raw = _ATTRIBUTIONS[method](module, images.detach().requires_grad_(), targets, layer)
    return raw.detach().float().clamp_min(0)


def normalise(maps: Tensor) -> Tensor:
    """Divide each map of [N, H, W] by its maximum; a map of zeros stays as it is."""
    largest = maps.amax((1, 2), keepdim=True)
    return torch.where(largest > 0, maps / largest, 0)


def resize_maps(maps: Tensor, height: int, width: int) -> Tensor:
    """[N, h, w] -> [N, height, width], bilinear, antialiased where it shrinks."""
    return F.interpolate(maps[:, None], (height, width), mode="bilinear", antialias=True)[:, 0].clamp_min(0)


def place(square: Tensor, height: int, width: int) -> Tensor:
    """Bring a map [h, w] of an image's central square back to the whole image: [height, width].

    The model saw the central square of the shorter side only: the map is zero outside of it.
    """
    left, top, side = central_square(width, height)
    whole = square.new_zeros(height, width)
    whole[top : top + side, left : left + side] = resize_maps(square[None], side, side)[0]
    return whole


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[nn.Module]:
    """The module behind a compiled one (hooks do not fire in compiled code), in evaluation mode for as long."""
    module = getattr(model, "_orig_mod", model)
    training = module.training
    module.eval()
    try:
        yield module
    finally:
        module.train(training)


# -- layers


def map_layers(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Names of the modules whose forward runs and gives a map, in the order in which they finish, with their outputs.

    Run on one image; outputs are [1, C, h, w].
    """
    seen: dict[str, Tensor] = {}

    def recorder(name: str) -> Callable[..., None]:
        def record(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and output.ndim == 4:
                seen.pop(name, None)  # a module that runs twice counts where it ran last
                seen[name] = output

        return record

    with uncompiled(model) as module, torch.no_grad():
        handles = [part.register_forward_hook(recorder(name)) for name, part in module.named_modules() if name]
        try:
            module(images[:1])
        finally:
            for handle in handles:
                handle.remove()
    return seen


def pooled_layer(model: nn.Module, images: Tensor) -> str:
    """The name of the module whose output the global pooling sees, after the activation.

    For a model with `forward_features` the outermost module with that output, else the last one that gives a map of
    more than one pixel.

    Raises:
        ValueError: there is none.
    """
    layers = map_layers(model, images)
    module = getattr(model, "_orig_mod", model)
    forward_features = getattr(module, "forward_features", None)
    if forward_features is not None:
        with uncompiled(module), torch.no_grad():
            features = forward_features(images[:1])
        fitting = [name for name, output in layers.items() if torch.equal(output, features)]
    else:
        fitting = [name for name, output in layers.items() if output[0, 0].numel() > 1]
    if not fitting:
        raise ValueError("no module of the model gives the map that its pooling sees: name one as the layer")
    return fitting[-1]


def find_layer(model: nn.Module, name: str | None, images: Tensor) -> nn.Module:
    """The module called `name`, by default `pooled_layer`.

    Raises:
        ValueError: no such module, or one that does not run or gives no map; the message lists the choices.
    """
    module = getattr(model, "_orig_mod", model)
    if name is None:
        return module.get_submodule(pooled_layer(module, images))
    layers = map_layers(module, images)
    if name in layers:
        return module.get_submodule(name)
    known = {known_name for known_name, _ in module.named_modules()}
    fault = "gives no map, or its forward does not run" if name in known else "is not in the model"
    near = difflib.get_close_matches(name, layers, n=3)
    outer = [choice for choice in sorted(layers) if choice.count(".") < _LISTED_DEPTH]
    raise ValueError(
        f"layer {name!r} {fault}; {'did you mean ' + ', '.join(near) + '? ' if near else ''}"
        f"choices: {', '.join(outer)} and the modules inside them"
    )


# -- methods: (model, images, targets, layer) -> [N, h, w]


def _grad_cam(model: nn.Module, images: Tensor, targets: Tensor, layer: str | None) -> Tensor:
    from captum.attr import LayerGradCam

    method = LayerGradCam(model, find_layer(model, layer, images))
    return method.attribute(images, targets, relu_attributions=True)[:, 0]


def _zhou_cam(model: nn.Module, images: Tensor, targets: Tensor, layer: str | None) -> Tensor:
    from captum.attr import LayerActivation

    features = LayerActivation(model, find_layer(model, layer, images)).attribute(images).detach()
    classifier = _classifier(model)
    with torch.no_grad():
        pooled = classifier(features.mean((2, 3))) if features.shape[1] == classifier.in_features else None
        if pooled is None or not torch.allclose(pooled.float(), model(images).float(), rtol=1e-2, atol=1e-2):
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

    return (
        IntegratedGradients(model)
        .attribute(
            images,
            target=targets,
            n_steps=_INTEGRATION_STEPS,
            internal_batch_size=max(_INTEGRATION_BATCH, len(images)),
        )
        .sum(1)
    )


def _occlusion(model: nn.Module, images: Tensor, targets: Tensor, layer: str | None) -> Tensor:
    from captum.attr import Occlusion

    _, channels, height, width = images.shape
    patch, step = max(1, min(height, width) // 4), max(1, min(height, width) // 8)
    with torch.no_grad():
        drops = Occlusion(model).attribute(
            images, (channels, patch, patch), strides=(channels, step, step), target=targets
        )
    return drops[:, 0]  # the patch covers all colours, so they are alike


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
    "cam": _zhou_cam,
    "integrated-gradients": _integrated_gradients,
    "occlusion": _occlusion,
    "guided-grad-cam": _guided_grad_cam,
}
