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
SETTINGS=(ROAD PROJECT ZONE NAME BUCKET ACCELERATOR_TYPE TOPOLOGY RUNTIME_VERSION CAPACITY MAX_RUN_DURATION VALID_UNTIL CLUSTER QUEUE SLICES
  CREATE_ARGS SSH_ARGS RUN CONFIG TRAIN_ARGS RUN_ENV ASSETS MAX_RESTARTS RESTART_PAUSE DELETE_WHEN_DONE WORKER_HOME)

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
  CREATE_ARGS=() SSH_ARGS=() TRAIN_ARGS=() RUN_ENV=()
  # shellcheck source=pod.env
  source "$env_file"
  : "${ROAD:=queued-resource}" "${TOPOLOGY:=}" "${MAX_RUN_DURATION:=}" "${CLUSTER:=}" "${QUEUE:=}"
  : "${RUNTIME_VERSION:=}" "${CAPACITY:=on-demand}" "${VALID_UNTIL:=}" "${SLICES:=1}" "${ASSETS:=}" "${MAX_RESTARTS:=20}"
  : "${RESTART_PAUSE:=60}" "${DELETE_WHEN_DONE:=no}" "${WORKER_HOME:=/opt/dapo_jax}"

  match ROAD '^(queued-resource|mig|gke)$' "queued-resource, mig or gke"
  match PROJECT '^([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]$' "a Google Cloud project id such as my-project"
  match ZONE '^[a-z]+-[a-z]+[0-9]+-[a-z0-9]+$' "a zone such as us-east5-a"
  match NAME '^[a-z]([a-z0-9-]{0,56}[a-z0-9])?$' "a name of at most 58 lower-case letters, digits and dashes that starts with a letter"
  match CAPACITY '^(on-demand|spot|reserved|flex-start)$' "on-demand, spot, reserved or flex-start"
  if [[ $CAPACITY == flex-start ]]; then
    match MAX_RUN_DURATION '^([1-9][0-9]?[hm]|1[0-5][0-9]h|16[0-8]h|[1-7]d)$' "a duration of at most seven days such as 24h or 7d"
  elif [[ -n $MAX_RUN_DURATION ]]; then
    bad "$env_file: MAX_RUN_DURATION is for CAPACITY=flex-start"
  fi
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
  for key in "${RUN_ENV[@]}"; do
    [[ $key =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || bad "$env_file: RUN_ENV: $(printf %q "$key") is not NAME=VALUE"
  done
  [[ -z $ASSETS ]] || match ASSETS '^gs://[^/]+(/.*)?$' "a gs:// folder"
  accelerator
  road
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
    tpu7x-*) runtime=none ;;
    *) bad "$env_file: ACCELERATOR_TYPE=$ACCELERATOR_TYPE is unknown; known are v4-N, v5p-N, v5litepod-N, v6e-N and tpu7x-N" ;;
  esac
  if [[ $ACCELERATOR_TYPE == v4-* || $ACCELERATOR_TYPE == v5p-* || $ACCELERATOR_TYPE == tpu7x-* ]]; then
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

