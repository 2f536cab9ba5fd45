#!/usr/bin/env bash
# A run on GKE with xpk (pip install xpk), on one or several slices. The cluster exists: xpk cluster create --tpu-type=… --num-slices=…
#
#   CLUSTER=pods TPU_TYPE=v5litepod-256 SLICES=2 launch/gke_xpk.sh clara train --config configs/mistral_7b.py:scp \
#       --config.mesh.preset=slices --workdir /bucket/runs/scp ...
#
# /bucket is a storage that was attached to the cluster: xpk storage attach bucket --type=gcsfuse --bucket=… --mount-point=/bucket
# DRY_RUN=1 prints what would be executed.
set -euo pipefail

NAME=${NAME:-clara-$(date +%m%d-%H%M)}
PROJECT=${PROJECT:-$(gcloud config get-value project 2>/dev/null || true)}
ZONE=${ZONE:-us-west4-a}
CLUSTER=${CLUSTER:-clara}
TPU_TYPE=${TPU_TYPE:-v5litepod-256}
SLICES=${SLICES:-1}
RESTARTS=${RESTARTS:-100}              # after preemptions; each goes on from the last step
IMAGE=${IMAGE:-python:3.11}            # this directory is laid over it
DRY_RUN=${DRY_RUN:-}

[ $# -gt 0 ] || { sed -n '2,8p' "$0" | sed 's/^# \{0,1\}//'; exit 2; }
run() {
  local word line=+
  for word in "$@"; do if [[ $word == *[[:space:]]* ]]; then line+=" ${word@Q}"; else line+=" $word"; fi; done
  echo "$line" >&2
  if [ -z "$DRY_RUN" ]; then "$@"; fi
}
run xpk workload create --workload "$NAME" --cluster "$CLUSTER" --project "${PROJECT:-PROJECT}" --zone "$ZONE" \
  --tpu-type "$TPU_TYPE" --num-slices "$SLICES" --max-restarts "$RESTARTS" --base-docker-image "$IMAGE" --script-dir "$PWD" \
  --command "pip install -q -c constraints.txt -e '.[tpu,records,tensorboard]' && $(printf '%q ' "$@")--distributed"
