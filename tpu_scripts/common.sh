# Sourced by every script here: options, the settings of pod.env and their checks, and `run`, which only prints under --dry-run.
# shellcheck shell=bash
set -euo pipefail
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "$0: needs bash 4.4 or newer, this is $BASH_VERSION (macOS: brew install bash)" >&2
  exit 2
fi
export LC_ALL=C # so that [a-z] means the same everywhere

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
declare -A on=() # options given: on[--dry-run]=yes, on[--worker=]=3
SETTINGS=(PROJECT ZONE NAME BUCKET ACCELERATOR_TYPE RUNTIME_VERSION CAPACITY VALID_UNTIL SLICES CREATE_ARGS SSH_ARGS RUN CONFIG TRAIN_ARGS
  ASSETS MAX_RESTARTS RESTART_PAUSE DELETE_WHEN_DONE WORKER_HOME)

say() { printf '%s\n' "$*" >&2; }
fail() { say "$(basename "$0"): $*" && exit 1; }
bad() { say "$(basename "$0"): $*" && exit 2; } # what the user can put right before anything was done

# options "--flag --value= ..." "$@": fills `on`; --help prints the comment at the top of the script.
options() {
  local allowed=" --dry-run --env= $1 " arg key
  shift
  for arg; do
    case $arg in
      -h | --help) sed -n -e '/^# shellcheck/q' -e '2,$s/^# \{0,1\}//p' "$0" && exit 0 ;;
      --*=*) key=${arg%%=*}= ;;
      --*) key=$arg ;;
      *) bad "unexpected argument $(printf %q "$arg"); see --help" ;;
    esac
    [[ $allowed == *" $key "* ]] || bad "unknown option $(printf %q "$arg"); see --help"
    on[$key]=${arg#"$key"}
    [[ $key == *= ]] || on[$key]=yes
  done
}

# match KEY REGEX WHAT: one clear line for a setting that is missing or is not WHAT.
match() {
  local value=${!1:-}
  [[ -n $value ]] || bad "$env_file: $1 is not set; it is $3"
  [[ $value =~ $2 ]] || bad "$env_file: $1=$(printf %q "$value") is not $3"
}

