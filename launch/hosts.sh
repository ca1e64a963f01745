# shellcheck shell=bash disable=SC2034,SC2154 # variables are shared with the script that sources this
# Sourced by tpu.sh and mig.sh: the verbs, in terms of what either of them defines:
#   machine_create, machine_delete   make it, and be rid of it
#   machine_state                    sets `machine` to absent, waiting, ready, gone (preempted, stopped), failed (never
#                                    made) or unknown, and `machine_says` to what the cloud said
#   on_hosts all|NUMBER COMMAND      runs a shell command on all hosts, or on one
#   copy_to_hosts FILE NAME          copies a file to all home folders
#   copy_from_host PATH FOLDER       copies a folder from the first host
#   fetch_logs FOLDER                writes the logs of each host there
# and of $hosts (of all slices), $devices.

options="name zone project type capacity reservation service-account slices config workdir data worker output \
  requirements grace lines poll wait longest-wait healthy max-crashes max-creations"
lists="env create-flag"
switches="print dirty any-region everything delete-when-done internal-ip"
verbs="create setup train follow tail status fetch stop free supervise delete"

common_help() {
  cat <<'TEXT'
  --name=NAME --zone=ZONE --type=TYPE    always needed; TYPE as v5litepod-16 (or v5e-16), v5p-128, v6e-64 …
  --project=PROJECT                      default: gcloud's own
  --print                                prints the exact commands, runs nothing

verbs:
  create      makes the TPU
    --capacity=on-demand|spot|reserved     (default on-demand); spot is cheaper, and can be preempted at any time
    --service-account=EMAIL                what the hosts may do; it must be allowed to write to the bucket
    --create-flag=FLAG                     goes to gcloud as it is, as in --create-flag=--network=mine; may be repeated
  setup       ships the committed code to every host, and installs --requirements=requirements-tpu.txt
    --dirty                                ships the working tree as it stands, changes and all
  train       starts training on every host, in the background: it outlives the connection
    --config=FILE --workdir=gs://…         the recipe, and the run's folder: the same folder resumes the run
    --config.FIELD=VALUE                   changes the recipe
    --data=gs://…                          prepared records, copied to every host first
    --env=NAME=VALUE                       a variable for training; it is printed, and stands in the list of processes
    --any-region                           buckets need not be in the region of the TPU
  follow      shows the log of a host (--worker=0) until training ends; Ctrl-C stops only the display
  tail        shows the end of the log of every host (--lines=40)
  status      the TPU's state, and a line a host: running or ended, exit status, seconds
  fetch       copies the run's folder, without checkpoints, and all logs to --output=work/fetched/NAME
    --everything                           with checkpoints
  stop        asks training to stop after the current step with a checkpoint; kills it after --grace=300 seconds
  free        ends every process that holds the TPU, and removes the lock of one that died
  supervise   create, setup and train, and again after each preemption, until training is done
    --poll=60 --wait=15 --longest-wait=900   seconds between polls; seconds to wait before a restart, doubled each time
    --healthy=1800                         training seen running after so many seconds clears crashes and the wait
    --max-crashes=3                        consecutive crashes (not preemptions) after which it gives up
    --max-creations=100                    consecutive attempts to get the TPU after which it gives up
    --delete-when-done                     deletes the TPU when training is done, rejects its input or keeps crashing
  delete      deletes the TPU, and what its hosts hold with it

Exit status: 0 done; 1 it failed, or training keeps crashing; 2 rejected input; 75 stopped by a signal (run it again to
resume).
TEXT
}

