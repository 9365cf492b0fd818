"""The storage types of `--mixed_precision`, and the autocast that computes in them."""

from __future__ import annotations

import torch

# `no` has no autocast type: everything stays in float32.
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The autocast context of bf16 or fp16; for `no`, one that is switched off."""
    return torch.autocast(device.type, PRECISIONS.get(precision), enabled=precision in PRECISIONS)


def activation_bytes(precision: str) -> int:
    """Bytes of one number of an activation."""
    return PRECISIONS.get(precision, torch.float32).itemsize
