"""What only a clock can tell of a model on this device."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

LATENCY_REPEATS, STEP_REPEATS = 15, 5


def latency_ms(model: nn.Module, image_size: int, device: torch.device, dtype: torch.dtype | None) -> float:
    """Milliseconds to classify one image: median of 15, in evaluation mode, uncompiled, autocast to `dtype` if any."""
    model = model.to(device).eval()
    image = torch.zeros(1, 3, image_size, image_size, device=device).to(memory_format=torch.channels_last)
    with torch.inference_mode(), _autocast(device, dtype):
        return _median_ms(lambda: model(image), LATENCY_REPEATS, device)


def step_ms(
    model: nn.Module, image_size: int, batch_size: int, device: torch.device, dtype: torch.dtype | None
) -> float:
    """Milliseconds of a forward and backward pass of `batch_size` images: median of 5, uncompiled."""
    model = model.to(device).train()
    images = torch.zeros(batch_size, 3, image_size, image_size, device=device).to(memory_format=torch.channels_last)

    def step() -> None:
        with _autocast(device, dtype):
            loss = model(images).float().square().mean()
        loss.backward()

    return _median_ms(step, STEP_REPEATS, device)


def _autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[object]:
    return torch.autocast(device.type, dtype) if dtype is not None else contextlib.nullcontext()


def _median_ms(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Of `repeats` calls after two that warm up."""
    seconds = []
    for _ in range(2 + repeats):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds[2:])
