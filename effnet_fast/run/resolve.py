"""Resolve the settings that depend on the data and the machine: `auto`, image size, precision, step mode, workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from effnet_fast import data, provenance
from effnet_fast.config import LoaderKind, LoaderName, TrainConfig
from effnet_fast.data.choose_loader import choose_loader
from effnet_fast.distributed import World
from effnet_fast.model import scaling, variant
from effnet_fast.model.blocks import Kernels, kernels_in_use
from effnet_fast.run.verdicts import passes_check

# On 2 CPU cores, compiling B0's training step took 97 s. It then ran 1.17 times as fast at output stride 8 (p20 1.04,
# p80 1.28, alternating with eager) and 0.95 times as fast at 32. So only long runs on large maps gain.
CPU_COMPILE_STRIDE = 8
CPU_COMPILE_IMAGES = 200_000

# Dropout and stochastic depth draw the same numbers compiled and eager, so a step depends on (seed, rank, step) in
# every mode. Inductor's own generator draws different ones, and in torch 2.13 repeats them in some layouts (pytorch
# #198333; in stochastic depth #196227). Reordering for memory would change the order of draws (#192635). A block draws
# only N numbers, so this costs no speed.
_SAME_DRAWS = {"fallback_random": True, "reorder_for_peak_memory": False}
# Inductor uses channels-last only if a graph contains forward convolutions. A backward graph has none, so it would not
# (pytorch #189239; this costs a fifth of MobileNet's speed).
_CHANNELS_LAST = {"force_layout_optimization": True}


def load_dataset(config: TrainConfig) -> data.Dataset:
    """The data set of a config, limited and split.

    Raises:
        ValueError, OSError: images are missing, damaged, or too few for the split.
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


def resolve_image_size(setting: str | int, model: str, native: int) -> int:
    """Pixels of the input; auto scales the data set's `native` pixels by the variant's resolution over 224."""
    return scaling.scaled_size(native, variant(model).resolution) if setting == "auto" else int(setting)


def compiling_pays(device: torch.device, output_stride: int, images: int) -> bool:
    """Whether `--step auto` compiles: on CUDA, and on the CPU if the run sees enough `images` at this stride."""
    return device.type == "cuda" or (output_stride <= CPU_COMPILE_STRIDE and images >= CPU_COMPILE_IMAGES)


def resolve_step(config: TrainConfig, world: World, output_stride: int, images: int) -> tuple[bool, bool]:
    """Whether `--step` compiles the model, and whether it captures the step in a CUDA graph.

    Args:
        config: the run's config.
        world: number of ranks, and the device.
        output_stride: the model's output stride.
        images: training images times epochs.

    Raises:
        ValueError: `--step graph` without CUDA or with apex's optimizers.
    """
    if config.step == "auto":
        # The C++ kernels leave little to compile.
        eager = world.device.type == "cpu" and kernels_in_use(config.kernels, world.device) == "cpp"
        return not eager and compiling_pays(world.device, output_stride, images), _uses_graph(config, world)
    if config.step == "graph":
        _check_graph(config, world)
    return config.step in ("compile", "graph"), config.step == "graph"


def _uses_graph(config: TrainConfig, world: World) -> bool:
    can_capture = world.device.type == "cuda" and world.size == 1 and not config.optimizer.startswith("apex-")
    return can_capture and passes_check("graph", world.device, "--step auto is compile")


def resolve_kernels(setting: Kernels, device: torch.device) -> Kernels:
    """Replace `auto` by torch on a GPU where the Triton kernels fail their self-check."""
    if setting != "auto" or device.type != "cuda" or passes_check("kernels", device, "--kernels auto is torch"):
        return setting
    return "torch"


def resolve_loader(setting: LoaderName, split: data.Split, device: torch.device) -> tuple[LoaderKind, str]:
    """The loader and the reason; `auto` does not choose DALI on a GPU where it fails its self-check.

    Raises:
        ValueError: see `choose_loader`.
    """
    loader, reason = choose_loader(setting, split, device)
    if setting != "auto" or loader != "dali" or device.type != "cuda":
        return loader, reason
    fallback: LoaderKind = "resident" if isinstance(split, data.ArraySplit) else "torch"
    if passes_check("dali", device, f"--loader auto is {fallback}"):
        return loader, reason
    return fallback, "DALI fails its self-check"


def _check_graph(config: TrainConfig, world: World) -> None:
    if world.device.type != "cuda":
        raise ValueError("--step graph is a CUDA graph, and this runs on the CPU: use --step compile or eager")
    if config.optimizer.startswith("apex-"):
        raise ValueError(
            f"--step graph would freeze the learning rate of --optimizer {config.optimizer}, a number of the host: "
            "use --step compile, or another optimizer"
        )


def compile_model(model: nn.Module, device: torch.device) -> nn.Module:
    """torch.compile, with options that avoid its known defects.

    torch splits the graph of a DDP model at the bounds of the gradient buckets (pytorch #108966), so that reduction
    overlaps with the backward pass. With activation checkpointing it does not split.

    Each image size of progressive resizing is compiled once: dynamic=False, since torch would otherwise compile one
    slower version for all sizes after the first.
    """
    return torch.compile(model, dynamic=False, options=compile_options(device))  # type: ignore[return-value]


def compile_options(device: torch.device) -> dict[str, Any]:
    """Inductor's options for a training step on this device."""
    return _SAME_DRAWS | (_CHANNELS_LAST if device.type == "cuda" else {})


def set_backends(deterministic: bool) -> None:
    """Set the switches of cuDNN, cuBLAS and TF32; nothing else sets them."""
    torch.backends.cudnn.benchmark = not deterministic
    torch.set_float32_matmul_precision("high")  # TF32 for float32 products
    torch.backends.cudnn.allow_tf32 = True
    torch.use_deterministic_algorithms(deterministic)  # also switches it off, for a later run of this process


def loader_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Type of the images: float16 on CUDA if the first convolution computes in 16 bits anyway."""
    return torch.float16 if precision != "no" and device.type == "cuda" else torch.float32


def worker_count(setting: int) -> int:
    """`--num_workers`, at most the cores available to this process."""
    return min(setting, provenance.cores())
