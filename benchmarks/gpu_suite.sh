#!/usr/bin/env bash
# Throughput, roofline, loaders and step profile in one command, under 10 minutes on one GPU, into one JSON with its
# provenance. Ranks (scaling.py) need several GPUs; the ops are in gpu_kernels.sh.
#
#   benchmarks/gpu_suite.sh [OUT.json]         default benchmarks/results/suite-DATE.json
#
# Environment: PYTHON (default python). It changes no setting of the machine. A benchmark that fails or takes too long is
# reported, the others run, and the status is 1. The time to an accuracy, which takes minutes, is in gpu_train.sh. Without
# a GPU the smallest form of every benchmark runs.
set -uo pipefail
suite=suite
# shellcheck source=benchmarks/parts.sh
source "$(dirname "$0")/parts.sh"

if on_gpu; then
    # Compiling takes most of the time: beside an H100 a minute for our step, two or three for timm's. So the throughputs
    # compile side by side, and take turns once all are ready.
    two=(--direction train --rounds 10 --candidate effnet_fast:graph --candidate timm:compile)
    ahead throughput 390 "${two[@]}" --output-stride 8 --batch-size 512 --candidate torchvision:compile \
        --candidate effnet_fast:compile
    ahead throughput 390 "${two[@]}" --output-stride 8 --batch-size 256
    ahead throughput 390 "${two[@]}" --output-stride 8 --batch-size 1024
    ahead throughput 390 "${two[@]}" --image-size 224 --batch-size 128
    gather 320
    # The roofline and the loaders need the captured step's time; they measure it only where throughput did not.
    measured='import json, sys; rows = json.load(open(sys.argv[1]))["rows"]
print(*next((row["ms"][1], row["img/s"][1]) for row in rows if row["step"] == "graph"))'
    read -r step_ms step_rate < <("$python" -c "$measured" "${parts[0]}" 2>/dev/null)
    roofline=(--measure --step graph)
    loader=(--step graph)
    if [ -n "${step_ms:-}" ]; then
        roofline=(--step-ms "$step_ms")
        loader+=(--step-rate "$step_rate")
    fi
    part roofline 40 "${roofline[@]}"
    part loader 45 --num-workers 16 "${loader[@]}"
    part step_profile 60 --step graph
else
    echo "no GPU: the smallest form of each benchmark; the figures say nothing about a GPU"
    small=(--batch-size 4 --output-stride 32)
    part throughput 120 --peers --no-compile --rounds 2 --warm-up 1 "${small[@]}"
    part roofline 60 --chip h100 "${small[@]}"
    part loader 90 --images 1024 --rounds 2 --num-workers 2 "${small[@]}"
    part step_profile 60 --steps 1 "${small[@]}"
    part scaling 120 --ranks 1 2 --kind weak --rounds 2 "${small[@]}"
    part time_to_accuracy 90 --recipe quickstart --target 0 --seeds 1 --set limit_train=64 --set limit_eval=20 \
        --set batch_size=32 --set num_epochs=1 --set num_workers=1
    part ops 60 --op silu --limit 1 --no-compile
fi
finish
