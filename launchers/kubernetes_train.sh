#!/usr/bin/env bash
# Train on a Kubernetes cluster, as an Indexed Job: one pod a node, which meet by torchrun's rendezvous. If a node fails,
# the others resume from the last checkpoint, and its pod joins again on another node. Needs Kubernetes 1.31 or newer.
#
#   IMAGE=registry.example/effnet-fast NODES=4 launchers/kubernetes_train.sh [--dry-run] --dataset cifar100 ...
#
# With --dry-run it prints the manifest, else it applies it with kubectl. Arguments: those of `effnet-fast train`; data
# and results are in /shared unless --data_dir and --save_dir say otherwise. Environment:
#   IMAGE  the image, built from launchers/Dockerfile
#   CLAIM  PersistentVolumeClaim that all pods mount (ReadWriteMany) on /shared; default effnet-fast
#   NAME   of the Job and its Service; default effnet-fast
#   NODES  pods; default 2
#   GPUS   GPUs a pod; default 8
set -euo pipefail
folder=$(dirname "$0")
# shellcheck source-path=SCRIPTDIR
source "$folder/launch.sh"

export IMAGE="${IMAGE:?the image, built from launchers/Dockerfile}"
export CLAIM="${CLAIM:-effnet-fast}" NAME="${NAME:-effnet-fast}" NODES="${NODES:-2}" GPUS="${GPUS:-8}"
[[ $NODES =~ ^[1-9][0-9]*$ && $GPUS =~ ^[1-9][0-9]*$ ]] || { echo "error: NODES and GPUS must be whole numbers" >&2; exit 2; }
for name in "$NAME" "$CLAIM"; do
    [[ $name =~ ^[a-z]([-a-z0-9]{0,50}[a-z0-9])?$ ]] || { echo "error: '$name' is no name for Kubernetes" >&2; exit 2; }
done
[[ $IMAGE =~ ^[A-Za-z0-9._/:@-]+$ ]] || { echo "error: IMAGE='$IMAGE' is no name of an image" >&2; exit 2; }

# The arguments as a JSON list, which is YAML too.
json_list() {
    local separator=[ argument
    for argument in "$@"; do
        argument=${argument//\\/\\\\}
        printf '%s"%s"' "$separator" "${argument//\"/\\\"}"
        separator=', '
    done
    printf ']'
}
# Kubernetes expands $(POD_IP), and reads $$ as $.
export ARGUMENTS
ARGUMENTS=$(json_list --nnodes "1:$NODES" --nproc-per-node "$GPUS" --rdzv-backend bound \
    --rdzv-endpoint "$NAME-0.$NAME:29500" --rdzv-id "$NAME" --rdzv-conf join_timeout=3600 \
    --local-addr "\$(POD_IP)" --max-restarts 100 \
    -m effnet_fast train --data_dir /shared/data --save_dir /shared/results "${@//$/\$\$}")

manifest=$(<"$folder/kubernetes_train.yaml")
for variable in IMAGE CLAIM NAME NODES GPUS ARGUMENTS; do
    manifest=${manifest//"\${$variable}"/"${!variable}"}
done

if $dry_run; then
    printf '%s\n' "$manifest"
else
    show kubectl apply -f -
    kubectl apply -f - <<<"$manifest"
fi
