"""Images per second of the loaders: `python benchmarks/loader.py [--step-rate IMG_PER_S] [--record]`.

DALI (on the GPU where there is one, and on the CPU), the resident loader, and a torch DataLoader with worker processes
deliver the same training batches of synthetic 32 px images with crop and flip, and take turns. The share of the step is
a batch's loading time over a training step's time: at 100 % or more the loader is the bottleneck. `--record` writes the
file that `--loader auto` follows.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import harness
import torch
from harness import Case

from effnet_fast.data import choose_loader
from effnet_fast.data.loader import Loader

IMAGES = 50_000  # as in CIFAR: the start of an epoch is part of the rate
SPEEDS = Path(choose_loader.__file__).with_name("loader_speeds.json")


def make(kind: str, case: Case, workers: int) -> tuple[Loader, Iterator]:
    """A loader and its endless batches on the device; `dali-cpu` loads on the CPU and copies to the device.

    Raises:
        ValueError, ImportError: the loader does not work on this machine.
    """
    if kind != "dali-cpu":
        return harness.make_batches(case, kind, workers, IMAGES)
    loader, batches = harness.make_batches(case, "dali", workers, IMAGES, torch.device("cpu"))
    return loader, (tuple(t.to(harness.DEVICE, non_blocking=True) for t in batch) for batch in batches)


def kinds() -> list[str]:
    """Loaders to measure; without a GPU `dali` is DALI on the CPU."""
    return (["dali", "dali-cpu"] if harness.DEVICE == "cuda" else ["dali"]) + ["resident", "torch"]


def speeds(
    case: Case, workers: int, batches: int, rounds: int, after_round: Callable[[dict[str, list[float]]], None]
) -> dict[str, list[float]]:
    """img/s of each loader that works here, one figure a round, in turns; `after_round` receives those so far."""
    loaders = {}
    for kind in kinds():
        try:
            loaders[kind] = make(kind, case, workers)
        except (ValueError, ImportError) as error:
            print(f"{kind} is left out: {error}")
    try:
        for _, stream in loaders.values():
            _drain(stream, batches)
        rates: dict[str, list[float]] = {kind: [] for kind in loaders}
        for _ in range(rounds):
            for kind, (_, stream) in loaders.items():
                start = time.perf_counter()
                _drain(stream, batches)
                rates[kind].append(batches * case.batch_size / (time.perf_counter() - start))
            after_round(rates)
        return rates
    finally:
        for loader, _ in loaders.values():
            loader.close()


def _drain(stream: Iterator, batches: int) -> None:
    for _ in range(batches):
        next(stream)
    harness.synchronise()


def record(path: Path, rows: list[dict]) -> None:
    """Write the medians under this device's name into the file that `--loader auto` follows."""
    about = harness.environment()
    name = torch.cuda.get_device_name() if harness.DEVICE == "cuda" else "cpu"
    known = json.loads(path.read_text()) if path.exists() else {}
    known[name] = {row["loader"]: round(row["img/s"][1]) for row in rows if row["loader"] != "dali-cpu"} | {
        "commit": about["commit"],
        "date": about["date"][:10],
        "torch_version": about["torch"],
        "dali_version": about["nvidia-dali-cuda120"],
        "machine": about["gpu"] or f"{about['cores']} cores of an {about['cpu']}",
    }
    path.write_text(json.dumps(known, indent=2) + "\n")
    print(f"written: {path}")


def main(argv: list[str]) -> None:
    parser = harness.parser(__doc__)
    harness.add_case(parser)
    parser.add_argument("--num-workers", type=int, default=8, help="threads or processes, at most the cores")
    parser.add_argument("--batches", type=int, default=20, help="batches in each turn of a loader")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step-rate", type=float, help="img/s of the training step; default measured here")
    parser.add_argument("--step", choices=harness.MODES, default="eager", help="mode of the step that is measured")
    parser.add_argument("--record", action="store_true", help="write the speeds that --loader auto follows")
    parser.add_argument("--speeds", type=Path, default=SPEEDS, help="where --record writes")
    args = parser.parse_args(argv)
    case = harness.case_of(args)
    print(f"{case}\n{harness.warning()}".rstrip())
    rate = args.step_rate or step_rate(case, args.step)
    settings = harness.settings_of(case, num_workers=args.num_workers, step_rate=rate, step=args.step)

    def save(rates: dict[str, list[float]], quiet: bool = True) -> list[dict]:
        rows = rows_of(rates, rate)
        harness.write(args.out, harness.result("loader", settings, rows), quiet)
        return rows

    rows = save(speeds(case, args.num_workers, args.batches, args.rounds, save), quiet=False)
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
