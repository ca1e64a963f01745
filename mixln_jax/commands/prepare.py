"""Turn text into records of tokens: tokenizer, shards and a manifest; what is there is reused."""

from mixln_jax.command_line import CommandLine
from mixln_jax.commands._training import config_of_run
from mixln_jax.data.prepare import prepare, train_tokenizer
from mixln_jax.errors import InputError
from mixln_jax.runs.remote import writable_place
from mixln_jax.training.finetune import follow


def main(argv: list[str]) -> int:
  line = CommandLine(__doc__ or "")
  line.config(required=False, of_run=config_of_run, sections=("data", "model", "train"))
  line.string("workdir", "instead of --config: a run's folder, for the data that its config names")
  line.integer("workers", "processes; by default one a core", minimum=1)
  line.string(
    "train_tokenizer",
    "only train a tokenizer on the corpus and write it here: a .model file (SentencePiece) or a .json (tokenizers)",
  )
  line.integer("tokenizer_size", "its vocabulary", default=32_000, minimum=259)
  values = line.parse(argv)
  if values.config is None:
    raise InputError("--config is required, or --workdir=RUN of a run that is there; see --help")
  config = line.config_value()
  if values.train_tokenizer is not None:
    with writable_place(values.train_tokenizer, "train_tokenizer") as path:
      tokenizer = train_tokenizer(config, str(path), values.tokenizer_size)
    print(f"tokenizer  {values.train_tokenizer}, {tokenizer.vocab_size:,} ids; set config.data.tokenizer to it")
    return 0
  if config.data.on_the_fly or config.data.mixture:
    field = "on_the_fly" if config.data.on_the_fly else "mixture"
    raise InputError(f"config.data.{field} is set, so there is nothing to prepare; leave it out to prepare a source")
  corpus = prepare(follow(config, line.overrides()), workers=values.workers)
  manifest = corpus.manifest
  for name, split in manifest.splits.items():
    print(
      f"{name:<10} {split.documents:,} documents, {split.tokens:,} tokens, {split.counted:,} "
      f"predicted, {split.records:,} records"
    )
  if manifest.cut_prompts:
    print(
      f"cut        {manifest.cut_prompts:,} prompts lost their beginning, to fit into {manifest.sequence_length} tokens"
    )
  for reason, count in manifest.skipped.items():
    print(f"skipped    {count:,} documents: {reason}")
  print(f"tokenizer  {manifest.tokenizer}, {manifest.vocab_size:,} ids")
  print(
    f"records    {corpus.folder}, mode {manifest.mode}, {manifest.sequence_length} tokens each, "
    f"fingerprint {manifest.fingerprint[:12]}"
  )
  return 0
