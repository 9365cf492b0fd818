#!/usr/bin/env bash
# The kernels on one GPU, under 10 minutes, into one JSON with its provenance.
#
#   benchmarks/gpu_kernels.sh [OUT.json]       default benchmarks/results/kernels-DATE.json
#
# Every launch that the parts of an op may have, beside the one that the package chooses; then the table of the ops, whose
# kernels are compiled by then, beside PyTorch's; then the library's 1x1 convolutions, as such and as matrix products.
# Environment: PYTHON (default python). Without a GPU the smallest form.
set -uo pipefail
suite=kernels
# shellcheck source=benchmarks/parts.sh
source "$(dirname "$0")/parts.sh"

if on_gpu; then
    # The limits add up to 580 s; each writes what it has after every part of an op.
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
