#!/usr/bin/env bash
# Train on all GPUs of this machine, one process each (on a machine without, one process a core).
#
#   launchers/train_node.sh [--dry-run] --dataset cifar100 ...
#
# Arguments: those of `effnet-fast train`. Environment:
#   NPROC_PER_NODE  processes; default auto
#   MAX_RESTARTS    times that the processes are started again when one fails; default 3
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/launch.sh"

launch torchrun --rdzv-backend bound --rdzv-endpoint localhost:0 --rdzv-id "$$-$(date +%s)" \
    --nproc-per-node "${NPROC_PER_NODE:-auto}" --max-restarts "${MAX_RESTARTS:-3}" -m effnet_fast train "$@"
