#!/usr/bin/env bash
# Train in one process, on one GPU or the CPU.
#
#   launchers/train_single.sh [--dry-run] --dataset cifar100 --num_epochs 200 ...
#
# Arguments: those of `effnet-fast train`. Environment: CUDA_VISIBLE_DEVICES chooses the GPU.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/launch.sh"

launch effnet-fast train "$@"
