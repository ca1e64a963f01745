# shellcheck shell=bash disable=SC2034 # what is set here is for the caller
# Sourced: what a TPU type is made of, by Google's pages on TPU versions, runtimes and machine types.
# Devices are what jax.device_count() says: a core of v2, v3 and tpu7x, a chip from v4 to v6e.

# describe_tpu TYPE: sets tpu_type (as gcloud spells it), generation, runtime, chips, devices and hosts (of one slice).
describe_tpu() {
  local size=${1##*-} smallest
  generation=${1%-*}
  [[ $1 == *-* && $size =~ ^[1-9][0-9]{0,4}$ ]] ||
    refuse "--type=$(quote "$1"): must be a TPU generation and a size, as in v5litepod-16, v5p-128 or v6e-64"
  chips=$size
  case "$generation" in # v5e and v6e are named after their chips; the others after their cores, two a chip
    v2 | v3) runtime=tpu-ubuntu2204-base smallest=4 chips=$((size / 2)) devices=$size ;;
    v4) runtime=tpu-ubuntu2204-base smallest=4 chips=$((size / 2)) devices=$chips ;;
    v5p) runtime=v2-alpha-tpuv5 smallest=4 chips=$((size / 2)) devices=$chips ;;
    v5e | v5litepod) generation=v5litepod runtime=v2-alpha-tpuv5-lite smallest=1 devices=$size ;;
    v6e) runtime=v2-alpha-tpuv6e smallest=1 devices=$size ;;
    tpu7x) runtime="" smallest=4 chips=$((size / 2)) devices=$size ;; # not in the API that has runtimes
    *) refuse "--type=$(quote "$1"): unknown generation; choices: v2, v3, v4, v5litepod (or v5e), v5p, v6e, tpu7x" ;;
  esac
  ((chips >= smallest && ((chips & (chips - 1)) == 0 || chips % 64 == 0))) ||
    refuse "--type=$(quote "$1"): $chips chips are no slice; one of $generation has a power of two of chips from" \
      "$smallest on, or a multiple of 64"
  case "$generation" in # a v5e or v6e host alone has up to 8 chips; every other host has 4
    v5litepod | v6e) hosts=$((chips <= 8 ? 1 : chips / 4)) ;;
    *) hosts=$((chips / 4)) ;;
  esac
  tpu_type=$generation-$size
}

# describe_machine: after describe_tpu, sets machine_type, topology and image_family of Compute Engine.
describe_machine() {
  local a b c
  image_family=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e
  case "$generation" in
    v5p) machine_type=ct5p-hightpu-4t ;;
    v6e) machine_type=ct6e-standard-$((chips > 8 ? 4 : chips))t ;;
    tpu7x) machine_type=tpu7x-standard-4t image_family=ubuntu-accel-2404-amd64-tpu-tpu7x ;;
    *) refuse "--type=$tpu_type: Compute Engine has v5p, v6e and tpu7x; for $generation use launch/tpu.sh" ;;
  esac
  (((chips & (chips - 1)) == 0)) || refuse "--type=$tpu_type: $chips chips have several shapes; take a power of two"
  if [ "$generation" = v6e ]; then # 1x1, 1x2, 2x2, 2x4, 4x4, …
    for ((a = 1, b = 1; a * b < chips; )); do
      if ((a < b)); then ((a *= 2)); else ((b *= 2)); fi
    done
    topology=${a}x$b
  else # 2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, …
    for ((a = 2, b = 2, c = 1; a * b * c < chips; )); do
      if ((a < b)); then ((a *= 2)); elif ((b < c)); then ((b *= 2)); else ((c *= 2)); fi
    done
    topology=${a}x${b}x$c
  fi
}
