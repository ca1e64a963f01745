#!/usr/bin/env bash
# A TPU of the Cloud TPU API (v2 to v6e): made, set up, trained on, watched, restarted, deleted. The guide: docs/tpu.md.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'TEXT'
usage: bash launch/tpu.sh VERB --name=NAME --zone=ZONE --type=TYPE [OPTION ...]

Needs the Google Cloud CLI (gcloud), signed in. For TPUs of Compute Engine: launch/mig.sh; of GKE: launch/gke.sh.

  --how=queued|direct                    (default queued) wait in Google's queue, or have it now or not at all; give the
                                         same to every verb
  --valid-until=6h                       queued: how long to wait in the queue
  --slices=1                             queued: slices of the type, joined over the data centre's network
  --internal-ip                          ssh to internal addresses, from a machine in the same network
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

tpus=(gcloud compute tpus)

machine_create() {
  local flags=("--accelerator-type=$tpu_type")
  case "$capacity" in
    spot | reserved) flags+=("--$capacity") ;;
  esac
  # The default scopes let a host read buckets, but not write to them.
  flags+=(--scopes=https://www.googleapis.com/auth/cloud-platform)
  flags+=(${service_account:+--service-account="$service_account"})
  ! "$internal_ip" || flags+=(--internal-ips)
  flags+=(${create_flag[@]+"${create_flag[@]}"})
  if [ "$how" = direct ]; then
    run "${tpus[@]}" tpu-vm create "$name" "${where[@]}" --version="$runtime" "${flags[@]}"
    return
  fi
  local nodes=("--node-id=$name")
  ((slices == 1)) || nodes=("--node-count=$slices" "--node-prefix=$name")
  run "${tpus[@]}" queued-resources create "$name" "${where[@]}" "${nodes[@]}" --runtime-version="$runtime" \
    ${valid_until:+--valid-until-duration="$valid_until"} "${flags[@]}"
}

machine_delete() {
  if [ "$how" = direct ]; then
    run "${tpus[@]}" tpu-vm delete "$name" "${where[@]}" --quiet
  else
    run "${tpus[@]}" queued-resources delete "$name" "${where[@]}" --force --quiet
  fi
}

machine_state() {
  local describe=("${tpus[@]}" tpu-vm describe "$name" "${where[@]}" "--format=value(state)") errors
  if [ "$how" = queued ]; then
    describe=("${tpus[@]}" queued-resources describe "$name" "${where[@]}")
    describe+=("--format=value(state.state,state.failedData.error.message)")
  fi
  if "$print"; then
    run "${describe[@]}"
    return
  fi
  errors=$(mktemp)
  machine_says=$("${describe[@]}" 2>"$errors") || machine_says="$(cat "$errors")"
  rm -f "$errors"
  machine_says=${machine_says//$'\t'/ } machine_says=${machine_says% }
  case "$machine_says" in
    READY | ACTIVE) machine=ready ;;
    PREEMPTED | TERMINATED | STOPPED | STOPPING | SUSPENDED | SUSPENDING | HIDDEN | HIDING) machine=gone ;;
    FAILED*) machine=failed ;;
    CREATING | ACCEPTED | PROVISIONING | WAITING_FOR_RESOURCES | DELETING) machine=waiting ;;
    STARTING | RESTARTING | REIMAGING | REPAIRING | UNHIDING) machine=waiting ;;
    *NOT_FOUND* | *"not found"*) machine=absent machine_says="no such TPU" ;;
    *) machine=unknown ;;
  esac
}

# Hosts of several slices are reached through their queued resource, as workers of its nodes.
reach() {
  local api=tpu-vm
  ((slices == 1)) || api=queued-resources
  run "${tpus[@]}" "$api" "$1" "${where[@]}" ${internal[@]+"${internal[@]}"} "${@:2}"
}

on_hosts() {
  local each=$((hosts / slices)) which=(--worker=all --node=all)
  [ "$1" = all ] || which=("--worker=$(($1 % each))" "--node=$(($1 / each))")
  ((slices > 1)) || which=("${which[0]}")
  reach ssh "$name" "${which[@]}" --command="$2"
}

copy_to_hosts() {
  local which=(--worker=all --node=all)
  ((slices > 1)) || which=("${which[0]}")
  reach scp "$1" "$name:$2" "${which[@]}"
}

copy_from_host() {
  reach scp "$name:$1" "$2" --recurse --worker=0
}

fetch_logs() {
  local cat='cat mixln_jax/work/launch/train-*.log' slice
  if ((slices == 1)); then
    reach ssh "$name" --worker=all --output-directory="$1" --command="$cat"
    return
  fi
  for ((slice = 0; slice < slices; slice++)); do # gcloud calls the logs 0.log, 1.log, … in every node
    run mkdir -p "$1/slice-$slice"
    reach ssh "$name" --worker=all --node="$slice" --output-directory="$1/slice-$slice" --command="$cat"
  done
}

options+=" how valid-until" how=queued valid_until=""
read_command_line "$@"
check how "queued|direct" "queued or direct"
check valid-until "[0-9]+[smhd]" "a duration, as 6h"
[ "$how" = queued ] || ((slices == 1)) || refuse "--slices=$slices: several come only from the queue; use --how=queued"
[ -n "$runtime" ] || refuse "--type=$tpu_type: the Cloud TPU API ends at v6e; use launch/mig.sh or launch/gke.sh"
[ -z "$reservation" ] || refuse "--reservation: the Cloud TPU API takes any of the project; use --capacity=reserved"
where=("--zone=$zone" ${project_flag[@]+"${project_flag[@]}"}) internal=()
! "$internal_ip" || internal=(--internal-ip)
main
