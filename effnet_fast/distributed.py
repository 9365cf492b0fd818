"""Ranks, devices and collective operations. Every function also works without torchrun, as a world of one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from effnet_fast.internals import internal


@dataclass(frozen=True)
class World:
    """This process is `rank` of `size` and computes on `device`."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init(device: str = "auto", timeout: float | None = None) -> World:
    """Join the process group described by torchrun's environment variables; without them, a world of one.

    Args:
        device: auto, cuda or cpu. The backend is nccl on CUDA and gloo on the CPU.
        timeout: seconds after which a collective operation fails; default: torch's.

    Raises:
        ValueError: `device` is cuda but no GPU is visible, or there are fewer GPUs than local ranks.
        ConnectionError: the ranks cannot connect.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    chosen = choose_device(device, local_rank)
    if "RANK" not in os.environ:
        return World(0, 1, chosen)
    if not dist.is_initialized():
        _join(chosen, None if timeout is None else timedelta(seconds=timeout))
    return World(dist.get_rank(), dist.get_world_size(), chosen)


@contextmanager
def group(device: str = "auto", timeout: float | None = None) -> Iterator[World]:
    """Join the process group, see `init`, and leave it at the end.

    After an error one of several ranks does not leave: NCCL's shutdown waits for all ranks, and the others wait for
    this one in a collective operation. The process ends instead, with its message, and torchrun ends the others.
    """
    world = init(device, timeout)
    try:
        yield world
    except BaseException:
        if world.size == 1:
            shutdown()
        raise
    shutdown()


def _join(device: torch.device, timeout: timedelta | None) -> None:
    on_gpu = device.type == "cuda"
    try:
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None, timeout=timeout)
    except (dist.DistError, ValueError) as error:  # ValueError: an environment variable is missing or invalid
        variables = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
        raise ConnectionError(
            f"the ranks cannot connect ({', '.join(f'{name}={value}' for name, value in variables.items())}: "
            f"{str(error).partition(chr(10))[0]}); start WORLD_SIZE processes, preferably with torchrun"
        ) from error


def alone(device: str = "auto") -> World:
    """A world of one on the device of LOCAL_RANK (default 0), for independent workers without a process group.

    Raises:
        ValueError: see `init`.
    """
    return World(0, 1, choose_device(device, int(os.environ.get("LOCAL_RANK", 0))))


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """The torch device for auto, cpu, cuda (the GPU of the local rank) or cuda:N; a GPU becomes the current device.

    Raises:
        ValueError: another device, no visible GPU, fewer GPUs than local ranks, or no GPU N.
    """
    match = re.fullmatch(r"(auto|cpu|cuda)(?:(?<=cuda):(\d+))?", device)
    if match is None:
        raise ValueError(f"unknown device {device!r}: use auto, cpu, cuda or cuda:N")
    kind, number = match.groups()
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: no CUDA GPU is visible; check nvidia-smi, or use --device cpu")
    if kind == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    index, count = int(number or local_rank), torch.cuda.device_count()
    if number and index >= count:
        raise ValueError(f"--device {device}: this machine has {count} GPUs, cuda:0 to cuda:{count - 1}")
    if index >= count:
        raise ValueError(f"local rank {local_rank} has no GPU: start at most {count} processes on this machine")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def launch() -> str | None:
    """Identifier of the torchrun or Slurm job, the same after a restart: --rdzv-id, or Slurm's job and step numbers.

    None without a launcher. A requeued Slurm job restarts its step numbers at 0; two steps of one allocation are two
    jobs.
    """
    if elastic := _torchrun_id():
        return elastic
    if (slurm := os.environ.get("SLURM_JOB_ID")) is None:
        return None
    return f"{slurm}.{os.environ.get('SLURM_STEP_ID', 'batch')}"


def may_be_restart() -> bool:
    """Whether torchrun or Slurm may have restarted this process.

    Under torchrun always: the agent of a machine that has come back counts its restarts from 0. Under Slurm alone only
    in a requeued job, since many commands can follow each other in one allocation.
    """
    return bool(_torchrun_id()) or int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0


def _torchrun_id() -> str | None:
    """torchrun's --rdzv-id; None without one."""
    elastic = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if elastic == "none" else elastic


def key_value_store() -> dist.Store | None:
    """A new connection to the ranks' key-value store; None in a world of one."""
    if world_size() == 1:
        return None
    return internal("torch.distributed.distributed_c10d._get_default_store")().clone()


def is_main() -> bool:
    """Whether this is rank 0, which prints and writes files."""
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


def on_main(work: Callable[[], None]) -> None:
    """Call `work` on rank 0 while the other ranks wait.

    Raises:
        OSError: on all ranks if `work` raises it, or a subclass of it; other exceptions are raised on rank 0 only.
    """
    failure = None
    if is_main():
        try:
            work()
        except OSError as error:
            failure = error
    message = gather_objects(None if failure is None else str(failure))[0]
    if failure is not None:
        raise failure
    if message is not None:
        raise OSError(message)


def all_reduce_(tensor: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> torch.Tensor:
    """Reduce over all ranks in place; a no-op in a world of one."""
    if world_size() > 1:
        dist.all_reduce(tensor, op)
    return tensor


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true on any rank. With more than one rank this synchronises the host with the device."""
    if world_size() == 1:
        return flag
    return bool(all_reduce_(torch.tensor(float(flag), device=device), dist.ReduceOp.MAX).item())


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        # The sum enters every rank's loss, so its gradient is the sum of all ranks' gradients.
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def gather_rows(row: torch.Tensor) -> torch.Tensor:
    """Gather one row per rank, differentiably: [C] -> [world, C], equal on all ranks."""
    table = row.new_zeros(world_size(), row.numel())
    table[dist.get_rank()] = row
    return _AllReduceSum.apply(table)


def gather_objects(value: Any) -> list[Any]:
    """Gather `value` from all ranks, in rank order, on all ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
