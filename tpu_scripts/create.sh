#!/usr/bin/env bash
# Asks for the slice of pod.env by its ROAD: a queued resource, a managed instance group, or a GKE node pool.
#
#   create.sh [--dry-run] [--env=FILE]
#
# Nothing runs on it yet: setup.sh and run.sh when it is ACTIVE (status.sh), or launch.sh instead of all three.
# Asking twice is harmless: what is there already is only reported.
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options "" "$@"
settings

# shellcheck disable=SC2119 # no more flags to pass
if [[ $ROAD == gke ]]; then create_request && exit; fi # there `state` is that of the JobSet
get_state NONE || exit 1
# shellcheck disable=SC2119 # no more flags to pass
case $state in
  NONE) create_request ;;
  SUSPENDED | FAILED) fail "$NAME is $state and will not come back: delete.sh, then create.sh" ;;
  *) say "$NAME is there already: $state" ;;
esac
