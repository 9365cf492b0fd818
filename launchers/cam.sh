#!/usr/bin/env bash
# Draw class activation maps.
#
#   launchers/cam.sh [--dry-run] --checkpoints FOLDER --images_path FOLDER --output_path FOLDER ...
#
# Arguments: those of `effnet-fast cam`. Environment: CUDA_VISIBLE_DEVICES chooses the GPU.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/launch.sh"

launch effnet-fast cam "$@"
