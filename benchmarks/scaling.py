"""Weak and strong scaling over ranks: `python benchmarks/scaling.py --ranks 1 2 4 8`.

Starts itself under torchrun with each number of ranks (nccl on GPUs, gloo on the CPU, one thread a rank) and measures
the training step under DistributedDataParallel with shared BatchNorm statistics, as `effnet-fast train` runs it. Weak:
each rank has the whole batch; strong: the batch is divided. Efficiency is the rate over ranks times the rate of the
smallest number of ranks, per rank. The communication share is what a step takes longer than the same step with
gradients and statistics kept apart.
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
from pathlib import Path

import harness
import torch
from harness import Case

from effnet_fast import distributed
from effnet_fast.model import batch_norms
from effnet_fast.run.build import data_parallel


def worker(args: argparse.Namespace, case: Case) -> None:
    """One rank: times the step with and without communication; rank 0 writes both."""
    world = distributed.init(harness.DEVICE)
    try:
        wrap = functools.partial(data_parallel, static_graph=False)
        step = harness.make_step(case, args.step, world, wrap if world.size > 1 else None)
        batch = tuple(t.to(world.device) for t in harness.make_batch(case))

        def timed(apart: bool) -> float:
            for norm in batch_norms(step.module):
                norm.synchronised = not apart
            quiet = step.model.no_sync if apart and world.size > 1 else contextlib.nullcontext

            def call() -> None:
                with quiet():
                    step(*batch, 0)

            distributed.barrier()
            return harness.quantiles(harness.alternating({"step": call}, args.rounds, 2, harness.INNER)["step"])[1]

        together, apart = timed(apart=False), timed(apart=True)
        if world.is_main:
            args.worker.write_text(json.dumps({"ms": together, "ms apart": apart}))
    finally:
        distributed.shutdown()


def launch(ranks: int, case: Case, args: argparse.Namespace) -> dict[str, float]:
    """Measure with so many ranks, each with the case's batch.

    Raises:
        OSError: the ranks failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", __file__]
        words += ["--model", case.model, "--image-size", case.image_size, "--output-stride", case.output_stride]
        words += ["--batch-size", case.batch_size, "--dtype", case.dtype, "--rounds", args.rounds, "--step", args.step]
        done = subprocess.run(
            [*map(str, words), "--worker", str(found)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            reason = next((x for x in done.stderr.splitlines() if "Error" in x or "error" in x), "no message")
            raise OSError(f"{ranks} ranks failed: {reason}")
        return json.loads(found.read_text())


def rows_of(kind: str, case: Case, args: argparse.Namespace) -> list[dict]:
    """One row per number of ranks."""
    rows: list[dict] = []
    for ranks in args.ranks:
        share = case if kind == "weak" else dataclasses.replace(case, batch_size=case.batch_size // ranks)
        found = launch(ranks, share, args)
        rate = ranks * share.batch_size / found["ms"] * 1e3
        base = rows[0]["img/s"] / rows[0]["ranks"] if rows else rate / ranks
        rows.append(
            {
                "scaling": kind,
                "ranks": ranks,
                "batch a rank": share.batch_size,
                "ms": found["ms"],
                "img/s": rate,
                "efficiency": rate / (ranks * base),
                "communication": max(0.0, 1 - found["ms apart"] / found["ms"]),
            }
        )
        row = rows[-1]
        print(
            f"{kind:6} {ranks} rank(s) x {row['batch a rank']}: {rate:10.1f} img/s  "
            f"efficiency {row['efficiency']:.1%}  communication {row['communication']:.1%}",
            flush=True,
        )
    return rows


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
    rows = [row for kind in args.kind or ["weak", "strong"] for row in rows_of(kind, case, args)]
    harness.write(args.out, harness.result("scaling", harness.settings_of(case, step=args.step), rows))


if __name__ == "__main__":
    harness.run(main)
