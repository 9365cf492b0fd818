# shellcheck shell=bash
# shellcheck disable=SC2154 # suite is set by who sources this
# What the suites share; sourced by them. A suite is a list of parts, each a script of this folder with a time limit, and
# joins what they wrote into one JSON. A part that fails or takes too long is named, and the others go on.
#
# Environment: PYTHON (default python). Before it is sourced: `suite`, the name; the JSON is the first argument, default
# benchmarks/results/SUITE-DATE.json.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
out=${1:-$here/results/$suite-$(date +%Y%m%d-%H%M%S).json}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if ! "$python" -c "import effnet_fast" 2>"$work/import.log"; then
    echo "error: $python cannot import effnet_fast: pip install '.[bench]' first, or set PYTHON ($(tail -n 1 "$work/import.log"))" >&2
    exit 2
fi

failed=0
parts=()

# part NAME SECONDS ARGUMENTS...: run NAME.py within its time, and keep what it wrote.
part() {
    local name=$1 seconds=$2 begin=$SECONDS
    local result=$work/$((${#parts[@]} + 1))-$name.json
    shift 2
    echo "== $name $*"
    parts+=("$result")
    if timeout -k 5 "$seconds" "$python" "$here/$name.py" --out "$result" "$@"; then
        echo "== $name took $((SECONDS - begin)) s"
    else
        echo "FAILED: $name.py after $((SECONDS - begin)) s" >&2
        failed=1
    fi
}

on_gpu() {
    "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"
}

# finish: join the results; the status says whether all went well.
finish() {
    "$python" "$here/report.py" --merge "$out" "${parts[@]}" || exit 1
    exit "$failed"
}
