# shellcheck shell=bash
# Sourced by the launchers. `launch COMMAND...` prints a command and becomes it; with --dry-run as the launcher's first
# argument it only prints.

dry_run=false
if [[ ${1:-} == --dry-run ]]; then
    dry_run=true
    shift
fi

show() {
    printf '+'
    printf ' %q' "$@"
    printf '\n'
}

launch() {
    show "$@"
    $dry_run || exec "$@"
}
