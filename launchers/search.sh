#!/usr/bin/env bash
# Search the factors of compound scaling.
#
#   launchers/search.sh [--dry-run] [plan|run|collect|choose] ...
#
# Arguments: those of `effnet-fast search`. Environment: CUDA_VISIBLE_DEVICES chooses the GPU.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/launch.sh"

launch effnet-fast search "$@"
