"""Convert weights: a run to a safetensors folder (--output), or such a folder or a GGUF file to a run (--input)."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixln_jax import config as config_lib
from mixln_jax.command_line import CommandLine
from mixln_jax.config import NEWEST, Config
from mixln_jax.data.tokenizer import SENTENCEPIECE, Tokenizer
from mixln_jax.errors import InputError
from mixln_jax.interop import export, hf
from mixln_jax.interop.check import check_export
from mixln_jax.interop.foreign import open_foreign
from mixln_jax.interop.safetensors_folder import write_folder
from mixln_jax.interop.tokenizer_beside import check_tokenizer
from mixln_jax.model.parameters import count_params
from mixln_jax.opening import OpenRun, open_run
from mixln_jax.places import is_url
from mixln_jax.runs.remote import readable_place, writable_place
from mixln_jax.training.begin import Origin, begin_from, check_new

LAYOUTS = ("auto", "stock", "official")


def main(argv: list[str]) -> int:
  line = CommandLine(__doc__ or "")
  line.config(required=False)
  line.string("workdir", "the run: what is read with --output, what is made with --input", required=True)
  line.string("output", "folder to write: config.json and safetensors")
  line.string(
    "input",
    "what to read: the folder of a LLaMA, Qwen 2 or 3, OLMo 2, BERT, or official Mix-LN checkpoint in safetensors, or "
    "a LLaMA as a .gguf file, which brings its tokenizer (it needs requirements-gguf.txt)",
  )
  line.string("placement", "with --input: the norm placement, where its config.json does not say it")
  line.string(
    "layout",
    "with --output: stock, a model that transformers has; official, the Mix-LN code's names with the placement in "
    "config.json and a modelling file beside it; auto, the first where there is one",
    default="auto",
  )
  line.integer("step", "with --output: which checkpoint; by default the newest", minimum=0)
  line.number("shard_gb", "with --output: largest file", default=5.0, minimum=1e-6)
  values = line.parse(argv)
  if (values.input is None) == (values.output is None):
    raise InputError(
      "give --output=FOLDER to write a run's weights, or --input=FOLDER (or FILE.gguf) to make a run of a checkpoint"
    )
  if values.layout not in LAYOUTS:
    raise InputError(f"--layout={values.layout!r}: must be one of {', '.join(LAYOUTS)}")
  _refuse_flags_of_the_other_direction(line, values)
  if values.output is not None:
    with writable_place(values.output, "output") as folder:
      _write(values.workdir, folder, values.output, values.step, values.layout, values.shard_gb)
    return 0
  if values.config is None:
    raise InputError("--config is required with --input: the recipe that the new run is trained with; see --help")
  config = line.config_value()
  check_new(values.workdir)  # before anything is downloaded
  with readable_place(values.input, "input") as folder:
    _read(config, line.overrides(), values.workdir, folder, values.placement)
  return 0


def _refuse_flags_of_the_other_direction(line: CommandLine, values: Any) -> None:
  """A flag that would be ignored is a misunderstanding."""
  given = ("step", "layout", "shard_gb") if values.input is not None else ("config", "placement")
  for name in given:
    if line.was_given(name):
      raise InputError(
        f"--{name} has no meaning with --{'input' if values.input is not None else 'output'}; leave it out"
      )


def _write(workdir: str, folder: Path, output: str, step: int | None, layout: str, shard_gb: float) -> None:
  with open_run(workdir, NEWEST if step is None else step) as run:
    config = run.config
    official = layout == "official" or (layout == "auto" and hf.family_of(config.model) is None)
    description = hf.hf_config(config.model, config.data.sequence_length, official=official)
    tokenizer = _tokenizer(run)
    if tokenizer is not None:
      description |= export.token_ids(tokenizer)
    others = export.modeling_files(description)
    if tokenizer is not None:
      others |= export.tokenizer_files(tokenizer, config.data.sequence_length)
    tensors = hf.export_weights(run.params, config.model)
    check_export(run.params, config.model, tensors, description)
    files = write_folder(folder, tensors, description, int(shard_gb * 1e9), others)
    print(f"read       {run.folder.address}, step {run.step}")
  size = f"{count_params(config.model) / 1e6:.2f} M parameters in {files} file{'s' * (files > 1)}"
  names = "".join(f", {name}" for name in others)
  print(f"wrote      {output if is_url(output) else folder}: {description['model_type']}, {size}{names}")
  for number, hint in enumerate(export.loading_hint(description, others)):
    print(f"{'' if number else 'load it':<11}{hint}")


def _tokenizer(run: OpenRun) -> Tokenizer | None:
  """The run's tokenizer; None where it is not on this machine, which the weights don't need."""
  try:
    return run.tokenizer
  except InputError as error:
    print(f"warning: written without its tokenizer: {error}", file=sys.stderr)
    return None


def _read(
  config: Config, overrides: Mapping[str, Any], workdir: str, source: Path, placement_string: str | None
) -> None:
  foreign = open_foreign(source, placement_string)
  fields = foreign.fields
  if overrides.get("model.tied_embeddings") is False and hf.HEAD in foreign.tensors:
    fields["tied_embeddings"] = False  # a head that is there may differ from the embedding, whatever config.json says
  for name, value in overrides.items():
    if name.startswith("model.") and fields.get(name.removeprefix("model."), value) != value:
      hint = "; say it with --placement" if name == "model.placement" else "; leave it out"
      raise InputError(f"--config.{name}={value}: the checkpoint says {fields[name.removeprefix('model.')]!r}{hint}")
  config.model.update(fields)
  if not config.model.placement:
    raise InputError("--placement is required: the checkpoint's config.json does not say where its norms stand")
  if foreign.tokenizer is not None and config.data.tokenizer == SENTENCEPIECE:
    config.data.tokenizer = str(source)  # what nobody stated: none is trained where a model has one
  config_lib.validate(config)
  warning = check_tokenizer(source, config)
  if warning is not None:
    print(f"warning: the tokenizer is {warning}", file=sys.stderr)
  params = hf.import_weights(foreign.tensors, config.model)
  folder = begin_from(config, params, workdir, Origin(foreign.facts, foreign.tokenizer))
  print(f"placement  {config_lib.table(config.model).layer_list}")
  print(f"model      {count_params(config.model) / 1e6:.2f} M parameters, from {source}")
  if foreign.tokenizer is not None:
    ids = f"{foreign.tokenizer.vocab_size:,} ids, id {foreign.tokenizer.eos_id} ends a document"
    print(f"tokenizer  {config.data.tokenizer}: {ids}")
  for note in foreign.notes:
    print(f"note       {note}")
  print(f"wrote      {folder.address}, step 0; `train --workdir` resumes it")
