"""Two trainings at once on one machine: how fast each is with different waiting policies of OpenMP.

Each policy gets a pair of processes that train the same case on the CPU. One process of a pair trains alone for some
seconds, then both do. Rounds alternate over the policies, so that other work on the machine affects all alike. The
first seconds of each training are not timed: in them the package's policy reacts to the load of the one before. The
result is written after each round.

    python benchmarks/crowd.py --rounds 9 --out benchmarks/results/crowd.json
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

import harness
from harness import Case

from effnet_fast import openmp

POLICIES: dict[str, dict[str, str]] = {
    "package": {},  # with `openmp.share_cores`, which a setting of the user turns off
    "libgomp": {"GOMP_SPINCOUNT": "300000"},  # its own default
    "passive": {"OMP_WAIT_POLICY": "passive"},
    **{f"spin {count}": {"GOMP_SPINCOUNT": str(count)} for count in (100, 300, 1000, 3000)},
    "1 thread": {"OMP_NUM_THREADS": "1"},
}
VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")


class Trainer:
    """A process that trains on request, and reports its images per second."""

    def __init__(self, case: Case, policy: dict[str, str], settle: float, seconds: float) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | policy
        arguments = ["--image-size", case.image_size, "--output-stride", case.output_stride, "--model", case.model]
        arguments += ["--batch-size", case.batch_size, "--dtype", case.dtype]
        arguments += ["--settle", settle, "--seconds", seconds, "--worker"]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.read()  # it has warmed up

    def start(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("train\n")
        self.process.stdin.flush()

    def read(self) -> float:
        assert self.process.stdout is not None
        return float(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()


def worker(case: Case, settle: float, seconds: float) -> None:
    """Train whenever a line comes on stdin: first untimed, then timed."""
    step, batch = harness.make_step(case, "eager"), harness.make_batch(case)
    for number in range(3):
        step(*batch, number)
    print(0, flush=True)

    def run(seconds: float) -> tuple[int, float]:
        """Number of steps, and the seconds they took."""
        steps, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds:
            step(*batch, steps)
            steps += 1
        return steps, time.perf_counter() - begin

    with openmp.share_cores():
        for _ in sys.stdin:
            run(settle)
            steps, elapsed = run(seconds)
            print(steps * case.batch_size / elapsed, flush=True)


def measure(pair: list[Trainer]) -> tuple[float, float]:
    """Images per second of one process alone, and of the slower one when both train."""
    pair[0].start()
    alone = pair[0].read()
    for trainer in pair:
        trainer.start()
    return alone, min([trainer.read() for trainer in pair])


def main(argv: list[str]) -> None:
    parser = harness.parser(__doc__)
    harness.add_case(parser)
    parser.set_defaults(output_stride=32)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one measurement")
    parser.add_argument("--settle", type=float, default=2 * openmp.POLL_SECONDS, help="untimed seconds before each")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES), metavar="POLICY")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    case = harness.case_of(args)
    if args.worker:
        worker(case, args.settle, args.seconds)
        return
    if harness.DEVICE == "cuda":
        raise ValueError("this measures CPU trainings: hide the GPU with CUDA_VISIBLE_DEVICES=")
    pairs = {
        name: [Trainer(case, POLICIES[name], args.settle, args.seconds) for _ in range(2)] for name in args.policies
    }
    samples = {name: [] for name in pairs}
    settings = harness.settings_of(case, rounds=args.rounds)
    for _ in range(args.rounds):
        for name, pair in pairs.items():
            samples[name].append(measure(pair))
        harness.write(args.out, harness.result("crowd", settings, [row(name, samples) for name in pairs]), quiet=True)
    for pair in pairs.values():
        for trainer in pair:
            trainer.close()
    print(harness.table([row(name, samples) for name in pairs]))


def row(name: str, samples: dict[str, list[tuple[float, float]]]) -> dict[str, object]:
    """p20, p50 and p80 of a policy; ratios are of measurements of the same round."""
    alone, together = (list(values) for values in zip(*samples[name], strict=True))
    result: dict[str, object] = {"policy": name}
    for label, values in (("alone", alone), ("together", together)):
        result[f"{label} img/s p20 p50 p80"] = " ".join(f"{value:.0f}" for value in harness.quantiles(values))
    for label, reference, index in (("alone / libgomp", "libgomp", 0), ("together / 1 thread", "1 thread", 1)):
        if reference in samples:
            pairs = zip(samples[name], samples[reference], strict=True)
            ratios = harness.quantiles([mine[index] / other[index] for mine, other in pairs])
            result[f"{label} p20 p50 p80"] = " ".join(f"{ratio:.2f}" for ratio in ratios)
    return result


if __name__ == "__main__":
    harness.run(main)
