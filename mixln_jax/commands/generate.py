"""Generate text from a run's checkpoint."""

from mixln_jax.command_line import CommandLine
from mixln_jax.inference.generate import generate_text
from mixln_jax.parallel import processes
from mixln_jax.runs.folder import RunFolder
from mixln_jax.runs.opening import read_config
from mixln_jax.training.setup import on_mesh, open_run, set_up, spread_over_all_devices


def main(argv: list[str]) -> int:
  line = CommandLine(__doc__ or "")
  line.string("workdir", "the run's folder", required=True)
  line.string("prompt", "text to go on from", default="")
  line.integer("num_tokens", "tokens to generate", default=100, minimum=1)
  line.number("temperature", "0 = always the likeliest token", default=0.8, minimum=0.0)
  line.integer("seed", "seed of the sampling", default=0, minimum=0, maximum=2**32 - 1)
  line.integer("step", "which checkpoint; by default the newest", minimum=0)
  values = line.parse(argv)
  folder = RunFolder(values.workdir)
  config = read_config(folder)
  processes.join(config.parallel)
  setup = set_up(spread_over_all_devices(config))
  run = open_run(folder, setup.mesh, values.step)
  with on_mesh(setup.mesh):
    text = generate_text(
      run.config.model,
      run.params,
      setup.corpus.tokenizer,
      values.prompt,
      values.num_tokens,
      temperature=values.temperature,
      seed=values.seed,
    )
  if processes.is_first():
    print(values.prompt + text)
  return 0
