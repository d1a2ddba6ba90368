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
if [[ $state == NONE && $ROAD == queued-resource ]]; then # elsewhere other parts may be there
  say "$NAME is not there: nothing to delete"
else
  quiet=()
  if [[ -n ${on[--yes]:-} ]]; then quiet=(--quiet); fi
  delete_request "${quiet[@]}"
fi
