"""Compile the Triton kernels of a step before it runs, side by side: Triton itself compiles each at its first launch.

`recorded` runs a step on fake tensors and returns its launches. `compile_all` compiles them into Triton's disk cache,
in other processes that need no GPU; a later launch in any process then finds its kernel there.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from effnet_kernels.launch import IMPLEMENTATIONS, launches_go_to, triton

try:
    from torch._subclasses.fake_tensor import FakeTensorMode

    HAS_FAKES = True
except ImportError:  # not a public name: a new torch may lack it, and each kernel then compiles at its first launch

    class FakeTensorMode:  # type: ignore[no-redef]
        """Stands in for the base class."""

    HAS_FAKES = False


@dataclass(frozen=True)
class Launch:
    """What a compilation depends on.

    Attributes:
        module, name: of the kernel.
        arguments: a dtype's name for each pointer, and a number of the same type for each number.
        options: the named arguments: compile-time constants and the compiler's options.
    """

    module: str
    name: str
    arguments: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]


class _OpsOnFakes(FakeTensorMode):
    """Runs the ops' launchers on fake tensors, for which torch would compute the results' shapes only."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() not in IMPLEMENTATIONS:
            return super().__torch_dispatch__(func, types, args, kwargs)
        with self:
            return IMPLEMENTATIONS[func.name()](*args, **(kwargs or {}))


def recorded(step: Callable[[FakeTensorMode], object]) -> list[Launch]:
    """The distinct launches of `step`, which works on the mode's fake tensors; none starts."""
    found: dict[Launch, None] = {}

    def note(op: str, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        found[Launch(kernel.fn.__module__, kernel.fn.__name__, tuple(map(_kind, args)), tuple(options.items()))] = None

    with _OpsOnFakes() as fakes, launches_go_to(note):
        step(fakes)
    return list(found)


def _kind(argument: Any) -> Any:
    """Equal for arguments that need the same compilation: kernels are not specialised for their numbers."""
    if isinstance(argument, Tensor):
        return str(argument.dtype).removeprefix("torch.")
    return argument if not isinstance(argument, int) else 2**31 if argument >= 2**31 else 0


def current_target() -> Any:
    """What Triton compiles for on the current GPU."""
    return triton.runtime.driver.active.get_current_target()


def compile_all(launches: list[Launch], target: Any, workers: int) -> Iterator[list[str]]:
    """Compile in `workers` other processes.

    Yields, as each is done, the key and the name for `is_compiled`, or nothing where a compilation failed: the launch
    itself will raise the error.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    reading, writing = os.pipe()
    processes: list[subprocess.Popen[bytes]] = []
    try:
        with open(reading, encoding="ascii") as lines:
            with open(writing, "wb") as output:
                for _ in range(workers):
                    command = [sys.executable, "-m", "effnet_kernels.ahead"]
                    processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, env=environment))
            for number, process in enumerate(processes):
                assert process.stdin is not None
                with contextlib.suppress(BrokenPipeError), process.stdin as task:  # kernels of one that died come later
                    share = [asdict(launch) for launch in launches[number::workers]]
                    task.write(json.dumps([asdict(target), share]).encode())
            for line in lines:
                yield line.split()
    finally:
        for process in processes:
            process.kill()
            process.wait()


def keep_cache_folder() -> None:
    """Name Triton's cache folder in the environment: else Inductor names its own one there, amid a run."""
    os.environ.setdefault("TRITON_CACHE_DIR", triton.knobs.cache.dir)


def is_compiled(key: str, name: str) -> bool:
    """Whether Triton's disk cache holds a kernel that `compile_all` compiled."""
    return triton.runtime.cache.get_cache_manager(key).get_group(f"{name}.json") is not None


def _compile(module: str, name: str, arguments: list[Any], options: list[tuple[str, Any]]) -> str:
    kernel = getattr(importlib.import_module(module), name)
    kinds = [getattr(torch, argument) if isinstance(argument, str) else argument for argument in arguments]
    with contextlib.suppress(Exception):
        compiled = kernel.warmup(*kinds, grid=(1,), **dict(options))
        return f"{compiled.hash} {compiled.name}"
    return ""


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the first one ends this
    fields, launches = json.load(sys.stdin)
    target = triton.backends.compiler.GPUTarget(**fields)
    without_gpu = types.SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
    )
    triton.runtime.driver.set_active(without_gpu)
    for launch in launches:
        # One write a line, since processes share the pipe: with PYTHONUNBUFFERED=1, print writes its end apart.
        sys.stdout.write(f"{_compile(**launch)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main()
