#!/usr/bin/env bash
# Sets up every worker: the code of the last sync.sh, its own Python 3.12 environment with dapo_jax[tpu], and ASSETS.
#
#   setup.sh [--dry-run] [--env=FILE]
#
# Again after every sync.sh; what is there already stays. Refused while a run is going.
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options "" "$@"
settings

[[ $ROAD != gke ]] || bad "ROAD=gke: every pod sets itself up; run.sh starts the JobSet"
need_active
upload_worker
on_workers setup
