"""What `auto` and the other words of a config become on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effnet_fast import data, provenance
from effnet_fast.config import TrainConfig
from effnet_fast.distributed import World
from effnet_fast.model import scaling, variant

# On 2 CPU cores compiling B0's training step took 97 s; it then ran 1.17 times as fast at output stride 8 (p20 1.04,
# p80 1.28, alternating with eager) and 0.95 times at 32. So only long runs on large maps gain.
CPU_COMPILE_STRIDE = 8
CPU_COMPILE_IMAGES = 200_000

# Dropout and stochastic depth draw what they draw uncompiled, in the same order, so that a step's draws depend on
# (seed, rank, step) in every mode. Inductor's own generator draws other numbers, and in torch 2.13 repeats them in some
# layouts (pytorch #198333; under stochastic depth #196227); its reordering for memory would change whose draw comes
# first (#192635). There are but N numbers a block, so nothing is lost in speed.
_SAME_DRAWS = {"fallback_random": True, "reorder_for_peak_memory": False}
# A graph of a backward pass has no forward convolution, by which Inductor decides, and would leave channels-last
# (pytorch #189239, a fifth of MobileNet's speed).
_CHANNELS_LAST = {"force_layout_optimization": True}


def load_dataset(config: TrainConfig) -> data.Dataset:
    """The images that a config names, limited and split as it says.

    Raises:
        ValueError, OSError: they are not there, damaged, or too few for the split.
    """
    return data.load_dataset(
        config.dataset,
        Path(config.data_dir),
        seed=config.seed,
        val_fraction=config.val_fraction,
        limit_train=config.limit_train,
        limit_eval=config.limit_eval,
        on_bad_image=config.on_bad_image,
    )


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


def resolve_step(config: TrainConfig, world: World, output_stride: int, images: int) -> tuple[bool, bool]:
    """Whether a step is compiled, and whether it is captured in a CUDA graph.

    Raises:
        ValueError: a graph is asked for where it cannot be.
    """
    if config.step == "graph":
        _refuse_graph(config, world)
        return config.compile != "no", True
    asked = {"compile": "yes", "eager": "no"}.get(config.step, str(config.compile))
    return resolve_compile(asked, world.device, output_stride, images), False


def _refuse_graph(config: TrainConfig, world: World) -> None:
    if world.device.type != "cuda":
        raise ValueError("--step graph is a CUDA graph, and this runs on the CPU: use --step compile or eager")
    if world.size > 1:
        raise ValueError(f"--step graph is for one GPU, and these are {world.size} ranks: use --step compile")
    if config.optimizer.startswith("apex-"):
        raise ValueError(
            f"--step graph would freeze the learning rate of --optimizer {config.optimizer}, a number of the host: "
            "use --step compile, or another optimizer"
        )


def compile_model(model: nn.Module, device: torch.device) -> nn.Module:
    """torch.compile, round its known traps.

    One is left as it is: the graph of a DDP model is cut at the bounds of the gradients' buckets (pytorch #108966),
    which lets them travel while the backward pass goes on. With checkpointed activations torch cuts nothing.
    """
    return torch.compile(model, options=compile_options(device))  # type: ignore[return-value]


def compile_options(device: torch.device) -> dict[str, Any]:
    """Inductor's options for a training step on this device."""
    return _SAME_DRAWS | (_CHANNELS_LAST if device.type == "cuda" else {})


def set_backends(deterministic: bool) -> None:
    """The one place that sets cuDNN's, cuBLAS's and TF32's switches."""
    torch.backends.cudnn.benchmark = not deterministic
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
    torch.backends.cudnn.allow_tf32 = True
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)  # off again too, for the next run of this process


def loader_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Half the bytes to hand over where the first convolution computes in 16 bits anyway."""
    return torch.float16 if precision != "no" and device.type == "cuda" else torch.float32


def worker_count(asked: int) -> int:
    """`--num_workers`, at least one and at most the cores this process may use."""
    return max(1, min(asked, provenance.cores()))
