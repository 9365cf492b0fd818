"""Checks of the machine around torch: speed of memory and launches, disk, shared memory, fonts."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

Status = Literal["ok", "absent", "broken"]
Answer = tuple[Status, str]

SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED_MEMORY = 256 * 2**20  # bytes; a container's default is 64 MiB


def check_speed(device: torch.device) -> Answer:
    """Measure copy bandwidth and the cost of issuing one operator, for information only."""
    size = 2**28 if device.type == "cuda" else 2**25
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _median_seconds(lambda: target.copy_(source), device, 7)
    small = torch.zeros(1, device=device)
    launch = _median_seconds(lambda: [small.add_(1) for _ in range(1000)], device, 5) / 1000
    return "ok", f"copies {2 * size / copy / 1e9:,.0f} GB/s (read and write), {1e6 * launch:.1f} us an operator"


def _median_seconds(work: Callable[[], object], device: torch.device, runs: int) -> float:
    seconds = []
    for _ in range(runs + 1):  # the first warms up
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def check_disk(device: torch.device) -> Answer:
    free = shutil.disk_usage(os.getcwd()).free
    if free < 2**30:
        return "broken", f"{free / 2**20:,.0f} MiB free in this folder: free some; a checkpoint takes 50 MiB or more"
    return "ok", f"{free / 2**30:,.0f} GiB free in this folder"


def check_shared_memory(device: torch.device) -> Answer:
    if not SHARED_MEMORY.is_dir():
        return "absent", f"no {SHARED_MEMORY} on this system"
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < LEAST_SHARED_MEMORY:
        return "broken", (
            f"{free / 2**20:,.0f} MiB free in {SHARED_MEMORY}, too little for --loader torch: start the container with "
            "--shm-size 1g, or use --num_workers 0"
        )
    return "ok", f"{free / 2**20:,.0f} MiB free in {SHARED_MEMORY}"


def check_fonts(device: torch.device) -> Answer:
    from effnet_fast.report.fonts import drawable

    sample = "中한あ"
    if drawable(sample) != sample:
        return "absent", "no font for Chinese, Korean or Japanese: pictures show such names transliterated"
    return "ok", "fonts for Chinese, Korean and Japanese names"
