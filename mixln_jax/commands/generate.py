"""Generate text from a run's checkpoint, for one prompt or many."""

import json
from typing import Any

from mixln_jax.command_line import CommandLine
from mixln_jax.config import NEWEST
from mixln_jax.data.tokenizer import Tokenizer
from mixln_jax.errors import InputError
from mixln_jax.inference.generate import BATCH_SIZE, Text, check_context, encode_prompt, generate_texts
from mixln_jax.inference.prompts import read_prompts
from mixln_jax.inference.sampling import Sampling
from mixln_jax.opening import open_run
from mixln_jax.parallel import processes
from mixln_jax.text import for_stdout

NUM_TOKENS = 100


def main(argv: list[str]) -> int:
  line = CommandLine(__doc__ or "")
  line.string("workdir", "the run's folder", required=True)
  line.strings("prompt", "text to continue; may be given several times. By default the start of a document")
  line.string("prompts", "file of prompts: .txt, one a line, or .jsonl, objects with `prompt`")
  line.integer("num_tokens", f"most tokens to add; by default {NUM_TOKENS}, or what the run's length allows", minimum=1)
  line.number("temperature", "0 = always the likeliest token", default=0.8, minimum=0.0)
  line.integer("top_k", "only the k likeliest tokens; 0 = all", default=0, minimum=0)
  line.number("top_p", "only the likeliest tokens whose probabilities reach p; 1 = all", default=1.0)
  line.integer("seed", "seed of the sampling", default=0, minimum=0, maximum=2**32 - 1)
  line.strings("stop", "text that ends a row, before which its text is cut; may be given several times")
  line.boolean("ignore_end", "continue past the end of a document")
  line.boolean("beyond_context", "continue past the length that the run was trained at")
  line.integer("batch_size", "prompts at a time", default=BATCH_SIZE, minimum=1)
  line.integer("step", "which checkpoint; by default the newest", minimum=0)
  line.boolean("json", "print a JSON object a prompt")
  values = line.parse(argv)
  sampling = Sampling(values.temperature, values.top_k, values.top_p, values.seed)
  sampling.check()
  prompts = _prompts(values)
  stop_texts = values.stop or []
  if "" in stop_texts:
    raise InputError("--stop='': an empty text stands everywhere; give a text, or leave it out")
  step = NEWEST if values.step is None else values.step
  with open_run(values.workdir, step) as run:
    tokenizer = run.tokenizer
    num_tokens = _num_tokens(tokenizer, prompts, values, run.config.data.sequence_length)
    texts = generate_texts(
      run.config.model,
      run.params,
      tokenizer,
      prompts,
      num_tokens,
      sampling=sampling,
      stop_ids=[] if values.ignore_end else [tokenizer.eos_id],
      stop_texts=stop_texts,
      batch_size=values.batch_size,
    )
  if processes.is_first():
    shown = [_shown(prompt, text, as_json=values.json) for prompt, text in zip(prompts, texts, strict=True)]
    print(("\n" if values.json else "\n\n").join(shown))
  return 0


def _prompts(values: Any) -> list[str]:
  if values.prompts is not None and values.prompt:
    raise InputError("give --prompt or --prompts, not both")
  return read_prompts(values.prompts) if values.prompts is not None else values.prompt or [""]


def _num_tokens(tokenizer: Tokenizer, prompts: list[str], values: Any, context: int) -> int:
  longest = max(len(encode_prompt(tokenizer, prompt)) for prompt in prompts)
  if values.beyond_context:
    return values.num_tokens or NUM_TOKENS
  num_tokens = values.num_tokens or max(1, min(NUM_TOKENS, context - longest))
  check_context(longest, num_tokens, context)
  return num_tokens


def _shown(prompt: str, text: Text, *, as_json: bool) -> str:
  if not as_json:
    return for_stdout(prompt + text.text)
  return json.dumps({"prompt": prompt, "text": text.text, "tokens": len(text.ids), "stopped": text.stopped})
