# shellcheck shell=bash
# Sourced by the launchers. `launch COMMAND...` prints a command and executes it; with --dry-run as the launcher's first
# argument it only prints it.

dry_run=false
if [[ ${1:-} == --dry-run ]]; then
    dry_run=true
    shift
fi

# Logs keep the printed command, so it leaves out passwords in URLs, as effnet_fast/credentials.py does.
show() {
    local masked='s#(://[^/:@]*):.*@#\1:***@#; s#(https?://)[^/:@]+@#\1***@#
        s#([?&](password|passwd|pwd|token|api_key)=)[^&]*#\1***#gI'
    printf '+'
    for word in "$@"; do
        printf ' %q' "$(sed -E "$masked" <<<"$word")"
    done
    printf '\n'
}

# torchrun's shared store outlives a restart: new processes read the address of a dead one from it, and a machine that
# joins later waits for it in vain (torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Seconds that processes have to save after a SIGTERM (torch 2.12 on; before, 30).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-170}"
# srun does not take it from sbatch by itself (Slurm 22.05 on); outside Slurm nobody reads it.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"

launch() {
    show "$@"
    $dry_run || exec "$@"
}
