"""Find the layer whose output becomes a map, and unwrap compiled models so that hooks fire."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_LISTED_DEPTH = 2  # module names with fewer than this many dots are listed in the error for an unknown layer


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the original module of a compiled model, in evaluation mode; restore the mode afterwards.

    The original is needed because hooks do not fire in compiled code.
    """
    module = getattr(model, "_orig_mod", model)
    training = module.training
    module.eval()
    try:
        yield module
    finally:
        module.train(training)


def map_layers(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Run one image and return the output [1, C, h, w] of every module that gives a map.

    Args:
        model: [N, 3, H, W] -> logits.
        images: [N, 3, H, W]; only the first is used.

    Returns:
        Dotted module name -> output, in the order in which the modules finish.
    """
    outputs: dict[str, Tensor] = {}

    def recorder(name: str) -> Callable[..., None]:
        def record(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and output.ndim == 4:
                outputs.pop(name, None)  # if a module runs twice, keep the position of the last run
                outputs[name] = output

        return record

    with uncompiled(model) as module, torch.no_grad():
        handles = [part.register_forward_hook(recorder(name)) for name, part in module.named_modules() if name]
        try:
            module(images[:1])
        finally:
            for handle in handles:
                handle.remove()
    return outputs


def pooled_layer(model: nn.Module, images: Tensor) -> str:
    """Return the name of the module whose output enters the global pooling, after the activation.

    For a model with `forward_features` this is the outermost module with that output; otherwise the last module whose
    map has more than one pixel.

    Raises:
        ValueError: no module qualifies.
    """
    layers = map_layers(model, images)
    module = getattr(model, "_orig_mod", model)
    forward_features = getattr(module, "forward_features", None)
    if forward_features is not None:
        with uncompiled(module), torch.no_grad():
            features = forward_features(images[:1])
        candidates = [name for name, output in layers.items() if torch.equal(output, features)]
    else:
        candidates = [name for name, output in layers.items() if output[0, 0].numel() > 1]
    if not candidates:
        raise ValueError("no module of the model outputs the map that enters its pooling: name a layer")
    return candidates[-1]


def find_layer(model: nn.Module, name: str | None, images: Tensor) -> nn.Module:
    """Return the module called `name`, by default `pooled_layer`.

    Raises:
        ValueError: there is no such module, it does not run, or it gives no map; the message lists the choices.
    """
    module = getattr(model, "_orig_mod", model)
    if name is None:
        return module.get_submodule(pooled_layer(module, images))
    layers = map_layers(module, images)
    if name in layers:
        return module.get_submodule(name)
    known = {known_name for known_name, _ in module.named_modules()}
    problem = "gives no map, or its forward does not run" if name in known else "is not in the model"
    similar = difflib.get_close_matches(name, layers, n=3)
    outer = [choice for choice in sorted(layers) if choice.count(".") < _LISTED_DEPTH]
    raise ValueError(
        f"layer {name!r} {problem}; {'did you mean ' + ', '.join(similar) + '? ' if similar else ''}"
        f"choices: {', '.join(outer)} and the modules inside them"
    )
