"""Compare variants of a recipe by validation images alone: `python benchmarks/choose_recipe.py --variant cutmix=0`.

Each variant is a recipe with FIELD=VALUE changes, trained for the same few epochs on the same part of the training
images and scored on the rest; the test images are not read. One seed shows only large differences: use `--seeds 3`
where the best are close; column p is then the paired t-test against the best, with Holm's correction. Few epochs favour
weak regularisation. The result is written after each variant.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import tempfile
import time
from typing import Any

import harness
from time_to_accuracy import recipe

from effnet_fast import distributed
from effnet_fast.config import TrainConfig
from effnet_fast.run.training import train_in
from effnet_fast.search.choose import holm, paired_p


class _Stopped(Exception):
    """A signal stopped the run; finished variants are kept."""


def top1(config: TrainConfig) -> float:
    """Train to the end; the last evaluation's top-1 in percent, of the moving average if there is one."""
    outcome = train_in(distributed.alone(config.device), config)
    if not outcome.finished:
        raise _Stopped
    return outcome.top1


def row(variant: str, config: TrainConfig, seeds: int) -> dict[str, Any]:
    """A variant's mean and standard deviation over seeds, or the reason why it cannot be trained."""
    start = time.perf_counter()
    try:
        scores = [top1(dataclasses.replace(config, seed=seed)) for seed in range(seeds)]
    except (ValueError, FloatingPointError) as error:
        failed = {"val top1": None, "spread": None, "p": None, "s": None, "failed": str(error), "scores": []}
        return {"variant": variant, **failed}
    return {
        "variant": variant,
        "val top1": statistics.mean(scores),
        "spread": statistics.stdev(scores) if seeds > 1 else None,
        "p": None,
        "s": (time.perf_counter() - start) / seeds,
        "failed": "",
        "scores": scores,
    }


def compare(rows: list[dict[str, Any]]) -> None:
    """Sort by accuracy and set `p` of each variant but the best: paired t-test over the seeds, Holm's correction."""
    rows.sort(key=lambda row: -1.0 if row["val top1"] is None else row["val top1"], reverse=True)
    best, *others = rows
    raw = {row["variant"]: paired_p(best["scores"], row["scores"]) for row in others if len(row["scores"]) > 1}
    for row in rows:
        row["p"] = holm(raw).get(row["variant"])


def table(rows: list[dict[str, Any]]) -> str:
    return harness.table([{name: value for name, value in row.items() if name != "scores"} for row in rows])


def main(argv: list[str]) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--recipe", default="cifar100", help="name in effnet_fast/recipes, or a YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change all variants")
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="FIELD=VALUE ...",
        help="changes of a variant; '' is the recipe itself",
    )
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--val-fraction", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, default=1, help="runs of each variant, with seeds 0, 1, ...")
    args = parser.parse_args(argv)
    if args.seeds < 1 or not 0 < args.val_fraction < 1:
        raise ValueError("--seeds must be at least 1 and --val-fraction between 0 and 1")
    variants = args.variant or [""]
    shared = [*args.set, f"num_epochs={args.epochs}", f"val_fraction={args.val_fraction}", "resume=no"]
    configs = {variant: recipe(args.recipe, [*variant.split(), *shared]) for variant in variants}
    settings = {"recipe": args.recipe, "changes": shared, "seeds": args.seeds, "variants": list(configs)}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(_Stopped):
        for variant, config in configs.items():
            rows.append(row(variant or "as it is", dataclasses.replace(config, save_dir=folder), args.seeds))
            print(table(rows[-1:]), flush=True)
            compare(rows)
            harness.write(args.out, harness.result("choose_recipe", settings, rows))
    print(table(rows))


if __name__ == "__main__":
    harness.run(main)
