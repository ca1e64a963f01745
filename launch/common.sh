# shellcheck shell=bash disable=SC2034 # what is set here is for the caller
# Sourced by the scripts that start training on other machines: options, refusals, printing, the code that is shipped.
# Callers define `usage`. Bash 3.2, as macOS has it, is enough.

# What the functions below read; callers set what they have.
print=false dirty=false any_region=false config="" workdir="" zone="" project_flag=() overrides=()

# Bad input: nothing was done, and trying again is of no use.
refuse() {
  echo "error: $*" >&2
  exit 2
}

# Its arguments as one line that a POSIX shell (here, on the other side of ssh, in a container) reads as the same words.
quote() {
  local word line="" apostrophe="'" escaped="'\\''"
  for word; do
    case "$word" in
      '' | *[!A-Za-z0-9_@%+=:,./-]*) word="'${word//$apostrophe/$escaped}'" ;;
    esac
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# Prints a command as it can be pasted and, unless --print was given, runs it; stdout is then the command's own.
run() {
  if "$print"; then
    printf '+ %s\n' "$(quote "$@")"
  else
    printf '+ %s\n' "$(quote "$@")" >&2
    "$@"
  fi
}

# The same, in place of this script: a signal to it reaches the command.
run_in_place() {
  ! "$print" || { run "$@" && exit; }
  printf '+ %s\n' "$(quote "$@")"
  exec "$@"
}

# parse_options VALUES LISTS SWITCHES ARGUMENT...: --an-option=x, or --an-option x, sets `an_option`; a list is appended
# to; a switch becomes true; --config.FIELD=VALUE goes to `overrides`. Names are separated by spaces.
parse_options() {
  local _values=" $1 " _lists=" $2 " _switches=" $3 " _option _name _variable _value # the caller has an option `name`
  shift 3
  while (($#)); do
    _option=$1
    shift
    case "$_option" in
      --help | -h) usage && exit 0 ;;
      *$'\n'*) refuse "$(quote "$_option"): a line break can't be passed on" ;;
      --config.?*=*) overrides+=("$_option") && continue ;;
      --config.*) refuse "$_option needs a value, as in $_option=…" ;;
      --?*) ;;
      *) refuse "unexpected argument $(quote "$_option"); options start with --, see --help" ;;
    esac
    _name=${_option%%=*} _name=${_name#--}
    _variable=${_name//-/_}
    if [[ $_switches == *" $_name "* && $_option != *=* ]]; then
      printf -v "$_variable" true
      continue
    fi
    [[ $_values$_lists == *" $_name "* ]] || refuse "unknown option --$_name; --help lists all"
    if [[ $_option == *=* ]]; then
      _value=${_option#*=}
    else
      (($#)) || refuse "--$_name needs a value, as in --$_name=…"
      _value=$1
      shift
    fi
    [[ $_value != *$'\n'* ]] || refuse "--$_name: a line break can't be passed on"
    if [[ $_lists == *" $_name "* ]]; then
      eval "$_variable+=(\"\$_value\")" # a name of the caller's list, never the user's
    else
      printf -v "$_variable" '%s' "$_value"
    fi
  done
}

# require NAME MEANING: refuses a missing option.
require() {
  local variable=${1//-/_}
  [ -n "${!variable:-}" ] || refuse "--$1 is required: $2"
}

# check NAME PATTERN MEANING: refuses a value that does not match; an empty one is for `require`.
check() {
  local variable=${1//-/_}
  [[ -z ${!variable:-} || ${!variable} =~ ^($2)$ ]] || refuse "--$1=$(quote "${!variable}"): must be $3"
}

check_recipe() {
  require config "the recipe, as in --config=configs/llama_1b.py"
  require workdir "the run's folder, as in --workdir=gs://BUCKET/runs/NAME"
  case "$workdir" in
    gs://?*/?*) ;;
    gs:*) refuse "--workdir=$workdir: must be a folder in a bucket, gs://BUCKET/FOLDER, or a folder on a disk" ;;
  esac
  # A recipe's name will do, as it does for the commands.
  [ -f "${config%%:*}" ] || [ -f "configs/${config%%:*}.py" ] ||
    refuse "--config=$config: no such file; the recipes lie in configs/"
}

# pack_code FOLDER: writes the committed code (with --dirty: all that git does not ignore, as it stands) to
# FOLDER/mixln_jax.tar.gz, with a file REVISION that says what it is: on the other machine there is no git.
pack_code() {
  local folder=$1 tree=HEAD revision
  local archive=(git archive --format=tar.gz --add-file="$folder/REVISION" --output="$folder/mixln_jax.tar.gz")
  revision=$(git rev-parse HEAD 2>/dev/null) || refuse "$PWD is not a git clone, so there is no committed code to ship"
  run mkdir -p "$folder"
  local look=(git status --porcelain)
  # What git does not know is not shipped without --dirty; to print what would be done, it does not matter.
  if "$print" && ! "$dirty"; then look+=(--untracked-files=no); fi
  if [ -n "$("${look[@]}")" ]; then
    "$dirty" || refuse "there are changes that are not committed (git status); commit them, or ship them with --dirty"
    run cp "$(git rev-parse --git-path index)" "$folder/index"
    run env GIT_INDEX_FILE="$folder/index" git add --all
    if "$print"; then
      tree="\$TREE"
      echo "+ TREE=\$($(quote env GIT_INDEX_FILE="$folder/index" git write-tree))"
    else
      tree=$(GIT_INDEX_FILE=$folder/index git write-tree)
    fi
    revision=$revision-dirty-$tree
  fi
  if "$print"; then
    echo "+ echo $revision > $(quote "$folder/REVISION")"
    echo "+ $(quote "${archive[@]}") $tree"
  else
    echo "$revision" >"$folder/REVISION"
    run "${archive[@]}" "$tree"
  fi
}

# in_region PLACE: refuses a bucket that is not in the region of --zone: reading across regions is slow, and billed.
in_region() {
  local bucket=${1#gs://} region=${zone%-*} location describe
  "$any_region" && return
  bucket=gs://${bucket%%/*}
  describe=(gcloud storage buckets describe "$bucket" '--format=value(location)')
  describe+=(${project_flag[@]+"${project_flag[@]}"})
  if "$print"; then
    run "${describe[@]}"
    return
  fi
  location=$("${describe[@]}") ||
    refuse "$bucket can't be read (gcloud says why above); create it, or skip this check with --any-region"
  location=$(echo "$location" | tr '[:upper:]' '[:lower:]')
  [ "$location" = "$region" ] ||
    refuse "$bucket is in $location, --zone=$zone in $region: traffic between them is slow and billed; take a" \
      "bucket in $region, or pass --any-region"
}
