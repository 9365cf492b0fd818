"""Compare training options at equal training time, on validation images: `python benchmarks/choose_recipe.py`.

Each candidate is a recipe with changes. It is trained with each seed on a part of the training images and scored on the
rest; the test images are not read. Every candidate gets the time of `--epochs` epochs of the first one: its steps and
the first one's, loading included, are timed in turns, so that other load on the machine affects both alike, and it
trains for the nearest number of whole epochs: the more `--epochs`, the more equal the time; column s holds the seconds.

Each candidate is compared with the one it builds on (`against`) by the paired t-test over the seeds, with Holm's
correction for all comparisons. It is to be adopted only if it scores higher with p below 0.05 on at least 3 seeds.

Without `--variant`, the candidates are those of candidates.py, or some of them: `--only muon zero-init`. The result is
written after each run; the same command with the same `--out` continues, also with more candidates or seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import harness
from candidates import CANDIDATES, Candidate, building
from time_to_accuracy import recipe, shared

from effnet_fast import distributed
from effnet_fast.config import TrainConfig
from effnet_fast.run.build import build
from effnet_fast.run.plan import make_plan, run_folder
from effnet_fast.run.training import train_in
from effnet_fast.search.choose import holm, paired_p

Row = dict[str, Any]

LEAST_SEEDS = 3  # for a test
LEVEL = 0.05
AS_IT_IS = "as it is"


class _Stopped(Exception):
    """A signal stopped the run; finished runs are kept."""


# -- equal time


@dataclass(frozen=True)
class Entry:
    """A candidate and its config."""

    candidate: Candidate
    config: TrainConfig


@dataclass(frozen=True)
class Steps:
    """A candidate's steps by image size: the call that takes one, and their number in a run of `--epochs` epochs."""

    calls: dict[int, harness.Call]
    counts: dict[int, int]


@contextlib.contextmanager
def steps_of(entry: Entry) -> Iterator[Steps]:
    """Build a candidate's run to time its steps, each on the next batch of its loader."""
    with building(entry.candidate):
        plan = make_plan(entry.config, distributed.alone(entry.config.device), None)
        parts = build(plan)
    batches = harness.endless(parts.loader)
    first_steps = dict(zip(plan.sizes.sizes, plan.sizes.starts, strict=True))
    counts = plan.sizes.counts(0, plan.steps)

    def call(size: int) -> harness.Call:
        return lambda: parts.step(*next(batches), first_steps[size])

    try:
        yield Steps({size: call(size) for size in counts}, counts)
    finally:
        parts.close()


def relative_time(first: Entry, other: Entry, rounds: int) -> float:
    """Time of an epoch of `other` as a multiple of that of `first`; their steps take turns."""
    with steps_of(first) as one, steps_of(other) as two:
        calls = {(who, size): call for who, steps in enumerate((one, two)) for size, call in steps.calls.items()}
        # A step captured in a CUDA graph is captured anew when the image size changes.
        samples = harness.alternating(calls, rounds, warm_up=2, inner=harness.INNER, first=1)
    first_ms, other_ms = (
        [sum(count * samples[who, size][turn] for size, count in steps.counts.items()) for turn in range(rounds)]
        for who, steps in enumerate((one, two))
    )
    return statistics.median(other / first for first, other in zip(first_ms, other_ms, strict=True))


# -- runs


def top1(entry: Entry, seed: int, epochs: int) -> float:
    """Train to the end; the last evaluation's top-1 in percent, of the moving average if there is one."""
    config = dataclasses.replace(entry.config, seed=seed, num_epochs=epochs, eval_every_epochs=epochs)
    shutil.rmtree(run_folder(config), ignore_errors=True)  # a requeued Slurm job would resume another candidate's run
    with building(entry.candidate):
        outcome = train_in(distributed.alone(config.device), config)
    if not outcome.finished:
        raise _Stopped
    return outcome.top1


def train(row: Row, seed: int, entry: Entry, first: Entry, rounds: int) -> None:
    """Train a candidate with a seed and add its score to its row, or why it cannot be trained.

    Args:
        row: completed in place.
        first: the entry whose epochs set the time.
        rounds: turns of the timing; 0 gives all candidates the same epochs.
    """
    try:
        if row["epochs"] is None:
            ratio = relative_time(first, entry, rounds) if rounds and entry is not first else 1.0
            row["relative time"], row["epochs"] = ratio, max(1, round(first.config.num_epochs / ratio))
        start = time.perf_counter()
        row["scores"].append(top1(entry, seed, row["epochs"]))
        row["seconds"].append(time.perf_counter() - start)
        row["commits"].append(harness.environment()["commit"])
    except (ValueError, FloatingPointError, ImportError) as error:
        row["failed"] = str(error)


# -- the comparison


def new_row(name: str, candidate: Candidate) -> Row:
    """A candidate without runs."""
    row = {"candidate": name, **dataclasses.asdict(candidate), "relative time": None, "epochs": None}
    return row | {"scores": [], "seconds": [], "commits": [], "failed": ""}


def judge(rows: list[Row]) -> None:
    """Set each row's `gain` over the candidate it builds on, in points of top-1, its `p`, and whether to adopt it."""
    scores = {row["candidate"]: row["scores"] for row in rows}
    raw = {}
    for row in rows:
        other = scores.get(row["against"], [])
        pairs = min(len(row["scores"]), len(other))  # the same seeds
        own, other = row["scores"][:pairs], other[:pairs]
        row["gain"] = statistics.mean(own) - statistics.mean(other) if pairs else None
        if pairs >= LEAST_SEEDS:
            raw[row["candidate"]] = paired_p(own, other)
    corrected = holm(raw)
    for row in rows:
        row["p"] = corrected.get(row["candidate"])
        row["adopt"] = "" if row["p"] is None else "yes" if row["p"] < LEVEL and row["gain"] > 0 else "no"


