"""Shared by the benchmarks: a case with its batch, loader and training step; timing; rates; and the result file.

The step is `effnet_fast.train.step.Step`, as `effnet-fast train` runs it by default: SGD with Nesterov momentum, label
smoothing 0.1, gradients clipped at 5, and the guard against non-finite gradients.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from effnet_fast import create_model, provenance
from effnet_fast.checkpoint import write_atomically
from effnet_fast.config import TrainConfig
from effnet_fast.data.augment_params import Augment
from effnet_fast.data.choose_loader import make_loader
from effnet_fast.data.loader import Loader, LoaderSpec
from effnet_fast.data.synthetic import load_synthetic
from effnet_fast.distributed import World
from effnet_fast.model import default_output_stride, variant
from effnet_fast.precision import autocast
from effnet_fast.run import gpu_clock
from effnet_fast.run.cold_start import compile_kernels
from effnet_fast.run.resolve import compile_model, loader_dtype, resolve_step, set_backends, worker_count
from effnet_fast.train import optim
from effnet_fast.train.step import Step, StepOptions

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INNER = 10 if DEVICE == "cuda" else 1  # steps timed together, so that the host runs ahead of the GPU as in training
MODES = ("eager", "compile", "graph")
PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
RATE, MOMENTUM, DECAY, SMOOTHING, CLIP = 0.01, 0.9, 5e-4, 0.1, 5.0

Call = Callable[[], object]
Quantiles = tuple[float, float, float]


@dataclass(frozen=True)
class Case:
    """A model on batches of square images, computed in `dtype` under autocast."""

    model: str = "efficientnet-b0"
    image_size: int = 32
    output_stride: int = 8
    batch_size: int = 256
    dtype: str = "bfloat16"
    num_classes: int = 100
    width: float = 1.0

    @property
    def precision(self) -> str:
        """The value of `--mixed_precision`."""
        return PRECISIONS[self.dtype]

    def __str__(self) -> str:
        return (
            f"{self.model} at {self.image_size} px, output stride {self.output_stride}, batch {self.batch_size}, "
            f"{self.dtype}"
        )


def parser(description: str) -> argparse.ArgumentParser:
    """An argument parser with `--out`, which every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the result, with its provenance, as JSON")
    return parser


