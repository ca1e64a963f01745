"""Converts the tokenizer in a GGUF file to a tokenizer.json or a SentencePiece model.

Two kinds of llama.cpp are supported: `gpt2`, byte-level byte-pair encoding with merges, where `tokenizer.ggml.pre`
names the way to split a text into words; and `llama`, a SentencePiece model of byte-pair encoding with scores.
"""

import json
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from mixln_jax.data.gguf_file import GgufFile
from mixln_jax.data.tokenizer import END_TOKENS, HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from mixln_jax.errors import InputError

# Kinds of token, with the numbers that GGUF and SentencePiece both use.
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
KINDS = range(1, 7)

GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA_3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
# `tokenizer.ggml.pre` -> the patterns of two splits, the second applied to the pieces of the first: as in llama.cpp's
# src/llama-vocab.cpp, written as the steps of the models' own tokenizer.json.
PRE_TOKENIZERS: dict[str, tuple[str | None, str]] = {
  "gpt-2": (None, GPT_2),
  "smollm": (r"\p{N}", GPT_2),
  "llama-bpe": (None, LLAMA_3),
  "llama3": (None, LLAMA_3),
  "qwen2": (None, QWEN_2),
}


def gguf_tokenizer(file: GgufFile) -> Tokenizer:
  """The tokenizer of a GGUF file.

  Raises:
    InputError: it has none, has one of an unsupported kind, or one that contradicts itself or the tensors.
  """
  kind = file.fact("tokenizer.ggml.model", str)
  tokens, kinds = _tokens(file)
  if kind == "gpt2":
    return _byte_level(file, tokens, kinds)
  if kind == "llama":
    return _sentencepiece(file, tokens, kinds)
  raise InputError(
    f"tokenizer {file.path}: tokenizer.ggml.model={kind!r} is not supported; supported: gpt2 (byte-level byte-pair "
    "encoding) and llama (SentencePiece)"
  )


def _tokens(file: GgufFile) -> tuple[list[str], list[int]]:
  """The tokens, and the kind of each."""
  tokens = _list(file, "tokenizer.ggml.tokens", str)
  if not tokens:
    raise InputError(f"tokenizer {file.path}: has no tokens; use another file")
  if len(set(tokens)) < len(tokens):
    twice = next(token for index, token in enumerate(tokens) if token in tokens[:index])
    raise InputError(f"tokenizer {file.path}: the token {twice[:40]!r} stands there twice; use another file")
  kinds = _list(file, "tokenizer.ggml.token_type", int)
  if len(kinds) != len(tokens) or not set(kinds) <= set(KINDS):
    raise InputError(f"tokenizer {file.path}: token_type has no valid kind for each of {len(tokens):,} tokens")
  return tokens, kinds


def _list(file: GgufFile, name: str, kind: type) -> list[Any]:
  values = file.fact(name, list)
  if not all(type(value) is kind for value in values):
    raise InputError(f"tokenizer {file.path}: {name} has values that are not of type {kind.__name__}")
  return values


def _stated_token(file: GgufFile, name: str, tokens: list[str]) -> int | None:
  """The id of a special token that the file states; None if it states none."""
  full = f"tokenizer.ggml.{name}_token_id"
  if not file.has(full):
    return None
  index = file.fact(full, int)
  if not 0 <= index < len(tokens):
    raise InputError(f"tokenizer {file.path}: {full}={index}, but there are {len(tokens):,} tokens")
  return index


def _byte_level(file: GgufFile, tokens: list[str], kinds: list[int]) -> HuggingFaceTokenizer:
  """The tokenizer.json of a byte-level byte-pair encoding."""
  pre = file.fact("tokenizer.ggml.pre", str, "gpt-2")
  if pre not in PRE_TOKENIZERS:
    raise InputError(
      f"tokenizer {file.path}: tokenizer.ggml.pre={pre!r}, how a text is cut into words, is not known here; known: "
      f"{', '.join(PRE_TOKENIZERS)}; set config.data.tokenizer to the model's tokenizer.json"
    )
  ids = {token: index for index, token in enumerate(tokens)}
  merges = []
  for merge in _list(file, "tokenizer.ggml.merges", str):
    pair = merge.split(" ")
    if len(pair) != 2 or not {*pair, "".join(pair)} <= ids.keys():
      raise InputError(f"tokenizer {file.path}: the merge {merge[:40]!r} is not of two tokens into a third")
    merges.append(pair)
  first, second = PRE_TOKENIZERS[pre]
  steps = [_split(pattern) for pattern in (first, second) if pattern is not None]
  steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False})
  added = []
  for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
    if kind in (UNKNOWN, CONTROL, USER_DEFINED):
      special = kind != USER_DEFINED
      flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
      added.append({"id": index, "content": token, **flags})
  description = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": added,
    "normalizer": None,
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
    "post_processor": None,
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": {"type": "BPE", "unk_token": None, "vocab": ids, "merges": merges, "ignore_merges": second == LLAMA_3},
  }
  content = json.dumps(description, ensure_ascii=False).encode()
  special_tokens = {entry["content"] for entry in added if entry["special"]}
  end = None
  if special_tokens.isdisjoint(END_TOKENS):
    index = _stated_token(file, "eos", tokens)
    end = None if index is None else tokens[index]
  return HuggingFaceTokenizer(content, str(file.path), end)


def _split(pattern: str) -> dict[str, Any]:
  return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _sentencepiece(file: GgufFile, tokens: list[str], kinds: list[int]) -> SentencePieceTokenizer:
  """The SentencePiece model of the tokens and their scores."""
  scores = _list(file, "tokenizer.ggml.scores", float)
  if len(scores) != len(tokens):
    raise InputError(f"tokenizer {file.path}: {len(scores):,} scores for {len(tokens):,} tokens; use another file")
  end = _stated_token(file, "eos", tokens)
  unknown = _stated_token(file, "unknown", tokens)
  if end is None or unknown is None or kinds[unknown] != UNKNOWN or kinds.count(UNKNOWN) != 1:
    raise InputError(
      f"tokenizer {file.path}: a SentencePiece model states the id that ends a document and one unknown token; this "
      "file does not; set config.data.tokenizer to the model's tokenizer.model"
    )
  model: Any = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
  for token, score, kind in zip(tokens, scores, kinds, strict=True):
    model.pieces.add(piece=token, score=score, type=kind)
  trainer, normalizer = model.trainer_spec, model.normalizer_spec
  begin, pad = _stated_token(file, "bos", tokens), _stated_token(file, "padding", tokens)
  trainer.model_type = trainer.BPE
  trainer.vocab_size, trainer.byte_fallback = len(tokens), True
  trainer.unk_id, trainer.eos_id, trainer.unk_piece, trainer.eos_piece = unknown, end, tokens[unknown], tokens[end]
  trainer.bos_id = -1 if begin is None else begin
  trainer.bos_piece = tokens[begin] if begin is not None else "<s>"
  trainer.pad_id = -1 if pad is None else pad
  trainer.pad_piece = tokens[pad] if pad is not None else "<pad>"
  normalizer.name = "identity"
  normalizer.add_dummy_prefix = file.fact("tokenizer.ggml.add_space_prefix", bool, True)
  normalizer.remove_extra_whitespaces, normalizer.escape_whitespaces = False, True
  return SentencePieceTokenizer(model.SerializeToString(), str(file.path))
