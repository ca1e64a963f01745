# shellcheck shell=bash
# Sourced: makes .venv and installs a requirements file into it, once for each version of the file.
# Callers define `run`, which prints a command and, unless they only print, runs it.

# The first Python that is new enough; PYTHON overrides.
find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: Python 3.11 or newer is needed; install it, or name one: PYTHON=/path/to/python3.11 bash $0" >&2
  return 2
}

set_up_environment() {
  local requirements=$1 stamp python
  python=$(find_python) || exit 2
  stamp=.venv/installed-$(cat requirements*.txt | cksum | cut -d' ' -f1)-$(basename "$requirements")
  [ -e "$stamp" ] && return
  [ -x .venv/bin/python ] || run "$python" -m venv .venv
  run .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
  run touch "$stamp"
}
