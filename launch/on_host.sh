#!/usr/bin/env bash
# The part of launching that runs on a host of a TPU slice, in the shipped code; tpu.sh, mig.sh and gke.sh call it.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'TEXT'
usage: bash launch/on_host.sh VERB [--print] [...]

  setup [--requirements=FILE]       makes .venv (with a Python 3.12 of its own where the host's is too old) and installs
  start [OPTION ...] [TRAINING ...] starts training in the background; it outlives the connection
  exec  [OPTION ...] [TRAINING ...] the same in the foreground, in place of this script: signals reach training
  state                             a line: launch-state HOST bare|ready|running|ended|lost STATUS SECONDS ASKED WORKDIR
  follow                            shows the log until training ends
  tail [--lines=40]                 shows the end of the log
  stop [--grace=300]                asks training to stop after its step with a checkpoint; kills it after the grace
  idle                              refuses where training runs
  free                              ends every process that holds the TPU, and removes a lock that nobody holds

options of start and exec:
  --data=gs://…                     copies prepared records to work/records/HASH first, and trains on them
  --env=NAME=VALUE                  sets a variable for training; may be repeated
TRAINING: --config=FILE --workdir=DIR --config.FIELD=VALUE …, as `python -m mixln_jax train` takes them

What it knows of a run lies in work/launch: train.log (a link to the newest of its logs), pid, status, asked, workdir.
TEXT
}

state=work/launch
# The lock and the devices of libtpu; the tests put others here.
tpu_lock=${MIXLN_TPU_LOCK:-/tmp/libtpu_lockfile}
tpu_devices=${MIXLN_TPU_DEVICES:-/dev/accel* /dev/vfio/[0-9]*}

# shellcheck source=launch/common.sh
source launch/common.sh
requirements=requirements-tpu.txt data="" grace=300 lines=40 env=()
# shellcheck source=launch/environment.sh
source launch/environment.sh

# A Python that is new enough, in PYTHON: TPU images of Ubuntu 22.04 have 3.10. uv keeps one in the home folder.
find_or_install_python() {
  local uv=$HOME/.local/share/mixln_jax/uv
  find_python >/dev/null 2>&1 && return
  [ -x "$uv/bin/uv" ] || run python3 -m pip install --quiet --disable-pip-version-check --target "$uv" uv
  run "$uv/bin/uv" python install --quiet 3.12
  "$print" || PYTHON=$("$uv/bin/uv" python find --managed-python 3.12)
}

setup() {
  find_or_install_python
  set_up_environment "$requirements"
}

# The process that trains, if one does; after a restart of the machine its number can be another's.
running_pid() {
  local pid
  pid=$(cat "$state/pid" 2>/dev/null) || return
  grep -qasE 'mixln_jax|on_host' "/proc/$pid/cmdline" && echo "$pid"
}

refuse_if_running() {
  local pid
  if pid=$(running_pid); then
    refuse "$(hostname): training runs there (process $pid); wait for it, or end it with the verb stop"
  fi
}

# The processes that hold the TPU, by id.
holders() {
  local found
  # shellcheck disable=SC2086 # patterns of device files
  found=$(fuser $tpu_devices 2>/dev/null || sudo -n fuser $tpu_devices 2>/dev/null) || return 0
  echo "$found" | tr -s ' ' '\n' | grep -E '^[0-9]+$' || true
}

# A holder makes JAX fall back to the CPU, or hang; a lock that its holder left behind does the same.
refuse_if_held() {
  local pid
  for pid in $(holders); do
    refuse "$(hostname): process $pid holds the TPU ($(ps -o args= -p "$pid" | cut -c1-120)); end it with the verb free"
  done
  remove_stale_lock
}

remove_stale_lock() {
  if [ -e "$tpu_lock" ]; then
    run rm -f "$tpu_lock" || run sudo -n rm -f "$tpu_lock"
  fi
}

free_tpu() {
  local pid signal
  for signal in TERM KILL; do # one that is killed at once can leave the chips unusable until a restart of the host
    for pid in $(holders); do
      run kill "-$signal" "$pid" || run sudo -n kill "-$signal" "$pid" || true
    done
    for _ in $(seq 100); do
      [ -n "$(holders)" ] || break
      sleep 0.1
    done
  done
  remove_stale_lock
}

# Copies the records of --data to a folder of their own, which it sets `records` to.
copy_data() {
  records=work/records/$(echo "$data" | cksum | cut -d' ' -f1)
  run mkdir -p "$records"
  if command -v gcloud >/dev/null; then
    run gcloud storage rsync "$data" "$records" --recursive
  else
    run .venv/bin/python -c "import fsspec, sys
fs, path = fsspec.url_to_fs(sys.argv[1])
fs.get(path.rstrip('/') + '/', sys.argv[2] + '/', recursive=True)" "$data" "$records"
  fi
}

