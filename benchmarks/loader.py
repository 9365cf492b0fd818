"""Images per second of the loaders: `python benchmarks/loader.py [--step-rate IMG_PER_S] [--record]`.

DALI (on the GPU where there is one, and on the CPU), the resident loader, and a torch DataLoader with worker processes
deliver the same training batches of synthetic 32 px images with crop and flip. They take turns of a whole epoch, so
nothing is loaded ahead in another loader's turn, and the start of an epoch is part of the rate. The share of the step
is a batch's loading time over a training step's time: at 100 % or more the loader is the bottleneck. `--record` writes
the file that `--loader auto` follows.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import harness
import torch
from harness import Case

from effnet_fast.data import choose_loader
from effnet_fast.data.loader import Loader


def make(kind: str, case: Case, workers: int, images: int) -> Loader:
    """A loader of batches on the device; `dali-cpu` loads on the CPU.

    Raises:
        ValueError, ImportError: the loader does not work on this machine.
    """
    if kind != "dali-cpu":
        return harness.make_batches(case, kind, workers, images)[0]
    return harness.make_batches(case, "dali", workers, images, torch.device("cpu"))[0]


def kinds() -> list[str]:
    """Loaders to measure; without a GPU `dali` is DALI on the CPU."""
    return (["dali", "dali-cpu"] if harness.DEVICE == "cuda" else ["dali"]) + ["resident", "torch"]


def speeds(
    case: Case, workers: int, images: int, rounds: int, after_round: Callable[[dict[str, list[float]]], None]
) -> dict[str, list[float]]:
    """img/s of each loader that works here, one figure a round, in turns; `after_round` receives those so far."""
    loaders = {}
    for kind in kinds():
        try:
            loaders[kind] = make(kind, case, workers, images)
        except (ValueError, ImportError) as error:
            print(f"{kind} is left out: {error}")
    try:
        rates: dict[str, list[float]] = {kind: [] for kind in loaders}
        for epoch in range(rounds + 1):
            for kind, loader in loaders.items():
                start = time.perf_counter()
                batches = _drain(loader, epoch)
                if epoch:  # the first one warms up
                    rates[kind].append(batches * case.batch_size / (time.perf_counter() - start))
            if epoch:
                after_round(rates)
        return rates
    finally:
        for loader in loaders.values():
            loader.close()


def _drain(loader: Loader, epoch: int) -> int:
    """Load an epoch, and copy its batches to the device where they are not there yet; return their number."""
    batches = 0
    for batch in loader.epoch(epoch):
        for tensor in batch:
            tensor.to(harness.DEVICE, non_blocking=True)
        batches += 1
    harness.synchronise()
    return batches


def record(path: Path, rows: list[dict]) -> None:
    """Write the medians under this device's name into the file that `--loader auto` follows."""
    about = harness.environment()
    name = torch.cuda.get_device_name() if harness.DEVICE == "cuda" else "cpu"
    known = json.loads(path.read_text()) if path.exists() else {}
    known[name] = {row["loader"]: round(row["img/s"][1]) for row in rows if row["loader"] != "dali-cpu"} | {
        "commit": about["commit"],
        "date": about["date"][:10],
        "torch_version": about["torch"],
        "dali_version": about["nvidia-dali-cuda120"] or about["nvidia-dali-cuda130"],
        "machine": about["gpu"] or f"{about['cores']} cores of an {about['cpu']}",
    }
    path.write_text(json.dumps(known, indent=2) + "\n")
    print(f"written: {path}")


def main(argv: list[str]) -> None:
    parser = harness.parser(__doc__)
    harness.add_case(parser)
    parser.add_argument("--num-workers", type=int, default=8, help="threads or processes, at most the cores")
    parser.add_argument("--images", type=int, default=50_000, help="of an epoch, which is a turn; as in CIFAR")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step-rate", type=float, help="img/s of the training step; default measured here")
    parser.add_argument("--step", choices=harness.MODES, default="eager", help="mode of the step that is measured")
    parser.add_argument("--record", action="store_true", help="write the speeds that --loader auto follows")
    parser.add_argument("--speeds", type=Path, default=choose_loader.SPEEDS, help="where --record writes")
    args = parser.parse_args(argv)
    case = harness.case_of(args)
    print(f"{case}\n{harness.warning()}".rstrip())
    rate = args.step_rate or step_rate(case, args.step)
    settings = harness.settings_of(
        case, num_workers=args.num_workers, images=args.images, step_rate=rate, step=args.step
    )

    def save(rates: dict[str, list[float]], quiet: bool = True) -> list[dict]:
        rows = rows_of(rates, rate)
        harness.write(args.out, harness.result("loader", settings, rows), quiet)
        return rows

    rows = save(speeds(case, args.num_workers, args.images, args.rounds, save), quiet=False)
    for row in rows:
        print(f"{row['loader']:9} {row['img/s'][1]:12,.0f} img/s  {row['share of step']:7.1%} of a step at {rate:,.0f}")
    if args.record:
        record(args.speeds, rows)


def rows_of(rates: dict[str, list[float]], step_rate: float) -> list[dict]:
    """A row for each loader."""
    rows = []
    for kind, samples in rates.items():
        quantiles = harness.quantiles(samples)
        rows.append({"loader": kind, "img/s": quantiles, "share of step": step_rate / quantiles[1]})
    return rows


def step_rate(case: Case, mode: str) -> float:
    """img/s of our training step on a batch on the device."""
    step, batch = harness.make_step(case, mode), harness.make_batch(case)
    ms = harness.quantiles(harness.alternating({"step": lambda: step(*batch, 0)}, 5, 2, harness.INNER)["step"])[1]
    return case.batch_size / ms * 1e3


if __name__ == "__main__":
    harness.run(main)