# Reads and checks the command line of either script.
read_command_line() {
  name="" zone="" project="" type="" capacity=on-demand reservation="" service_account="" slices=1
  config="" workdir="" data="" worker=0 output="" requirements=requirements-tpu.txt grace=300 lines=40
  poll=60 wait=15 longest_wait=900 healthy=1800 max_crashes=3 max_creations=100
  env=() create_flag=() overrides=() everything=false delete_when_done=false internal_ip=false
  (($#)) || { usage >&2 && exit 2; }
  case "$1" in
    --help | -h | help) usage && exit 0 ;;
  esac
  verb=$1
  [[ " $verbs " == *" $verb "* ]] || refuse "unknown verb $(quote "$verb"); choices: ${verbs// /, }"
  shift
  parse_options "$options" "$lists" "$switches" "$@"
  require name "a name for the TPU, as in --name=llama"
  require zone "where it stands, as in --zone=us-west4-a"
  require type "what it is, as in --type=v5litepod-16"
  check name "[a-z]([-a-z0-9]{0,47}[a-z0-9])?" "lower-case letters, digits and dashes, from a letter on, at most 49"
  check zone "[a-z]+-[a-z]+[0-9]+-[a-z]" "a zone, as us-west4-a"
  check project "[a-z][-a-z0-9:.]{4,61}[a-z0-9]" "a project's id"
  check capacity "on-demand|spot|reserved" "on-demand, spot or reserved"
  check worker "0|[1-9][0-9]{0,8}" "the number of a host, from 0"
  check data "gs://..*" "a folder in a bucket, as gs://BUCKET/records"
  local option
  for option in grace lines poll wait longest-wait healthy; do
    check "$option" "0|[1-9][0-9]{0,8}" "a whole number"
  done
  for option in slices max-crashes max-creations; do
    check "$option" "[1-9][0-9]{0,8}" "a whole number from 1 on"
  done
  describe_tpu "$type"
  hosts=$((hosts * slices)) devices=$((devices * slices))
  ((worker < hosts)) || refuse "--worker=$worker: $slices slices of $tpu_type have hosts 0 to $((hosts - 1))"
  project_flag=(${project:+--project="$project"})
}

# The command that runs on_host.sh on the other side.
on_host() {
  echo "cd mixln_jax && $(quote bash launch/on_host.sh "$@")"
}

# Where the code lies that is to be shipped: what was packed stays the same for every restart.
packed() {
  echo "work/launch/$name"
}

# Ships what was packed, and installs what it needs.
set_up_hosts() {
  local unpack="mkdir -p mixln_jax && cd mixln_jax && { [ ! -e launch/on_host.sh ] || bash launch/on_host.sh idle; }"
  unpack+=" && rm -rf mixln_jax configs launch && tar -xzf ../mixln_jax.tar.gz"
  copy_to_hosts "$(packed)/mixln_jax.tar.gz" mixln_jax.tar.gz &&
    on_hosts all "$unpack && $(quote bash launch/on_host.sh setup --requirements="$requirements")"
}

# What can be known before the TPU is paid for.
check_training() {
  local why=""
  check_recipe
  ((hosts == 1)) || why="the $hosts hosts share no disk"
  [ "$verb" != supervise ] || why="a preempted TPU takes its disks with it"
  [[ -z $why || $workdir == gs://?* ]] || refuse "--workdir=$(quote "$workdir"): must be gs://BUCKET/…: $why"
  [[ $workdir != gs://* ]] || in_region "$workdir"
  [ -z "$data" ] || in_region "$data"
}

start_training() {
  local variable arguments=(start "--config=$config" "--workdir=$workdir")
  arguments+=(--config.parallel.expect_platform=tpu "--config.parallel.expect_devices=$devices")
  [ -z "$data" ] || arguments+=("--data=$data")
  for variable in ${env[@]+"${env[@]}"}; do
    arguments+=("--env=$variable")
  done
  on_hosts all "$(on_host "${arguments[@]}" ${overrides[@]+"${overrides[@]}"})" && return
  local status=$? # those that did start would wait for the others
  echo "error: training did not start on all hosts (see above; the verb setup ships the code): stopping the others" >&2
  on_hosts all "$(on_host stop --grace=10)" || true
  return "$status"
}

ask_hosts() {
  local bare="echo \"launch-state \$(hostname) bare - 0 false -\""
  on_hosts all "cd mixln_jax 2>/dev/null && bash launch/on_host.sh state || $bare"
}

status() {
  machine_state
  "$print" || echo "machine      $name: $machine ($machine_says)"
  if "$print" || [ "$machine" = ready ]; then
    ask_hosts | sed -n 's/^launch-state/host        /p; /^+ /p'
  fi
}

fetch() {
  output=${output:-work/fetched/$name}
  run mkdir -p "$output/logs"
  if [ -n "$workdir" ]; then
    if [[ $workdir == gs://* ]]; then
      local flags=(${project_flag[@]+"${project_flag[@]}"} --recursive)
      "$everything" || flags=(--exclude='^checkpoints/.*' "${flags[@]}")
      run gcloud storage rsync "$workdir" "$output" "${flags[@]}"
    else
      copy_from_host "$([[ $workdir == /* ]] || echo mixln_jax/)$workdir" "$output"
    fi
  fi
  fetch_logs "$output/logs"
}

main() {
  case "$verb" in
    create) machine_create ;;
    setup) pack_code "$(packed)" && set_up_hosts ;;
    train) check_training && start_training ;;
    follow) on_hosts "$worker" "$(on_host follow)" ;;
    tail) on_hosts all "$(on_host tail --lines="$lines")" ;;
    status) status ;;
    fetch) fetch ;;
    stop) on_hosts all "$(on_host stop --grace="$grace")" ;;
    free) on_hosts all "$(on_host free)" ;;
    supervise) check_training && pack_code "$(packed)" && supervise ;;
    delete) machine_delete ;;
  esac
}
