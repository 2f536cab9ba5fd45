#!/usr/bin/env bash
# A run on Cloud TPU VMs through queued resources: create, install, train, delete.
#
#   NAME=scp TYPE=v5litepod-32 launch/tpu_vm.sh up                     # asks for the machines and waits for them
#   NAME=scp launch/tpu_vm.sh install                                  # this repository on every worker
#   NAME=scp launch/tpu_vm.sh train --config configs/mistral_7b.py:scp --workdir gs://my-bucket/runs/scp ...
#   NAME=scp launch/tpu_vm.sh down
#
# `train` may be called again after a preemption: the run goes on from its last step. DRY_RUN=1 prints what would be executed.
set -euo pipefail

NAME=${NAME:-clara}
PROJECT=${PROJECT:-$(gcloud config get-value project 2>/dev/null || true)}
ZONE=${ZONE:-us-west4-a}
TYPE=${TYPE:-v5litepod-32}             # v5litepod-N, v5p-N (cores), v6e-N
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}  # v2-alpha-tpuv5 for v5p, v2-alpha-tpuv6e for v6e
SPOT=${SPOT---spot}                    # empty for on demand
REPOSITORY=${REPOSITORY:-$(git remote get-url origin 2>/dev/null || echo REPOSITORY)}
REVISION=${REVISION:-$(git rev-parse HEAD 2>/dev/null || echo main)}  # pushed, so that the workers can fetch it
DRY_RUN=${DRY_RUN:-}

run() {
  local word line=+
  for word in "$@"; do if [[ $word == *[[:space:]]* ]]; then line+=" ${word@Q}"; else line+=" $word"; fi; done
  echo "$line" >&2
  if [ -z "$DRY_RUN" ]; then "$@"; fi
}
where=(--project "${PROJECT:-PROJECT}" --zone "$ZONE")
everywhere() { run gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all --command="$1"; }

action=${1:-}; shift || true
case "$action" in
  up)
    run gcloud compute tpus queued-resources create "$NAME" --node-id "$NAME" "${where[@]}" --accelerator-type "$TYPE" \
      --runtime-version "$RUNTIME" $SPOT
    until [ -n "$DRY_RUN" ] || gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format='value(state.state)' | grep -q ACTIVE; do
      sleep 30
    done ;;
  install)
    everywhere "{ [ -d clara_jax ] || git clone $REPOSITORY clara_jax; } && cd clara_jax && git fetch && git checkout $REVISION && python3 -m venv .venv && \
.venv/bin/pip install -q -c constraints.txt -e '.[tpu,records,tensorboard,gcs]'" ;;
  train)
    # The process is told to save when the machine is taken away (SIGTERM).
    everywhere "cd clara_jax && .venv/bin/clara train --distributed $(printf '%q ' "$@")" ;;
  down)
    run gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet ;;
  *) sed -n '2,9p' "$0" | sed 's/^# \{0,1\}//'; exit 2 ;;
esac
