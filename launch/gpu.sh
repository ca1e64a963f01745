#!/usr/bin/env bash
# Sets everything up and trains a model on the NVIDIA GPUs of this machine, one process for all of them.
#   bash launch/gpu.sh --config=configs/llama_130m.py --workdir=work/runs/mine
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'TEXT'
usage: bash launch/gpu.sh --config=FILE --workdir=DIR [--gpus=N] [--print] [--config.FIELD=VALUE ...]

Makes .venv, installs requirements-gpu.txt (once), prepares the corpus (once), and trains; the same --workdir resumes the
run. --gpus=N takes the first N (default: those of CUDA_VISIBLE_DEVICES, else all that nvidia-smi lists). Training does
not start where JAX finds fewer, or falls back to the CPU. Ctrl-C or SIGTERM ends it after the current step, with a
checkpoint.
--print only prints the commands. Several machines: launch/slurm.sh.
TEXT
}

# shellcheck source=launch/common.sh
source launch/common.sh
# shellcheck source=launch/environment.sh
source launch/environment.sh

gpus=""
parse_options "config workdir gpus" "" "print" "$@"
check_recipe
check gpus "[1-9][0-9]*" "a number of GPUs, from 1 on"
visible=()
if [ -n "$gpus" ]; then
  visible=(env "CUDA_VISIBLE_DEVICES=$(seq -s, 0 $((gpus - 1)))")
elif [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
  gpus=$(echo "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | grep -c .)
else
  gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ') || "$print" ||
    refuse "nvidia-smi lists no GPU; install NVIDIA's driver, pass --gpus=N, or train on the CPU with launch/local.sh"
  if [ "$gpus" = 0 ]; then
    gpus=1
    echo "nvidia-smi lists no GPU here: this is what runs where it lists one" >&2
  fi
fi

set_up_environment requirements-gpu.txt
run .venv/bin/python -m mixln_jax prepare "--config=$config" ${overrides[@]+"${overrides[@]}"}
train=(${visible[@]+"${visible[@]}"} .venv/bin/python -m mixln_jax train "--config=$config" "--workdir=$workdir")
train+=(--config.parallel.expect_platform=gpu "--config.parallel.expect_devices=$gpus")
run_in_place "${train[@]}" ${overrides[@]+"${overrides[@]}"}
