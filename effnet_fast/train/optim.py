"""Optimizers that scale gradients and skip bad steps on the device, without host synchronisation.

They follow the interface of torch's fused optimizers and GradScaler: an optimizer with the attributes `grad_scale` and
`found_inf` (float32 tensors of one element) divides gradients by `grad_scale`, and changes nothing if `found_inf` is 1.
Clipping and the fp16 scale therefore need no pass of their own over the gradients.

All state is created with the optimizer, so that a warm-up can be undone and the first step can be skipped.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from effnet_fast.model import Network
from effnet_fast.train.flat_tensors import FlatTensors
from effnet_fast.train.muon import Muon, split_groups

# NVIDIA apex's optimizers by the names used here: class, and state per parameter.
APEX = {"apex-sgd": ("FusedSGD", ("momentum_buffer",)), "apex-lamb": ("FusedLAMB", ("exp_avg", "exp_avg_sq"))}


class RMSprop(torch.optim.Optimizer):
    """TensorFlow's RMSprop, which the EfficientNet paper used.

    ms = decay * ms + (1 - decay) * g^2, starting from 1; m = momentum * m + lr * g / sqrt(ms + eps); w -= m.
    torch's RMSprop starts from 0 and adds eps outside the root, which trains differently.
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
        keep = 1 - self.found_inf  # 0 skips the step
        for group in self.param_groups:
            self._update([p for p in group["params"] if p.grad is not None], group, keep)

    def _update(self, params: list[Tensor], group: dict[str, Any], keep: Tensor) -> None:
        # A bad gradient is replaced by 0; multiplying it by 0 would leave NaN.
        grads = [torch.where(keep > 0, p.grad / self.grad_scale, 0.0) for p in params if p.grad is not None]
        squares = [self.state[p]["mean_square"] for p in params]
        momenta = [self.state[p]["momentum"] for p in params]
        torch._foreach_add_(grads, params, alpha=group["weight_decay"])
        change = torch._foreach_mul(grads, grads)
        torch._foreach_sub_(change, squares)
        torch._foreach_mul_(change, keep * (1 - group["decay"]))
        torch._foreach_add_(squares, change)
        root = torch._foreach_add(squares, group["eps"])
        torch._foreach_sqrt_(root)
        torch._foreach_div_(grads, root)
        torch._foreach_mul_(grads, keep * group["lr"])
        torch._foreach_mul_(momenta, 1 - keep * (1 - group["momentum"]))
        torch._foreach_add_(momenta, grads)
        torch._foreach_sub_(params, torch._foreach_mul(momenta, keep))


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Group trainable parameters by weight decay and by `lr_scale`, a factor of the learning rate.

    Weight decay applies to convolution and linear weights, not to BatchNorm and biases, which have one dimension. The
    classifier has an `lr_scale` of 1, each layer before it `layer_decay` times that of the next (Clark et al. 2020,
    ELECTRA).
    """
    groups = []
    for scale, parameters in _scaled(model, layer_decay):
        params = [p for p in parameters if p.requires_grad]
        for decay, belongs in ((weight_decay, lambda p: p.ndim > 1), (0.0, lambda p: p.ndim <= 1)):
            group = {"params": [p for p in params if belongs(p)], "weight_decay": decay, "lr_scale": scale}
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
    """Build an optimizer for a model's trainable parameters.

    Learning rates are float32 tensors on the device, one per `lr_scale`; apex's are Python numbers. They are 0 until
    `set_rate` sets them, before each step.

    Args:
        name: sgd (Nesterov), adamw, rmsprop (see `RMSprop`), muon (see `Muon`), apex-sgd or apex-lamb (NVIDIA apex).
        model: the model.
        momentum: of sgd, rmsprop, muon and apex-sgd.
        weight_decay: per step and unit of learning rate; coupled (added to the gradient) for sgd and rmsprop,
            decoupled for adamw, muon and lamb.
        layer_decay: see `parameter_groups`; values other than 1 need a `Network`.

    Raises:
        ValueError: the name is unknown, or NVIDIA apex is needed and not installed.
    """
    groups = parameter_groups(model, weight_decay, layer_decay)
    if name in APEX:
        return _make_apex(name, groups, momentum)
    if name == "muon":
        groups = split_groups(groups)
    rate = torch.zeros((), device=groups[0]["params"][0].device)
    rates = {group["lr_scale"]: rate.clone() for group in groups}
    for group in groups:
        group["lr"] = rates[group["lr_scale"]]
    if name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=rate, momentum=momentum, nesterov=momentum > 0, fused=True)
        if momentum > 0:
            # If the first step is skipped, torch leaves these uninitialised.
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
    if name == "muon":
        return Muon(groups, lr=rate, momentum=momentum)
    raise ValueError(f"unknown optimizer {name!r}; choose sgd, adamw, rmsprop, muon, {' or '.join(APEX)}")


class _Skipping:
    """Mixin that gives an apex optimizer the interface of this module.

    apex has no public way to skip a step, so each step is taken, and undone if it was bad. FusedLAMB counts steps
    on the host, including bad ones, so its bias correction is one step ahead after each fp16 overflow.
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
    optimizer_class, state_names = apex_class(name), APEX[name][1]
    options: dict[str, Any] = {"lr": 0.0}
    if name == "apex-sgd":
        options |= {"momentum": momentum, "nesterov": momentum > 0}
    else:
        options["max_grad_norm"] = float("inf")  # turns off its own clipping
    optimizer = type(f"Skipping{optimizer_class.__name__}", (_Skipping, optimizer_class), {})(groups, **options)
    for p in (p for group in groups for p in group["params"]):
        optimizer.state[p] = {key: torch.zeros_like(p) for key in state_names}
    return optimizer


def apex_class(name: str) -> type:
    """The class of NVIDIA apex for apex-sgd or apex-lamb.

    Raises:
        ValueError: apex is not installed, lacks its CUDA extensions, or is the unrelated PyPI project of that name.
    """
    try:
        importlib.import_module("amp_C")  # apex's kernels; imported first, so that the unrelated `apex` is never run
        return getattr(importlib.import_module("apex.optimizers"), APEX[name][0])
    except (ImportError, AttributeError) as error:
        is_installed = importlib.util.find_spec("apex") is not None
        reason = "the installed `apex` is another project or lacks its CUDA extensions"
        raise ValueError(
            f"--optimizer {name} needs NVIDIA apex, and {reason if is_installed else 'it is not installed'}: build it "
            "with --cpp_ext --cuda_ext from https://github.com/NVIDIA/apex (PyPI's `apex` is something else)"
        ) from error


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next step, times each group's `lr_scale`."""
    for group in optimizer.param_groups:
        scaled = rate * group["lr_scale"]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(scaled)
        else:
            group["lr"] = scaled


def make_capturable(optimizer: torch.optim.Optimizer) -> None:
    """Let a CUDA graph capture torch's fused optimizers; they compute the same either way."""
    for group in optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = True


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state dict, but keep the learning-rate tensors, which torch would replace by copies."""
    kept = [{name: group[name] for name in ("lr", "lr_scale")} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, entries in zip(optimizer.param_groups, kept, strict=True):
        group.update(entries)
