"""Seconds until a run first reaches a top-1 on its test images: `python benchmarks/time_to_accuracy.py --target 75 80`.

Runs `effnet-fast train` with a recipe (`--recipe`, and `--set FIELD=VALUE`) once for each seed, and stops each run when
an evaluation reaches the highest target; with `--keep FOLDER` it trains to its end, and is kept in FOLDER/NAME/seed0,
... for `--out NAME.json`. Before the clock starts, a step and an evaluation compile what is left to compile and are
undone; their seconds are reported separately. (On a GPU, the Triton kernels have compiled before them.) The clock
covers training, loading and saving, with and without evaluations. A target that a seed misses has no mean. The result
is written after each seed; the same command with the same `--out` continues, on the same kind of machine, with the
seeds that are missing. `--candidate timm` trains one of candidates.py instead: the recipe with its changes, or with
timm's model.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import harness
import torch
from candidates import CANDIDATES, Candidate, building

import effnet_fast
from effnet_fast import cli
from effnet_fast.config import TrainConfig
from effnet_fast.outcome import metric
from effnet_fast.run import training
from effnet_fast.run.plan import run_folder
from effnet_fast.train.graph import unchanged

RECIPES = Path(effnet_fast.__file__).parent / "recipes"
MACHINE = ("gpu", "cpu", "cores", "torch")  # of the provenance: seconds compare only where these are the same


class _Reached(Exception):
    """The run has reached its target."""


class Clock:
    """Replaces the loop `fit`: compiles first, records the time of each evaluation, and stops at a top-1."""

    def __init__(self, target: float) -> None:
        self.target = target
        self.compile_seconds = 0.0
        self.history: list[dict[str, float]] = []

    def fit(self, step, loader, watch, progress, epochs, hooks, stop) -> None:
        evaluate = hooks.evaluate
        start = time.perf_counter()
        self._compile(step, loader, evaluate.__self__)  # the run
        self.compile_seconds = time.perf_counter() - start
        self.start, self.evaluating = time.perf_counter(), 0.0
        hooks = dataclasses.replace(hooks, evaluate=lambda: self._evaluate(evaluate, progress))
        self.real(step, loader, watch, progress, epochs, hooks, stop)

    real = staticmethod(training.fit)

    def _compile(self, step, loader, run) -> None:
        with unchanged(step.tensors):  # load_state would make the step capture its graph again
            for number in step.sizes.starts:  # the first step of each image size
                step(*next(iter(loader.epoch(0))), number)
            run._evaluate_weights()  # compiles other kernels than the step
        harness.synchronise()

    def _evaluate(self, evaluate: Callable[[], None], progress) -> None:
        harness.synchronise()
        start = time.perf_counter()
        evaluate()
        now = time.perf_counter()
        self.evaluating += now - start
        row = evaluate.__self__.last_result  # type: ignore[attr-defined]
        top1 = metric(row, "top1")
        seconds = now - self.start
        self.history.append(
            {"epoch": progress.epoch, "top1": top1, "s": seconds, "s without evaluation": seconds - self.evaluating}
        )
        if top1 >= self.target:
            raise _Reached


def one_run(config: TrainConfig, target: float, candidate: Candidate) -> dict:
    """Train until the target or the end; all evaluations with their times."""
    clock = Clock(target)
    with building(candidate), mock.patch.object(training, "fit", clock.fit):
        try:
            status = training.train(config).status
        except _Reached:
            status = 0
    if status or not clock.history:
        raise ValueError(f"the run of seed {config.seed} was stopped before its first evaluation, or by a signal")
    commit = harness.environment()["commit"]
    return {"seed": config.seed, "commit": commit, "compile s": clock.compile_seconds, "history": clock.history}


def reached(row: dict, target: float) -> dict[str, float] | None:
    """A run's first evaluation at or above the target."""
    return next((moment for moment in row["history"] if moment["top1"] >= target), None)


def continues(made: dict, settings: dict) -> bool:
    """Whether an earlier result has these settings, and was measured on such a machine with as many threads."""
    same_machine = all(made["provenance"][name] == harness.environment()[name] for name in MACHINE)
    return same_machine and made["threads"] == torch.get_num_threads() and settings.items() <= made["settings"].items()


