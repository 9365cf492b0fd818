"""Compile the Triton kernels of a run side by side before its first step, unless Triton's cache holds them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch.func import functional_call

from effnet_fast import distributed, provenance
from effnet_fast.checkpoint import write_atomically
from effnet_fast.model import Network, batch_norms
from effnet_fast.model.blocks import Kernels, ahead, kernels_in_use
from effnet_fast.precision import autocast
from effnet_fast.run.verdicts import cache_folder, device_key
from effnet_fast.train.evaluate import evaluating

MOST_PROCESSES = 12
SECONDS_BETWEEN_LINES = 5.0


def compile_kernels(
    model: Network, kernels: Kernels, precision: str, device: torch.device, images: int, sizes: set[int]
) -> None:
    """Compile the kernels of training and evaluation; the other ranks of a machine wait for its first.

    Args:
        kernels: of the model, as resolved for this device.
        precision, device, images, sizes: see `step_launches`.
    """
    if device.type != "cuda" or kernels_in_use(kernels, device) != "triton":
        return
    ahead.keep_cache_folder()
    if not ahead.HAS_FAKES:
        if distributed.is_main():
            print(f"torch {torch.__version__} has no FakeTensorMode: each GPU kernel compiles at its first launch")
        return
    # The workers of a search, which train different models, are worlds of one.
    if distributed.world_size() == 1 or os.environ.get("LOCAL_RANK", "0") == "0":
        compile_found(lambda: step_launches(model, precision, device, images, sizes), device, say=distributed.is_main())
    distributed.barrier()


def compile_found(find: Callable[[], list[ahead.Launch]], device: torch.device, *, say: bool) -> None:
    """Compile the launches that `find` returns; if it fails, warn only, since each compiles at its first launch too."""
    try:
        launches = find()
    except Exception as error:  # torch's fake tensors are not public, and another version may change them
        reason = str(error).strip().partition("\n")[0]
        print(
            f"warning: the GPU kernels are not known before the first step ({type(error).__name__}: {reason}); each "
            "compiles at its first launch",
            file=sys.stderr,
        )
        return
    compile_missing(launches, record_of(launches, device), say=say)


def step_launches(
    model: Network, precision: str, device: torch.device, images: int, sizes: set[int]
) -> list[ahead.Launch]:
    """The distinct launches of a forward and backward pass and of an evaluation, found on fake tensors.

    Args:
        model: in training mode, on `device`.
        precision: bf16, fp16 or no.
        device: of the fake tensors.
        images: of one pass.
        sizes: of the training images, in pixels.
    """

    def step(fakes: ahead.FakeTensorMode) -> None:
        tensors: dict[str, torch.Tensor] = {
            name: fakes.from_tensor(t) for name, t in model.state_dict(keep_vars=True).items()
        }
        for size in sizes:
            x = torch.empty(images, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
            with autocast(precision, device):
                logits = functional_call(model, tensors, (x,))
            logits.float().sum().backward()
            with evaluating(model), autocast(precision, device):
                functional_call(model, tensors, (x,))

    # Fake tensors are not sent to other ranks; and a block that is computed again launches the same kernels again.
    norms = [norm for norm in batch_norms(model) if norm.synchronised]
    blocks = [module for module in model.modules() if getattr(module, "recompute", False)]
    with _switched_off(norms, "synchronised"), _switched_off(blocks, "recompute"):
        return ahead.recorded(step)


@contextlib.contextmanager
def _switched_off(modules: Sequence[torch.nn.Module], name: str) -> Iterator[None]:
    """In this context, an attribute of the modules that is True is False."""
    for module in modules:
        setattr(module, name, False)
    try:
        yield
    finally:
        for module in modules:
            setattr(module, name, True)


def compile_missing(launches: list[ahead.Launch], record: Path, *, say: bool) -> None:
    """Compile launches unless `record` lists kernels that are all in Triton's cache; then write `record`.

    Args:
        launches: from `step_launches`.
        record: a file that belongs to these launches.
        say: whether to print the progress, on stderr.
    """
    if not launches or _all_compiled(record):
        return
    workers = min(provenance.cores(), MOST_PROCESSES, len(launches))
    if say:
        print(f"compiling {len(launches)} GPU kernels in {workers} processes, once for this GPU", file=sys.stderr)
    compiled, done, said = [], 0, time.monotonic()
    for done, kernel in enumerate(ahead.compile_all(launches, ahead.current_target(), workers), start=1):
        compiled += [kernel] if kernel else []
        if say and time.monotonic() - said >= SECONDS_BETWEEN_LINES:
            print(f"compiled {done} of {len(launches)} GPU kernels", file=sys.stderr)
            said = time.monotonic()
    if done == len(launches):
        _write(record, compiled)


def record_of(launches: list[ahead.Launch], device: torch.device) -> Path:
    """The file that `compile_missing` keeps for these launches on this device."""
    digest = hashlib.sha256("\n".join(sorted(map(repr, launches))).encode()).hexdigest()[:16]
    return cache_folder() / f"compiled-{device_key(device)}-{digest}.json"


def _all_compiled(record: Path) -> bool:
    try:
        return all(ahead.is_compiled(key, name) for key, name in json.loads(record.read_text()))
    except (OSError, ValueError, TypeError):  # missing, incomplete, or written by another program
        return False


def _write(record: Path, compiled: list[list[str]]) -> None:
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(record, json.dumps(compiled).encode())
    except OSError:  # a read-only home folder
        pass
