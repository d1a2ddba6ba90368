#!/usr/bin/env bash
# Starts the run on every worker, detached: it continues when the connection or this machine is lost.
#
#   run.sh [--dry-run] [--env=FILE]
#
# A failed program is started again MAX_RESTARTS times. Refused while a run is going. Before it: sync.sh, setup.sh; after it: logs.sh.
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options "" "$@"
settings

if [[ $ROAD == gke ]]; then
  upload_worker
  clear_finished
  apply_jobset
  exit
fi
need_active
upload_worker
clear_finished
on_workers start
