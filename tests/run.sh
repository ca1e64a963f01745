#!/usr/bin/env bash
# Sets itself up and runs the tests on CPU. Extra arguments go to pytest; --slow adds the long tests.
#   bash tests/run.sh tests/model -k causal
#   PYTHON=python3.13 VENV=.venv-3.13 bash tests/run.sh    # with another Python, in an environment of its own
set -euo pipefail
cd "$(dirname "$0")/.."

run() {
  printf '+ %s\n' "$*"
  "$@"
}

selection="not slow" arguments=()
for argument in "$@"; do
  case "$argument" in
    --slow) selection="slow or not slow" ;;
    *) arguments+=("$argument") ;;
  esac
done

# shellcheck source=launch/environment.sh
source launch/environment.sh
set_up_environment requirements-dev.txt
run "${VENV:-.venv}/bin/python" -m pytest -n 2 --dist loadscope -m "$selection" ${arguments[@]+"${arguments[@]}"}
