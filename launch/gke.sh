#!/usr/bin/env bash
# A run on GKE as a JobSet, on one TPU slice or several; what is preempted starts again and resumes from its last step.
# The cluster has JobSet (kubernetes-sigs/jobset) and a node pool of these slices.
#
#   NAME=scp TPU=v5e TOPOLOGY=4x8 launch/gke.sh clara train --config configs/mistral_7b.py:scp --workdir gs://my-bucket/runs/scp ...
#   NAME=scp TPU=v5e TOPOLOGY=16x16 SLICES=2 launch/gke.sh clara train --config configs/mistral_7b.py:scp --config.mesh.preset=slices ...
#   NAME=ask TPU=v5e TOPOLOGY=2x4 launch/gke.sh clara evaluate --mesh tensor=8 ...
#
# Rows, bases and working directories are read from and written to gs://. DRY_RUN=1 prints the manifest.
set -euo pipefail

NAME=${NAME:-clara}
TPU=${TPU:-v5e}                        # v4, v5e, v5p, v6e, tpu7x
TOPOLOGY=${TOPOLOGY:-4x8}
SLICES=${SLICES:-1}
SPOT=${SPOT-true}                      # empty for on demand
RESTARTS=${RESTARTS:-100}              # of the whole set, after preemptions and failures
SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-default}  # of Kubernetes, with access to the buckets
IMAGE=${IMAGE:-python:3.11}            # needs git and Python
REPOSITORY=${REPOSITORY:-$(git remote get-url origin 2>/dev/null || true)}
REVISION=${REVISION:-$(git rev-parse HEAD 2>/dev/null || echo main)}  # pushed, so that the pods can fetch it
DRY_RUN=${DRY_RUN:-}

[ $# -gt 0 ] || { sed -n '2,9p' "$0" | sed 's/^# \{0,1\}//'; exit 2; }
[[ $TOPOLOGY =~ ^[1-9][0-9]*x[1-9][0-9]*(x[1-9][0-9]*)?$ ]] || { echo "gke: TOPOLOGY=$TOPOLOGY: expected such as 4x8 or 2x2x4" >&2; exit 2; }
[[ $SLICES =~ ^[1-9][0-9]*$ && $RESTARTS =~ ^[0-9]+$ ]] || { echo "gke: SLICES=$SLICES, RESTARTS=$RESTARTS: expected whole numbers" >&2; exit 2; }
[ -n "$REPOSITORY" ] || { echo "gke: REPOSITORY: name one, there is no remote 'origin'" >&2; exit 2; }
chips=$((${TOPOLOGY//x/*}))
case $TPU in
  v4) accelerator=tpu-v4-podslice ;;
  v5e) accelerator=tpu-v5-lite-podslice ;;
  v5p) accelerator=tpu-v5p-slice ;;
  v6e) accelerator=tpu-v6e-slice ;;
  tpu7x) accelerator=tpu7x ;;
  *) echo "gke: TPU=$TPU: expected v4, v5e, v5p, v6e or tpu7x" >&2; exit 2 ;;
esac
# Chips of a machine: all of a slice of up to 8 (v5e, v6e) or 4, and 4 of a larger one.
case $TPU in v5e | v6e) largest=8 ;; *) largest=4 ;; esac
host=$((chips <= largest ? chips : 4))
((chips % host == 0)) || { echo "gke: TOPOLOGY=$TOPOLOGY: $chips chips do not fill machines of $host" >&2; exit 2; }
printf -v command '%q ' "$@"
quote() { printf '%s' "$1" | sed 's/\\/\\\\/g; s/"/\\"/g'; }  # for a string of YAML

manifest() {
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: "$(quote "$NAME")"
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $RESTARTS
  replicatedJobs:
    - name: slice
      replicas: $SLICES
      template:
        spec:
          parallelism: $((chips / host))
          completions: $((chips / host))
          backoffLimit: 0
          template:
            spec:
              restartPolicy: Never
              serviceAccountName: "$(quote "$SERVICE_ACCOUNT")"
              terminationGracePeriodSeconds: 120
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $accelerator
                cloud.google.com/gke-tpu-topology: $TOPOLOGY
YAML
  if [ -n "$SPOT" ]; then
    cat <<YAML
                cloud.google.com/gke-spot: "true"
              tolerations:
                - key: cloud.google.com/gke-spot
                  operator: Equal
                  value: "true"
                  effect: NoSchedule
YAML
  fi
  cat <<YAML
              containers:
                - name: clara
                  image: "$(quote "$IMAGE")"
                  # A pod that is told to stop (SIGTERM) has saved when it ends, but has not finished: the set starts again.
                  command: ["bash", "-c"]
                  args:
                    - |
                      set -e
                      git clone --quiet ${REPOSITORY@Q} /clara && cd /clara && git checkout --quiet ${REVISION@Q}
                      pip install --quiet --constraint constraints.txt --editable '.[tpu,records,tensorboard,gcs]'
                      ${command}--distributed &
                      trap 'kill -TERM \$!; wait \$!; exit 143' TERM
                      wait \$!
                  ports:
                    - containerPort: 8471
                    - containerPort: 8476
                  resources:
                    limits:
                      google.com/tpu: "$host"
YAML
}

if [ -n "$DRY_RUN" ]; then manifest; else manifest | kubectl apply -f -; fi
