#!/usr/bin/env bash
# A Python for the hosts of fake_gcloud.py: makes an environment of itself, installs nothing, trains as the plan says.
case "$*" in
  "-c import sys"*) exit 0 ;;
  "-m venv "*) mkdir -p .venv/bin && cp "$0" .venv/bin/python && exit ;;
  "-m pip "* | "-m mixln_jax prepare "*) exit 0 ;;
esac
printf '%s\0' "$@" >"$FAKE_CLOUD/trained-${FAKE_HOST:-here}"
env >"$FAKE_CLOUD/environment-${FAKE_HOST:-here}"
count=$(cat "$FAKE_CLOUD/count-${FAKE_HOST:-here}" 2>/dev/null || echo 0)
echo $((count + 1)) >"$FAKE_CLOUD/count-${FAKE_HOST:-here}"
word=$(sed -n "$((count + 1))p" "$FAKE_CLOUD/attempts" 2>/dev/null)
echo "attempt $((count + 1)): ${word:=$(tail -n 1 "$FAKE_CLOUD/attempts")}"
looks() {
  grep -ac 'on_host.sh state' "$FAKE_CLOUD/calls"
}
trap 'echo got SIGTERM && exit 75' TERM
case "$word" in
  done) exit 0 ;;
  crash) echo "RuntimeError: something broke" && exit 1 ;;
  long) # a crash after it was seen running for a second: once the second look is asked for, the first is over
    sleep 1.1
    seen=$(looks)
    for _ in $(seq 600); do (($(looks) < seen + 2)) || break; sleep 0.05; done
    echo "RuntimeError: something broke" && exit 1
    ;;
  refused) echo "error: config.model.placement='mixx': unknown placement" && exit 2 ;;
  signal) exit 75 ;;
  preempted) [ "$FAKE_HOST" = host-0 ] && echo "${FAKE_PREEMPTED:-SUSPENDED}" >"$FAKE_CLOUD/tpu" ;;
  deaf) trap '' TERM ;;
  taken) # host 1 goes first, training on the other one aborts, and the cloud says so only a little later
    [ "$FAKE_HOST" = host-0 ] && sleep 0.5 && echo SUSPENDED >"$FAKE_CLOUD/tpu"
    exit 134
    ;;
  half) [ "$FAKE_HOST" = host-1 ] && exit 1 ;;
esac
touch "$FAKE_CLOUD/running-${FAKE_HOST:-here}"
for _ in $(seq 600); do sleep 0.05; done
