#!/usr/bin/env bash
# The kernels on one GPU, under 10 minutes, into one JSON with its provenance.
#
#   benchmarks/gpu_kernels.sh [OUT.json]       default benchmarks/results/kernels-DATE.json
#
# Times every launch of an op's space beside the one that the package chooses, then the ops beside PyTorch's operators,
# then 1x1 convolutions as convolutions and as matrix products. Without a GPU the smallest form of each runs.
# Environment: PYTHON (default python).
set -uo pipefail
suite=kernels
# shellcheck source=benchmarks/parts.sh
source "$(dirname "$0")/parts.sh"

if on_gpu; then
    # The limits add up to 580 s; each script writes its result after every row.
    part tune 360 --limit 12
    part ops 160 --no-compile --op bn_silu --op depthwise_conv --op mbconv --limit 12
    part pointwise 60
else
    echo "no GPU: the smallest form of each; the figures say nothing about a GPU"
    part tune 120 --target normalize --limit 1
    part ops 60 --op silu --limit 1 --no-compile
    part pointwise 60 --limit 1
fi
finish
