# The worker's side. The scripts put the settings of pod.env before this text and give it to every worker: as the startup script of a
# launched slice (no argument), or over ssh. One folder, one lock and one program a worker, whichever way it was started.
#
#   boot    set up, run, restart: what a created, re-created or rebooted slice does by itself (the default)
#   setup   code, Python 3.12 environment and assets; what is there already stays
#   start   the run, detached from the caller
#   stop    SIGTERM to the program, wait until it has saved [--kill: then SIGKILL]
#   status  one line
#   once    set up, then become the program (for GKE, where the JobSet restarts)
# shellcheck shell=bash disable=SC2154 # the settings are above, in the uploaded script
set -euo pipefail
export PATH=$PATH:/snap/bin HOME=${HOME:-/root} # a startup script has neither gcloud's snap folder nor HOME
UV_VERSION=0.13.9
SETUP_TRIES=${SETUP_TRIES:-6}

say() { printf '%s %s\n' "$(date -u +%FT%TZ)" "$*"; }
fail() { say "$(hostname): $*" >&2 && exit 1; }
is_free() { flock -n lock true; }
lock() {
  exec 9>>lock # the program inherits file 9: the lock is free when the last process that could hold the TPU is gone
  flock -n 9 || fail "a run is going here: stop.sh first (after a crash: stop.sh --kill)"
}

metadata() {
  curl -sf -m 10 -H "Metadata-Flavor: Google" "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1" || true
}

# slice0-worker3: from the environment (GKE), else from the metadata server (TPU VM), as jax does.
who() {
  local slice=${MEGASCALE_SLICE_ID:-} worker=${TPU_WORKER_ID:-}
  [[ -n $slice ]] || slice=$(metadata tpu-env | sed -n "s/^MEGASCALE_SLICE_ID: *'\{0,1\}\([0-9]*\).*/\1/p")
  [[ -n $worker ]] || worker=$(metadata agent-worker-number)
  [[ -n $worker ]] || worker=$(metadata tpu-env | sed -n "s/^TPU_WORKER_ID: *'\{0,1\}\([0-9]*\).*/\1/p")
  echo "slice${slice:-0}-worker${worker:-0}"
}

# retry WHAT COMMAND...: a hiccup of the network must not end the run: up to SETUP_TRIES times, after 10, 20, 40, ... seconds.
retry() {
  local what=$1 try pause=10
  shift
  for ((try = 1; try <= SETUP_TRIES; try++)); do
    if "$@"; then return; fi
    ((try < SETUP_TRIES)) || break
    say "$(hostname): $what failed, again in $pause s"
    sleep "$pause"
    pause=$((pause < 160 ? pause * 2 : 160))
  done
  say "$(hostname): $what failed $SETUP_TRIES times; the lines above say why" >&2
  return 1
}

# Whatever failed (curl, tar, uv, a full disk), the status is 1: 2 and 3 are the program's own and end a JobSet for good. In a process of its
# own, so that `set -e` holds in it.
set_up() { retry setup bash "$self" setup-once || exit 1; }

# Idempotent: the same tarball is installed once. The system Python is too old and not ours, so uv brings its own 3.12 into WORKER_HOME.
# `git archive` dates files with their commit: no package newer than that, so all hosts, and a slice re-created next month, get the same.
setup() {
  export UV_CACHE_DIR=$WORKER_HOME/uv_cache UV_PYTHON_INSTALL_DIR=$WORKER_HOME/python UV_NO_MODIFY_PATH=1 UV_INSTALL_DIR=$WORKER_HOME/bin
  local sum committed
  gcloud storage cp "$POD/code.tar.gz" code.tar.gz
  sum=$(sha256sum <code.tar.gz)
  if [[ ! -f installed || $(<installed) != "$sum" ]]; then
    rm -rf installed code && mkdir code && tar -xzf code.tar.gz -C code
    if [[ $(bin/uv --version 2>/dev/null) != "uv $UV_VERSION"* ]]; then
      curl -LsSf "https://astral.sh/uv/$UV_VERSION/install.sh" -o uv_install.sh
      sh uv_install.sh
    fi
    bin/uv venv --quiet --clear --python 3.12 venv
    committed=$(date -u -d "@$(stat -c %Y code/pyproject.toml)" +%FT%TZ)
    bin/uv pip install --quiet --python venv/bin/python --exclude-newer "$committed" "./code[tpu]"
    echo "$sum" >installed
  fi
  if [[ -n $ASSETS ]]; then mkdir -p assets && gcloud storage rsync --recursive "$ASSETS" assets; fi
  say "$(hostname): set up"
}

