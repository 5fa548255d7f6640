#!/bin/bash
# A job on hosts that are reached by ssh, one agent on each. Change the three marked lines, then: ./ssh.sh
#
# Ctrl-C, or SIGTERM to this script, ends the job at an agreed step; a second one ends it at once. A host that comes back
# after a loss joins again when its line is run again: `./ssh.sh that-host`.

HOSTFILE=hostfile                                       # 1: one host name per line
DIRECTORY=$PWD                                          # 2: where the script lies on every host (a shared directory)
COMMAND=(--nproc-per-node 8 train.py --config config.yaml)   # 3: ranks per host, your script and its arguments

set -uo pipefail
mapfile -t hosts < <(grep -vE '^[[:space:]]*(#|$)' "$HOSTFILE")
endpoints=$(printf '%s:29400,' "${hosts[@]}")
job=$(basename "$DIRECTORY")
pids=()

run() { # -tt: when this connection ends, the agent over there gets SIGHUP, which asks it to stop
  local command
  command=$(printf '%q ' holdfast run --nnodes "${#hosts[@]}" --rdzv-backend c10d --rdzv-id "$job" \
    --rdzv-endpoint "${endpoints%,}" --hold-job "$job" --hold-grace 60s --hold-requeue-code 75 "${COMMAND[@]}")
  exec ssh -tt -o BatchMode=yes "$1" "cd $(printf %q "$DIRECTORY") && exec $command"
}

for host in "${@:-${hosts[@]}}"; do
  run "$host" </dev/null &
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' INT TERM
code=0
for pid in "${pids[@]}"; do
  while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done
  wait "$pid" || code=$?
done
exit "$code"
