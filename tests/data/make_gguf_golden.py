"""Makes tests/data/gguf/: a tiny LLaMA in Q4_1 and Q8_0, and what transformers reads and computes of the file.

    pip install torch transformers accelerate gguf
    python tests/data/make_gguf_golden.py [FILE.gguf]

`tiny.gguf` has random weights and a byte-level tokenizer of 300 ids; `tiny.npz` has `tokens` [B, T], their `logits`
[B, T, V], `greedy` (a prompt and its likeliest continuation) and the ids of `TEXT`. Of a FILE.gguf, if one is given,
the same is written to FILE.npz beside it, of longer rows (benchmarks/exact_logits.py reads it).
"""

import argparse
import json
from pathlib import Path

import gguf
import numpy as np
import tokenizers
import torch
import transformers
from gguf import quants
from tokenizers import decoders, models, pre_tokenizers, trainers

FOLDER = Path(__file__).parent / "gguf"
TEXT = (
  "The tea in 1790 cost 12,345.67 dollars;  two  blanks, a\ttab\nand\n\nlines: don't, e.g. naïve cafés, 茶と水, 🍵!"
)
WIDTH, HIDDEN, HEADS, KV_HEADS, LAYERS, VOCAB = 64, 96, 4, 2, 2, 300


def llama_cpp_order(weight, heads):
  """llama.cpp's `permute` of a query or key projection (convert_hf_to_gguf.py)."""
  return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_tokenizer(writer):
  """A byte-level byte-pair encoding of 300 ids with SmolLM's special tokens and cutting of words."""
  model = tokenizers.Tokenizer(models.BPE())
  model.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
  )
  model.decoder = decoders.ByteLevel()
  special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  trainer = trainers.BpeTrainer(
    vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet, show_progress=False
  )
  model.train_from_iterator([TEXT, "the tea and the tab and the lines of the cafés"] * 5, trainer)
  ids = model.get_vocab(with_added_tokens=True)
  assert len(ids) == VOCAB, len(ids)
  merges = [" ".join(pair) for pair in json.loads(model.to_str())["model"]["merges"]]
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("smollm")
  writer.add_token_list(sorted(ids, key=ids.get))
  writer.add_token_types([3] * len(special) + [1] * (VOCAB - len(special)))
  writer.add_token_merges(merges)
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)


def write(path):
  """Writes the tiny model."""
  rng = np.random.default_rng(0)
  writer = gguf.GGUFWriter(str(path), "llama")
  writer.add_name("tiny")
  writer.add_block_count(LAYERS)
  writer.add_context_length(128)
  writer.add_embedding_length(WIDTH)
  writer.add_feed_forward_length(HIDDEN)
  writer.add_head_count(HEADS)
  writer.add_head_count_kv(KV_HEADS)
  writer.add_rope_dimension_count(WIDTH // HEADS)
  writer.add_rope_freq_base(1000.0)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_vocab_size(VOCAB)
  write_tokenizer(writer)

  def matrix(name, rows, columns, kind=gguf.GGMLQuantizationType.Q4_1, heads=0):
    weight = rng.normal(size=(rows, columns)).astype(np.float32) / 8
    weight = llama_cpp_order(weight, heads) if heads else weight
    writer.add_tensor(name, quants.quantize(weight, kind), raw_dtype=kind)

  def gain(name):
    writer.add_tensor(name, rng.uniform(0.6, 1.4, WIDTH).astype(np.float32))

  matrix("token_embd.weight", VOCAB, WIDTH, gguf.GGMLQuantizationType.Q8_0)
  for layer in range(LAYERS):
    block, keys = f"blk.{layer}.", WIDTH * KV_HEADS // HEADS
    gain(f"{block}attn_norm.weight")
    matrix(f"{block}attn_q.weight", WIDTH, WIDTH, heads=HEADS)
    matrix(f"{block}attn_k.weight", keys, WIDTH, heads=KV_HEADS)
    matrix(f"{block}attn_v.weight", keys, WIDTH)
    matrix(f"{block}attn_output.weight", WIDTH, WIDTH)
    gain(f"{block}ffn_norm.weight")
    matrix(f"{block}ffn_gate.weight", HIDDEN, WIDTH)
    matrix(f"{block}ffn_up.weight", HIDDEN, WIDTH)
    matrix(f"{block}ffn_down.weight", WIDTH, HIDDEN)
  gain("output_norm.weight")
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def read(path, length=16):
  """What transformers makes of a file, saved beside it."""
  place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
  model = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).eval()
  ids = transformers.AutoTokenizer.from_pretrained(**place)(TEXT, add_special_tokens=False).input_ids
  tokens = np.random.default_rng(1).integers(0, model.config.vocab_size, (2, length))
  row = [0, *ids[:4]]
  with torch.no_grad():
    logits = model(torch.tensor(tokens)).logits.numpy()
    for _ in range(12):  # without `generate`, which masks a first token that it takes for padding
      row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
  np.savez_compressed(
    path.with_suffix(".npz"), tokens=tokens, logits=logits, text=TEXT, ids=np.array(ids), greedy=np.array(row)
  )
  print(f"{path.name}: {len(ids)} ids, greedy {row}")


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("file", nargs="?", type=Path)
  given = parser.parse_args().file
  if given is not None:
    read(given, length=64)
    return
  FOLDER.mkdir(exist_ok=True)
  write(FOLDER / "tiny.gguf")
  read(FOLDER / "tiny.gguf")


if __name__ == "__main__":
  main()
