#!/usr/bin/env bash
# Several processes on this machine, as a pod runs them: to try a run before paying for chips.
#
#   PROCESSES=4 launch/local.sh clara train --config configs/tiny.py:scp --workdir runs/scp ...
#
# With GPUs each process takes its own; without, each has DEVICES virtual CPU devices. Process 0 writes to the screen, the others to
# LOGS/process-I.log. SIGTERM to this script goes to all of them: they save together and end.
set -euo pipefail

PROCESSES=${PROCESSES:-2}
DEVICES=${DEVICES:-1}          # CPU devices of each process
PLATFORM=${PLATFORM:-cpu}      # cpu or cuda
PORT=${PORT:-12321}
LOGS=${LOGS:-logs}
DRY_RUN=${DRY_RUN:-}

[ $# -gt 0 ] || { echo "usage: PROCESSES=N launch/local.sh clara train --config … --workdir …" >&2; exit 2; }
run() { if [ -n "$DRY_RUN" ]; then printf '%s\n' "$*"; else eval "$*"; fi; }

run "mkdir -p $LOGS"
pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
for ((i = 0; i < PROCESSES; i++)); do
  if [ "$PLATFORM" = cpu ]; then
    environment="JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$DEVICES"
  else
    environment="CUDA_VISIBLE_DEVICES=$i"
  fi
  to=$([ "$i" = 0 ] || echo "> $LOGS/process-$i.log 2>&1")
  command="env $environment $(printf '%q ' "$@")--coordinator localhost:$PORT --processes $PROCESSES --process $i $to"
  if [ -n "$DRY_RUN" ]; then echo "$command &"; else eval "exec_in_background() { exec $command; }"; exec_in_background & pids+=($!); fi
done
status=0
for pid in "${pids[@]}"; do
  while :; do
    ended=0; wait "$pid" || ended=$?
    kill -0 "$pid" 2>/dev/null || break  # a trapped signal ends a wait early
  done
  # The process may have ended while the signal was handled: ask once more, the shell remembers.
  [ "$ended" -le 128 ] || { ended=0; wait "$pid" || ended=$?; }
  [ "$ended" = 0 ] || status=$ended
done
exit "$status"
