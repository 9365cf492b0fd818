#!/usr/bin/env bash
# Is everything right on this GPU? Under 10 minutes, into one JSON with its provenance.
#
#   benchmarks/gpu_correct.sh [OUT.json]       default benchmarks/results/correct-DATE.json
#
# The tests with the kernels for real, every op at every layer of B0 to B7 against float64, the eager, compiled and
# captured step, DALI on the GPU, DDP on nccl, exact resume, and the kernels under compute-sanitizer. Without a GPU a
# few of the tests run. Environment: PYTHON (default python), WORKERS (tests side by side; default 12).
set -uo pipefail
suite=correct
# shellcheck source=benchmarks/parts.sh
source "$(dirname "$0")/parts.sh"
cd "$here/.." || exit 1

side_by_side=(--numprocesses "${WORKERS:-12}")
if on_gpu; then
    # The limits add up to 580 s. The captured step compiles eight models, and each test of resuming trains in four
    # processes, two of which compile: these come first, since all else builds on the step, and have the time for it.
    # --seconds begins after checks.py's own imports, hence 15 s below the limit.
    part checks 110 --seconds 95 -- tests/train/test_graph.py tests/test_distributed.py tests/data -m "" "${side_by_side[@]}"
    part checks 140 --seconds 125 -- tests/op_tests -m "" "${side_by_side[@]}"
    part checks 150 --seconds 135 -- tests/faults/test_kills.py tests/test_launchers.py -m "" -k "gpu or nccl" -n 4
    part checks 50 --seconds 35 --sanitizer memcheck -- tests/op_tests/test_ops.py -m "not slow" -k "against and no-vector"
    part checks 50 --seconds 35 --sanitizer racecheck -- tests/op_tests/test_ops.py -m "not slow" -k "against and no-vector"
    part checks 80 --seconds 65 -- tests -m "not slow" "${side_by_side[@]}" --dist loadfile
else
    echo "no GPU: a few of the tests, in Triton's interpreter"
    part checks 120 --seconds 110 -- tests/op_tests/test_ops.py -m "not slow" -k "against and silu and no-vector" -n 1
    part checks 120 --seconds 110 -- tests/train/test_graph.py -k "gpu or graph" -n 1
fi
finish
