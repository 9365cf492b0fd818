"""Times of the kernels' launches on this GPU, kept beside the self-checks' verdicts, and the launches that won."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from effnet_fast import distributed
from effnet_fast.model.blocks import Kernels, tuning
from effnet_fast.run.verdicts import cache_folder, device_key

Key = tuple[str, tuple[int, ...]]

LEAST_GAIN = 0.02  # a smaller one may be noise


@dataclass(frozen=True)
class Timing:
    """One launch of a kernel, or one implementation of an op.

    Attributes:
        kernel, sizes: as in `LaunchChoice`.
        launch: the launch's fields.
        ms: milliseconds; None if it failed, or if its result differs from the heuristic's.
    """

    kernel: str
    sizes: tuple[int, ...]
    launch: dict[str, Any]
    ms: float | None


class Timings:
    """The file of the times measured on a device with a storage type; another driver, version or code has another."""

    def __init__(self, device: torch.device, precision: str) -> None:
        self.path: Path = cache_folder() / f"tune-{device_key(device)}-{precision}.jsonl"

    def read(self) -> list[Timing]:
        """All times; a missing file has none, and lines that are torn or another program's are left out."""
        try:
            lines = self.path.read_bytes().splitlines()
        except OSError:
            return []
        return [timing for line in lines if (timing := _parsed(line)) is not None]

    def add(self, timing: Timing) -> None:
        """Append a time.

        Raises:
            OSError: the cache cannot be written; EFFNET_FAST_CACHE sets another folder.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write("\n" + json.dumps(asdict(timing)))  # the line break comes first, and so ends a torn line


def _parsed(line: bytes) -> Timing | None:
    try:
        timing = Timing(**json.loads(line))
        sizes = tuple(int(size) for size in timing.sizes)
        return Timing(str(timing.kernel), sizes, dict(timing.launch), None if timing.ms is None else float(timing.ms))
    except (ValueError, TypeError):
        return None


def winners(timings: Iterable[Timing]) -> dict[Key, Any]:
    """The launch that beats the heuristic's, where one does by LEAST_GAIN. Launches outside the space are ignored."""
    times: dict[Key, dict[Any, float]] = defaultdict(dict)
    for timing in timings:
        launch = tuning.launch_of(timing.kernel, timing.sizes, timing.launch)
        if launch is not None and timing.ms is not None:
            times[timing.kernel, timing.sizes][launch] = timing.ms
    won = {}
    for (kernel, sizes), ms in times.items():
        heuristic, best = tuning.PARTS[kernel].choice.heuristic(*sizes), min(ms, key=lambda launch: ms[launch])
        if heuristic in ms and ms[best] <= (1 - LEAST_GAIN) * ms[heuristic]:
            won[kernel, sizes] = best
    return won


def tuned_launches(
    device: torch.device, precision: str, kernels: Kernels, *, compiled: bool, deterministic: bool
) -> dict[Key, Any]:
    """The launches for a training, equal on all ranks: rank 0 reads them.

    There are none on the CPU, with PyTorch's operators, and in a deterministic run: a launch decides how sums are
    split, and so their last bits. Ops change to PyTorch's operators only for `--kernels auto` in a compiled model,
    for which these were timed.
    """
    if device.type != "cuda" or kernels == "torch" or deterministic:
        return {}
    launches = winners(Timings(device, precision).read()) if distributed.is_main() else {}
    if kernels != "auto" or not compiled:
        launches = {key: launch for key, launch in launches.items() if key[0] not in tuning.OPS}
    return distributed.gather_objects(launches)[0]
