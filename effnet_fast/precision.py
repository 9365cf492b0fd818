"""Dtypes and autocast contexts of `--mixed_precision`."""

from __future__ import annotations

from typing import Any

import torch

# `no` has no autocast type: everything stays in float32.
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}

BFLOAT16_PRODUCTS = ("amx_bf16", "avx512_bf16")  # features of CPUs that multiply matrices of bfloat16


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The autocast context of bf16 or fp16; a disabled one for `no`."""
    return torch.autocast(device.type, PRECISIONS.get(precision), enabled=precision in PRECISIONS)


def resolve_precision(setting: str, device: torch.device) -> str:
    """bf16, fp16 or no; auto is bf16 on CUDA and no on the CPU."""
    if setting == "auto":
        return "bf16" if device.type == "cuda" else "no"
    return setting


def fastest_dtype(device: torch.device) -> torch.dtype:
    """The dtype whose matrix products are fastest: bfloat16 on CUDA and on CPUs that multiply it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16
    get_capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)  # torch 2.11 lacks it
    capabilities = get_capabilities()
    return torch.bfloat16 if any(capabilities.get(name) for name in BFLOAT16_PRODUCTS) else torch.float32


def activation_type(precision: str) -> torch.dtype:
    """The dtype in which activations are stored."""
    return PRECISIONS.get(precision, torch.float32)
