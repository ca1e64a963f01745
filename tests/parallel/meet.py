"""One of several processes that meet at the start of a run; run as a script, behaves as its argument says."""

import os
import signal
import sys
import time

from mixln_jax import __main__ as front_door
from mixln_jax import config as config_lib
from mixln_jax.errors import InputError
from mixln_jax.parallel import processes


def meet(behaviour, seconds):
  config = config_lib.base()
  config.parallel.update(join_timeout=int(seconds), heartbeat_timeout=10)
  processes.join(config.parallel)
  with processes.failing_together():
    if behaviour == "is refused":
      raise InputError("config.data.directory='gone': no records there")
    if behaviour == "crashes":
      raise RuntimeError("disk on fire")
    if behaviour == "dies":
      os.kill(os.getpid(), signal.SIGKILL)
      time.sleep(60)
    rate = 2e-3 if behaviour == "differs" else 1e-3
    processes.agree("the start", {"config.seed": 0, "config.optimizer.learning_rate": rate})
    processes.wait_for_all("the end")
  print("met")
  return 0


if __name__ == "__main__":
  # The front door's own way from an exception to an exit status.
  command = type(sys)("meet")
  command.main = lambda argv: meet(*argv)
  sys.modules["mixln_jax.commands.doctor"] = command
  sys.exit(front_door.main(["doctor", *sys.argv[1:]]))
