"""Weak and strong scaling over ranks: `python benchmarks/scaling.py --ranks 1 2 4 8`.

Runs itself under torchrun with each number of ranks (nccl on GPUs, gloo on the CPU, one thread a rank) and measures
the training step under DistributedDataParallel with shared BatchNorm statistics. Weak: each rank has the whole batch;
strong: the batch is divided. Efficiency is the rate per rank, relative to the smallest number of ranks. The
communication share is the extra time over the same step without exchange of gradients and statistics; both take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import harness
import torch
from harness import Case

from effnet_fast import distributed
from effnet_fast.model import batch_norms
from effnet_fast.run.build import data_parallel

Times = dict[str, float]  # `ms` of the step, and `ms apart` without exchange if there are several ranks


def worker(args: argparse.Namespace, case: Case) -> None:
    """One rank: time the step with and without communication; rank 0 writes both."""
    world = distributed.init(harness.DEVICE)
    try:
        wrap = functools.partial(data_parallel, static_graph=False)
        step = harness.make_step(case, args.step, world, wrap if world.size > 1 else None)
        batch = tuple(t.to(world.device) for t in harness.make_batch(case))

        def call(apart: bool) -> None:
            for norm in batch_norms(step.module):
                norm.synchronised = not apart
            with step.model.no_sync() if apart else contextlib.nullcontext():
                step(*batch, 0)

        calls = {"ms": functools.partial(call, apart=False)}
        if world.size > 1:
            calls["ms apart"] = functools.partial(call, apart=True)
        distributed.barrier()
        samples = harness.alternating(calls, args.rounds, 2, harness.INNER)
        if world.is_main:
            args.worker.write_text(json.dumps({name: harness.quantiles(ms)[1] for name, ms in samples.items()}))
    finally:
        distributed.shutdown()


def launch(ranks: int, case: Case, args: argparse.Namespace) -> Times:
    """Measure with this number of ranks, each with the case's batch.

    Raises:
        OSError: the ranks failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        times = Path(folder) / "times.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", __file__]
        command += ["--model", case.model, "--image-size", case.image_size, "--output-stride", case.output_stride]
        command += ["--batch-size", case.batch_size, "--dtype", case.dtype]
        command += ["--rounds", args.rounds, "--step", args.step, "--worker", times]
        process = subprocess.run(
            list(map(str, command)),
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if process.returncode:
            reason = next((x for x in process.stderr.splitlines() if "Error" in x or "error" in x), "no message")
            raise OSError(f"{ranks} ranks failed: {reason}")
        return json.loads(times.read_text())


def rows_of(kind: str, case: Case, args: argparse.Namespace, measured: dict[tuple[int, Case], Times]) -> Iterator[dict]:
    """One row per number of ranks, as soon as it is measured.

    Args:
        measured: times by ranks and case; completed in place, so that weak and strong scaling share a baseline.
    """
    base = None
    for ranks in args.ranks:
        share = case if kind == "weak" else dataclasses.replace(case, batch_size=case.batch_size // ranks)
        if (ranks, share) not in measured:
            measured[ranks, share] = launch(ranks, share, args)
        times = measured[ranks, share]
        rate = ranks * share.batch_size / times["ms"] * 1e3
        base = base or rate / ranks
        yield {
            "scaling": kind,
            "ranks": ranks,
            "batch a rank": share.batch_size,
            "ms": times["ms"],
            "img/s": rate,
            "efficiency": rate / (ranks * base),
            "communication": max(0.0, 1 - times.get("ms apart", times["ms"]) / times["ms"]),
        }


def line(row: dict) -> str:
    """A row as printed text."""
    return (
        f"{row['scaling']:6} {row['ranks']} rank(s) x {row['batch a rank']}: {row['img/s']:10.1f} img/s  "
        f"efficiency {row['efficiency']:.1%}  communication {row['communication']:.1%}"
    )


def main(argv: list[str]) -> None:
    parser = harness.parser(__doc__)
    harness.add_case(parser)
    parser.add_argument("--ranks", type=int, nargs="+", help="default 1, 2, 4, ... up to the GPUs or cores")
    parser.add_argument("--kind", choices=("weak", "strong"), action="append", help="default both")
    parser.add_argument("--step", choices=("eager", "compile"), default="eager")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    case = harness.case_of(args)
    if args.worker:
        worker(args, case)
        return
    places = torch.cuda.device_count() if harness.DEVICE == "cuda" else harness.provenance.cores()
    args.ranks = sorted(args.ranks or [2**i for i in range(places.bit_length()) if 2**i <= places])
    if harness.DEVICE == "cuda" and args.ranks[-1] > places:
        raise ValueError(f"--ranks {args.ranks[-1]}: there are {places} GPU(s) here")
    if any(ranks < 1 or case.batch_size % ranks for ranks in args.ranks):
        raise ValueError(f"--ranks must be at least 1 and divide the batch of {case.batch_size}")
    print(f"{case}\n{harness.warning()}".rstrip())
    rows: list[dict] = []
    measured: dict[tuple[int, Case], Times] = {}
    for kind in args.kind or ["weak", "strong"]:
        for row in rows_of(kind, case, args, measured):
            print(line(row), flush=True)
            rows.append(row)
            harness.write(args.out, harness.result("scaling", harness.settings_of(case, step=args.step), rows))


if __name__ == "__main__":
    harness.run(main)