# Reads pod.env and checks it all, whichever script asks, so that a mistake shows at the first command and not at the last.
settings() {
  env_file=${on[--env=]:-$here/pod.env}
  [[ $env_file == */* ]] || env_file=./$env_file # `source` looks for bare names in PATH
  [[ -r $env_file ]] || bad "$env_file: cannot be read; copy pod.env, or name yours with --env=FILE"
  local error key
  error=$(bash -n "$env_file" 2>&1) || bad "not valid bash: ${error//$'\n'/; }"
  while read -r key; do
    [[ " ${SETTINGS[*]} " == *" $key "* ]] || bad "$env_file: there is no setting $key; the settings are ${SETTINGS[*]}"
  done < <(sed -n 's/^[[:space:]]*\([A-Za-z_][A-Za-z0-9_]*\)=.*/\1/p' "$env_file")
  unset "${SETTINGS[@]}" # settings come from the file alone, not from whatever the shell exports
  CREATE_ARGS=() SSH_ARGS=() TRAIN_ARGS=()
  # shellcheck source=pod.env
  source "$env_file"
  : "${RUNTIME_VERSION:=}" "${CAPACITY:=on-demand}" "${VALID_UNTIL:=}" "${SLICES:=1}" "${ASSETS:=}" "${MAX_RESTARTS:=20}"
  : "${RESTART_PAUSE:=60}" "${DELETE_WHEN_DONE:=no}" "${WORKER_HOME:=/opt/dapo_jax}"

  match PROJECT '^([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]$' "a Google Cloud project id such as my-project"
  match ZONE '^[a-z]+-[a-z]+[0-9]+-[a-z0-9]+$' "a zone such as us-east5-a"
  match NAME '^[a-z]([a-z0-9-]{0,56}[a-z0-9])?$' "a name of at most 58 lower-case letters, digits and dashes that starts with a letter"
  match CAPACITY '^(on-demand|spot|reserved)$' "on-demand, spot or reserved"
  match SLICES '^[1-9][0-9]{0,2}$' "a number of slices, 1 to 999"
  match BUCKET '^gs://[a-z0-9][a-z0-9._-]{1,61}[a-z0-9](/[A-Za-z0-9._-]+)*$' \
    "a bucket or a folder in it, gs://bucket/folder, without a slash at the end"
  match RUN '^[A-Za-z0-9][A-Za-z0-9._-]*$' "a run name of letters, digits, dots, dashes and underscores"
  match CONFIG '^[^/].*$' "the path of a config inside the repository such as configs/tiny_cpu.yaml"
  match MAX_RESTARTS '^[0-9]{1,6}$' "a number"
  match RESTART_PAUSE '^[0-9]{1,6}$' "a number of seconds"
  match DELETE_WHEN_DONE '^(yes|no)$' "yes or no"
  match WORKER_HOME '^(/[A-Za-z0-9._-]+)+$' "a folder on each worker such as /opt/dapo_jax"
  [[ -z $VALID_UNTIL ]] || match VALID_UNTIL '^[0-9]+[smhd]$' "a duration such as 6h"
  [[ -z $ASSETS ]] || match ASSETS '^gs://[^/]+(/.*)?$' "a gs:// folder"
  accelerator
  nodes=("$NAME")
  if ((SLICES > 1)); then nodes=(); for ((key = 0; key < SLICES; key++)); do nodes+=("$NAME-$key"); done; fi
  where=(--project="$PROJECT" --zone="$ZONE")
  POD=$BUCKET/pods/$NAME
  RUN_DIR=$BUCKET/runs/$RUN
  CACHE=$BUCKET/jax_cache
}

# Chips, hosts and runtime version of ACCELERATOR_TYPE. Names count TensorCores (two a chip) on v4 and v5p, and chips on v5e and v6e.
accelerator() {
  match ACCELERATOR_TYPE '^[A-Za-z0-9-]+$' "an accelerator type such as v5p-256 or v6e-8"
  local sizes='1|4|8|16|32|64|128|256' runtime size=${ACCELERATOR_TYPE##*-}
  case $ACCELERATOR_TYPE in
    v4-*) runtime=tpu-ubuntu2204-base ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v5e-*) bad "$env_file: ACCELERATOR_TYPE=$ACCELERATOR_TYPE: Cloud TPU calls this v5litepod-$size" ;;
    tpu7x* | v7*) bad "$env_file: ACCELERATOR_TYPE=$ACCELERATOR_TYPE: the Cloud TPU API has no TPU7x; use GKE, see jobset.yaml" ;;
    *) bad "$env_file: ACCELERATOR_TYPE=$ACCELERATOR_TYPE is unknown; known are v4-N, v5p-N, v5litepod-N and v6e-N" ;;
  esac
  if [[ $ACCELERATOR_TYPE == v4-* || $ACCELERATOR_TYPE == v5p-* ]]; then
    if [[ ! $ACCELERATOR_TYPE =~ ^[a-z0-9]+-[1-9][0-9]{0,4}$ ]] || ((size % 8 != 0)); then
      bad "$env_file: ACCELERATOR_TYPE=$ACCELERATOR_TYPE: the number counts TensorCores, 8 a host: 8, 16, 32, ..."
    fi
    chips=$((size / 2)) hosts=$((size / 8))
  else
    [[ $ACCELERATOR_TYPE =~ ^[a-z0-9]+-($sizes)$ ]] ||
      bad "$env_file: ACCELERATOR_TYPE=$ACCELERATOR_TYPE: the number is one of ${sizes//|/, }"
    chips=$size hosts=$((size <= 8 ? 1 : size / 4))
  fi
  case $RUNTIME_VERSION in
    tpu-ubuntu2204-base | v2-alpha-tpuv5 | v2-alpha-tpuv5-lite | v2-alpha-tpuv6e)
      [[ $RUNTIME_VERSION == "$runtime" ]] ||
        bad "$env_file: RUNTIME_VERSION=$RUNTIME_VERSION is not for $ACCELERATOR_TYPE; leave it out to get $runtime"
      ;;
    "") RUNTIME_VERSION=$runtime ;;
    *) match RUNTIME_VERSION '^[a-z0-9.-]+$' "a TPU software version such as $runtime" ;;
  esac
}

