"""Makes tests/data/exported.npz, harness.npz and harness_splits.npz: what transformers and its harness say of our
exported models.

    pip install torch transformers -r requirements-dev.txt
    PYTHONPATH=.:tests python tests/data/make_export_golden.py

exported.npz: for each of PLACEMENTS, a model with the seeded parameters of tests/helpers.py is exported, loaded by
AutoModelForCausalLM with the modelling file that is written beside the weights, and its logits are kept (`logits/NAME`)
with the hash of that file and the models' `options`. The script also compares them with ours, and greedy generation
with and without the cache.

harness.npz: what the harness's own Hugging Face model (lm_eval HFLM, torch) says of one exported model: log-likelihoods
of pairs (`texts`: JSON) that fit, are cut, or have no context; of whole texts; and greedy generation.

harness_splits.npz: log-likelihoods, by the same, of contexts and continuations that a speech is cut into: contexts of 0
to 6 characters, and NUM_SPLITS places at random. Where the harness's model has no answer (its context or continuation
has no token, on which it fails an assertion) the value is NaN.
"""

import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from helpers import random_params, random_tokens, small_model
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from mixln_jax.data.corpus import EMBEDDED, parts_of, read
from mixln_jax.data.tokenizer import Tokenizer
from mixln_jax.data.tokenizer_training import train_hugging_face, train_sentencepiece
from mixln_jax.inference.generate import generate
from mixln_jax.interop import hf
from mixln_jax.interop.export import tokenizer_files
from mixln_jax.interop.safetensors_folder import write_folder
from mixln_jax.model import Transformer

HERE = Path(__file__).parent
PLACEMENTS = (
  "mix:0.25",
  "post",
  "lns",
  "sandwich",
  "deepnorm",
  "keel*2,admin*1,layerscale*1+gpas",
  "hybrid_first*2,skipinit*1,post*1+gpas",
  "pre*1+qk_norm,reordered*2+qk_norm_full,hybrid*1",
)
# Beside the placement, what else the layout carries.
SHAPE = {"num_kv_heads": 1, "mlp_pad_to": 32}
OPTIONS = {"lns": {"tied_embeddings": True}, "post": {"qkv_bias": True}, "sandwich": {"rope_scaling": "llama3"}}
HARNESS_PLACEMENT, MAX_LENGTH, VOCABULARY = "mix:0.5", 24, 280
TEXT = "the quick brown fox jumps over a lazy dog while naïve cafés serve tea; "
PAIRS = [
  ("the quick brown", " fox"),
  ("the quick brown ", "fox jumps"),
  ("", "a lazy dog"),
  ("tea", "!"),
  (TEXT * 3, "serve tea at the cafés"),
  ("naïve", " cafés\nserve"),
]
WHOLE = ["tea", TEXT, TEXT * 4]
PROMPTS = [("the quick", {"until": ["\n"], "max_gen_toks": 8}), (TEXT * 2, {"until": ["e", "zz"], "max_gen_toks": 12})]

SPLITS_VOCABULARY, NUM_SPLITS, SPLITS_TEXT, LONGEST_SPLIT = 500, 1000, 6000, 50  # of characters the last two


def exported_model(placement: str):
  return small_model(placement=placement, **SHAPE, **OPTIONS.get(placement, {}))


def load_exported(model, params, folder, extra=None):
  config = hf.hf_config(model, MAX_LENGTH, official=True) | (extra or {})
  write_folder(folder, hf.export_weights(params, model), config, 10**9, {hf.MODELING.name: hf.MODELING.read_bytes()})
  loaded, said = transformers.AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=True, output_loading_info=True
  )
  assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), said
  return loaded.eval()


def largest_difference(placement: str) -> tuple[np.ndarray, float]:
  """The exported model's logits, and how far ours are from them; its generation must be ours."""
  model = exported_model(placement)
  params, tokens = random_params(model), np.array(random_tokens(model, 2, 10))
  with tempfile.TemporaryDirectory() as folder:
    exported = load_exported(model, params, folder)
  with torch.no_grad():
    logits = exported(torch.from_numpy(tokens)).logits.numpy()
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with_cache, without = (
      exported.generate(torch.from_numpy(tokens), use_cache=use, **options).numpy() for use in (True, False)
    )
  np.testing.assert_array_equal(with_cache, without)
  np.testing.assert_array_equal(with_cache[:, tokens.shape[1] :], generate(model, params, tokens.tolist(), 8))
  ours = Transformer(model).apply({"params": params}, tokens)
  return logits, float(np.abs(ours - logits).max())


def make_exported() -> None:
  arrays = {"modeling_sha256": np.array(hashlib.sha256(hf.MODELING.read_bytes()).hexdigest())}
  arrays["options"] = np.array(json.dumps({name: SHAPE | OPTIONS.get(name, {}) for name in PLACEMENTS}))
  for placement in PLACEMENTS:
    arrays[f"logits/{placement}"], difference = largest_difference(placement)
    print(
      f"{placement:<50} largest logit {np.abs(arrays[f'logits/{placement}']).max():.2f}, difference {difference:.1e}"
    )
    assert difference < 2e-5
  np.savez_compressed(HERE / "exported.npz", **arrays)


