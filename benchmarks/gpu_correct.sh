#!/usr/bin/env bash
# Is everything right on this GPU? Under 10 minutes, into one JSON with its provenance.
#
#   benchmarks/gpu_correct.sh [OUT.json]       default benchmarks/results/correct-DATE.json
#
# The tests that need a GPU (captured step, DALI, nccl, exact resume), every op against float64, the ops at every layer
# of B0, and the kernels under compute-sanitizer. Tests that only compile are left out: they need no GPU. Without a GPU a
# few tests run in Triton's interpreter. Environment: PYTHON (default python), WORKERS (test processes; default 12).
set -uo pipefail
suite=correct
# shellcheck source=benchmarks/parts.sh
source "$(dirname "$0")/parts.sh"
cd "$here/.." || exit 1

workers=(--numprocesses "${WORKERS:-12}")
ops=(tests/op_tests/test_ops.py tests/op_tests/test_registration.py tests/op_tests/test_model.py)
if on_gpu; then
    # The limits add up to 540 s; --seconds starts after the imports of checks.py, so it is 15 s shorter. The captured
    # step compiles eight models, and a test of resuming trains in four processes, two of which compile.
    part checks 100 --seconds 85 -- tests -m "gpu and not slow" "${workers[@]}"
    part checks 110 --seconds 95 -- "${ops[@]}" -m "" "${workers[@]}"
    part checks 110 --seconds 95 -- tests --ignore tests/op_tests -m "gpu and slow" --numprocesses 4
    part checks 75 --seconds 60 -- tests/op_tests/test_every_layer.py -m "" -k b0 "${workers[@]}"
    # Python and torch alone take half a minute to start under the sanitizer.
    part checks 85 --seconds 70 --sanitizer memcheck -- tests/op_tests/test_ops.py -m "not slow" -k "against and no-vector"
    part checks 60 --seconds 45 --sanitizer racecheck -- tests/op_tests/test_ops.py -m "not slow" -k "against and no-vector"
else
    echo "no GPU: a few of the tests, in Triton's interpreter"
    part checks 120 --seconds 110 -- tests/op_tests/test_ops.py -m "not slow" -k "against and silu and no-vector" -n 1
    part checks 120 --seconds 110 -- tests/train/test_graph.py -k "gpu or graph" -n 1
fi
finish
