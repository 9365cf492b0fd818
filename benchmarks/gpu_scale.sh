#!/usr/bin/env bash
# The scaling study's five models at equal cost on one GPU, and the maps of each.
#
#   benchmarks/gpu_scale.sh                    SAVE_DIR/scale/study.json and SAVE_DIR/scale-maps/gallery.html, summary.csv
#
# Environment: PYTHON (default python), DATA_DIR (a folder with CIFAR-100, default data), SAVE_DIR (default results),
# EPOCHS (default 15), SECONDS_AT_MOST of the study (default 480). Run it again to resume a study that was stopped.
# Without a GPU each model trains on a few synthetic images.
set -euo pipefail
suite=scale # writes no JSON of its own
# shellcheck source=benchmarks/parts.sh
source "$(dirname "$0")/parts.sh"
save_dir=${SAVE_DIR:-results}
images=$save_dir/scale-images

data=(--dataset cifar100 --data_dir "${DATA_DIR:-data}")
settings=(--config "$here/../effnet_fast/recipes/cifar100.yaml" --num_epochs "${EPOCHS:-15}" --target_flops 4.245e8)
if ! on_gpu; then
    echo "no GPU: a few synthetic images; the figures say nothing"
    data=(--dataset synthetic --data_dir "$save_dir")
    settings=(--num_epochs 1 --limit_train 64 --limit_eval 20 --batch_size 32 --output_stride 32 --target_flops 2.984e7)
fi

status=0 # a study that is stopped has maps of the models that it trained
timeout -k 20 "${SECONDS_AT_MOST:-480}" \
    "$python" -m effnet_fast study "${settings[@]}" "${data[@]}" --save_dir "$save_dir" --run_name scale &
wait $! || status=$? # a trap would wait for the foreground
"$python" -m effnet_fast data "${data[@]}" --export "$images" --export_images 16
"$python" -m effnet_fast cam --checkpoints "$save_dir/scale" --images_path "$images" --output_path "$save_dir/scale-maps" \
    --resume no || exit $((status ? status : $?)) # the maps of a stopped study are not those of the whole one
exit "$status"