def table(rows: list[Row]) -> str:
    """The best candidates first: mean and standard deviation of top-1 over the seeds, and the comparison."""
    ranked = sorted(rows, key=lambda row: statistics.mean(row["scores"] or [-1.0]), reverse=True)
    return harness.table([_printed(row) for row in ranked])


def _printed(row: Row) -> dict[str, str]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    scores, seconds = row["scores"], row["seconds"]
    return {
        "candidate": row["candidate"],
        "val top1": number(statistics.mean(scores) if scores else None, ".2f"),
        "spread": number(statistics.stdev(scores) if len(scores) > 1 else None, ".2f"),
        "seeds": str(len(scores)),
        "epochs": number(row["epochs"], "d"),
        "s": number(statistics.mean(seconds) if seconds else None, ".0f"),
        "against": row["against"] or "",
        "gain": number(row["gain"], "+.2f"),
        "p": number(row["p"], ".3f"),
        "adopt": row["failed"] or row["adopt"],
    }


def read_rows(path: Path | None, settings: dict[str, Any], fresh: dict[str, Row]) -> dict[str, Row]:
    """The rows of an earlier, interrupted comparison, and the fresh ones that it lacks; all by name.

    Raises:
        ValueError: the file holds something else, or a comparison with other settings.
    """

    def matches(made: dict[str, Any]) -> bool:
        return made["settings"] == settings and all(
            row[field] == fresh[row["candidate"]][field]
            for row in made["rows"]
            if row["candidate"] in fresh
            for field in ("changes", "against", "peer")
        )

    earlier = {row["candidate"]: row for row in harness.earlier_rows(path, "comparison", matches)}
    # A candidate that could not be trained is tried again.
    kept = {name: {"commits": [None] * len(row["scores"])} | row | {"failed": ""} for name, row in earlier.items()}
    return {**fresh, **kept}


def chosen(args: argparse.Namespace) -> dict[str, Candidate]:
    """The candidates by name, those that are compared with each other."""
    if args.variant:
        first = args.variant[0] or AS_IT_IS
        names = {variant or AS_IT_IS: variant for variant in args.variant}
        return {name: Candidate(changes, None if name == first else first) for name, changes in names.items()}
    return {name: CANDIDATES[name] for name in args.only or CANDIDATES}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = harness.parser(__doc__)
    parser.add_argument("--recipe", default="cifar100-cpu", help="name in effnet_fast/recipes, or a YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change all candidates")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=CANDIDATES,
        metavar="NAME",
        help="of " + ", ".join(CANDIDATES) + "; the first one's time is the others'",
    )
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="FIELD=VALUE ...",
        help="changes of a candidate of your own, '' is the recipe itself; the first one is what others are against",
    )
    parser.add_argument("--epochs", type=int, default=5, help="of the first candidate; the others get its time")
    parser.add_argument("--same-epochs", action="store_true", help="give all --epochs, without timing them")
    parser.add_argument("--rounds", type=int, default=9, help="turns in which steps are timed")
    parser.add_argument("--val-fraction", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, default=LEAST_SEEDS, help="runs of each candidate, with seeds 0, 1, ...")
    args = parser.parse_args(argv)
    if min(args.seeds, args.epochs, args.rounds) < 1 or not 0 < args.val_fraction < 1:
        raise ValueError("--seeds, --epochs and --rounds must be at least 1 and --val-fraction between 0 and 1")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    candidates = chosen(args)
    changes = [*args.set, f"num_epochs={args.epochs}", f"val_fraction={args.val_fraction}", "resume=no"]
    first = next(iter(candidates))
    settings = {"recipe": args.recipe, "changes": changes, "same epochs": args.same_epochs, "first": first}
    with TemporaryDirectory() as folder:
        entries = {
            name: Entry(candidate, recipe(args.recipe, [*candidate.changes.split(), *changes, f"save_dir={folder}"]))
            for name, candidate in candidates.items()
        }
        settings["config"] = shared(entries[first].config)
        rows = read_rows(args.out, settings, {name: new_row(name, entry.candidate) for name, entry in entries.items()})
        runs = [(seed, name) for seed in range(args.seeds) for name in entries if seed >= len(rows[name]["scores"])]
        start = time.perf_counter()
        with contextlib.suppress(_Stopped):
            for done, (seed, name) in enumerate(runs, start=1):
                row = rows[name]
                if row["failed"]:
                    continue
                train(row, seed, entries[name], entries[first], 0 if args.same_epochs else args.rounds)
                judge(list(rows.values()))
                harness.write(args.out, harness.result("choose_recipe", settings, list(rows.values())), quiet=True)
                left = (time.perf_counter() - start) / done * (len(runs) - done) / 60
                outcome = row["failed"] or f"{row['scores'][-1]:.2f} %"
                print(
                    f"run {done} of {len(runs)}: {name}, seed {seed}: {outcome}; about {left:.0f} min left", flush=True
                )
    judge(list(rows.values()))
    print(table(list(rows.values())))


if __name__ == "__main__":
    harness.run(main)
