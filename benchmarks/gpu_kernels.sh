#!/usr/bin/env bash
# The kernels on one GPU, under 10 minutes, into one JSON with its provenance.
#
#   benchmarks/gpu_kernels.sh [OUT.json]       default benchmarks/results/kernels-DATE.json
#
# Times every launch of the kernels (effnet-fast tune), then the ops beside PyTorch's operators, then 1x1 convolutions as
# convolutions and as matrix products. Without a GPU the smallest form of the latter two runs.
# Environment: PYTHON (default python).
set -uo pipefail
suite=kernels
# shellcheck source=benchmarks/parts.sh
source "$(dirname "$0")/parts.sh"

if on_gpu; then
    # The limits add up to 540 s; each part keeps its times if it is stopped.
    verb tune 330 --batch_size 512 --seconds 290
    part ops 150 --no-compile --op bn_silu --op depthwise_conv --op mbconv --limit 12
    part pointwise 60
else
    echo "no GPU: the smallest form of each; the figures say nothing about a GPU"
    part ops 60 --op silu --limit 1 --no-compile
    part pointwise 60 --limit 1
fi
finish
