# Shared by the scripts of this folder; POSIX sh, to be sourced.

# Where downloads and builds live, outside of any clone.
CACHE=${MCP_SIDECAR_CACHE:-${HOME:?}/.cache/mcp-opa-sidecar}

# However a script ends, nothing of it stays: $work is the folder that it works in, if it has one.
work=
step_log=
step_ticker=
clean_up() {
    [ -z "$work" ] || rm -rf "$work"
    [ -z "$step_log" ] || rm -f "$step_log"
    [ -z "$step_ticker" ] || kill "$step_ticker" 2>/dev/null || :
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

say() { printf '%s\n' "$*" >&2; }

# step LABEL COMMAND…: runs a command whose output matters only when it fails.
# A terminal sees the label and the seconds; anything else sees nothing until there is a failure.
step() {
    step_label=$1
    shift
    step_log=$(mktemp "${TMPDIR:-/tmp}/mcp-opa-sidecar.XXXXXX")
    step_start=$(date +%s)
    if [ -t 2 ]; then
        printf '%s …' "$step_label" >&2
        step_tick $$ &
        step_ticker=$!
    fi
    step_code=0
    "$@" >"$step_log" 2>&1 </dev/null || step_code=$?
    if [ -n "$step_ticker" ]; then
        kill "$step_ticker" 2>/dev/null || :
        wait "$step_ticker" 2>/dev/null || :
        step_ticker=
        step_seconds=$(($(date +%s) - step_start))
        if [ "$step_code" -eq 0 ]; then
            printf '\r%s … done (%s s)\n' "$step_label" "$step_seconds" >&2
        else
            printf '\r%s … failed (%s s)\n' "$step_label" "$step_seconds" >&2
        fi
    fi
    if [ "$step_code" -ne 0 ]; then
        say "$step_label: exit code $step_code. The end of its output:"
        tail -n 25 "$step_log" | sed 's/^/  | /' >&2
    fi
    rm -f "$step_log"
    return "$step_code"
}

# Ends by itself when the script that started it is gone.
step_tick() {
    trap - EXIT
    exec >/dev/null # left open, it would keep the $(…) that this script may run in from ending
    while sleep 1 && kill -0 "$1" 2>/dev/null; do
        printf '\r%s … %s s' "$step_label" "$(($(date +%s) - step_start))" >&2
    done
}
