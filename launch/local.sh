#!/usr/bin/env bash
# Sets everything up and trains a model on this machine. Extra arguments go to the training command:
#   bash launch/local.sh --config.model.placement=pre
# Another recipe: bash launch/local.sh --config=configs/llama_9m.py ...
# --print shows what would be done, and does nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'TEXT'
usage: bash launch/local.sh [--print] [--config=FILE] [--workdir=DIR] [--config.FIELD=VALUE ...]

Makes .venv and installs requirements.txt (once), prepares the corpus (once), and trains; a new run each time, under
work/runs, unless --workdir names one to resume. Defaults: --config=configs/tiny.py.
The fields: .venv/bin/python -m mixln_jax train --help all
TEXT
}

# shellcheck source=launch/common.sh
source launch/common.sh
# shellcheck source=launch/environment.sh
source launch/environment.sh

config=configs/tiny.py
while (($#)); do
  case "$1" in
    --print) print=true ;;
    --help | -h) usage && exit 0 ;;
    --config=*) config=${1#--config=} ;;
    --workdir=*) workdir=${1#--workdir=} ;;
    --config | --workdir)
      (($# > 1)) || refuse "$1 needs a value, as in $1=…"
      printf -v "${1#--}" '%s' "$2"
      shift
      ;;
    *) overrides+=("$1") ;;
  esac
  shift
done
name=$(basename "${config%%:*}" .py)
workdir=${workdir:-work/runs/$name-$(date +%Y%m%d-%H%M%S)}

set_up_environment requirements.txt
run .venv/bin/python -m mixln_jax prepare "--config=$config" ${overrides[@]+"${overrides[@]}"}
train=(.venv/bin/python -m mixln_jax train "--config=$config" "--workdir=$workdir")
run_in_place "${train[@]}" ${overrides[@]+"${overrides[@]}"} # so that a signal to this script reaches the training
