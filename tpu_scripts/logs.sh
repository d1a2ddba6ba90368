#!/usr/bin/env bash
# Follows the log of worker 0; Ctrl-C ends the following, not the run.
#
#   logs.sh [--worker=N] [--slice=N] [--bucket] [--dry-run] [--env=FILE]
#
# --bucket prints what was copied to the bucket (once a minute and at the end), of all starts: also when the slice is gone.
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options "--worker= --slice= --bucket" "$@"
settings

worker=${on[--worker=]-0} slice=${on[--slice=]-0}
below() { [[ $1 =~ ^(0|[1-9][0-9]{0,4})$ ]] && (($1 < $2)); }
below "$worker" "$hosts" || bad "--worker=$(printf %q "$worker"): a slice has $hosts workers, numbered from 0"
below "$slice" "$SLICES" || bad "--slice=$(printf %q "$slice"): there are $SLICES slices, numbered from 0"
if [[ -n ${on[--bucket]:-} ]]; then
  run gcloud storage cat "$POD/logs/slice$slice-worker$worker-*.log"
elif [[ $ROAD == gke ]]; then
  run kubectl logs --follow --selector="jobset.sigs.k8s.io/jobset-name=$NAME,jobset.sigs.k8s.io/job-index=$slice,batch.kubernetes.io/job-completion-index=$worker"
elif [[ $ROAD == mig ]]; then
  instances # the N-th by name, which need not be worker N; the name of a log in the bucket says which it is
  [[ -n ${on[--dry-run]:-} ]] && worker=0
  run gcloud compute ssh "${nodes[worker]}" "${where[@]}" "${SSH_ARGS[@]}" --command="tail -n +1 -F $WORKER_HOME/latest.log"
else
  run gcloud compute tpus tpu-vm ssh "${nodes[slice]}" "${where[@]}" --worker="$worker" "${SSH_ARGS[@]}" \
    --command="tail -n +1 -F $WORKER_HOME/latest.log"
fi
