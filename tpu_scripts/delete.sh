#!/usr/bin/env bash
# Deletes the slice, which ends its cost. Checkpoints, logs and code stay in the bucket.
#
#   delete.sh [--yes] [--dry-run] [--env=FILE]
#
# Does not stop the run first: stop.sh saves what was done since the last checkpoint. --yes does not ask. Nothing there: nothing to do.
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options "--yes" "$@"
settings

get_state ACTIVE || exit 1
if [[ $state == NONE && $ROAD != gke ]]; then # on GKE the node pool may be there without a JobSet
  say "$NAME is not there: nothing to delete"
else
  quiet=()
  if [[ -n ${on[--yes]:-} ]]; then quiet=(--quiet); fi
  delete_request "${quiet[@]}"
fi
