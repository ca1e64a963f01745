"""A gcloud that has no cloud: hosts are folders of $FAKE_CLOUD, commands run in them as ssh would run them.

Every call is kept in `calls`, a line a call, its words separated by NUL. Plans are files with a word a line, taken in
order (the last one stays): `creations` (ok, capacity, denied, failed) and `starts` (ok; refused: no host is reached;
cut: training starts, the connection breaks, and the TPU is in repair when next looked at) are read here, `attempts` by
fake_python.sh.
"""
# Only os and sys are imported: the tests call this some hundred times.
# ruff: noqa: PTH102, PTH103, PTH110, PTH120, PTH123, SIM105

import fcntl
import os
import signal
import sys

CLOUD = os.environ["FAKE_CLOUD"]
HOSTS = int(os.environ.get("FAKE_HOSTS", "2"))
STATE = f"{CLOUD}/tpu"  # its state, and line by line what it will be at each further describe; no file, no TPU


def read(path):
  with open(path, "rb") as file:
    return file.read()


def write(path, data):
  with open(path, "wb") as file:
    file.write(data)


def state():
  return read(STATE).decode().split("\n")[0].strip() if os.path.exists(STATE) else None


def take(plan):
  """The next word of a plan; hosts that are started at the same time take turns."""
  with open(f"{CLOUD}/{plan}.turn", "w") as turn:
    fcntl.flock(turn, fcntl.LOCK_EX)
    words = read(f"{CLOUD}/{plan}").split()
    write(f"{CLOUD}/{plan}", b"\n".join(words[1:] or words))
  return words[0]


def flag(name):
  return next((word.split("=", 1)[1] for word in sys.argv if word.startswith(f"--{name}=")), None)


def fail(message, status=1):
  print(f"ERROR: (gcloud) {message}", file=sys.stderr)
  return status


def folder(number):
  return f"{CLOUD}/host-{number}"


def create(created):
  word = take("creations")
  if word == b"capacity":
    return fail("There is no more capacity in the zone")
  if word == b"denied":
    return fail("PERMISSION_DENIED: you may not")
  if state():
    return fail("ALREADY_EXISTS: there is one")
  for number in range(HOSTS):
    os.mkdir(folder(number))
  write(STATE, b"FAILED\tQuota limit 'x' exceeded" if word == b"failed" else created.encode())
  return 0


def delete():
  for number in range(HOSTS):
    pid = f"{folder(number)}/mixln_jax/work/launch/pid"
    if os.path.exists(pid) and not os.path.exists(os.path.dirname(pid) + "/status"):
      try:
        os.kill(int(read(pid)), signal.SIGKILL)
      except ProcessLookupError:
        pass
  # Whoever waited for the process may be writing its status down.
  return int(all(os.system(f"rm -rf '{CLOUD}'/host-* '{STATE}' 2>/dev/null") for _ in range(50)))


def describe():
  if not state():
    return fail("NOT_FOUND: Resource was not found")
  lines = read(STATE).split(b"\n")
  if any(lines[1:]):
    write(STATE, b"\n".join(lines[1:]))
  print(state())
  return 0


def ssh(numbers):
  if state() not in ("READY", "ACTIVE", "RUNNING"):
    return fail("ssh: no route to host", 255)
  # gcloud splits the command at spaces, and ssh joins it with them.
  command, output, running = " ".join(flag("command").split(" ")), flag("output-directory"), []
  word = take("starts") if "on_host.sh start" in command else b"ok"
  if word == b"refused":
    return fail("ssh: connection reset", 255)
  for number in numbers:
    environment = {**os.environ, "HOME": folder(number), "FAKE_HOST": f"host-{number}"}
    actions = [(os.POSIX_SPAWN_OPEN, 1, f"{output}/{number}.log", os.O_WRONLY | os.O_CREAT, 0o644)] if output else []
    words = ["bash", "-c", 'cd "$HOME" && eval "$0"', command]
    running.append(os.posix_spawnp("bash", words, environment, file_actions=actions))
  statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in running]
  if word == b"cut":
    os.system(f"timeout 60 sh -c 'until [ -e {CLOUD}/running-host-{numbers[-1]} ]; do sleep 0.05; done'")
    write(STATE, f"{state()}\nREPAIRING\n{state()}".encode())
    return fail("ssh: connection reset", 255)
  return next((status for status in statuses if status), 0)


def scp(source, target, numbers):
  host, _, path = target.rpartition(":")
  for number in numbers:
    if host:
      write(f"{folder(number)}/{path}", read(source))
    else:
      os.system(f"cp -r '{folder(number)}/{source.split(':', 1)[1]}' '{target}'")
  return 0


def storage(words):
  if words[:2] == ["buckets", "describe"]:
    print("US-WEST4")
  elif words[0] == "rsync":
    os.makedirs(words[2], exist_ok=True)
    write(f"{words[2]}/from", words[1].encode())
  return 0


def compute(words):
  """What mig.sh asks for; an instance is called host-NUMBER, too."""
  if words[:3] == ["instance-groups", "managed", "create"]:
    return create("RUNNING")
  if words[:3] == ["instance-groups", "managed", "delete"]:
    return delete()
  if words[:3] == ["instance-groups", "managed", "list-instances"]:
    if not state():
      return fail("The resource 'instanceGroupManagers/x' was not found")
    print("\n".join(f"host-{number}\t{state()}" for number in range(HOSTS)))
  if words[0] == "ssh":
    return ssh([int(words[1].split("-")[1])])
  if words[0] == "scp":
    return scp(words[1], words[2], [int(words[2].split(":")[0].split("-")[1])])
  return 0


def main():
  with open(f"{CLOUD}/calls", "a") as file:
    file.write("\0".join(sys.argv[1:]) + "\n")
  words = [word for word in sys.argv[1:] if not word.startswith("--")]
  if words[0] == "storage":
    return storage(words[1:])
  if words[0] == "config":
    print("project")
    return 0
  if words[1] != "tpus":
    return compute(words[1:])
  numbers = range(HOSTS) if flag("worker") == "all" else [int(flag("worker") or 0)]
  verbs = {
    "create": lambda: create("ACTIVE" if words[2] == "queued-resources" else "READY"),
    "delete": delete,
    "describe": describe,
    "ssh": lambda: ssh(numbers),
    "scp": lambda: scp(words[4], words[5], numbers),
  }
  return verbs[words[3]]()


sys.exit(main())
