"""Seconds until a run first reaches a top-1 on its test images: `python benchmarks/time_to_accuracy.py --target 75`.

Runs `effnet-fast train` with a recipe (`--recipe`, and `--set FIELD=VALUE`), once for each seed, in one process, and
stops each as soon as an evaluation reaches the target. One step before the clock starts compiles and is then undone:
its seconds are told apart. The clock covers training, loading and saving; seconds with and without evaluations are
told. A seed that ends without reaching the target is reported as such, and no mean is given.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import harness
import torch

import effnet_fast
from effnet_fast import cli
from effnet_fast.config import TrainConfig
from effnet_fast.run import training

RECIPES = Path(effnet_fast.__file__).parent / "recipes"


class _Reached(Exception):
    """The run has done what it was started for."""


class Clock:
    """Stands in for the loop `fit`: compiles first, notes when each evaluation ended, and stops at the target."""

    def __init__(self, target: float) -> None:
        self.target = target
        self.compile_seconds = 0.0
        self.history: list[dict[str, float]] = []

    def fit(self, step, loader, watch, progress, epochs, every, stop) -> None:
        begin = time.perf_counter()
        self._compile(step, loader)
        self.compile_seconds = time.perf_counter() - begin
        self.start, self.evaluating = time.perf_counter(), 0.0
        evaluate = every.evaluate
        every = dataclasses.replace(every, evaluate=lambda: self._evaluate(evaluate, progress))
        self.real(step, loader, watch, progress, epochs, every, stop)

    real = staticmethod(training.fit)

    def _compile(self, step, loader) -> None:
        state = copy.deepcopy(step.state_dict())
        step(*next(iter(loader.epoch(0))), 0)
        step.load_state_dict(state)
        harness.synchronise()

    def _evaluate(self, evaluate: Callable[[], None], progress) -> None:
        harness.synchronise()
        begin = time.perf_counter()
        evaluate()
        now = time.perf_counter()
        self.evaluating += now - begin
        row = evaluate.__self__.last_result  # type: ignore[attr-defined]  # the run's own method
        top1 = row.get("ema_top1", row["top1"])
        seconds = now - self.start
        self.history.append(
            {"epoch": progress.epoch, "top1": top1, "s": seconds, "s without evaluation": seconds - self.evaluating}
        )
        if top1 >= self.target:
            raise _Reached


def one_run(config: TrainConfig, target: float) -> dict:
    """Train until the target or the end; what was reached, and when."""
    clock = Clock(target)
    with mock.patch.object(training, "fit", clock.fit):
        try:
            status = training.train(config)
        except _Reached:
            status = 0
    if status or not clock.history:
        raise ValueError(f"the run of seed {config.seed} was stopped before its first evaluation, or by a signal")
    last = clock.history[-1]
    return {
        "seed": config.seed,
        "reached": last["top1"] >= target,
        "compile s": clock.compile_seconds,
        **last,
        "history": clock.history,
    }


def recipe(name: str, changes: list[str]) -> TrainConfig:
    """A packaged recipe or a YAML file, with FIELD=VALUE changes.

    Raises:
        ValueError: there is no such recipe or field.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.exists():
        raise ValueError(
            f"no recipe {name!r}; packaged are {', '.join(sorted(p.stem for p in RECIPES.glob('*.yaml')))}"
        )
    for change in changes:
        if "=" not in change:
            raise ValueError(f"--set {change}: write FIELD=VALUE")
    return cli.parse(cli.VERBS["train"], "train", ["--config", str(path), *(f"--{change}" for change in changes)])


def summary(rows: list[dict]) -> dict[str, float]:
    """Mean and standard deviation over seeds; empty unless all reached the target."""
    if not all(row["reached"] for row in rows):
        return {}
    seconds = [row["s"] for row in rows]
    spread = statistics.stdev(seconds) if len(seconds) > 1 else 0.0
    return {"mean s": statistics.mean(seconds), "standard deviation s": spread, "seeds": len(seconds)}


def main(argv: list[str]) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--recipe", default="cifar100-cpu", help="name in effnet_fast/recipes, or a YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change the recipe")
    parser.add_argument("--target", type=float, required=True, help="top-1 in percent")
    parser.add_argument("--seeds", type=int, default=3, help="runs, of seeds 0, 1, ...")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, not {args.seeds}")
    config = recipe(args.recipe, args.set)
    print(f"recipe {args.recipe} {' '.join(args.set)}, target {args.target:g} %\n{harness.warning()}".rstrip())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            torch.compiler.reset()
            rows.append(one_run(dataclasses.replace(config, seed=seed, save_dir=folder, resume="no"), args.target))
            row = rows[-1]
            print(
                f"seed {seed}: {'reached' if row['reached'] else 'NOT reached, ended at'} {row['top1']:.2f} % after "
                f"{row['s']:.1f} s ({row['s without evaluation']:.1f} s without evaluations), "
                f"compiling {row['compile s']:.1f} s"
            )
    whole = summary(rows)
    if whole:
        print(f"{whole['mean s']:.1f} +- {whole['standard deviation s']:.1f} s over {whole['seeds']} seed(s)")
    settings = {"recipe": args.recipe, "changes": args.set, "target": args.target, "summary": whole}
    harness.write(args.out, harness.result("time_to_accuracy", settings, rows))


if __name__ == "__main__":
    harness.run(main)
