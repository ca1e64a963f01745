#!/usr/bin/env bash
# Trains on the GPU nodes of a Slurm cluster: submits itself as the batch script. A process a GPU.
#   bash launch/slurm.sh --nodes=2 --gpus=8 --time=24:00:00 --config=configs/llama_1b.py --workdir=/shared/runs/mine
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: bash launch/slurm.sh --config=FILE --workdir=DIR --nodes=N --gpus=N --time=TIME [OPTION ...]

Run it on a login node, from a clone on a file system that all nodes see; --workdir and the prepared records (`python -m
mixln_jax prepare`) lie on one too. Makes .venv, installs requirements-gpu.txt (once), and submits the job.

  --gpus=N                   GPUs of each node, and processes
  --time=24:00:00            as sbatch takes it, over 3 minutes; 180 s before its end training stops with a checkpoint, and the job is
                             requeued, until training is done
  --config.FIELD=VALUE       changes the recipe
  --name=mixln_jax           of the job; its log is work/slurm/NAME-ID.log
  --partition=P --account=A  of the job
  --sbatch-flag=FLAG         goes to sbatch as it is, as in --sbatch-flag=--exclusive; may be repeated
  --print                    prints the exact commands, runs nothing

Exit status of the job: that of training, 0 done, 1 failed, 2 rejected input, 75 stopped by a signal. Only 75 before the
time limit is requeued. To stop it with a checkpoint: scancel --signal=TERM JOB, then scancel JOB once it waits again.
TEXT
}

# sbatch runs a copy of this script, from another folder.
in_job=false
if [ "${1:-}" = job ] && [ -n "${SLURM_JOB_ID:-}" ]; then
  in_job=true
  shift
  cd "$SLURM_SUBMIT_DIR"
else
  cd "$(dirname "$0")/.."
fi
# shellcheck source=launch/common.sh
source launch/common.sh
# shellcheck source=launch/environment.sh
source launch/environment.sh

# seconds_of TIME: of what sbatch takes: MINUTES[:SECONDS], HOURS:MINUTES:SECONDS, DAYS-HOURS[:MINUTES[:SECONDS]].
seconds_of() {
  local days=0 rest=$1 one two three
  if [[ $rest == *-* ]]; then
    days=${rest%%-*} rest=${rest#*-}
    IFS=: read -r one two three <<<"$rest"
  else
    case "$rest" in
      *:*:*) IFS=: read -r one two three <<<"$rest" ;;
      *) one=0 && IFS=: read -r two three <<<"$rest" ;;
    esac
  fi
  echo $((10#$days * 86400 + 10#${one:-0} * 3600 + 10#${two:-0} * 60 + 10#${three:-0}))
}

# In the job. Slurm sends the SIGTERM of --signal to the tasks, not to this shell: a SIGTERM here is a scancel or a
# preemption, after which Slurm itself decides whether the job is queued again.
job() {
  local status=0 cancelled=false
  trap 'cancelled=true' TERM
  # Tasks end seconds apart: the first one writes last. None is killed because another ended.
  # srun does not take the CPUs of a task from sbatch (since Slurm 22.05): without its own flag each task has one.
  run srun --kill-on-bad-exit=0 --wait=600 ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} "$@" ||
    status=$?
  echo "training ended with exit status $status"
  if ((status == 75)) && ! "$cancelled"; then
    run scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$status"
}

if "$in_job"; then
  job "$@"
fi
nodes="" gpus="" time="" name=mixln_jax partition="" account="" sbatch_flag=()
parse_options "config workdir nodes gpus time name partition account" "sbatch-flag" "print" "$@"
check_recipe
require nodes "how many nodes"
require gpus "how many GPUs each node has"
require time "the time limit, as in --time=24:00:00"
check nodes "[1-9][0-9]*" "a whole number from 1 on"
check gpus "[1-9][0-9]*" "a whole number from 1 on"
check time "[0-9]+(-[0-9]+)?(:[0-9]+){0,2}" "minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS, as sbatch takes it"
seconds=$(seconds_of "$time")
((seconds > 180)) || refuse "--time=$time: $seconds seconds, but training is told to stop 180 s before the end, so that" \
  "it would never start; give more than 3 minutes"
check name "[A-Za-z0-9_.-]+" "letters, digits, dots, dashes and underscores"

set_up_environment requirements-gpu.txt
run mkdir -p work/slurm
train=(.venv/bin/python -m mixln_jax train "--config=$config" "--workdir=$workdir")
train+=(--config.parallel.expect_platform=gpu "--config.parallel.expect_devices=$((nodes * gpus))")
train+=(${overrides[@]+"${overrides[@]}"})
run sbatch --job-name="$name" --nodes="$nodes" --ntasks-per-node="$gpus" --gpus-per-node="$gpus" --time="$time" \
  --signal=TERM@180 --requeue --open-mode=append --output="work/slurm/%x-%j.log" \
  ${partition:+--partition="$partition"} ${account:+--account="$account"} ${sbatch_flag[@]+"${sbatch_flag[@]}"} \
  launch/slurm.sh job "${train[@]}"
