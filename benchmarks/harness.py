"""What the benchmarks share: a case, its batch, its loader and its training step, timing, rates, and the result file.

A step here is `effnet_fast.train.step.Step`, the very one that `effnet-fast train` takes, with its defaults: SGD with
Nesterov momentum, label smoothing 0.1, clipping at 5, and the guard against a gradient that is not finite.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effnet_fast import create_model, provenance
from effnet_fast.config import TrainConfig
from effnet_fast.data.augment_params import Augment
from effnet_fast.data.choose_loader import make_loader
from effnet_fast.data.loader import Loader, LoaderSpec
from effnet_fast.data.synthetic import load_synthetic
from effnet_fast.distributed import World
from effnet_fast.model import default_output_stride, variant
from effnet_fast.precision import autocast
from effnet_fast.run.resolve import compile_model, loader_dtype, resolve_step, set_backends, worker_count
from effnet_fast.train import optim
from effnet_fast.train.step import Step, StepOptions

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REPEATS = 20
INNER = 10 if DEVICE == "cuda" else 1  # steps timed together: the host issues one while the GPU is at those before
MODES = ("eager", "compile", "graph")
CACHE_BYTES = 256 << 20  # several times the second-level cache of an A100 or H100
PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
RATE, MOMENTUM, DECAY, SMOOTHING, CLIP = 0.01, 0.9, 5e-4, 0.1, 5.0

Call = Callable[[], object]
Quantiles = tuple[float, float, float]


@dataclass(frozen=True)
class Case:
    """What is measured: a model on square images, in batches, in a type of arithmetic (autocast)."""

    model: str = "efficientnet-b0"
    image_size: int = 32
    output_stride: int = 8
    batch_size: int = 256
    dtype: str = "bfloat16"
    num_classes: int = 100

    @property
    def precision(self) -> str:
        """As `--mixed_precision` calls it."""
        return PRECISIONS[self.dtype]

    def __str__(self) -> str:
        return (
            f"{self.model} at {self.image_size} px, output stride {self.output_stride}, batch {self.batch_size}, "
            f"{self.dtype}"
        )


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the arguments that every benchmark has: `--out`."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, help="write the result, with its provenance, as JSON")
    return made


def add_case(to: argparse.ArgumentParser) -> None:
    """The arguments that make a `Case`; the defaults fit the device."""
    to.add_argument("--model", default="efficientnet-b0")
    to.add_argument("--image-size", type=int, default=32)
    to.add_argument("--output-stride", type=int, choices=(4, 8, 16, 32), help="default 8 below 128 px, else 32")
    to.add_argument("--batch-size", type=int, default=512 if DEVICE == "cuda" else 64)
    to.add_argument("--dtype", choices=PRECISIONS, default="bfloat16" if DEVICE == "cuda" else "float32")


def case_of(args: argparse.Namespace) -> Case:
    """The case that the arguments name.

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
    """Call a script's main; what the user can mend becomes one line and status 2."""
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


# -- what is measured


def make_model(case: Case) -> nn.Module:
    """Our model of the case, on the device."""
    torch.manual_seed(0)
    model = create_model(case.model, case.num_classes, case.image_size, case.output_stride)
    return model.to(DEVICE)


def make_batch(case: Case) -> tuple[Tensor, Tensor]:
    """Random images [N, 3, S, S], channels last, and labels [N], on the device."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(case.batch_size, 3, case.image_size, case.image_size, generator=generator)
    labels = torch.randint(case.num_classes, (case.batch_size,), generator=generator)
    return images.to(DEVICE, memory_format=torch.channels_last), labels.to(DEVICE)


def check_mode(mode: str) -> tuple[bool, bool]:
    """Whether a step of this mode is compiled, and whether it is captured, as `effnet-fast train --step` has it.

    Raises:
        ValueError: graph without CUDA.
    """
    return resolve_step(TrainConfig(step=mode), World(0, 1, torch.device(DEVICE)), 0, 0)  # type: ignore[arg-type]


def make_step(case: Case, mode: str, world: World | None = None, wrap: Callable | None = None) -> Step:
    """The training step of the case in a mode: eager, compile or graph (captured, with the compiled model in it).

    Args:
        world: of several ranks; default this process alone.
        wrap: what to put around the module before it is compiled, such as DistributedDataParallel.

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
    """The step that a user of another library writes: forward, loss, backward, fused SGD; no clipping, no guard."""
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
    """A training loader over procedural images, and its batches without end, on a device, default the one in use.

    Raises:
        ValueError: the loader cannot serve here.
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
    return loader, _endless(loader)


def _endless(loader: Loader) -> Iterator[tuple[Tensor, Tensor]]:
    epoch = 0
    while True:
        yield from loader.epoch(epoch)
        epoch += 1


# -- time


def quantiles(values: list[float]) -> Quantiles:
    """p20, p50 and p80."""
    ordered = sorted(values)
    return tuple(ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.5, 0.8))  # type: ignore[return-value]


def synchronise() -> None:
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def wall_ms(call: Call) -> float:
    """Milliseconds of one call, the device's work included."""
    synchronise()
    begin = time.perf_counter()
    call()
    synchronise()
    return (time.perf_counter() - begin) * 1e3


