# shellcheck shell=bash
# Sourced: makes a virtual environment and installs a requirements file into it, once for each version of the file.
# Callers define `run`, which prints a command and, unless they only print, runs it.

# Whether a command is a Python that is new enough.
is_python() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# The first Python that is new enough; PYTHON overrides.
find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
    if is_python "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  echo "error: Python 3.11 or newer is needed; install it, or name one: PYTHON=/path/to/python3.11 bash $0" >&2
  return 2
}

# The interpreter of one version, such as 3.13, that can make a virtual environment: from the path, or one of pyenv's,
# whose command on the path fails where no project has chosen that version. Nothing where there is none.
find_python_of() {
  local version=$1 candidate
  for candidate in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version"*/bin/python3; do
    if "$candidate" -c "import ensurepip, sys; sys.exit(sys.version_info[:2] != (${version/./, }))" 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
}

# set_up_environment REQUIREMENTS: in .venv, or the folder that VENV names.
set_up_environment() {
  local requirements=$1 venv=${VENV:-.venv} stamp python
  stamp=$venv/installed-$(cat requirements*.txt | cksum | cut -d' ' -f1)-$(basename "$requirements")
  [ -e "$stamp" ] && return
  if [ ! -x "$venv/bin/python" ]; then
    python=$(find_python) || exit 2
    run "$python" -m venv "$venv"
  fi
  run "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
  run touch "$stamp"
}
