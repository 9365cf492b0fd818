#!/usr/bin/env bash
# Train on several machines: run the same line on each of them. Machines may fail, come back and join.
#
#   RDZV_ENDPOINT=node1:29500 launchers/train_multinode.sh [--dry-run] --save_dir /shared/results ...
#
# Arguments: those of `effnet-fast train`; --save_dir must be a folder that all machines share. Environment:
#   RDZV_ENDPOINT   host:port of the machine where they meet, one of them; a name or address of the private network
#   RDZV_ID         name of the job, the same on all machines; default effnet-fast
#   NNODES          machines, as least:most; default 1:4. With 1:N both halves of a split network continue, and the
#                   lock of the run folder stops the second; N:N waits for all
#   NPROC_PER_NODE  processes on each machine; default auto
#   MAX_RESTARTS    times that processes are started again when one fails; default 3
#   LOCAL_ADDR      address by which the others reach this machine, where its host name does not serve
#   GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME  network interface of the gradients
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/launch.sh"

launch torchrun --nnodes "${NNODES:-1:4}" --nproc-per-node "${NPROC_PER_NODE:-auto}" \
    --rdzv-backend bound --rdzv-endpoint "${RDZV_ENDPOINT:?host:port of one of the machines}" \
    --rdzv-id "${RDZV_ID:-effnet-fast}" --max-restarts "${MAX_RESTARTS:-3}" ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"} \
    -m effnet_fast train "$@"