# Training in place of this script: the data first, and the environment that training wants.
exec_training() {
  local variable
  require config "the recipe, as in --config=configs/llama_1b.py"
  require workdir "the run's folder"
  for variable in ${env[@]+"${env[@]}"}; do
    [[ $variable =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || refuse "--env=$(quote "$variable"): must be NAME=VALUE"
    export "${variable?}"
  done
  # JAX's own port on TPU VMs, 8482, is not among those that Google's default firewall opens; 8476 is (jax-ml/jax#35905).
  export JAX_COORDINATOR_PORT=${JAX_COORDINATOR_PORT:-8476}
  # shellcheck disable=SC3045
  ulimit -n "$(ulimit -Hn)" 2>/dev/null || true
  if [ -n "$data" ]; then
    copy_data
    overrides=("--config.data.directory=$records" ${overrides[@]+"${overrides[@]}"})
  fi
  local train=(.venv/bin/python -m mixln_jax train "--config=$config" "--workdir=$workdir")
  run_in_place "${train[@]}" ${overrides[@]+"${overrides[@]}"}
}

# In the background of `start`: waits for the command and writes down how it ended. A shutdown signals all processes,
# and training answers a second signal by stopping at once: so this passes none on.
attend() {
  local status=0
  trap : TERM INT HUP
  # shellcheck disable=SC2016
  bash -c 'echo "$$" >"$0.partial" && mv "$0.partial" "$0" && exec "$@"' "$state/pid" "$@" || status=$?
  echo "$status" >"$state/status.partial"
  mv "$state/status.partial" "$state/status"
  echo "ended with exit status $status"
}

# start ARGUMENT...: `exec` with the same arguments, in the background.
start() {
  local log
  refuse_if_running
  refuse_if_held
  if "$print"; then
    run bash launch/on_host.sh exec "$@"
    return
  fi
  mkdir -p "$state"
  log=train-$(date -u +%Y%m%dT%H%M%SZ)-$$.log
  rm -f "$state"/{pid,status,asked}
  ln -sfn "$log" "$state/train.log"
  echo "$workdir" >"$state/workdir"
  setsid nohup bash launch/on_host.sh attend bash launch/on_host.sh exec "$@" >"$state/$log" 2>&1 </dev/null &
  for _ in $(seq 50); do # until it has an id: `state` would call it lost
    [ -e "$state/pid" ] && break
    sleep 0.1
  done
  echo "$(hostname): training started, log in $PWD/$state/$log"
}

show_state() {
  local what=ready status=- seconds=0 asked=false
  [ -x .venv/bin/python ] || what=bare
  if [ -e "$state/pid" ]; then
    [ -e "$state/status" ] || running_pid >/dev/null || sleep 1 # its end is just being written down
    seconds=$(($(date +%s) - $(date -r "$state/pid" +%s)))
    if [ -e "$state/status" ]; then
      what=ended status=$(cat "$state/status")
      seconds=$(($(date -r "$state/status" +%s) - $(date -r "$state/pid" +%s)))
    elif running_pid >/dev/null; then
      what=running
    else # the machine was restarted, or the kernel killed all of it
      what=lost
    fi
  fi
  ! [ -e "$state/asked" ] || asked=true # last: `stop` leaves it before training ends, so it is there if an end is
  echo "launch-state $(hostname) $what $status $seconds $asked $(cat "$state/workdir" 2>/dev/null || echo -)"
}

stop() {
  local pid waited=0
  pid=$(running_pid) || { echo "$(hostname): no training runs" && return; }
  run touch "$state/asked"
  run kill -TERM "$pid"
  "$print" && return
  while running_pid >/dev/null; do
    ((waited++ < grace)) || { run kill -KILL "$pid" || true && break; }
    sleep 1
  done
  echo "$(hostname): training ended"
}

follow() {
  local pid
  pid=$(running_pid) || pid=""
  run tail -n 100 ${pid:+--pid="$pid"} ${pid:+-F} "$state/train.log"
}

(($#)) || { usage >&2 && exit 2; }
verb=$1
shift
if [ "$verb" = attend ]; then # what `start` runs
  attend "$@"
  exit
fi
parse_options "requirements data config workdir grace lines" "env" "print" "$@"
check grace "[0-9]+" "a number of seconds"
check lines "[0-9]+" "a number of lines"
case "$verb" in
  --help | -h | help) usage ;;
  setup) setup ;;
  start) start "$@" ;;
  exec) exec_training ;;
  state) show_state ;;
  follow) follow ;;
  tail) run tail -n "$lines" "$state/train.log" ;;
  stop) stop ;;
  idle) refuse_if_running ;;
  free) free_tpu ;;
  *) refuse "unknown verb $(quote "$verb"); choices: setup, start, exec, state, follow, tail, stop, idle, free" ;;
esac
