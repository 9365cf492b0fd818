"""Muon for the matrices of 1x1 convolutions, AdamW for all other parameters.

Sources: Jordan et al., Muon: An optimizer for hidden layers in neural networks (2024); Liu et al., Muon is Scalable for
LLM Training (arXiv 2502.16982), whose scale of the update lets both parts share a learning rate and a weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effnet_fast.precision import fastest_dtype

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, chosen for the largest slope at zero
ITERATIONS = 5
EPS = 1e-7
FEW_ROWS = 64  # matrices of at most so many rows are one padded batch


class Muon(torch.optim.AdamW):
    """Muon for parameter groups with `muon` true, AdamW for the others.

    A weight W [rows, columns] with gradient g becomes:
    B = lerp(B, g, 1 - momentum); U = orthogonalize(lerp(g, B, momentum));
    W = W - lr * (weight_decay * W + 0.2 * sqrt(max(rows, columns)) * U).

    As described in `train.optim`, gradients are divided by `grad_scale`, and nothing changes if `found_inf` is 1.

    Args:
        groups: parameter groups with the keys lr (a tensor), weight_decay and muon. Weights of Muon are [rows, columns]
            or [rows, columns, 1, 1].
        lr: the default learning rate.
        momentum: Muon's momentum; AdamW uses betas of 0.9 and 0.999.
        dtype: dtype of the orthogonalisation; None means that of `fastest_dtype`.
    """

    grad_scale: Tensor
    found_inf: Tensor

    def __init__(
        self, groups: list[dict[str, Any]], lr: Tensor, momentum: float = 0.95, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(groups, lr=lr, fused=True)
        self.momentum, self.dtype = momentum, dtype or fastest_dtype(lr.device)
        for group in self.param_groups:
            for p in group["params"]:
                buffers = ["momentum_buffer"] if group["muon"] else ["exp_avg", "exp_avg_sq"]
                # Muon needs no step, but AdamW's load_state_dict looks for one.
                self.state[p] = {"step": torch.zeros((), device=p.device)} | {b: torch.zeros_like(p) for b in buffers}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        groups = self.param_groups
        for group in groups:
            if group["muon"]:
                params = [p for p in group["params"] if p.grad is not None]
                self._update(params, group["lr"], group["weight_decay"])
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            super().step()
        finally:
            self.param_groups = groups

    def _update(self, params: list[Tensor], lr: Tensor, weight_decay: float) -> None:
        """Update all matrices, each step of it for all of them together; all arithmetic stays on the device."""
        if not params:
            return
        keep = 1 - self.found_inf  # 0 skips the step
        weights = [p.flatten(1) for p in params]
        buffers = [self.state[p]["momentum_buffer"].flatten(1) for p in params]
        flat = torch.cat([p.grad.flatten() for p in params]) / self.grad_scale  # type: ignore[union-attr]
        # A bad gradient is cleared rather than multiplied by 0, which would leave NaN.
        flat = torch.where(keep > 0, flat, 0.0)
        grads = [g.view_as(w) for g, w in zip(flat.split([w.numel() for w in weights]), weights, strict=True)]
        share = keep * (1 - self.momentum)
        torch._foreach_mul_(buffers, 1 - share)
        torch._foreach_add_(buffers, torch._foreach_mul(grads, share))
        torch._foreach_lerp_(grads, buffers, self.momentum)
        updates = orthogonalize(grads, self.dtype, pad=flat.is_cuda)
        torch._foreach_mul_(updates, [0.2 * math.sqrt(max(w.shape)) for w in weights])
        torch._foreach_mul_(updates, keep * lr)
        torch._foreach_mul_(weights, 1 - keep * lr * weight_decay)
        torch._foreach_sub_(weights, updates)


def orthogonalize(matrices: Sequence[Tensor], dtype: torch.dtype, pad: bool = False) -> list[Tensor]:
    """Newton-Schulz iteration towards U V^T of each matrix U S V^T; singular values end between about 0.7 and 1.2.

    Args:
        matrices: each [rows, columns], of any shapes.
        dtype: dtype of the computation.
        pad: make matrices of similar shapes one batch, with rows and columns of zeros, which the iteration keeps. It
            saves launches, of which a GPU's time consists here. Otherwise those of one shape are a batch.

    Returns:
        New matrices of the same shapes and dtypes.
    """
    wide = [m if m.shape[0] <= m.shape[1] else m.mT for m in matrices]
    batches: dict[object, list[int]] = {}
    for i, matrix in enumerate(wide):
        batches.setdefault(max(matrix.shape[0] - 1, FEW_ROWS - 1).bit_length() if pad else matrix.shape, []).append(i)
    results = [torch.empty_like(m) for m in matrices]
    for members in batches.values():
        size = [max(wide[i].shape[dim] for i in members) for dim in (0, 1)]
        batch = matrices[0].new_zeros(len(members), *size, dtype=dtype)
        for x, i in zip(batch, members, strict=True):
            _corner(x, wide[i]).copy_(wide[i])
        for x, i in zip(_orthogonalize_wide(batch), members, strict=True):
            x = _corner(x, wide[i])
            results[i].copy_(x if x.shape == results[i].shape else x.mT)
    return results


def _corner(padded: Tensor, matrix: Tensor) -> Tensor:
    """The part of a padded matrix that holds a matrix."""
    return padded[: matrix.shape[0], : matrix.shape[1]]


def _orthogonalize_wide(x: Tensor) -> Tensor:
    """The iteration on [N, rows, columns], rows <= columns, in its dtype."""
    rows, columns = x.shape[1:]
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)
    use_gram = columns >= 2 * rows and x.dtype != torch.bfloat16  # bfloat16 rounds the Gram matrix too coarsely
    return _iterate_on_gram(x) if use_gram else _iterate(x)


def _iterate(x: Tensor) -> Tensor:
    """x = (a I + b A + c A^2) x with A = x x^T, five times."""
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, _higher_terms(gram), x, beta=COEFFICIENTS[0])
    return x


def _iterate_on_gram(x: Tensor) -> Tensor:
    """The same on [N, rows, rows] matrices only: all factors are polynomials of one A, so they commute.

    With r = columns / rows it multiplies (17 + 2 r) rows^3 numbers a matrix, rather than (5 + 10 r) rows^3.
    """
    gram = x @ x.mT
    total = factor = _factor(gram)
    for _ in range(ITERATIONS - 1):
        gram = factor @ gram @ factor
        factor = _factor(gram)
        total = factor @ total
    return total @ x


def _factor(gram: Tensor) -> Tensor:
    """a I + b A + c A^2."""
    factor = _higher_terms(gram)
    factor.diagonal(dim1=1, dim2=2).add_(COEFFICIENTS[0])
    return factor


def _higher_terms(gram: Tensor) -> Tensor:
    """b A + c A^2."""
    return torch.baddbmm(gram, gram, gram, beta=COEFFICIENTS[1], alpha=COEFFICIENTS[2])


def split_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split each parameter group into weights of 1x1 convolutions, with the key `muon` true, and the rest."""
    split = []
    for group in groups:
        for muon in (True, False):
            params = [p for p in group["params"] if _is_matrix(p) == muon]
            if params:
                split.append({**group, "params": params, "muon": muon})
    return split


def _is_matrix(p: Tensor) -> bool:
    return p.ndim == 4 and p.shape[1] > 1 and tuple(p.shape[2:]) == (1, 1)
