#!/usr/bin/env bash
# TPU slices of Google Kubernetes Engine, through xpk (pip install xpk): a cluster that is kept, and workloads in it.
# Kubernetes restarts a workload itself. docs/tpu.md is the guide.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'TEXT'
usage: bash launch/gke.sh VERB --cluster=NAME --zone=ZONE --project=PROJECT [OPTION ...]

Needs gcloud, kubectl and xpk (pip install xpk), signed in.

  --print                                prints the exact commands, runs nothing
  --type=TYPE --slices=1                 for create and train: v5litepod-16 (or v5e-16), v5p-128, v6e-64, tpu7x-128 …

verbs:
  create      makes the cluster, with a pool of nodes for the slices
    --capacity=on-demand|spot|reserved     (default on-demand)
    --reservation=NAME                     with --capacity=reserved
    --xpk-flag=FLAG                        goes to `xpk cluster create` as it is; may be repeated
  train       builds an image of the committed code, and starts training in it
    --name=NAME                            of the workload
    --config=FILE --workdir=gs://…         the recipe, and the run's folder: the same folder resumes the run
    --config.FIELD=VALUE                   changes the recipe
    --data=gs://…                          prepared records, copied to every host first
    --env=NAME=VALUE                       a variable for training; may be repeated
    --base-image=python:3.12               what the code is put into; requirements-tpu.txt is installed at each start
    --image=IMAGE                          instead: an image of yours that has this code as its folder, and .venv
    --max-restarts=50                      restarts after a preemption, a failure of the machine or a SIGTERM (75);
                                           rejected input (2) and errors (1) are not retried
    --dirty                                ships the working tree as it stands, changes and all
    --any-region                           buckets need not be in the region of the zone
  status      the workloads of the cluster
  follow      shows the log of the first process of --name=NAME
  stop        deletes the workload --name=NAME; training gets a SIGTERM, and two minutes
  delete      deletes the cluster
TEXT
}

# shellcheck source=launch/common.sh
source launch/common.sh
# shellcheck source=launch/topology.sh
source launch/topology.sh

xpk_cluster=() # which cluster; what all commands take

create() {
  local flags=("--$capacity")
  [ "$capacity" != reserved ] || flags=("--reservation=$reservation")
  flags+=(${xpk_flag[@]+"${xpk_flag[@]}"})
  run xpk cluster create "${xpk_cluster[@]}" --tpu-type="$xpk_type" --num-slices="$slices" "${flags[@]}"
}

# The line that a shell in the container runs; `exec`, so that its SIGTERM reaches training.
container_command() {
  local variable arguments=(bash launch/on_host.sh exec "--config=$config" "--workdir=$workdir")
  arguments+=(--config.parallel.expect_platform=tpu "--config.parallel.expect_devices=$((devices * slices))")
  [ -z "$data" ] || arguments+=("--data=$data")
  for variable in ${env[@]+"${env[@]}"}; do
    arguments+=("--env=$variable")
  done
  [ -n "$image" ] || printf 'bash launch/on_host.sh setup && '
  # shellcheck disable=SC2016
  # Kubernetes replaces $(NAME) in commands, and takes $$( for a plain $(.
  printf 'exec %s' "$(quote "${arguments[@]}" ${overrides[@]+"${overrides[@]}"})" | sed 's/\$(/$$(/g'
}

train() {
  local folder=work/launch/$name code=() command
  check_recipe
  [[ $workdir == gs://?* ]] ||
    refuse "--workdir=$(quote "$workdir"): must be gs://BUCKET/…: a container's disk ends with it"
  in_region "$workdir"
  [ -z "$data" ] || in_region "$data"
  if [ -z "$image" ]; then
    pack_code "$folder"
    run rm -rf "$folder/code"
    run mkdir -p "$folder/code"
    run tar -xzf "$folder/mixln_jax.tar.gz" -C "$folder/code"
    code=("--base-docker-image=$base_image" "--script-dir=$folder/code")
  else
    code=("--docker-image=$image")
  fi
  command=$(container_command)
  run xpk workload create "${xpk_cluster[@]}" --workload="$name" --tpu-type="$xpk_type" --num-slices="$slices" \
    "${code[@]}" --max-restarts="$max_restarts" --restart-on-exit-codes=75 --termination-grace-period-seconds=120 \
    --command="$command"
}

name="" cluster="" project="" type="" capacity=on-demand reservation="" slices=1 data="" image="" base_image=python:3.12
max_restarts=50 env=() xpk_flag=()
(($#)) || { usage >&2 && exit 2; }
case "$1" in
  --help | -h | help) usage && exit 0 ;;
esac
verb=$1
shift
parse_options "name cluster zone project type capacity reservation slices config workdir data image base-image \
  max-restarts" "env xpk-flag" "print dirty any-region" "$@"
require cluster "the cluster's name"
require zone "where its TPUs stand, as in --zone=us-west4-a"
require project "the project's id"
project_flag=("--project=$project")
for option in name cluster; do
  check "$option" "[a-z]([-a-z0-9]{0,38}[a-z0-9])?" "lower-case letters, digits, dashes, from a letter on, at most 40"
done
check zone "[a-z]+-[a-z]+[0-9]+-[a-z]" "a zone, as us-west4-a"
check capacity "on-demand|spot|reserved" "on-demand, spot or reserved"
check data "gs://..*" "a folder in a bucket, as gs://BUCKET/records"
check slices "[1-9][0-9]*" "a whole number from 1 on"
check max-restarts "[0-9]+" "a whole number"
[ "$capacity" != reserved ] || require reservation "the name of the reservation that --capacity=reserved takes"
xpk_cluster=("--cluster=$cluster" "--zone=$zone" "--project=$project")
case "$verb" in
  create | train)
    require type "what the slices are, as in --type=v5litepod-16"
    describe_tpu "$type"
    xpk_type=$tpu_type
    if [ "$generation" = tpu7x ]; then # xpk names it after its shape
      describe_machine
      xpk_type=tpu7x-$topology
    fi
    ;;
esac
case "$verb" in
  train | follow | stop) require name "the workload's name" ;;
esac
case "$verb" in
  create) create ;;
  train) train ;;
  status) run xpk workload list "${xpk_cluster[@]}" ;;
  follow)
    first=jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0
    run kubectl logs --follow --tail=100 --all-containers --selector="jobset.sigs.k8s.io/jobset-name=$name,$first"
    ;;
  stop) run xpk workload delete "${xpk_cluster[@]}" --workload="$name" ;;
  delete) run xpk cluster delete "${xpk_cluster[@]}" ;;
  *) refuse "unknown verb $(quote "$verb"); choices: create, train, status, follow, stop, delete" ;;
esac
