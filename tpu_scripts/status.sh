#!/usr/bin/env bash
# State of the queued resource, how the run ended if it has, and one line from every worker.
#
#   status.sh [--dry-run] [--env=FILE]
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options "" "$@"
settings

get_state ACTIVE || exit 1
say "$NAME: $state"
if ! run gcloud storage cat "$POD/finished" 2>"$tmp/error"; then
  if grep -qiE "$GONE" "$tmp/error"; then say "no run has ended"; else say "$POD/finished cannot be read: $(tail -n 1 "$tmp/error")"; fi
fi
if [[ $ROAD == gke ]]; then
  run kubectl get pods --selector="jobset.sigs.k8s.io/jobset-name=$NAME" --output=wide
elif [[ $state == ACTIVE ]]; then
  on_workers status
fi
