#!/usr/bin/env bash
# Asks for the slice of pod.env as a queued resource: on demand, spot or reserved; one slice or several.
#
#   create.sh [--dry-run] [--env=FILE]
#
# Nothing runs on it yet: setup.sh and run.sh when it is ACTIVE (status.sh), or launch.sh instead of all three.
# Asking twice is harmless: what is there already is only reported.
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options "" "$@"
settings

get_state NONE || exit 1
# shellcheck disable=SC2119 # no more flags to pass
case $state in
  NONE) create_request ;;
  SUSPENDED | FAILED) fail "$NAME is $state and will not come back: delete.sh, then create.sh" ;;
  *) say "$NAME is there already: $state" ;;
esac
