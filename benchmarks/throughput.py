"""Images per second of training and inference: `python benchmarks/throughput.py [--peers] [--out FILE]`.

Our step is that of `effnet-fast train`, with clipping and the guard against non-finite gradients. `--peers` runs the
same architecture of timm, torchvision and efficientnet-pytorch, where installed, on the same batch, channels last, with
a plain step, eager and compiled. All take turns. A ratio is the peer's time over ours in the same turn: above 1, ours
is faster. A peer's EfficientNet gets the strides of the case.
"""

from __future__ import annotations

import argparse
import functools
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
from effnet_fast.provenance import version

Who = tuple[str, str]  # library, mode of its step
Samples = dict[Who, list[float]]  # milliseconds, one a round
DROP_PATH, DROPOUT = 0.2, 0.2  # B0's, in all four libraries


def _import_torchvision() -> None:
    """Import torchvision, on a CPU build of PyTorch too.

    Its wheel brings two operators in a library that loads only with the CUDA build it was made for, and fails to import
    without them; no classifier calls them.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")


def _timm(case: Case, drop_rate: float = DROPOUT, drop_path_rate: float = DROP_PATH) -> nn.Module:
    _import_torchvision()  # timm imports it
    timm = importlib.import_module("timm")
    name = case.model.replace("-", "_")
    return timm.create_model(name, num_classes=case.num_classes, drop_rate=drop_rate, drop_path_rate=drop_path_rate)


def _torchvision(case: Case) -> nn.Module:
    _import_torchvision()
    models = importlib.import_module("torchvision.models")
    make = getattr(models, case.model.replace("-", "_"))
    return make(num_classes=case.num_classes)


def _efficientnet_pytorch(case: Case) -> nn.Module:
    package = importlib.import_module("efficientnet_pytorch")
    return package.EfficientNet.from_name(case.model, num_classes=case.num_classes, image_size=case.image_size)


PEERS: dict[str, Callable[..., nn.Module]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "efficientnet-pytorch": _efficientnet_pytorch,
}


def make_peer(who: str, case: Case, **options: float) -> nn.Module:
    """A peer's model with the strides of the case, on the CPU; `options` are those of its function."""
    peer = PEERS[who](case, **options)
    if case.output_stride != 32:
        reference = create_model(case.model, case.num_classes, case.image_size, case.output_stride)
        for conv, other in zip(_spatial(reference), _spatial(peer), strict=True):
            if conv.stride != other.stride:
                other.stride = conv.stride
                if hasattr(other, "static_padding"):  # EfficientNet-PyTorch's; at stride 1 SAME is symmetric
                    other.static_padding = nn.ZeroPad2d(other.kernel_size[0] // 2)
    return peer


def _spatial(model: nn.Module) -> list[nn.Conv2d]:
    """Convolutions larger than 1x1: the stem's and the depthwise ones, in the same order in every library."""
    return [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size[0] > 1]


def peers(case: Case, required: bool) -> list[str]:
    """The peers that can be imported and built; the others are printed.

    Raises:
        ValueError: the peers cannot have the strides of the case.
        ImportError: a peer is missing and `required`.
    """
    if case.output_stride != 32 and not case.model.startswith("efficientnet"):
        raise ValueError(f"the peers' {case.model} has stock strides only: --peers needs --output-stride 32")
    available = []
    for name in PEERS:
        try:
            make_peer(name, case)
        except (ImportError, RuntimeError) as error:  # torchvision built for another torch raises the second
            if required:
                raise ImportError(f"--require-peers: {name} cannot be imported ({error}): pip install {name}") from None
            print(f"{name} is left out: {error}")
        else:
            available.append(name)
    return available


def train_call(who: str, mode: str, case: Case) -> harness.Call:
    """A training step of one library in one mode, on a batch on the device."""
    images, labels = harness.make_batch(case)
    if who == "effnet_fast":
        step = harness.make_step(case, mode)
        return lambda: step(images, labels, 0)
    torch.manual_seed(0)
    model = make_peer(who, case).to(harness.DEVICE, memory_format=torch.channels_last).train()
    plain = harness.plain_step(model if mode == "eager" else torch.compile(model), case)  # type: ignore[arg-type]
    return lambda: plain(images, labels)


def inference_call(who: str, mode: str, case: Case) -> harness.Call:
    """A forward pass in evaluation mode of one library in one mode, on a batch on the device."""
    images, _ = harness.make_batch(case)
    model = harness.make_model(case) if who == "effnet_fast" else make_peer(who, case).to(harness.DEVICE)
    model = model.to(memory_format=torch.channels_last)
    infer = harness.inference(model if mode == "eager" else torch.compile(model), case)  # type: ignore[arg-type]
    return lambda: infer(images)


def loader_call(mode: str, case: Case, kind: str, workers: int) -> harness.Call:
    """Our training step on the next batch of a loader."""
    step = harness.make_step(case, mode)
    _, batches = harness.make_batches(case, kind, workers)
    return lambda: step(*next(batches), 0)


def candidates(args: argparse.Namespace, case: Case) -> list[Who]:
    """All candidates; ratios refer to the first, and those that compile longest come last."""
    if args.candidate:
        return [chosen(word, case) for word in args.candidate]
    modes = args.step or ["eager"]
    for mode in modes:
        harness.check_mode(mode)
    ours = [("effnet_fast", mode) for mode in modes]
    if not (args.peers or args.require_peers):
        return ours
    others = ["eager"] if args.no_compile else ["eager", "compile"]
    available = peers(case, args.require_peers)
    return ours + [(name, mode) for mode in others for name in available]


def chosen(word: str, case: Case) -> Who:
    """A candidate by its name, as `timm:compile`.

    Raises:
        ValueError: there is no such candidate.
        ImportError: the library cannot be imported.
    """
    who, _, mode = word.partition(":")
    if who == "effnet_fast":
        harness.check_mode(mode)
    elif who not in PEERS or mode not in ("eager", "compile"):
        names = ", ".join(["effnet_fast", *PEERS])
        raise ValueError(f"--candidate {word} must be LIBRARY:STEP, with one of {names} and eager, compile or graph")
    else:
        make_peer(who, case)
    return who, mode


def peak_memory(who: str, mode: str, case: Case) -> dict[str, float]:
    """Peak MiB of a few training steps in a new process: in all, and above the imports.

    Raises:
        OSError: the process failed.
    """
    flags = ["--model", case.model, "--image-size", case.image_size, "--output-stride", case.output_stride]
    flags += ["--batch-size", case.batch_size, "--dtype", case.dtype, "--threads", torch.get_num_threads()]
    command = [sys.executable, __file__, "--memory-of", who, mode, *map(str, flags)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise OSError(f"measuring the memory of {who} failed: {process.stderr.strip().splitlines()[-1]}")
    return json.loads(process.stdout.splitlines()[-1])


def memory_here(who: str, mode: str, case: Case) -> dict[str, float]:
    """Peak MiB of this process: resident memory on the CPU, allocated memory on the GPU."""

    def resident() -> float:
        # Not ru_maxrss, which a process inherits from its parent.
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
    calls: dict[Who, harness.Call], args: argparse.Namespace, keep: Callable[[Samples, dict[Who, str]], None]
) -> tuple[dict[Who, harness.Call], dict[Who, str]]:
    """Warm up the calls, which compiles them. Returns those that work, and the reasons of the others.

    Args:
        args: after `args.seconds` no further call is compiled; a running compilation cannot be interrupted.
        keep: receives a first time of each call, so that a kill during the next compilation loses no call.
    """
    deadline = time.perf_counter() + args.seconds
    warm: dict[Who, harness.Call] = {}
    left_out: dict[Who, str] = {}
    first: Samples = {}
    for who, call in calls.items():
        if time.perf_counter() > deadline:
            left_out[who] = f"{args.seconds:g} s were over"
            continue
        try:
            for _ in range(args.warm_up):
                call()
        except Exception as error:  # one candidate's failure must not hide the others' figures
            left_out[who] = str(error).strip().partition("\n")[0] or type(error).__name__
        else:
            warm[who] = call
            first[who] = [harness.wall_ms(call)]
            keep(first, left_out)
    return warm, left_out


def make_calls(direction: str, args: argparse.Namespace, case: Case, chosen: list[Who]) -> dict[Who, harness.Call]:
    """The calls to measure in one direction."""
    calls = {}
    for who, mode in chosen:
        if direction == "inference":
            if mode != "graph":
                calls[who, mode] = inference_call(who, mode, case)
        elif args.loader != "memory" and who == "effnet_fast":
            calls[who, mode] = loader_call(mode, case, args.loader, args.num_workers)
        else:
            calls[who, mode] = train_call(who, mode, case)
    return calls


def measure(
    args: argparse.Namespace, case: Case, save: Callable[[list[dict], list[dict]], None]
) -> tuple[list[dict], list[dict]]:
    """One row per library, mode and direction; and one for each that could not be measured, with the reason.

    Args:
        save: receives the rows so far whenever there are more.
    """
    harness.set_backends(deterministic=False)  # the same for all candidates
    selected = candidates(args, case)
    rows: list[dict] = []
    missing: list[dict] = []
    for direction in args.direction or ["train", "inference"]:

        def keep(samples: Samples, left_out: dict[Who, str], direction: str = direction) -> None:
            if not args.turn or max(map(len, samples.values()), default=0) > 1:  # others compile beside a first time
                save(rows + rows_of(direction, case, samples), missing + reasons(direction, left_out))

        calls = make_calls(direction, args, case, selected)
        warm, left_out = warmed(calls, args, keep)
        after_round = functools.partial(keep, left_out=left_out)
        with harness.turn(args.turn):
            measured = rows_of(direction, case, harness.alternating(warm, args.rounds, 0, args.inner, after_round))
            if harness.DEVICE == "cuda":
                for row, call in zip(measured, warm.values(), strict=True):
                    row["host ms"] = harness.quantiles([harness.host_ms(call) for _ in range(args.rounds)])
                    row["kernel ms"] = harness.kernel_ms(call)
        rows.extend(measured)
        missing.extend(reasons(direction, left_out))
        save(rows, missing)
    if args.memory:
        for row in rows:
            if row["direction"] == "train":
                row["memory"] = peak_memory(row["library"], row["step"], case)
                save(rows, missing)
    return rows, missing


def reasons(direction: str, left_out: dict[Who, str]) -> list[dict]:
    """Rows of the candidates that could not be measured."""
    return [{"direction": direction, "library": who, "step": mode, "why": why} for (who, mode), why in left_out.items()]


def rows_of(direction: str, case: Case, samples: Samples) -> list[dict]:
    """Times, rates and ratios to the first candidate, each as p20, p50, p80."""
    ours = next(iter(samples.values()), [])
    return [
        {
            "direction": direction,
            "library": who,
            "step": mode,
            "rounds": len(times),
            "ms": harness.quantiles(times),
            "img/s": harness.quantiles([case.batch_size / t * 1e3 for t in times]),
            "time over ours": harness.quantiles([peer / t for peer, t in zip(times, ours, strict=True)]),
        }
        for (who, mode), times in samples.items()
    ]


def line(row: dict) -> str:
    """A row as printed text."""
    low, middle, high = row["time over ours"]
    memory = f"  peak {row['memory']['MiB']:.0f} MiB" if "memory" in row else ""
    host = f"  issued in {row['host ms'][1]:.2f} ms, kernels {row['kernel ms']:.2f} ms" if "host ms" in row else ""
    return (
        f"{row['direction']:9} {row['library']:21} {row['step']:8} {row['img/s'][1]:10.1f} img/s  "
        f"{row['ms'][1]:9.2f} ms  time over ours {middle:.2f} ({low:.2f} to {high:.2f}){host}{memory}"
    )


def main(argv: list[str]) -> None:
    parser = harness.parser(__doc__)
    harness.add_case(parser)
    parser.add_argument("--step", choices=harness.MODES, action="append", help="mode of our step; repeat for several")
    parser.add_argument("--direction", choices=("train", "inference"), action="append", help="default both")
    parser.add_argument("--loader", choices=("memory", "dali", "resident", "torch"), default="memory")
    parser.add_argument("--num-workers", type=int, default=8)
    parser.add_argument("--peers", action="store_true", help="measure other libraries beside ours")
    parser.add_argument("--require-peers", action="store_true", help="as --peers, but a missing peer is an error")
    parser.add_argument("--no-compile", action="store_true", help="peers eager only")
    parser.add_argument("--candidate", action="append", metavar="LIBRARY:STEP", help="only this; repeat for several")
    parser.add_argument("--memory", action="store_true", help="peak memory too, each in a new process")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--inner", type=int, default=harness.INNER, help="calls timed together")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="then compile no further candidate")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--turn", type=Path, metavar="FILE", help="compile at once, time while holding this lock file")
    parser.add_argument("--memory-of", nargs=2, metavar=("LIBRARY", "STEP"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    case = harness.case_of(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_of:
        print(json.dumps(memory_here(*args.memory_of, case)))
        return
    print(f"{case}\n{harness.warning()}".rstrip())

    # Versions of the peers; None is not installed.
    beside = args.peers or args.require_peers or args.candidate
    versions = {name: version(name) for name in PEERS} if beside else {}

    def save(rows: list[dict], missing: list[dict], quiet: bool = True) -> None:
        about = {"loader": args.loader, "rounds": args.rounds, "peers": versions, "left_out": missing}
        result = harness.result("throughput", harness.settings_of(case, **about), rows)
        harness.write(args.out, result, quiet)

    rows, missing = measure(args, case, save)
    for row in rows:
        print(line(row))
    for row in missing:
        print(f"{row['direction']:9} {row['library']:21} {row['step']:8} left out: {row['why']}")
    save(rows, missing, quiet=False)
    if missing:
        sys.exit(1)


if __name__ == "__main__":
    harness.run(main)
