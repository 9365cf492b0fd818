"""Optimizers that scale gradients and skip a bad step on the device, without a word to the host.

The contract is that of torch's fused optimizers and GradScaler: an optimizer with the attributes `grad_scale` and
`found_inf` (float32 tensors of one element) divides the gradients by the first and changes nothing where the second
is 1. Clipping and the fp16 scale thus ride in the update's own pass over the gradients.

All of an optimizer's state exists from the start, so that a warm-up can be undone and a first step skipped.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from effnet_fast.model import Network
from effnet_fast.train.flat_tensors import FlatTensors

# NVIDIA apex's optimizers, by our names for them: the class, and the state that it keeps of each parameter.
APEX = {"apex-sgd": ("FusedSGD", ("momentum_buffer",)), "apex-lamb": ("FusedLAMB", ("exp_avg", "exp_avg_sq"))}


class RMSprop(torch.optim.Optimizer):
    """RMSprop as the EfficientNet paper trained with (TensorFlow's form).

    ms = decay * ms + (1 - decay) * g^2, starting from 1; m = momentum * m + lr * g / sqrt(ms + eps); w -= m.
    torch's own starts from 0 and adds eps outside the root, which trains differently.
    """

    grad_scale: Tensor
    found_inf: Tensor

    def __init__(self, params: Any, lr: Tensor, momentum: float = 0.9, decay: float = 0.9, eps: float = 1e-3) -> None:
        defaults = {"lr": lr, "momentum": momentum, "decay": decay, "eps": eps, "weight_decay": 0.0}
        super().__init__(params, defaults)
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p] = {"mean_square": torch.ones_like(p), "momentum": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        keep = 1 - self.found_inf
        for group in self.param_groups:
            self._update([p for p in group["params"] if p.grad is not None], group, keep)

    def _update(self, params: list[Tensor], group: dict[str, Any], keep: Tensor) -> None:
        # A bad gradient is cleared rather than multiplied by 0, which would leave NaN.
        grads = [torch.where(keep > 0, p.grad / self.grad_scale, 0.0) for p in params if p.grad is not None]
        squares = [self.state[p]["mean_square"] for p in params]
        momenta = [self.state[p]["momentum"] for p in params]
        torch._foreach_add_(grads, params, alpha=group["weight_decay"])
        gap = torch._foreach_mul(grads, grads)
        torch._foreach_sub_(gap, squares)
        torch._foreach_mul_(gap, keep * (1 - group["decay"]))
        torch._foreach_add_(squares, gap)
        step = torch._foreach_add(squares, group["eps"])
        torch._foreach_sqrt_(step)
        torch._foreach_div_(grads, step)
        torch._foreach_mul_(grads, keep * group["lr"])
        torch._foreach_mul_(momenta, 1 - keep * (1 - group["momentum"]))
        torch._foreach_add_(momenta, grads)
        torch._foreach_sub_(params, torch._foreach_mul(momenta, keep))


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Trainable parameters by weight decay and by `lr_scale`, their share of the learning rate.

    Convolution and linear weights decay; BatchNorm and biases, of one dimension, do not. The classifier has the whole
    rate, each layer before it `layer_decay` times that of the next (Clark et al. 2020, ELECTRA).
    """
    groups = []
    for scale, parameters in _scaled(model, layer_decay):
        params = [p for p in parameters if p.requires_grad]
        for decay, chosen in ((weight_decay, lambda p: p.ndim > 1), (0.0, lambda p: p.ndim <= 1)):
            group = {"params": [p for p in params if chosen(p)], "weight_decay": decay, "lr_scale": scale}
            if group["params"]:
                groups.append(group)
    return groups


def _scaled(model: nn.Module, layer_decay: float) -> list[tuple[float, list[nn.Parameter]]]:
    if layer_decay == 1:
        return [(1.0, list(model.parameters()))]
    assert isinstance(model, Network)
    layers = list(model.layers().values())
    return [
        (layer_decay ** (len(layers) - 1 - i), [p for module in layer for p in module.parameters()])
        for i, layer in enumerate(layers)
    ]


def make_optimizer(
    name: str, model: nn.Module, *, momentum: float, weight_decay: float, layer_decay: float = 1.0
) -> torch.optim.Optimizer:
    """Build an optimizer over a model's trainable parameters.

    Its learning rates, to be set each step by `set_rate`, are float32 tensors on the parameters' device, one shared by
    all groups of the same `lr_scale`; apex's are numbers.

    Args:
        name: sgd (Nesterov), adamw, rmsprop (the paper's), apex-sgd or apex-lamb (NVIDIA apex's).
        momentum: of sgd, rmsprop and apex-sgd.
        weight_decay: per step and unit of learning rate; coupled (added to the gradient) for sgd and rmsprop,
            decoupled for adamw and lamb.
        layer_decay: see `parameter_groups`; other than 1 it needs a model of the zoo.

    Raises:
        ValueError: an unknown name, or NVIDIA apex is asked for and not here.
    """
    groups = parameter_groups(model, weight_decay, layer_decay)
    if name in APEX:
        return _make_apex(name, groups, momentum)
    rate = torch.zeros((), device=groups[0]["params"][0].device)
    rates = {group["lr_scale"]: rate.clone() for group in groups}
    for group in groups:
        group["lr"] = rates[group["lr_scale"]]
    if name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=rate, momentum=momentum, nesterov=momentum > 0, fused=True)
        if momentum > 0:
            # torch leaves these uninitialised where the very first step is skipped.
            optimizer.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for g in groups for p in g["params"]})
        return optimizer
    if name == "adamw":
        adamw = torch.optim.AdamW(groups, lr=rate, fused=True)
        for p in (p for group in groups for p in group["params"]):
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            adamw.state[p] = {"step": torch.zeros((), device=p.device), **moments}
        return adamw
    if name == "rmsprop":
        return RMSprop(groups, lr=rate, momentum=momentum)
    raise ValueError(f"unknown optimizer {name!r}; choose sgd, adamw, rmsprop, {' or '.join(APEX)}")