def greedy_pair(model, params, tokenizer) -> tuple[str, str]:
  """A text and the likeliest token after it, where together they are read as these tokens again."""
  for end in range(1, len(TEXT)):
    context = tokenizer.encode(TEXT[:end])
    (added,) = generate(model, params, [context], 1)
    text = tokenizer.decode(added)
    if tokenizer.encode(TEXT[:end] + text) == context + added and not TEXT[:end].endswith(" "):
      return TEXT[:end], text
  raise AssertionError("no such text; change the seed")


def ask(model: HFLM, kind: str, arguments: list) -> list:
  return getattr(model, kind)([Instance(kind, {}, argument, index) for index, argument in enumerate(arguments)])


def check_tokenizers(*tokenizers: Tokenizer) -> transformers.PreTrainedTokenizerBase:
  """What AutoTokenizer makes of ours gives the same ids; of the last one it is returned."""
  theirs = None
  for ours in tokenizers:
    with tempfile.TemporaryDirectory() as folder:
      for name, content in tokenizer_files(ours, MAX_LENGTH).items():
        (Path(folder) / name).write_bytes(content)
      theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in (TEXT, " tea", "Hello  world\n\n 12345 ☃ tabs\tx", "a\n"):
      ids = theirs(text, add_special_tokens=False)["input_ids"]
      assert ids == ours.encode(text), (ours.name, text)
      assert theirs.decode(ids) == ours.decode(ids)
    assert theirs.eos_token_id == ours.eos_id
  return theirs


def make_harness() -> None:
  texts = [TEXT * 40, *PAIRS[5]]
  tokenizer = train_hugging_face(texts, VOCABULARY)
  theirs = check_tokenizers(train_sentencepiece(texts, VOCABULARY + 40), tokenizer)
  model = small_model(placement=HARNESS_PLACEMENT, vocab_size=VOCABULARY)
  params = random_params(model)
  with tempfile.TemporaryDirectory() as folder:
    exported = load_exported(model, params, folder, {"eos_token_id": tokenizer.eos_id, "bos_token_id": None})
  asked = HFLM(pretrained=exported, tokenizer=theirs, batch_size=2, device="cpu", max_length=MAX_LENGTH)
  texts = {"pairs": [*PAIRS, greedy_pair(model, params, tokenizer)], "whole": WHOLE, "prompts": PROMPTS}
  pairs = ask(asked, "loglikelihood", texts["pairs"])
  assert [greedy for _, greedy in pairs].count(True) == 1
  whole = ask(asked, "loglikelihood_rolling", [(text,) for text in WHOLE])
  added = texts["added"] = ask(asked, "generate_until", PROMPTS)
  print("log-likelihoods", [round(value, 3) for value, _ in pairs], "whole texts", whole, "added", added)
  np.savez_compressed(
    HERE / "harness.npz",
    texts=np.array(json.dumps(texts)),
    tokenizer=np.frombuffer(tokenizer.content, np.uint8),
    log_likelihoods=np.array([value for value, _ in pairs]),
    greedy=np.array([greedy for _, greedy in pairs]),
    whole=np.array(whole),
  )


def splits_of(text: str) -> list[tuple[str, str]]:
  """Contexts and continuations: short contexts at the text's beginning, then pieces of the text cut anywhere."""
  rng = np.random.default_rng(0)
  pairs = [(text[:length], text[length : length + size]) for length in range(7) for size in (1, 2, 3, 8)]
  while len(pairs) < NUM_SPLITS + 28:
    start, middle, end = np.sort(rng.integers(0, LONGEST_SPLIT, 3)) + rng.integers(0, len(text) - LONGEST_SPLIT)
    if middle < end:
      pairs.append((text[start:middle], text[middle:end]))
  return pairs


def make_splits() -> None:
  speech = next(read(parts_of(EMBEDDED)[0])).text[:SPLITS_TEXT]
  tokenizer = train_hugging_face([speech], SPLITS_VOCABULARY)
  theirs = check_tokenizers(tokenizer)
  model = small_model(placement=HARNESS_PLACEMENT, vocab_size=SPLITS_VOCABULARY)
  params = random_params(model)
  with tempfile.TemporaryDirectory() as folder:
    exported = load_exported(model, params, folder, {"eos_token_id": tokenizer.eos_id, "bos_token_id": None})
  # Its cache of logits takes requests of equal context + continuation[:-1] for one; with a context of another length
  # among them, as here, it then reads logits of other positions (lm_eval 0.4.13: up to 1.3 nats off its own answers).
  options = {"batch_size": 64, "device": "cpu", "max_length": MAX_LENGTH, "logits_cache": False}
  asked = HFLM(pretrained=exported, tokenizer=theirs, **options)
  pairs = splits_of(speech)
  answered = []
  for index, (context, continuation) in enumerate(pairs):
    ids = ([asked.prefix_token_id], [0]) if context == "" else asked._encode_pair(context, continuation)
    if all(ids):
      answered.append(index)
  values = np.full(len(pairs), np.nan)
  values[answered] = [value for value, _ in ask(asked, "loglikelihood", [pairs[index] for index in answered])]
  print(f"{len(answered)} of {len(pairs)} splits have an answer")
  np.savez_compressed(
    HERE / "harness_splits.npz",
    pairs=np.array(json.dumps(pairs)),
    tokenizer=np.frombuffer(tokenizer.content, np.uint8),
    log_likelihoods=values,
  )


if __name__ == "__main__":
  make_exported()
  make_harness()
  make_splits()
