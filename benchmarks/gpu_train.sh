#!/usr/bin/env bash
# CIFAR-100 on one GPU, in three commands of under 10 minutes each.
#
#   benchmarks/gpu_train.sh choose [OUT.json]  variants of the recipe, compared on validation images alone
#   benchmarks/gpu_train.sh final              the recipe to its end; SAVE_DIR/cifar100 has curves, rows, provenance
#   benchmarks/gpu_train.sh times [OUT.json]   seconds to 75 and 80 % top-1, three seeds; the runs, to their ends, in
#                                              SAVE_DIR/times/OUT; evaluated every three epochs
#
# OUT.json is by default benchmarks/results/train-DATE.json. Environment: PYTHON (default python), DATA_DIR (a folder
# with CIFAR-100, default data), SAVE_DIR (default results), STEP (default graph; use compile if capturing fails), EPOCHS
# of `choose` (default 30) and `times` (default the recipe's). After SECONDS_AT_MOST of training (default 400, since kernels
# compile before it) `final` evaluates, saves and ends; the same command resumes, as do the others with the same OUT.json.
# Without a GPU each trains on a few synthetic images.
set -uo pipefail
what=${1:-}
shift
suite=train
# shellcheck source=benchmarks/parts.sh
source "$(dirname "$0")/parts.sh"

save_dir=${SAVE_DIR:-results}
step=${STEP:-graph}
settings=(--set "data_dir=${DATA_DIR:-data}" --set "step=$step")
flags=(--data_dir "${DATA_DIR:-data}" --step "$step" --time_budget "${SECONDS_AT_MOST:-400}")
epochs=${EPOCHS:-30}
target=(--target 75 80 --seeds 3 ${EPOCHS:+--set "num_epochs=$EPOCHS"} --set eval_every_epochs=3)
if ! on_gpu; then
    echo "no GPU: a few synthetic images; the figures say nothing"
    small=(dataset=synthetic limit_train=64 limit_eval=20 batch_size=32 output_stride=32 num_workers=1)
    settings=()
    for setting in "${small[@]}"; do
        settings+=(--set "$setting")
    done
    flags=("${small[@]/#/--}" --num_epochs=1)
    epochs=1
    target=(--target 0 --seeds 1 --set num_epochs=1)
fi

# run NAME ARGUMENTS...: run NAME.py; the same command with the same OUT.json continues.
run() {
    exec timeout -k 5 540 "$python" "$here/$1.py" --out "$out" "${@:2}"
}

case $what in
choose)
    run choose_recipe --recipe cifar100 "${settings[@]}" --epochs "$epochs" --same-epochs --seeds 1 \
        --variant "" \
        --variant "auto_augment=trivial" \
        --variant "cutmix=0 mixup_prob=1" \
        --variant "optimizer=adamw learning_rate=3e-3" \
        --variant "optimizer=sgd learning_rate=0.2 weight_decay=5e-4"
    ;;
final)
    exec "$python" -m effnet_fast train --config "$here/../effnet_fast/recipes/cifar100.yaml" "${flags[@]}" \
        --save_dir "$save_dir" --run_name cifar100
    ;;
times)
    run time_to_accuracy --recipe cifar100 "${settings[@]}" "${target[@]}" --keep "$save_dir/times"
    ;;
*)
    echo "error: the first argument must be choose, final or times, not '$what'" >&2
    exit 2
    ;;
esac
