"""Measure inference latency and training step time of a model on this device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from effnet_fast.precision import autocast

LATENCY_REPEATS, STEP_REPEATS, WARMUP = 15, 5, 2


def latency_ms(model: nn.Module, image_size: int, device: torch.device, precision: str) -> float:
    """Measure the latency of classifying one image in milliseconds: median of 15, evaluation mode, not compiled.

    Args:
        model: is moved to `device`.
        image_size: side of the image in pixels.
        device: where to measure.
        precision: autocast type: bf16, fp16 or no.
    """
    model = model.to(device).eval()
    image = torch.zeros(1, 3, image_size, image_size, device=device).to(memory_format=torch.channels_last)
    with torch.inference_mode(), autocast(precision, device):
        return _median_ms(lambda: model(image), LATENCY_REPEATS, device)


def step_ms(model: nn.Module, image_size: int, batch_size: int, device: torch.device, precision: str) -> float:
    """Measure a forward and backward pass of `batch_size` images in milliseconds: median of 5, not compiled."""
    model = model.to(device).train()
    images = torch.zeros(batch_size, 3, image_size, image_size, device=device).to(memory_format=torch.channels_last)

    def step() -> None:
        with autocast(precision, device):
            loss = model(images).float().square().mean()
        loss.backward()

    return _median_ms(step, STEP_REPEATS, device)


def _median_ms(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    seconds = []
    for _ in range(WARMUP + repeats):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds[WARMUP:])
