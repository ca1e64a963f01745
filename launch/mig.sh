#!/usr/bin/env bash
# A TPU slice of Compute Engine, as a managed instance group (v5p, v6e, tpu7x): what Google points to in place of the
# Cloud TPU API, which gets no new TPUs. The verbs are those of tpu.sh. docs/tpu.md is the guide.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'TEXT'
usage: bash launch/mig.sh VERB --name=NAME --zone=ZONE --type=TYPE [OPTION ...]

Needs the Google Cloud CLI (gcloud), signed in. For v2 to v5e, and for the queue: launch/tpu.sh; for GKE: launch/gke.sh.
NAME is that of the group, of its instance template and of its workload policy; `delete` deletes all three.

  --reservation=NAME                     with --capacity=reserved: the reservation
  --internal-ip                          ssh to internal addresses, from a machine in the same network
  --disk=100                             GB of each host's disk
TEXT
  common_help
}

# shellcheck source=launch/common.sh
source launch/common.sh
# shellcheck source=launch/topology.sh
source launch/topology.sh
# shellcheck source=launch/hosts.sh
source launch/hosts.sh
# shellcheck source=launch/supervise.sh
source launch/supervise.sh

group=(gcloud compute instance-groups managed)
policies=(gcloud compute resource-policies)

machine_create() {
  local flags=("--machine-type=$machine_type" "--image-family=$image_family" "--boot-disk-size=${disk}GB")
  flags+=(--image-project=ubuntu-os-accelerator-images --maintenance-policy=TERMINATE --scopes=cloud-platform)
  case "$capacity" in # how Compute Engine calls it
    spot) flags+=(--provisioning-model=SPOT --instance-termination-action=STOP) ;;
    reserved)
      flags+=(--provisioning-model=RESERVATION_BOUND --instance-termination-action=DELETE)
      flags+=(--reservation-affinity=specific "--reservation=$reservation")
      ;;
  esac
  ! "$internal_ip" || flags+=(--no-address)
  flags+=(${service_account:+--service-account="$service_account"} ${create_flag[@]+"${create_flag[@]}"})
  # What an earlier attempt left behind would be in the way.
  [ "$verb" != supervise ] || "$print" || delete_parts 2>/dev/null
  run gcloud compute instance-templates create "$name" ${project_flag[@]+"${project_flag[@]}"} "${flags[@]}" || return
  local group_flags=("--size=$hosts" "--template=$name")
  if ((hosts > 1)); then # what makes one slice of the group
    run "${policies[@]}" create workload-policy "$name" "${region[@]}" --type=HIGH_THROUGHPUT \
      --accelerator-topology="$topology" || return
    group_flags+=("--workload-policy=projects/$(project_id)/regions/${zone%-*}/resourcePolicies/$name")
    group_flags+=(--target-size-policy-mode=bulk)
  fi
  # A slice that lost a host is made anew as a whole, by `supervise`: hence no repair.
  run "${group[@]}" create "$name" "${where[@]}" "${group_flags[@]}" --default-action-on-vm-failure=do-nothing
}

project_id() {
  if [ -n "$project" ]; then
    echo "$project"
  elif "$print"; then
    echo PROJECT
  else
    gcloud config get project
  fi
}

# What the group was made of; it can be deleted only after the group.
delete_parts() {
  run gcloud compute instance-templates delete "$name" ${project_flag[@]+"${project_flag[@]}"} --quiet || true
  ((hosts == 1)) || run "${policies[@]}" delete "$name" "${region[@]}" --quiet || true
}

machine_delete() {
  run "${group[@]}" delete "$name" "${where[@]}" --quiet || true
  delete_parts
  "$print" || { machine_state && [ "$machine" = absent ]; }
}

# The instances of the group, a line each: name, state.
instances() {
  run "${group[@]}" list-instances "$name" "${where[@]}" --format='value(instance.basename(),instanceStatus)'
}

machine_state() {
  local errors answer
  if "$print"; then
    instances
    return
  fi
  errors=$(mktemp)
  answer=$(instances 2>"$errors") || answer=$(cat "$errors")
  rm -f "$errors"
  names=()
  case "$answer" in
    *NOT_FOUND* | *"not found"*) machine=absent machine_says="no such group" && return ;;
    *ERROR:*) machine=unknown machine_says=$answer && return ;;
  esac
  local instance state running=0
  machine=waiting
  while read -r instance state; do
    [ -n "$instance" ] || continue
    names+=("$instance")
    case "$state" in
      RUNNING) running=$((running + 1)) ;;
      STOPPING | STOPPED | TERMINATED | SUSPENDING | SUSPENDED) machine=gone ;;
    esac
  done <<<"$answer"
  machine_says="$running of $hosts hosts run"
  [ "$machine" = gone ] || ((running < hosts)) || machine=ready
}

# Sets `names` to the instances, in their order.
find_names() {
  local number
  if "$print"; then
    instances
    names=()
    for ((number = 0; number < hosts; number++)); do names+=("INSTANCE-$number"); done
  elif ((${#names[@]} < hosts)); then
    machine_state
    [ "$machine" = ready ] || refuse "$name: $machine_says; wait until the verb status says ready"
  fi
}

# on_each all|NUMBER FUNCTION ...: FUNCTION INSTANCE … for the instances, all at once; fails as one of them does.
on_each() {
  local which=$1 number pid pids=() failed=0
  shift
  find_names
  for ((number = 0; number < hosts; number++)); do
    [ "$which" = all ] || [ "$which" = "$number" ] || continue
    if "$print"; then
      "$1" "${names[number]}" "${@:2}"
    else
      "$1" "${names[number]}" "${@:2}" &
      pids+=($!)
    fi
  done
  for pid in ${pids[@]+"${pids[@]}"}; do
    wait "$pid" || failed=$?
  done
  return "$failed"
}

ssh_to() {
  run gcloud compute ssh "$1" "${where[@]}" ${internal[@]+"${internal[@]}"} --command="$2"
}

scp_to() {
  run gcloud compute scp "$2" "$1:$3" "${where[@]}" ${internal[@]+"${internal[@]}"}
}

scp_from() {
  run gcloud compute scp "$1:$2" "$3" --recurse "${where[@]}" ${internal[@]+"${internal[@]}"}
}

logs_of() {
  ! "$print" || echo "# into $(quote "$2/$1.log"):"
  if "$print"; then
    ssh_to "$1" 'cat mixln_jax/work/launch/train-*.log'
  else
    ssh_to "$1" 'cat mixln_jax/work/launch/train-*.log' >"$2/$1.log"
  fi
}

on_hosts() {
  on_each "$1" ssh_to "$2"
}

copy_to_hosts() {
  on_each all scp_to "$1" "$2"
}

copy_from_host() {
  on_each 0 scp_from "$1" "$2"
}

fetch_logs() {
  on_each all logs_of "$1"
}

options+=" disk" disk=100 names=()
read_command_line "$@"
describe_machine
check disk "[1-9][0-9]*" "a number of GB"
((slices == 1)) || refuse "--slices=$slices: a group is one slice; several come from launch/tpu.sh or launch/gke.sh"
[ "$capacity" != reserved ] || require reservation "the name of the reservation that --capacity=reserved takes"
where=("--zone=$zone" ${project_flag[@]+"${project_flag[@]}"}) internal=()
region=("--region=${zone%-*}" ${project_flag[@]+"${project_flag[@]}"})
! "$internal_ip" || internal=(--internal-ip)
main