def add_case(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a `Case`; the defaults depend on the device."""
    parser.add_argument("--model", default="efficientnet-b0")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--output-stride", type=int, choices=(4, 8, 16, 32), help="default 8 below 128 px, else 32")
    parser.add_argument("--batch-size", type=int, default=512 if DEVICE == "cuda" else 64)
    parser.add_argument("--dtype", choices=PRECISIONS, default="bfloat16" if DEVICE == "cuda" else "float32")


def case_of(args: argparse.Namespace) -> Case:
    """The case of parsed arguments.

    Raises:
        ValueError: an unknown model or an impossible size.
    """
    variant(args.model)
    for name in ("image_size", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    stride = args.output_stride or default_output_stride(args.model, args.image_size)
    return Case(args.model, args.image_size, stride, args.batch_size, args.dtype)


def run(main: Callable[[list[str]], None]) -> None:
    """Call a script's main; a user's mistake prints one line and exits with status 2."""
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


# -- model, batch, step, loader


def make_model(case: Case) -> nn.Module:
    """The case's model, on the device; its Triton kernels are compiled, side by side."""
    torch.manual_seed(0)
    model = create_model(case.model, case.num_classes, case.image_size, case.output_stride, width=case.width)
    model.to(DEVICE)
    compile_kernels(model, "auto", case.precision, torch.device(DEVICE), case.batch_size, {case.image_size})
    return model


def make_batch(case: Case) -> tuple[Tensor, Tensor]:
    """Random images [N, 3, S, S] of a loader's dtype, channels last, and labels [N], on the device."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(case.batch_size, 3, case.image_size, case.image_size, generator=generator)
    labels = torch.randint(case.num_classes, (case.batch_size,), generator=generator)
    dtype = loader_dtype(case.precision, torch.device(DEVICE))
    return images.to(DEVICE, dtype, memory_format=torch.channels_last), labels.to(DEVICE)


def check_mode(mode: str) -> tuple[bool, bool]:
    """Whether a step of this mode is compiled, and whether it is captured in a CUDA graph, as in `train --step`.

    Raises:
        ValueError: graph without CUDA.
    """
    return resolve_step(TrainConfig(step=mode), World(0, 1, torch.device(DEVICE)), 0, 0)  # type: ignore[arg-type]


def make_step(case: Case, mode: str, world: World | None = None, wrap: Callable | None = None) -> Step:
    """The training step of a case in a mode: eager, compile, or graph (compiled and captured).

    Args:
        world: the ranks; default this process alone.
        wrap: applied to the module before it is compiled, such as DistributedDataParallel.

    Raises:
        ValueError: see `check_mode`.
    """
    compiled, graph = check_mode(mode)
    set_backends(deterministic=False)
    module = make_model(case).train()
    called = module if wrap is None else wrap(module)
    optimizer = optim.make_optimizer("sgd", module, momentum=MOMENTUM, weight_decay=DECAY)
    return Step(
        compile_model(called, torch.device(DEVICE)) if compiled else called,
        module,
        optimizer,
        lambda step: 1.0,
        StepOptions(RATE, case.precision, CLIP, label_smoothing=SMOOTHING, graph=graph),
        world or World(0, 1, torch.device(DEVICE)),
    )


def plain_step(model: nn.Module, case: Case) -> Callable[[Tensor, Tensor], object]:
    """The usual step of another library's user: forward, loss, backward, fused SGD; no clipping, no guard."""
    optimizer = torch.optim.SGD(
        model.parameters(), lr=RATE, momentum=MOMENTUM, nesterov=True, weight_decay=DECAY, fused=True
    )
    loss = nn.CrossEntropyLoss(label_smoothing=SMOOTHING)

    def step(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(case.precision, images.device):
            logits = model(images)
        loss(logits.float(), labels).backward()
        optimizer.step()

    return step


def inference(model: nn.Module, case: Case) -> Callable[[Tensor], Tensor]:
    """images -> logits, in evaluation mode and without gradients."""
    model.eval()

    def infer(images: Tensor) -> Tensor:
        with torch.inference_mode(), autocast(case.precision, images.device):
            return model(images)

    return infer


def make_batches(
    case: Case, kind: str, workers: int, images: int = 10_000, device: torch.device | None = None
) -> tuple[Loader, Iterator]:
    """A training loader over synthetic images, and its endless batches, on `device` (default: the one in use).

    Raises:
        ValueError: the loader does not work on this machine.
    """
    data = load_synthetic(train_size=max(images, case.batch_size), test_size=100)
    device = device or torch.device(DEVICE)
    spec = LoaderSpec(
        batch_size=case.batch_size,
        image_size=case.image_size,
        mean=data.mean,
        std=data.std,
        device=device,
        dtype=loader_dtype(case.precision, device),
        seed=0,
        rank=0,
        world=1,
        num_workers=worker_count(workers),
        augment=Augment(),
    )
    loader = make_loader(kind, data.train, spec)  # type: ignore[arg-type]
    return loader, endless(loader)


def endless(loader: Loader) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of all epochs of a loader, without an end."""
    epoch = 0
    while True:
        yield from loader.epoch(epoch)
        epoch += 1


# -- time


@contextlib.contextmanager
def turn(path: Path | None) -> Iterator[None]:
    """Hold the lock `path`, so that scripts that compile side by side are timed one after the other; None does nothing.

    A byte in the file `path`.waiting tells who holds the lock first that this script is ready.
    """
    if path is None:
        yield
        return
    if DEVICE == "cuda":
        torch.cuda.empty_cache()  # for the others
    with path.with_name(f"{path.name}.waiting").open("a") as file:
        file.write(".")
    with FileLock(path):
        yield


def quantiles(values: list[float]) -> Quantiles:
    """p20, p50 and p80.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("nothing was timed: --rounds must be at least 1")
    ordered = sorted(values)
    return tuple(ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.5, 0.8))  # type: ignore[return-value]


def synchronise() -> None:
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def wall_ms(call: Call) -> float:
    """Milliseconds of one call and of the work it queues on the device."""
    synchronise()
    start = time.perf_counter()
    call()
    synchronise()
    return (time.perf_counter() - start) * 1e3


def host_ms(call: Call) -> float:
    """Milliseconds until a call returns on an idle device: the host's time to issue it."""
    synchronise()
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def kernel_ms(call: Call, calls: int = 2) -> float:
    """Milliseconds of the kernels of one call, without the gaps between them."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        for _ in range(calls):
            call()
        synchronise()
    return sum(event.time_range.elapsed_us() for event in kernels(prof)) / calls / 1e3


def kernels(prof: profile) -> list[Any]:
    """The profiler's events of kernels; ranges of the host appear on the device's time line too."""
    events = prof.events() or []
    return [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]


def alternating(
    calls: dict[Any, Call],
    rounds: int,
    warm_up: int,
    inner: int = 1,
    after_round: Callable[[dict[Any, list[float]]], None] = lambda samples: None,
    first: int = 0,
) -> dict[Any, list[float]]:
    """Milliseconds of each call. The calls take turns, so that other load on the machine affects all alike.

    Args:
        inner: calls timed together, so that a GPU's queue stays filled.
        first: calls of each turn that are not timed, where a turn has to prepare something.
        after_round: receives all samples so far, to keep them should the script be stopped.
    """
    for call in calls.values():
        for _ in range(warm_up):
            call()
    samples: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            for _ in range(first):
                call()
            samples[name].append(wall_ms(lambda call=call: [call() for _ in range(inner)]) / inner)  # type: ignore[misc]
        after_round(samples)
    return samples


def replayed(functions: list[Call], cpu_rounds: int = 1) -> Quantiles:
    """p20, p50, p80 in ms of one call. The functions differ only in their buffers and take turns in one CUDA graph.

    Args:
        cpu_rounds: on the CPU, how often each function is timed.
    """
    if DEVICE == "cpu":
        return quantiles([wall_ms(function) for _ in range(cpu_rounds) for function in functions])
    return quantiles(gpu_clock.replayed_ms(functions))


def rotations(bytes_each: int) -> int:
    """How many copies of buffers of this size together exceed the cache."""
    return 2 if DEVICE == "cpu" else gpu_clock.rotations(bytes_each)


def copy_bandwidth() -> float:
    """GB/s of a copy in the device's memory, counting reads and writes."""
    size = 1 << 28
    a, b = (torch.zeros(size, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    return 2 * size / _least_ms(lambda: b.copy_(a)) / 1e6


def matrix_rate(dtype: str) -> float:
    """FLOP/s of a large square matrix product in `dtype`; float32 uses TF32 where the device has it."""
    side = 8192 if DEVICE == "cuda" else 1024
    set_backends(deterministic=False)
    a, b = (torch.randn(side, side, device=DEVICE, dtype=getattr(torch, dtype)) for _ in range(2))
    return 2 * side**3 / _least_ms(lambda: a @ b) * 1e3


def _least_ms(call: Call) -> float:
    """Least milliseconds of a call; on a GPU of twenty in a row, since one is hardly longer than its launch."""
    inner = 20 if DEVICE == "cuda" else 1
    return min(alternating({"call": call}, rounds=5, warm_up=1, inner=inner)["call"])


# -- results


def warning() -> str:
    """A note for readers of a CPU's figures; empty on a GPU."""
    if DEVICE == "cuda":
        return ""
    return f"CPU figures ({torch.get_num_threads()} threads): they say nothing about a GPU."


# Asked of git and the driver, so once a process: results are written again after each row.
environment = functools.cache(provenance.environment)


def result(benchmark: str, settings: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A result as it is written: benchmark, device, provenance, settings and rows."""
    return {
        "benchmark": benchmark,
        "device": DEVICE,
        "note": warning(),
        "threads": torch.get_num_threads(),
        "provenance": dict(environment()),
        "settings": settings,
        "rows": rows,
    }


def write(path: Path | None, result: dict[str, Any], quiet: bool = False) -> None:
    """Write a result, if a path is given; the file is replaced at once, so that a kill leaves a whole one."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())
    if not quiet:
        print(f"written: {path}")


def earlier_rows(path: Path | None, what: str, matches: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """The rows that an earlier, interrupted command has written to `--out`; none without a file.

    Args:
        path: of `--out`.
        what: the kind of result, for the message.
        matches: whether a result has the settings of this command.

    Raises:
        ValueError: the file holds something else, or a result that does not match.
    """
    if path is None or not path.exists():
        return []
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        result = json.loads(path.read_text())
        if matches(result):
            return result["rows"]
    raise ValueError(f"{path} is not a {what} with these settings: choose another --out")


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table with the columns of the first row."""
    if not rows:
        return ""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join(lines + ["| " + " | ".join(str(row.get(name, "")) for name in names) + " |" for row in rows])


def settings_of(case: Case, **more: Any) -> dict[str, Any]:
    """A case and further settings, as JSON types."""
    return asdict(case) | more