def shared(config: TrainConfig) -> dict[str, Any]:
    """The settings that all seeds share. They are kept, so that a recipe that has changed since is not continued."""
    own = {"seed", "save_dir", "data_dir"}
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in own}


def recipe(name: str, changes: list[str]) -> TrainConfig:
    """A packaged recipe or a YAML file, with FIELD=VALUE changes.

    Raises:
        ValueError: the recipe or a field does not exist.
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


def summary(rows: list[dict], target: float) -> dict[str, float]:
    """How many seeds reached a target; if all did, mean and standard deviation of their seconds."""
    seconds = [moment["s"] for moment in (reached(row, target) for row in rows) if moment is not None]
    counts = {"target": target, "seeds": len(rows), "reached": len(seconds)}
    if len(seconds) < len(rows):
        return counts
    spread = statistics.stdev(seconds) if len(seconds) > 1 else 0.0
    return counts | {"mean s": statistics.mean(seconds), "standard deviation s": spread}


def print_run(row: dict, targets: list[float]) -> None:
    """Print the run of a seed."""
    print(f"seed {row['seed']}: compiling {row['compile s']:.1f} s")
    for target in targets:
        moment, last = reached(row, target), row["history"][-1]
        if moment is None:
            print(f"  {target:g} % NOT reached: {last['top1']:.2f} % at the end, after {last['s']:.1f} s")
        else:
            print(
                f"  {target:g} %: {moment['top1']:.2f} % after {moment['s']:.1f} s "
                f"({moment['s without evaluation']:.1f} s without evaluations)"
            )


def main(argv: list[str]) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--recipe", default="cifar100-cpu", help="name in effnet_fast/recipes, or a YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change the recipe")
    parser.add_argument("--target", type=float, nargs="+", required=True, help="top-1 in percent, one or several")
    parser.add_argument("--candidate", choices=CANDIDATES, help="train this candidate of candidates.py")
    parser.add_argument("--keep", metavar="FOLDER", help="train each run to its end, and keep it in FOLDER/OUT")
    parser.add_argument("--seeds", type=int, default=3, help="number of runs, with seeds 0, 1, ...")
    args = parser.parse_args(argv)
    if args.keep and not args.out:
        raise ValueError("--keep needs --out, whose name the kept runs have too")
    if args.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, not {args.seeds}")
    candidate = CANDIDATES[args.candidate] if args.candidate else Candidate()
    config = recipe(args.recipe, [*candidate.changes.split(), *args.set])
    targets = sorted(args.target)
    named = " and ".join(f"{target:g} %" for target in targets)
    settings = {"recipe": args.recipe, "changes": args.set, "candidate": args.candidate, "targets": targets}
    settings["config"] = shared(config)
    rows = harness.earlier_rows(args.out, "measurement on this machine", lambda made: continues(made, settings))
    words = [args.recipe, *([f"as {args.candidate}"] if args.candidate else []), *args.set]
    print(f"recipe {' '.join(words)}, target {named}\n{harness.warning()}".rstrip())
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(len(rows), args.seeds):
            torch.compiler.reset()
            parent = f"{args.keep}/{args.out.stem}/seed{seed}" if args.keep else folder
            run = dataclasses.replace(config, seed=seed, save_dir=parent, resume="no")
            shutil.rmtree(run_folder(run), ignore_errors=True)  # a requeued Slurm job would resume it without its time
            rows.append(one_run(run, math.inf if args.keep else targets[-1], candidate))
            print_run(rows[-1], targets)
            goals = {"summary": [summary(rows, target) for target in targets]}
            harness.write(args.out, harness.result("time_to_accuracy", settings | goals, rows))
    for row in (summary(rows, target) for target in targets):
        if "mean s" in row:
            print(
                f"{row['target']:g} %: {row['mean s']:.1f} +- {row['standard deviation s']:.1f} s over "
                f"{row['seeds']} seed(s)"
            )


if __name__ == "__main__":
    harness.run(main)
