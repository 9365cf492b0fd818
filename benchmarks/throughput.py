"""Images per second of training and inference: `python benchmarks/throughput.py [--peers] [--out FILE]`.

Our step is the one of `effnet-fast train` (clipping and the guard against bad steps included). With `--peers` the same
architecture of timm, torchvision and efficientnet-pytorch, where they can be imported, runs beside it on the same
batch, channels last, with a plain step, eager and compiled; all take turns, so that a ratio of two is of neighbours in
time. Ratios are the peer's time over ours, taken per turn: above 1 we are faster. An EfficientNet of a peer
gets the strides of the case.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import harness
import torch
from harness import Case
from torch import nn

from effnet_fast import create_model

Who = tuple[str, str]  # library and mode of its step
DROP_PATH, DROPOUT = 0.2, 0.2  # of B0 in all four libraries


def _timm(case: Case) -> nn.Module:
    timm = importlib.import_module("timm")
    name = case.model.replace("-", "_")
    return timm.create_model(name, num_classes=case.num_classes, drop_rate=DROPOUT, drop_path_rate=DROP_PATH)


def _torchvision(case: Case) -> nn.Module:
    models = importlib.import_module("torchvision.models")
    make = getattr(models, case.model.replace("-", "_"))
    return make(num_classes=case.num_classes)


def _efficientnet_pytorch(case: Case) -> nn.Module:
    package = importlib.import_module("efficientnet_pytorch")
    return package.EfficientNet.from_name(case.model, num_classes=case.num_classes, image_size=case.image_size)


PEERS: dict[str, Callable[[Case], nn.Module]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "efficientnet-pytorch": _efficientnet_pytorch,
}


def make_peer(who: str, case: Case) -> nn.Module:
    """A peer's model with the strides of the case, on the CPU."""
    peer = PEERS[who](case)
    if case.output_stride != 32:
        ours = create_model(case.model, case.num_classes, case.image_size, case.output_stride)
        for own, other in zip(_spatial(ours), _spatial(peer), strict=True):
            if own.stride != other.stride:
                other.stride = own.stride
                if hasattr(other, "static_padding"):  # EfficientNet-PyTorch's; at stride 1 SAME is symmetric
                    other.static_padding = nn.ZeroPad2d(other.kernel_size[0] // 2)
    return peer


def _spatial(model: nn.Module) -> list[nn.Conv2d]:
    """Convolutions over more than a pixel, the stem's and the depthwise ones, which come in one order everywhere."""
    return [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size[0] > 1]


def peers(case: Case, required: bool) -> list[str]:
    """The peers that can be imported and built.

    Raises:
        ValueError: the case has strides that the peers lack.
        ImportError: one is missing and `required`.
    """
    if case.output_stride != 32 and not case.model.startswith("efficientnet"):
        raise ValueError(f"the peers' {case.model} has stock strides only: --peers needs --output-stride 32")
    found = []
    for name in PEERS:
        try:
            make_peer(name, case)
        except (ImportError, RuntimeError) as error:  # torchvision built for another torch raises the second
            if required:
                raise ImportError(f"--require-peers: {name} cannot be imported ({error}): pip install {name}") from None
            print(f"{name} is left out: {error}")
        else:
            found.append(name)
    return found


def train_call(who: str, mode: str, case: Case) -> harness.Call:
    """A training step of one library in one mode, on a batch in memory."""
    images, labels = harness.make_batch(case)
    if who == "effnet_fast":
        step = harness.make_step(case, mode)
        return lambda: step(images, labels, 0)
    torch.manual_seed(0)
    model = make_peer(who, case).to(harness.DEVICE, memory_format=torch.channels_last).train()
    plain = harness.plain_step(model if mode == "eager" else torch.compile(model), case)  # type: ignore[arg-type]
    return lambda: plain(images, labels)


def inference_call(who: str, mode: str, case: Case) -> harness.Call:
    """A forward pass in evaluation mode of one library in one mode, on a batch in memory."""
    images, _ = harness.make_batch(case)
    model = harness.make_model(case) if who == "effnet_fast" else make_peer(who, case).to(harness.DEVICE)
    model = model.to(memory_format=torch.channels_last)
    infer = harness.inference(model if mode == "eager" else torch.compile(model), case)  # type: ignore[arg-type]
    return lambda: infer(images)


def loader_call(mode: str, case: Case, kind: str, workers: int) -> harness.Call:
    """A training step of ours on the next batch of a loader."""
    step = harness.make_step(case, mode)
    _, batches = harness.make_batches(case, kind, workers)
    return lambda: step(*next(batches), 0)


def candidates(args: argparse.Namespace, case: Case) -> list[Who]:
    """(library, mode) of all that is measured; the first is what ratios refer to. What compiles longest comes last."""
    modes = args.step or ["eager"]
    for mode in modes:
        harness.check_mode(mode)
    ours = [("effnet_fast", mode) for mode in modes]
    if not (args.peers or args.require_peers):
        return ours
    others = ["eager"] if args.no_compile else ["eager", "compile"]
    found = peers(case, args.require_peers)
    return ours + [(name, mode) for mode in others for name in found]


def peak_memory(who: str, mode: str, case: Case, args: argparse.Namespace) -> dict[str, float]:
    """Peak MiB of a few training steps in a process of their own: all of it, and what building and training added."""
    words = ["--model", case.model, "--image-size", case.image_size, "--output-stride", case.output_stride]
    words += ["--batch-size", case.batch_size, "--dtype", case.dtype, "--threads", torch.get_num_threads()]
    command = [sys.executable, __file__, "--memory-of", who, mode, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"measuring the memory of {who} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def memory_here(who: str, mode: str, case: Case) -> dict[str, float]:
    """The peak of this very process: resident memory on the CPU, allocated memory on the GPU."""

    def resident() -> float:
        # Not ru_maxrss, which a process inherits from the one that started it.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    before = resident()
    call = train_call(who, mode, case)
    for _ in range(5):
        call()
    harness.synchronise()
    if harness.DEVICE == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
        return {"MiB": peak, "MiB above imports": peak}
    return {"MiB": resident(), "MiB above imports": resident() - before}


def warmed(
    calls: dict[Who, harness.Call], warm_up: int, seconds: float
) -> tuple[dict[Who, harness.Call], dict[Who, str]]:
    """The calls that can be measured, compiled and warm; and why the others cannot.

    Args:
        seconds: after which no further call is compiled; one that is being compiled cannot be interrupted.
    """
    until = time.perf_counter() + seconds
    warm: dict[Who, harness.Call] = {}
    left_out: dict[Who, str] = {}
    for who, call in calls.items():
        if time.perf_counter() > until:
            left_out[who] = f"{seconds:g} s were over"
            continue
        try:
            for _ in range(warm_up):
                call()
        except Exception as error:  # whatever ails one of them shall not hide the others' figures
            left_out[who] = str(error).strip().partition("\n")[0] or type(error).__name__
        else:
            warm[who] = call
    return warm, left_out


def measure(args: argparse.Namespace, case: Case) -> tuple[list[dict], list[dict]]:
    """One row per library, mode and direction; and one for each that could not be measured, with the reason."""
    harness.set_backends(deterministic=False)  # the same for all, whoever comes first
    chosen = candidates(args, case)
    rows: list[dict] = []
    missing: list[dict] = []
    for direction in args.direction or ["train", "inference"]:
        calls = {}
        for who, mode in chosen:
            if direction == "inference":
                if mode != "graph":
                    calls[who, mode] = inference_call(who, mode, case)
            elif args.loader != "memory" and who == "effnet_fast":
                calls[who, mode] = loader_call(mode, case, args.loader, args.num_workers)
            else:
                calls[who, mode] = train_call(who, mode, case)
        warm, left_out = warmed(calls, args.warm_up, args.seconds)
        found = rows_of(direction, case, harness.alternating(warm, args.rounds, 0, args.inner))
        if harness.DEVICE == "cuda":
            for row, call in zip(found, warm.values(), strict=True):
                row["host ms"] = harness.quantiles([harness.host_ms(call) for _ in range(args.rounds)])
        rows += found
        for (who, mode), why in left_out.items():
            missing.append({"direction": direction, "library": who, "step": mode, "why": why})
    if args.memory:
        for row in rows:
            if row["direction"] == "train":
                row["memory"] = peak_memory(row["library"], row["step"], case, args)
    return rows, missing


def rows_of(direction: str, case: Case, samples: dict) -> list[dict]:
    """Times, rates and ratios to the first candidate, each as p20, p50, p80."""
    ours = next(iter(samples.values()), [])
    rows = []
    for (who, mode), times in samples.items():
        rate = [case.batch_size / t * 1e3 for t in times]
        ratio = [theirs / t for theirs, t in zip(times, ours, strict=True)]
        rows.append(
            {
                "direction": direction,
                "library": who,
                "step": mode,
                "ms": harness.quantiles(times),
                "img/s": harness.quantiles(rate),
                "time over ours": harness.quantiles(ratio),
            }
        )
    return rows


def line(row: dict) -> str:
    """A row as it is printed."""
    low, middle, high = row["time over ours"]
    memory = f"  peak {row['memory']['MiB']:.0f} MiB" if "memory" in row else ""
    host = f"  issued in {row['host ms'][1]:.2f} ms" if "host ms" in row else ""
    return (
        f"{row['direction']:9} {row['library']:21} {row['step']:8} {row['img/s'][1]:10.1f} img/s  "
        f"{row['ms'][1]:9.2f} ms  time over ours {middle:.2f} ({low:.2f} to {high:.2f}){host}{memory}"
    )


def main(argv: list[str]) -> None:
    parser = harness.parser(__doc__)
    harness.add_case(parser)
    parser.add_argument("--step", choices=harness.MODES, action="append", help="mode of our step (may be repeated)")
    parser.add_argument("--direction", choices=("train", "inference"), action="append", help="default both")
    parser.add_argument("--loader", choices=("memory", "dali", "resident", "torch"), default="memory")
    parser.add_argument("--num-workers", type=int, default=8)
    parser.add_argument("--peers", action="store_true", help="measure other libraries beside ours")
    parser.add_argument("--require-peers", action="store_true", help="as --peers; one that is missing is an error")
    parser.add_argument("--no-compile", action="store_true", help="peers eager only")
    parser.add_argument("--memory", action="store_true", help="peak memory too, each in a process of its own")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--inner", type=int, default=harness.INNER, help="calls timed together")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which nothing else is compiled")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--memory-of", nargs=2, metavar=("LIBRARY", "STEP"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    case = harness.case_of(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_of:
        print(json.dumps(memory_here(*args.memory_of, case)))
        return
    print(f"{case}\n{harness.warning()}".rstrip())
    rows, missing = measure(args, case)
    for row in rows:
        print(line(row))
    for row in missing:
        print(f"{row['direction']:9} {row['library']:21} {row['step']:8} left out: {row['why']}")
    settings = harness.settings_of(
        case, loader=args.loader, rounds=args.rounds, peers=_versions(rows), left_out=missing
    )
    harness.write(args.out, harness.result("throughput", settings, rows))
    if missing:
        sys.exit(1)


def _versions(rows: list[dict]) -> dict[str, str | None]:
    from effnet_fast.provenance import version

    return {name: version(name) for name in {row["library"] for row in rows} & PEERS.keys()}


if __name__ == "__main__":
    harness.run(main)
