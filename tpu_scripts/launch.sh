#!/usr/bin/env bash
# All in one: sends the code, asks for the slice, and gives it a startup script that sets up, runs, and restarts.
#
#   launch.sh [--watch] [--allow-dirty] [--dry-run] [--env=FILE]
#
# A slice that is re-created or rebooted resumes by itself from the newest checkpoint. Google does not re-create a spot slice that was
# taken away: --watch looks every minute and does, until the run is over (exit 0 when it is done). launch.sh once more does it by hand.
# A flex-start slice that has reached MAX_RUN_DURATION is not requested again: that would be another paid run.
# A slice that is there is left alone.
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options "--watch --allow-dirty" "$@"
settings

replace() {
  delete_request --quiet
  create_request --metadata-from-file=startup-script="$tmp/worker.sh"
}

if [[ $ROAD == gke ]]; then
  [[ -z ${on[--watch]:-} ]] || bad "--watch: on GKE the JobSet restarts by itself"
  # shellcheck disable=SC2119
  create_request
  bash "$here/sync.sh" --env="$env_file" ${on[--dry-run]:+--dry-run} ${on[--allow-dirty]:+--allow-dirty}
  clear_finished
  apply_jobset
  exit
fi
get_state NONE || exit 1
[[ $state =~ ^(NONE|SUSPENDED|FAILED|EMPTY)$ ]] ||
  fail "$NAME is there already: $state; setup.sh and run.sh use it, delete.sh ends it"
bash "$here/sync.sh" --env="$env_file" ${on[--dry-run]:+--dry-run} ${on[--allow-dirty]:+--allow-dirty}
write_worker
clear_finished
if [[ $state == NONE ]]; then create_request --metadata-from-file=startup-script="$tmp/worker.sh"; else replace; fi
[[ -n ${on[--watch]:-} && -z ${on[--dry-run]:-} ]] || exit 0

active="" again="" # it was active once; the last attempt to replace it failed
while sleep 60; do
  if verdict=$(gcloud storage cat "$POD/finished" 2>/dev/null); then
    say "the run is over: $verdict"
    if [[ $DELETE_WHEN_DONE == yes && $verdict != *stopped* ]]; then (delete_request --quiet) || true; else say "delete.sh ends its cost"; fi
    [[ $verdict == 0\ done* ]] && exit 0
    exit 1
  fi
  get_state NONE || continue # a hiccup of the network
  case $state$again in
    ACTIVE*) active=yes again="" ;;
    SUSPENDED* | EMPTY* | NONEagain)
      [[ $state != EMPTY || -n $active$again ]] || continue # it is just being made
      if [[ $CAPACITY == flex-start ]]; then
        fail "$NAME has reached MAX_RUN_DURATION=$MAX_RUN_DURATION, as asked for: launch.sh once more resumes the run, delete.sh clears up"
      fi
      say "$NAME was taken away: asking again"
      set +e # in `if replace` a failed deletion would not end the attempt
      (set -e; replace)
      again=$?
      set -e
      if ((again)); then say "will try again in a minute" && again=again; else again=""; fi
      ;;
    FAILED*) fail "$NAME FAILED (no quota, or no such capacity): \`gcloud compute tpus queued-resources describe $NAME ${where[*]}\` says why" ;;
    NONE) fail "$NAME was deleted" ;;
  esac
done
