"""What `auto` and the other words of a config become on this machine."""

from __future__ import annotations

import os

import torch

from effnet_fast import provenance
from effnet_fast.model import scaling, variant

# On 2 CPU cores compiling B0's training step took 97 s; it then ran 1.17 times as fast at output stride 8 (p20 1.04,
# p80 1.28, alternating with eager) and 0.95 times at 32. So only long runs on large maps gain.
CPU_COMPILE_STRIDE = 8
CPU_COMPILE_IMAGES = 200_000


def resolve_image_size(asked: str | int, model: str, native: int) -> int:
    """Pixels of the input; auto scales the data set's `native` pixels as the variant scales 224."""
    return scaling.scaled_size(native, variant(model).resolution) if asked == "auto" else int(asked)


def resolve_precision(asked: str, device: torch.device) -> str:
    """bf16, fp16 or no; auto is bf16 on CUDA."""
    if asked == "auto":
        return "bf16" if device.type == "cuda" else "no"
    return asked


def resolve_compile(asked: str, device: torch.device, output_stride: int, images: int) -> bool:
    """Whether to compile; auto is yes on CUDA, and on the CPU where `images` visits at this stride make it pay."""
    if asked != "auto":
        return asked == "yes"
    return device.type == "cuda" or (output_stride <= CPU_COMPILE_STRIDE and images >= CPU_COMPILE_IMAGES)


def set_backends(deterministic: bool) -> None:
    """The one place that sets cuDNN's, cuBLAS's and TF32's switches."""
    torch.backends.cudnn.benchmark = not deterministic
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
    torch.backends.cudnn.allow_tf32 = True
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def loader_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Half the bytes to hand over where the first convolution computes in 16 bits anyway."""
    return torch.float16 if precision != "no" and device.type == "cuda" else torch.float32


def worker_count(asked: int) -> int:
    """`--num_workers`, at least one and at most the cores this process may use."""
    return max(1, min(asked, provenance.cores()))
