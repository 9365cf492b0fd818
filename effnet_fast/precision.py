"""Dtypes and autocast contexts of `--mixed_precision`."""

from __future__ import annotations

import torch

# `no` has no autocast type: everything stays in float32.
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The autocast context of bf16 or fp16; a disabled one for `no`."""
    return torch.autocast(device.type, PRECISIONS.get(precision), enabled=precision in PRECISIONS)


def resolve_precision(setting: str, device: torch.device) -> str:
    """bf16, fp16 or no; auto is bf16 on CUDA and no on the CPU."""
    if setting == "auto":
        return "bf16" if device.type == "cuda" else "no"
    return setting


def activation_bytes(precision: str) -> int:
    """Bytes per element of an activation."""
    return PRECISIONS.get(precision, torch.float32).itemsize
