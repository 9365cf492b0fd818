"""Optimizers that scale gradients and skip a bad step on the device, without a word to the host.

The contract is that of torch's fused optimizers and GradScaler: an optimizer with the attributes `grad_scale` and
`found_inf` (float32 tensors of one element) divides the gradients by the first and changes nothing where the second
is 1. Clipping and the fp16 scale thus ride in the update's own pass over the gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


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

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        keep = 1 - self.found_inf
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"mean_square": torch.ones_like(p), "momentum": torch.zeros_like(p)}
            self._update(params, group, keep)

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


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Convolution and linear weights decay; BatchNorm and biases, of one dimension, do not."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]


def make_optimizer(name: str, model: nn.Module, *, momentum: float, weight_decay: float) -> torch.optim.Optimizer:
    """Build an optimizer over a model's parameters.

    Its learning rate is one float32 tensor on the parameters' device, shared by all groups, to be filled each step.

    Args:
        name: sgd (Nesterov), adamw, or rmsprop (the paper's).
        momentum: of sgd and rmsprop.
        weight_decay: per step and unit of learning rate; coupled (added to the gradient) for sgd and rmsprop,
            decoupled for adamw.

    Raises:
        ValueError: an unknown name.
    """
    groups = parameter_groups(model, weight_decay)
    rate = torch.zeros((), device=groups[0]["params"][0].device)
    if name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=rate, momentum=momentum, nesterov=momentum > 0, fused=True)
        if momentum > 0:
            # torch leaves these uninitialised where the very first step is skipped.
            optimizer.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for g in groups for p in g["params"]})
        return optimizer
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=rate, fused=True)
    if name == "rmsprop":
        return RMSprop(groups, lr=rate, momentum=momentum)
    raise ValueError(f"unknown optimizer {name!r}; choose sgd, adamw or rmsprop")


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state dict and keep the one shared learning-rate tensor, which loading would replace by copies."""
    rate = optimizer.param_groups[0]["lr"]
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        group["lr"] = rate