# run COMMAND...: runs it, or prints it ready to paste.
run() {
  local line
  if [[ -n ${on[--dry-run]:-} ]]; then
    printf -v line '%q ' "$@"
    printf '%s\n' "${line% }"
  else
    "$@"
  fi
}

# get_state ASSUMED: sets `state` of the queued resource, NONE where there is none, ASSUMED under --dry-run.
# Returns 1 when it cannot be told.
get_state() {
  local query=(gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" "--format=value(state.state)")
  if [[ -n ${on[--dry-run]:-} ]]; then
    run "${query[@]}"
    state=$1
  elif ! state=$("${query[@]}" 2>"$tmp/error"); then
    grep -q NOT_FOUND "$tmp/error" || { say "$(basename "$0"): $(tail -n 1 "$tmp/error")" && return 1; }
    state=NONE
  fi
}

need_active() {
  get_state ACTIVE || exit 1
  case $state in
    ACTIVE) ;;
    NONE) fail "$NAME is not there: create.sh, or launch.sh" ;;
    SUSPENDED | FAILED) fail "$NAME is $state and will not come back: delete.sh, then create.sh or launch.sh" ;;
    *) fail "$NAME is $state, not yet ACTIVE: status.sh shows when it is" ;;
  esac
}

# create_request [FLAG...]: asks for the slice or slices.
create_request() {
  local flags=(--node-id="$NAME")
  if ((SLICES > 1)); then flags=(--node-count="$SLICES" --node-prefix="$NAME"); fi
  if [[ $CAPACITY != on-demand ]]; then flags+=("--$CAPACITY"); fi
  if [[ -n $VALID_UNTIL ]]; then flags+=(--valid-until-duration="$VALID_UNTIL"); fi
  say "$NAME: $SLICES x $ACCELERATOR_TYPE, $((SLICES * chips)) chips on $((SLICES * hosts)) hosts, $CAPACITY;" \
    "it costs chips x hours from ACTIVE until delete.sh"
  run gcloud compute tpus queued-resources create "$NAME" "${where[@]}" --accelerator-type="$ACCELERATOR_TYPE" \
    --runtime-version="$RUNTIME_VERSION" "${flags[@]}" "${CREATE_ARGS[@]}" "$@"
}

delete_request() { run gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force "$@"; }

# The script of the worker's side, $tmp/worker.sh: the settings, quoted by bash itself, before startup.sh.
write_worker() {
  {
    printf '#!/bin/bash\n'
    declare -p PROJECT ZONE NAME CONFIG TRAIN_ARGS ASSETS MAX_RESTARTS RESTART_PAUSE DELETE_WHEN_DONE WORKER_HOME POD RUN_DIR CACHE
    cat "$here/startup.sh"
  } >"$tmp/worker.sh"
}

upload_worker() {
  write_worker
  run gcloud storage cp "$tmp/worker.sh" "$POD/worker.sh"
  say "every worker runs: python -m dapo_jax.train --config ${CONFIG@Q} --run-dir $RUN_DIR ${TRAIN_ARGS[*]@Q}"
}

clear_finished() { run gcloud storage rm "$POD/finished" 2>/dev/null || true; } # none there: nothing to clear

# on_workers MODE [ARG]: the worker's script in that mode, on all workers of all slices at once, because one slice alone can only wait.
on_workers() {
  local command node ssh pids=() failed=0
  printf -v command 'sudo mkdir -p %q && sudo gcloud storage cp %q %q && sudo bash %q %s' \
    "$WORKER_HOME" "$POD/worker.sh" "$WORKER_HOME/worker.sh" "$WORKER_HOME/worker.sh" "$*"
  for node in "${nodes[@]}"; do
    ssh=(gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker=all "${SSH_ARGS[@]}" --command="$command")
    if [[ -n ${on[--dry-run]:-} ]]; then
      run "${ssh[@]}"
    else
      "${ssh[@]}" &
      pids+=($!)
    fi
  done
  for node in "${pids[@]}"; do wait "$node" || failed=1; done
  ((failed == 0)) || fail "not every worker did it: see the lines above; status.sh shows each"
}
