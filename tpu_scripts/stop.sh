#!/usr/bin/env bash
# Stops the run on every worker: SIGTERM, on which the program saves a checkpoint and leaves, and waits up to 15 minutes for that.
#
#   stop.sh [--kill] [--dry-run] [--env=FILE]
#
# --kill waits 10 seconds and then kills: for a program that hangs or was left over. The slice stays, and costs, until delete.sh.
# Without a run there is nothing to do.
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options "--kill" "$@"
settings

if [[ $ROAD == gke ]]; then
  run kubectl delete jobset "$NAME" --ignore-not-found # SIGTERM, and ten minutes to save
  exit
fi
need_active
on_workers stop "${on[--kill]:+--kill}"