# What the road needs besides: on Compute Engine and GKE a slice is named by its topology and machine type, always 4 chips a host.
road() {
  local places="Compute Engine" size=1 side image=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e
  if [[ $ROAD == queued-resource ]]; then
    [[ $ACCELERATOR_TYPE != tpu7x-* ]] || bad "$env_file: ROAD=$ROAD: TPU7x is on Compute Engine and GKE only; set ROAD=mig or ROAD=gke"
    return
  fi
  case $ACCELERATOR_TYPE in
    v5p-*) machine=ct5p-hightpu-4t label=tpu-v5p-slice ;;
    v6e-*) machine=ct6e-standard-4t label=tpu-v6e-slice ;;
    tpu7x-*) machine=tpu7x-standard-4t label=tpu7x image=ubuntu-accel-2404-amd64-tpu-tpu7x ;;
    v4-*) machine=ct4p-hightpu-4t label=tpu-v4-podslice places=GKE ;;
    *) machine=ct5lp-hightpu-4t label=tpu-v5-lite-podslice places=GKE ;;
  esac
  [[ $ROAD == gke || $places != GKE ]] || bad "$env_file: ROAD=mig: Compute Engine has v5p, v6e and TPU7x only; set ROAD=queued-resource or gke"
  match TOPOLOGY '^[1-9][0-9]?x[1-9][0-9]?(x[1-9][0-9]?)?$' "the shape of a slice such as 4x4x8"
  for side in ${TOPOLOGY//x/ }; do size=$((size * side)); done
  ((size == chips)) || bad "$env_file: TOPOLOGY=$TOPOLOGY has $size chips, $ACCELERATOR_TYPE has $chips"
  ((chips % 4 == 0)) || bad "$env_file: ROAD=$ROAD: slices have 4, 8, 16, ... chips, 4 a host"
  hosts=$((chips / 4)) region=${ZONE%-*} IMAGE=$image
  if [[ $ROAD == mig ]]; then
    ((SLICES == 1)) || bad "$env_file: ROAD=mig: one slice only; set SLICES=1, or ROAD=gke"
    [[ -z $VALID_UNTIL ]] || bad "$env_file: VALID_UNTIL is for ROAD=queued-resource"
  else
    match CLUSTER '^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$' "the name of a GKE cluster"
    [[ -z $QUEUE ]] || match QUEUE '^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$' "the name of a Kueue LocalQueue"
    ((${#NAME} <= 40)) || bad "$env_file: NAME=$NAME: node pools have names of at most 40 characters"
  fi
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

# What an earlier attempt has made or deleted is no failure.
THERE="already exists" GONE="not.?found|matched no objects"

# tolerate PATTERN COMMAND...: runs it; a failure whose message has PATTERN is none. gcloud asks nothing then: its stderr is no terminal.
tolerate() {
  local pattern=$1
  shift
  if [[ -n ${on[--dry-run]:-} ]]; then
    run "$@"
  else
    "$@" 2>"$tmp/error" || grep -qiE "$pattern" "$tmp/error" || fail "$(tail -n 1 "$tmp/error")"
  fi
}

# get_state ASSUMED: sets `state` of the queued resource, NONE where there is none, ASSUMED under --dry-run.
# Returns 1 when it cannot be told.
get_state() {
  local query=(gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" "--format=value(state.state)")
  case $ROAD in
    mig) query=(gcloud compute instance-groups managed list-instances "$NAME" "${where[@]}" "--format=value(currentAction,instanceStatus)") ;;
    gke) query=(kubectl get jobset "$NAME" "--output=jsonpath={.status.terminalState}{.spec.suspend}") ;;
  esac
  if [[ -n ${on[--dry-run]:-} ]]; then
    run "${query[@]}"
    state=$1
  elif ! state=$("${query[@]}" 2>"$tmp/error"); then
    grep -qiE "$GONE" "$tmp/error" || { say "$(basename "$0"): $(tail -n 1 "$tmp/error")" && return 1; }
    state=NONE
  elif [[ $ROAD == mig ]]; then
    state=$(awk 'NF {print $NF}' <<<"$state" | sed -E 's/^(STOPP|SUSPEND|TERMINAT).*/SUSPENDED/' | sort | uniq -c | awk '{print $1, $2}')
    case $state in
      "$hosts RUNNING") state=ACTIVE ;;
      *SUSPENDED*) state=SUSPENDED ;;
      "") state=EMPTY ;; # its VMs were deleted, as at the end of flex-start; or it is just being made
      *) state=WAITING_FOR_RESOURCES ;;
    esac
  elif [[ $ROAD == gke ]]; then
    case $state in Completed*) state=COMPLETED ;; Failed*) state=FAILED ;; true) state=WAITING_FOR_RESOURCES ;; *) state=ACTIVE ;; esac
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

# shellcheck disable=SC2120 # flags are for launch.sh
# create_request [FLAG...]: asks for the slice or slices.
create_request() {
  say "$NAME: $SLICES x $ACCELERATOR_TYPE, $((SLICES * chips)) chips on $((SLICES * hosts)) hosts, $CAPACITY;" \
    "it costs chips x hours from ACTIVE until delete.sh"
  "create_${ROAD/-/_}" "$@"
}