def host_ms(call: Call) -> float:
    """Milliseconds until a call returns that finds the device idle: what it takes the host to issue it."""
    synchronise()
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


def alternating(calls: dict[Any, Call], rounds: int, warm_up: int, inner: int = 1) -> dict[Any, list[float]]:
    """Milliseconds of each call, taken in turns, so that what else the machine does meets all of them alike.

    Args:
        inner: calls that are timed together, so that a GPU's queue stays filled.
    """
    for call in calls.values():
        for _ in range(warm_up):
            call()
    samples: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(wall_ms(lambda call=call: [call() for _ in range(inner)]) / inner)  # type: ignore[misc]
    return samples


def replayed(functions: list[Call]) -> Quantiles:
    """p20, p50, p80 in ms of one call, the functions (equal but for their buffers) taking turns in one CUDA graph."""
    if DEVICE == "cpu":
        return quantiles([wall_ms(function) for function in functions[:2]])
    for function in functions:
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for function in functions:
            function()
    samples = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) / len(functions))
    return quantiles(samples)


def rotations(bytes_each: int) -> int:
    """Copies of the buffers that together exceed the cache."""
    return 2 if DEVICE == "cpu" else max(2, min(16, CACHE_BYTES // bytes_each + 1))


def copy_bandwidth() -> float:
    """GB/s of a copy within the device's memory, read and write counted."""
    size = 1 << 28
    a, b = (torch.zeros(size, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    return 2 * size / _least_ms(lambda: b.copy_(a)) / 1e6


def matrix_rate(dtype: str) -> float:
    """FLOP/s of a large square matrix product of this type; float32 with TF32 where the device has it."""
    side = 8192 if DEVICE == "cuda" else 1024
    set_backends(deterministic=False)
    a, b = (torch.randn(side, side, device=DEVICE, dtype=getattr(torch, dtype)) for _ in range(2))
    return 2 * side**3 / _least_ms(lambda: a @ b) * 1e3


def _least_ms(call: Call) -> float:
    """The least milliseconds of a call; on a GPU of several in a row, since one hardly outlasts its launch."""
    inner = 20 if DEVICE == "cuda" else 1
    return min(alternating({"call": call}, rounds=5, warm_up=1, inner=inner)["call"])


# -- results


def warning() -> str:
    """What a reader must know of figures from here; empty on a GPU."""
    if DEVICE == "cuda":
        return ""
    return f"CPU figures ({torch.get_num_threads()} threads): they say nothing about a GPU."


def result(benchmark: str, settings: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A result as it is written: what was measured, where, and whether the figures are a GPU's."""
    return {
        "benchmark": benchmark,
        "device": DEVICE,
        "note": warning(),
        "threads": torch.get_num_threads(),
        "provenance": provenance.environment(),
        "settings": settings,
        "rows": rows,
    }


def write(path: Path | None, made: dict[str, Any]) -> None:
    """Write a result, if a path is given."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made, indent=1) + "\n")
    print(f"written: {path}")


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table; the first row names the columns."""
    if not rows:
        return ""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join(lines + ["| " + " | ".join(str(row.get(name, "")) for name in names) + " |" for row in rows])


def settings_of(case: Case, **more: Any) -> dict[str, Any]:
    """A case and what else was set, JSON-ready."""
    return asdict(case) | more
