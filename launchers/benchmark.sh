#!/usr/bin/env bash
# Measure training and inference speed against the peers.
#
#   launchers/benchmark.sh [--dry-run] ...
#
# Arguments: those of benchmarks/throughput.py. Environment: CUDA_VISIBLE_DEVICES chooses the GPU.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/launch.sh"

launch python "$(dirname "$0")/../benchmarks/throughput.py" "$@"
