"""Set-up of all tests: CPU, whatever the machine has, and quick compilation of the same programs.

XLA leaves out LLVM's optimizations here, and makes its loops with an older generator where it still has one (jaxlib
0.10 and 0.11.0), which takes a third of the time. Where two programs share arithmetic the older generator can round
them differently, and the one that users have does not: what must be equal across programs to the bit is compiled with
that one (`helpers.EXACT`).
"""

import os
import subprocess
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _xla_accepts(flags):
  """Whether XLA starts with these flags: it ends any process whose XLA_FLAGS hold one that it does not know."""
  command = [sys.executable, "-c", "import jax; jax.devices()"]
  return not subprocess.run(command, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True).returncode


# Workers and the processes that tests start inherit the flags, so that XLA is asked once.
if "--xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()
  older_loops = f"{flags} --xla_cpu_use_fusion_emitters=false"
  os.environ["XLA_FLAGS"] = older_loops if _xla_accepts(older_loops) else flags
# Many tests train the same small model: its programs are compiled once, for all workers and the processes they start.
if "MIXLN_TESTS_CACHE" not in os.environ:
  CACHE = tempfile.TemporaryDirectory(prefix="mixln_jax_tests_", ignore_cleanup_errors=True)
  os.environ["MIXLN_TESTS_CACHE"] = os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import pytest

from mixln_jax import config as config_lib
from mixln_jax.data.prepare import prepare

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "naïve", "cafés", "serve", "tea")


def _document(index):
  """A document of 3 to 60 words, the same for the same index."""
  return " ".join(WORDS[(index * 7 + position * position) % len(WORDS)] for position in range(3 + index * 13 % 58))


@pytest.fixture(scope="session")
def documents():
  return {f"{index:03d}.txt": _document(index) for index in range(120)}


@pytest.fixture(scope="session")
def source(tmp_path_factory, documents):
  """A folder of small text files."""
  folder = tmp_path_factory.mktemp("source")
  for name, text in documents.items():
    (folder / name).write_text(text)
  return folder


@pytest.fixture(scope="session")
def make_config(source, tmp_path_factory):
  """`make_config(**{"model.placement": "pre", …})`: a config of a small model on prepared byte records."""
  root = tmp_path_factory.mktemp("records")
  prepared = set()

  def make(**changes):
    config = config_lib.base()
    config.model.update(vocab_size=259, embed_dim=16, mlp_dim=24, num_layers=2, num_heads=2, placement="mix:0.5")
    config.data.update(source=str(source), tokenizer="bytes", sequence_length=32)
    config.train.update(num_steps=6, batch_size=8)
    config.optimizer.warmup_steps = 2
    config.checkpoint.every_steps = 2
    config.evaluate.update(every_steps=3, batch_size=8)
    config.logging.tensorboard = False
    config.update_from_flattened_dict(changes)
    if not config.data.directory:
      config.data.directory = str(root / f"{config.data.mode}{config.data.sequence_length}")
      if config.data.directory not in prepared:
        prepare(config, progress=False)
        prepared.add(config.data.directory)
    return config

  return make
