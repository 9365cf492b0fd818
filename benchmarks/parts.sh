# shellcheck shell=bash
# shellcheck disable=SC2154 # suite is set by who sources this
# Sourced by the suites. A suite runs parts, each a script of this folder with a time limit, and joins their results into
# one JSON. A part that fails or takes too long is reported, and the next one runs.
#
# Environment: PYTHON (default python), CARRIED (a folder of packages that this machine lacks, default .carry in the
# repository; README.md says how to fill it). Before it is sourced: `suite`, the name; the JSON is the first argument,
# default benchmarks/results/SUITE-DATE.json.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
carried=${CARRIED:-$here/../.carry}
if [[ -d $carried ]]; then
    export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$carried
fi
# One folder of compiled kernels for all parts: Inductor would name its own one.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TRITON_HOME:-${HOME:-/tmp}}/.triton/cache}
out=${1:-$here/results/$suite-$(date +%Y%m%d-%H%M%S).json}
[[ $out == /* ]] || out=$PWD/$out
work=               # the parts' results, in a folder beside $out, where they outlive a suite that is killed
declare -A ahead=() # processes in the background, and what they run
parts=()

# stop: end what runs, and keep the results so far.
stop() {
    local processes
    trap '' INT TERM HUP
    mapfile -t processes < <(jobs -rp)
    if [[ ${#processes[@]} -gt 0 ]]; then
        kill "${processes[@]}" 2>/dev/null
        wait
    fi
    if [[ -n $work ]]; then
        if join >/dev/null 2>&1 || ! compgen -G "$work/*.json" >/dev/null; then # joined, or no part has a result
            rm -rf "$work"
        else
            echo "error: $out cannot be written; the results of the parts are in $work" >&2
        fi
    fi
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

if ! why=$("$python" -c "import effnet_fast" 2>&1); then
    echo "error: $python cannot import effnet_fast: pip install '.[bench]' first, or set PYTHON ($(tail -n 1 <<<"$why"))" >&2
    exit 2
fi

absent=$("$python" -c '
from importlib.util import find_spec

def absent(name):
    try:
        return find_spec(name) is None
    except ModuleNotFoundError:  # of the parent package
        return True

names = "jsonargparse anyascii captum fvcore optuna nvidia.dali timm torchvision efficientnet_pytorch pytest_reportlog"
print(*filter(absent, names.split()), sep=", ")')
if [[ -n $absent ]]; then
    echo "not installed: $absent; parts that need them are reported and skipped"
fi

failed=0

# prepare: make the folder of the parts' results, once.
prepare() {
    if [[ -z $work ]] && ! work=$({ mkdir -p "$(dirname "$out")" && mktemp -d "$out.parts.XXXXXX"; } 2>/dev/null); then
        echo "error: cannot write $out: name another file" >&2
        exit 2
    fi
}

# part NAME SECONDS ARGUMENTS...: run NAME.py within its time; its result is kept even if it is killed.
part() {
    timed "$1" "$2" "$here/$1.py" --out RESULT "${@:3}"
}

# verb NAME SECONDS ARGUMENTS...: the same for effnet-fast NAME.
verb() {
    timed "$1" "$2" -m effnet_fast "$1" --output RESULT "${@:3}"
}

# timed NAME SECONDS ARGUMENTS...: run Python with these arguments, RESULT replaced by the file of the result.
timed() {
    prepare
    local name=$1 seconds=$2 start=$SECONDS
    local result=$work/$((${#parts[@]} + 1))-$name.json
    shift 2
    echo "== $name $*"
    parts+=("$result")
    timeout -k 5 "$seconds" "$python" "${@/#RESULT/"$result"}" & # a trap would wait for the foreground
    if wait $!; then
        echo "== $name took $((SECONDS - start)) s"
    else
        echo "FAILED: $name after $((SECONDS - start)) s" >&2
        failed=1
    fi
    join >/dev/null 2>&1 # now, so that whoever stops the suite loses one part at most
}

# ahead NAME SECONDS ARGUMENTS...: as `part`, but in the background: it compiles beside the others, and waits for its
# turn before it times. `gather` waits for it.
ahead() {
    prepare
    local name=$1 seconds=$2
    local result=$work/$((${#parts[@]} + 1))-$name.json
    shift 2
    if [[ ${#ahead[@]} -eq 0 ]]; then
        exec 9>"$work/turn"
        flock 9
    fi
    parts+=("$result")
    timeout -k 5 "$seconds" "$python" "$here/$name.py" --out "$result" --turn "$work/turn" "$@" >"$result.log" 2>&1 9>&- &
    ahead[$!]="$name $*"
}

# gather SECONDS: once all parts in the background have compiled, or after SECONDS, let them take turns; wait for them.
gather() {
    local latest=$((SECONDS + $1)) process
    while [[ $SECONDS -lt $latest && $(jobs -rp | wc -l) -gt $(cat "$work/turn.waiting" 2>/dev/null | wc -c) ]]; do
        sleep 1
    done
    echo "== timing starts after $SECONDS s"
    exec 9>&-
    for process in "${!ahead[@]}"; do
        if ! wait "$process"; then
            echo "FAILED: ${ahead[$process]}" >&2
            failed=1
        fi
        unset "ahead[$process]"
        join >/dev/null 2>&1
    done
    cat "$work"/*.json.log
}

join() {
    "$python" "$here/report.py" --merge "$out" "${parts[@]}"
}

on_gpu() {
    "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"
}

# finish: join the results; status 1 if a part failed.
finish() {
    join || exit 1
    exit "$failed"
}
