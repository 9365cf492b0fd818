"""The storage types of `--mixed_precision` and the autocast that computes in them."""

from __future__ import annotations

import torch

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The autocast of `--mixed_precision` bf16, fp16 or no."""
    return torch.autocast(device.type, PRECISIONS.get(precision), enabled=precision in PRECISIONS)