create_queued_resource() {
  local flags=(--node-id="$NAME") track=()
  if ((SLICES > 1)); then flags=(--node-count="$SLICES" --node-prefix="$NAME"); fi
  case $CAPACITY in
    flex-start) track=(alpha) flags+=(--provisioning-model=flex-start --max-run-duration="$MAX_RUN_DURATION") ;;
    spot | reserved) flags+=("--$CAPACITY") ;;
  esac
  if [[ -n $VALID_UNTIL ]]; then flags+=(--valid-until-duration="$VALID_UNTIL"); fi
  run gcloud "${track[@]}" compute tpus queued-resources create "$NAME" "${where[@]}" --accelerator-type="$ACCELERATOR_TYPE" \
    --runtime-version="$RUNTIME_VERSION" "${flags[@]}" "${CREATE_ARGS[@]}" "$@"
}

# The workload policy says that the hosts form one slice.
create_policy() {
  tolerate "$THERE" gcloud compute resource-policies create workload-policy "$NAME" --project="$PROJECT" --region="$region" \
    --type=HIGH_THROUGHPUT --accelerator-topology="$TOPOLOGY"
}


create_mig() {
  local flags=()
  case $CAPACITY in
    spot) flags=(--provisioning-model=SPOT --instance-termination-action=STOP) ;;
    reserved) flags=(--provisioning-model=RESERVATION_BOUND --instance-termination-action=DELETE --reservation-affinity=specific) ;;
    flex-start) flags=(--provisioning-model=FLEX_START --max-run-duration="$MAX_RUN_DURATION" --instance-termination-action=DELETE) ;;
  esac
  create_policy
  delete_template # of an earlier attempt, with other settings perhaps
  run gcloud compute instance-templates create "$NAME" --project="$PROJECT" --instance-template-region="$region" \
    --machine-type="$machine" --maintenance-policy=TERMINATE --image-family="$IMAGE" --image-project=ubuntu-os-accelerator-images \
    --boot-disk-size=200GB --scopes=cloud-platform "${flags[@]}" "${CREATE_ARGS[@]}" "$@"
  tolerate "$THERE" gcloud compute instance-groups managed create "$NAME" "${where[@]}" --size="$hosts" \
    --template="projects/$PROJECT/regions/$region/instanceTemplates/$NAME" --target-size-policy-mode=bulk \
    --workload-policy="projects/$PROJECT/regions/$region/resourcePolicies/$NAME" --default-action-on-vm-failure=do-nothing
}

delete_template() {
  tolerate "$GONE" gcloud compute instance-templates delete "$NAME" --project="$PROJECT" --region="$region" --quiet
}

# A node pool is exactly one slice; TPU7x takes the workload policy in place of the topology. Flex-start nodes come by the autoscaler, and
# the API takes their time in seconds only.
create_gke() {
  local flags=(--num-nodes="$hosts") unit=${MAX_RUN_DURATION: -1} node
  local -A seconds=([m]=60 [h]=3600 [d]=86400)
  case $CAPACITY in
    spot) flags+=(--spot) ;;
    reserved) flags+=(--reservation-affinity=specific) ;;
    flex-start)
      flags=(--flex-start --max-run-duration="$((${MAX_RUN_DURATION%?} * seconds[$unit]))s" --reservation-affinity=none --no-enable-autorepair
        --enable-autoscaling --num-nodes=0 --min-nodes=0 --max-nodes="$hosts")
      ;;
  esac
  if [[ $ACCELERATOR_TYPE == tpu7x-* ]]; then
    create_policy
    flags+=(--placement-policy="$NAME")
  else
    flags+=(--tpu-topology="$TOPOLOGY")
  fi
  for node in "${nodes[@]}"; do
    tolerate "$THERE" gcloud container node-pools create "$node" --project="$PROJECT" --cluster="$CLUSTER" --location="$region" \
      --node-locations="$ZONE" --machine-type="$machine" --disk-size=200 --scopes=cloud-platform "${flags[@]}" "${CREATE_ARGS[@]}"
  done
}

