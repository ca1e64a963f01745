"""Turn text into records of tokens: tokenizer, shards and a manifest; what is there is reused."""

from mixln_jax.command_line import CommandLine
from mixln_jax.data.prepare import prepare


def main(argv: list[str]) -> int:
  line = CommandLine(__doc__ or "")
  line.config()
  line.parse(argv)
  corpus = prepare(line.config_value())
  manifest = corpus.manifest
  for name, split in manifest.splits.items():
    print(
      f"{name:<10} {split.documents:,} documents, {split.tokens:,} tokens, {split.counted:,} "
      f"predicted, {split.records:,} records"
    )
  print(f"tokenizer  {manifest.tokenizer}, {manifest.vocab_size:,} ids")
  print(
    f"records    {corpus.folder}, mode {manifest.mode}, {manifest.sequence_length} tokens each, "
    f"fingerprint {manifest.fingerprint[:12]}"
  )
  return 0