program() {
  cd "$WORKER_HOME/code"
  export JAX_COMPILATION_CACHE_DIR=$CACHE PYTHONUNBUFFERED=1
  # Google's TPU guides ask for transparent huge pages: they shorten start-up and transfers between host and chips.
  echo always 2>/dev/null >/sys/kernel/mm/transparent_hugepage/enabled || true
  ((${#RUN_ENV[@]} == 0)) || export "${RUN_ENV[@]}"
  exec "$@" "$WORKER_HOME/venv/bin/python" -m dapo_jax.train --config "$CONFIG" --run-dir "$RUN_DIR" "${TRAIN_ARGS[@]}"
}

# New log for every start: a re-created slice must not overwrite in the bucket what its predecessor wrote.
open_log() {
  log=$WORKER_HOME/logs/$(who)-$(date -u +%Y%m%dT%H%M%SZ).log
  ln -sfn "$log" latest.log
}

upload_logs() { gcloud storage rsync logs "$POD/logs" >/dev/null 2>&1 || say "logs could not be copied to $POD/logs"; }

# Starts the program until it is over, here or on any other worker. A slice that comes back finds the same tarball and the same run
# folder, so it resumes from the newest checkpoint; one that comes back after the end does nothing.
loop() {
  local status restarts=0 verdict="" second
  (while sleep 60 && kill -0 $$; do upload_logs; done) 9>&- & # holds no lock, and ends with this loop
  # shellcheck disable=SC2064 # the uploader of now
  trap "kill $! 2>/dev/null || true; upload_logs" EXIT
  while :; do
    if gcloud storage cat "$POD/finished" 2>/dev/null; then
      say "the run is over: $POD/finished"
      return
    fi
    say "start, restart $restarts of at most $MAX_RESTARTS"
    (program setsid) & # its own process group, so that --kill ends the reward workers too
    echo $! >pid
    status=0
    wait $! || status=$?
    rm -f pid
    say "exit status $status"
    case $status in
      0) verdict="done" ;;
      2) verdict="bad input, not tried again" ;;
      3) verdict="no usable checkpoint, not tried again" ;;
      *)
        if [[ -e stopping ]]; then
          verdict="stopped"
        elif ((restarts >= MAX_RESTARTS)); then
          verdict="gave up after $restarts restarts"
        fi
        ;;
    esac
    if [[ -n $verdict ]]; then break; fi
    restarts=$((restarts + 1))
    for ((second = 0; second < RESTART_PAUSE; second++)); do
      if [[ -e stopping ]]; then break; fi
      sleep 1
    done
    if [[ -e stopping ]]; then verdict="stopped" && break; fi
  done
  finish "$status $verdict"
}

# The first verdict stays, and the others stop at it: one host alone can only wait.
finish() {
  say "$1"
  echo "$1 ($(who))" >finished
  retry "writing $POD/finished" gcloud storage cp --no-clobber finished "$POD/finished" || true
  if [[ $DELETE_WHEN_DONE == yes && $1 != *stopped && $(who) == slice0-worker0 ]]; then
    upload_logs
    sleep "$RESTART_PAUSE" # for the logs of the other workers
    local delete=(compute tpus queued-resources delete "$NAME" --project="$PROJECT" --zone="$ZONE" --force --quiet --async)
    if [[ $ROAD == mig ]]; then delete=(compute instance-groups managed delete "$NAME" --project="$PROJECT" --zone="$ZONE" --quiet); fi
    retry "deleting $NAME" gcloud "${delete[@]}"
  fi
}

stop() {
  local patience=900 kill_at=-1 sent="" pid="" second
  if [[ ${1:-} == --kill ]]; then patience=70 kill_at=10; fi
  touch stopping
  for ((second = 0; second < patience; second++)); do
    if is_free; then say "$(hostname): no run" && return; fi
    pid=$(cat pid 2>/dev/null || true)
    if [[ $pid != "$sent" ]]; then kill -TERM "$pid" 2>/dev/null || true; fi # once per program: a second signal could interrupt its checkpoint
    sent=$pid
    if ((second == kill_at)) && [[ -n $pid ]]; then kill -KILL -- "-$pid" || true; fi
    sleep 1
  done
  fail "still going after $patience s, process ${pid:-unknown}: stop.sh --kill; who has the TPU: sudo fuser -v /dev/accel* /dev/vfio/*"
}

status() {
  local state="no run"
  is_free || state="running"
  echo "$(who): $state; $(tail -n 1 latest.log 2>/dev/null || echo "no log")"
}

# Called in the last line: bash has read the whole file by then, so it may be replaced while it runs.
main() {
  self=$(realpath "$0")
  mkdir -p "$WORKER_HOME/logs"
  cd "$WORKER_HOME"
  case ${1:-boot} in
    boot)
      lock
      rm -f stopping
      open_log
      exec >>"$log" 2>&1
      trap upload_logs EXIT # a failed setup leaves its log too
      set_up
      loop
      ;;
    setup)
      lock
      set_up
      ;;
    setup-once) setup ;; # by set_up, which holds the lock
    start)
      lock
      [[ -f installed ]] || fail "nothing is set up here: setup.sh first"
      rm -f stopping
      open_log
      setsid nohup bash "$0" run </dev/null >>"$log" 2>&1 & # holds the lock through file 9, and outlives the ssh connection
      say "$(hostname): started, log $log"
      ;;
    run) loop ;; # by `start`
    stop) stop "${2:-}" ;;
    status) status ;;
    once)
      lock
      set_up
      program
      ;;
    *) fail "unknown mode $1" ;;
  esac
}
main "$@"