# Each part may be gone already: an earlier attempt may have failed half-way.
delete_request() {
  local node failed=0
  case $ROAD in
    queued-resource) [[ $state == NONE ]] || run gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force "$@" ;;
    mig)
      [[ $state == NONE ]] || run gcloud compute instance-groups managed delete "$NAME" "${where[@]}" "$@"
      delete_template
      delete_policy
      ;;
    gke)
      run kubectl delete jobset "$NAME" --ignore-not-found
      for node in "${nodes[@]}"; do
        run gcloud container node-pools delete "$node" --project="$PROJECT" --cluster="$CLUSTER" --location="$region" "$@" || failed=1
      done
      ((failed == 0)) || fail "not every node pool is deleted: see the lines above"
      if [[ $ACCELERATOR_TYPE == tpu7x-* ]]; then delete_policy; fi
      ;;
  esac
}

delete_policy() { tolerate "$GONE" gcloud compute resource-policies delete "$NAME" --project="$PROJECT" --region="$region" --quiet; }

# The JobSet of this run: jobset.yaml with the settings of pod.env.
apply_jobset() {
  sed -e "s|gs://YOUR_BUCKET|$BUCKET|; s|tpu-v5p-slice|$label|; s|4x4x8|$TOPOLOGY|" -e "s|^\( *name: \)dapo$|\1$NAME|; s|value: dapo$|value: $NAME|" \
    -e "s|replicas: 1$|replicas: $SLICES|; s|completions: 32|completions: $hosts|; s|parallelism: 32|parallelism: $hosts|; s|maxRestarts: 20|maxRestarts: $MAX_RESTARTS|" \
    -e "${QUEUE:+s|# kueue.x-k8s.io/queue-name: QUEUE|kueue.x-k8s.io/queue-name: $QUEUE|}" \
    -e "$([[ $CAPACITY != spot ]] || echo 's|# cloud.google.com/gke-spot|cloud.google.com/gke-spot|')" \
    -e "$([[ $CAPACITY != flex-start ]] || echo 's|# cloud.google.com/gke-flex-start|cloud.google.com/gke-flex-start|')" \
    "$here/jobset.yaml" >"$tmp/jobset.yaml"
  run kubectl apply --filename="$tmp/jobset.yaml"
}

# The script of the worker's side, $tmp/worker.sh: the settings, quoted by bash itself, before startup.sh.
write_worker() {
  {
    printf '#!/bin/bash\n'
    declare -p ROAD PROJECT ZONE NAME CONFIG TRAIN_ARGS RUN_ENV ASSETS MAX_RESTARTS RESTART_PAUSE DELETE_WHEN_DONE WORKER_HOME POD RUN_DIR CACHE
    cat "$here/startup.sh"
  } >"$tmp/worker.sh"
}

upload_worker() {
  write_worker
  run gcloud storage cp "$tmp/worker.sh" "$POD/worker.sh"
  say "every worker runs: python -m dapo_jax.train --config ${CONFIG@Q} --run-dir $RUN_DIR ${TRAIN_ARGS[*]@Q}"
}

clear_finished() { tolerate "$GONE" gcloud storage rm "$POD/finished"; }

# instances: sets `nodes` to the VMs of the managed instance group, which have names of their own.
instances() {
  local query=(gcloud compute instance-groups managed list-instances "$NAME" "${where[@]}" "--format=value(name)")
  if [[ -n ${on[--dry-run]:-} ]]; then
    run "${query[@]}"
    nodes=("$NAME-EACH")
  else
    mapfile -t nodes < <("${query[@]}" | sort)
    ((${#nodes[@]} == hosts)) || fail "$NAME has ${#nodes[@]} VMs, not $hosts: status.sh shows when it is complete"
  fi
}

# on_workers MODE [ARG]: the worker's script in that mode, on all workers of all slices at once, because one slice alone can only wait.
on_workers() {
  local command node ssh pids=() failed=0
  printf -v command 'sudo mkdir -p %q && sudo gcloud storage cp %q %q && sudo bash %q %s' \
    "$WORKER_HOME" "$POD/worker.sh" "$WORKER_HOME/worker.sh" "$WORKER_HOME/worker.sh" "$*"
  if [[ $ROAD == mig ]]; then instances; fi
  for node in "${nodes[@]}"; do
    ssh=(gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker=all "${SSH_ARGS[@]}" --command="$command")
    if [[ $ROAD == mig ]]; then ssh=(gcloud compute ssh "$node" "${where[@]}" "${SSH_ARGS[@]}" --command="$command"); fi
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
