# shellcheck shell=bash disable=SC2034,SC2154 # variables are shared with the script that sources this
# Sourced by hosts.sh's callers: keeps training going over preemptions, and tells a crash from one.

say() {
  printf '%s  %s\n' "$(date -u +%H:%M:%S)" "$*"
}

# Sleeps; a signal to this script ends the sleep.
rest() {
  sleep "$1" &
  wait $! || kill $! 2>/dev/null || true
}

# Waits before a restart, twice as long each time.
back_off() {
  say "waiting $pause s"
  rest "$pause"
  pause=$((2 * pause < longest_wait ? 2 * pause : longest_wait))
}

# give_up STATUS MESSAGE: the end, whatever it is.
give_up() {
  local status=$1
  shift
  say "$*"
  say "$preemptions preemptions, $crashes consecutive crashes"
  if "$delete_when_done" && ((status != 75)); then
    machine_delete || say "the TPU could not be deleted: it is still billed"
  elif [ "$machine" != absent ]; then
    say "the TPU is still there, and billed; delete it with the verb delete and the same --name and --zone"
  fi
  exit "$status"
}

# What the hosts say, as one: sets training (unreachable, none, running, done, stopped, refused, crashed), and of the
# host that decides it: by, status, seconds; asked: whether a person stopped it; theirs: the folder of the run.
look_at_hosts() {
  local answer
  answer=$(ask_hosts 2>/dev/null | grep '^launch-state ') || true
  read -r training by status seconds asked theirs <<<"$(awk -v hosts="$hosts" '
    { count[$3]++; folder = $7; for (i = 8; i <= NF; i++) folder = folder " " $i }
    $5 > longest { longest = $5 }
    $6 == "true" { asked = 1 }
    $3 == "lost" || ($3 == "ended" && $4 != 0 && $4 != 75) { if (!bad || $4 == 2) { bad = $2; status = $4 } }
    $3 == "ended" && $4 == 75 { stopped = $2 }
    END {
      if (NR < hosts) training = "unreachable"
      else if (asked && !count["running"]) { training = "stopped"; status = 75 }
      else if (bad) training = status == 2 ? "refused" : "crashed"
      else if (count["running"] && count["ready"] + count["bare"]) { training = "crashed"; bad = "a-half-start" }
      else if (count["running"]) training = "running"
      else if (count["ended"] < NR) training = "none"
      else if (stopped) { training = "stopped"; bad = stopped; status = 75 }
      else { training = "done"; status = 0 }
      print training, bad ? bad : "-", status == "" ? "-" : status, longest + 0, asked ? "true" : "false", folder
    }' <<<"$answer")"
}

# Whether the TPU is still there after a while: where a host was taken away, training on the others ends first.
is_still_there() {
  rest "$poll"
  machine_state
  [ "$machine" = ready ]
}

try_to_start() {
  say "starting training on $hosts hosts"
  if ! "$is_set_up"; then # since the TPU was made, or this script started
    set_up_hosts && is_set_up=true
  fi
  "$is_set_up" && start_training && return
  restart=true # hosts that did start were stopped by start_training: not by hand
  ! is_still_there || count_crash "the hosts could not be set up, or training not started (see above)"
}

# count_crash MESSAGE: gives up at the last one allowed; else frees the hosts for another start.
count_crash() {
  crashes=$((crashes + 1))
  say "crash $crashes of $max_crashes: $1"
  ((crashes < max_crashes)) || give_up 1 "training keeps crashing; what it said is above"
  on_hosts all "$(on_host stop --grace="$grace")" || true
  on_hosts all "$(on_host free)" || true
  back_off
  restart=true
}

show_logs() {
  say "the last lines of the logs:"
  on_hosts all "$(on_host tail --lines="$lines")" || true
}

look_at_training() {
  look_at_hosts
  if [ "$training" = unreachable ]; then
    unreachable=$((unreachable + 1))
    ((unreachable % 10)) || count_crash "not all $hosts hosts have answered 10 times"
    rest "$poll"
    return
  fi
  unreachable=0
  if [ "$training" = running ]; then
    if [ "$theirs" != "$workdir" ]; then
      delete_when_done=false # it is not ours to delete
      give_up 2 "another run trains there ($theirs); stop it first, or take another TPU"
    fi
    ((seconds < healthy)) || crashes=0 pause=$wait # only here: a run that has ended is looked at again and again
    restart=false
    rest "$poll"
    return
  fi
  ! "$restart" || training=none
  case "$training" in
    none) restart=false && try_to_start ;;
    done) give_up 0 "training is done" ;;
    stopped)
      ! "$asked" || give_up 75 "training was stopped by hand"
      say "training was stopped by a signal on $by, with a checkpoint"
      back_off # if that was a preemption, the TPU's state says so soon
      restart=true
      ;;
    refused | crashed)
      say "training ended on $by with exit status $status after $seconds s"
      show_logs
      is_still_there || return 0
      [ "$training" = crashed ] || { on_hosts all "$(on_host stop --grace=10)" || true; }
      [ "$training" = crashed ] || give_up 2 "training rejected its input on $by: trying again would not help"
      count_crash "exit status $status on $by"
      ;;
  esac
}

# count_creation WHY: gives up where another attempt would not help, or there were too many; else waits.
count_creation() {
  case "$1" in
    *PERMISSION_DENIED* | *UNAUTHENTICATED* | *"ot have permission"* | *INVALID_ARGUMENT* | \
      *"unrecognized arguments"* | *"uota limit"* | *"uota exceeded"*)
      give_up 1 "the TPU can't be made, and trying again would not help"
      ;;
  esac
  creations=$((creations + 1))
  ((creations < max_creations)) || give_up 1 "the TPU could not be made in $max_creations attempts"
  back_off
}

create_again() {
  local answer
  say "creating $name ($capacity $type)"
  if answer=$(machine_create 2>&1); then
    echo "$answer"
    return
  fi
  echo "$answer"
  case "$answer" in
    *ALREADY_EXISTS* | *"already exists"*) back_off ;; # what is being deleted, or was made by somebody meanwhile
    *) count_creation "$answer" ;;
  esac
}

leave_well() {
  say "stopping training, as a signal asked"
  machine_state
  if [ "$machine" = ready ]; then
    on_hosts all "$(on_host stop --grace="$grace")" || true
  fi
  give_up 75 "run the same command to resume"
}

supervise() {
  local crashes=0 preemptions=0 creations=0 unreachable=0 unknown=0 pause=$wait is_set_up=false told=false
  local restart=true # whatever ended there before this script is no affair of its
  if "$print"; then # one round of what it would do
    machine_state && machine_create && set_up_hosts && start_training && ask_hosts
    return
  fi
  trap 'told=true' TERM INT
  while :; do
    ! "$told" || leave_well
    machine_state
    [ "$machine" = unknown ] || unknown=0
    case "$machine" in
      ready) creations=0 && look_at_training ;;
      waiting) rest "$poll" ;;
      absent) is_set_up=false restart=true && create_again ;;
      gone)
        preemptions=$((preemptions + 1)) is_set_up=false
        say "$name was preempted or stopped ($machine_says), number $preemptions: deleting what is left of it"
        machine_delete || true
        back_off
        ;;
      failed)
        say "$name could not be made: $machine_says"
        ! machine_delete || machine=absent
        count_creation "$machine_says"
        ;;
      unknown)
        say "gcloud could not say how the TPU is: $machine_says"
        ((++unknown < 10)) || give_up 1 "gcloud has failed 10 times"
        back_off
        ;;
    esac
  done
}