class _Skipping:
    """Gives an apex optimizer the contract of this module; mixed in before it.

    FusedLAMB computes on whatever it is given, and the buffer by which FusedSGD's kernel can be told to do nothing is
    not part of its interface: so the step is taken, and taken back where it was bad. FusedLAMB counts its steps on the
    host, bad ones too, so after an overflow of fp16 its bias correction is ahead by a step.
    """

    grad_scale: Tensor
    found_inf: Tensor
    param_groups: list[dict[str, Any]]
    state: dict[Tensor, dict[str, Tensor]]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_div_([p.grad for p in params if p.grad is not None], self.grad_scale)
        changed = FlatTensors([*params, *(t for p in params for t in self.state[p].values())])
        before = changed.copy()
        super().step()  # type: ignore[misc]
        changed.restore(before, self.found_inf > 0)


def _make_apex(name: str, groups: list[dict[str, Any]], momentum: float) -> torch.optim.Optimizer:
    optimizer_class, kept = apex_class(name), APEX[name][1]
    options: dict[str, Any] = {"lr": 0.0}
    if name == "apex-sgd":
        options |= {"momentum": momentum, "nesterov": momentum > 0}
    else:
        options["max_grad_norm"] = float("inf")  # it would clip once more
    optimizer = type(f"Skipping{optimizer_class.__name__}", (_Skipping, optimizer_class), {})(groups, **options)
    for p in (p for group in groups for p in group["params"]):
        optimizer.state[p] = {key: torch.zeros_like(p) for key in kept}
    return optimizer


def apex_class(name: str) -> type:
    """NVIDIA apex's class for apex-sgd or apex-lamb.

    Raises:
        ValueError: apex is not installed, is the unrelated project of that name on PyPI, or lacks its CUDA extensions.
    """
    try:
        importlib.import_module("amp_C")  # apex's kernels; looked for first, so that no stranger's code is run
        return getattr(importlib.import_module("apex.optimizers"), APEX[name][0])
    except (ImportError, AttributeError) as error:
        stranger = importlib.util.find_spec("apex") is not None
        found = "the `apex` here is another project or lacks its CUDA extensions" if stranger else "it is not installed"
        raise ValueError(
            f"--optimizer {name} needs NVIDIA apex, and {found}: build it with --cpp_ext --cuda_ext from "
            "https://github.com/NVIDIA/apex (PyPI's `apex` is something else)"
        ) from error


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the next step's learning rate, times each group's scale: into torch's and our tensors, or apex's numbers."""
    for group in optimizer.param_groups:
        scaled = rate * group["lr_scale"]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(scaled)
        else:
            group["lr"] = scaled


def let_capture(optimizer: torch.optim.Optimizer) -> None:
    """Tell torch that a CUDA graph will hold the steps; its fused optimizers compute the same either way."""
    for group in optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = True


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state dict and keep the learning-rate tensors, which loading would replace by copies."""
    kept = [{name: group[name] for name in ("lr", "lr_scale")} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, kept, strict=True):
        group.update(own)
