"""Makes tests/data/bert/: what transformers computes of a tiny BERT with a head for masked tokens, and of MiniLM.

    pip install torch transformers
    python tests/data/make_bert_golden.py [FOLDER]

`tiny.npz` has a random model (`config`, `weight/NAME`), `tokens`, `token_types` and `mask` [B, T], the last hidden
states [B, T, D] and the logits [B, T, V]. Of a FOLDER with a BertModel in safetensors (MiniLM), `minilm.npz` has
`tokens` [B, T] and every eighth of the last hidden states' channels.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

FOLDER = Path(__file__).parent / "bert"
SHAPE = {
  "vocab_size": 50,
  "hidden_size": 24,
  "intermediate_size": 40,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "max_position_embeddings": 20,
  "type_vocab_size": 2,
}


def tiny():
  torch.manual_seed(0)
  model = transformers.BertForMaskedLM(transformers.BertConfig(**SHAPE)).eval()
  for name, parameter in model.named_parameters():
    with torch.no_grad():  # at which nothing is small
      scale = 0.3 if parameter.ndim == 2 else 0.5
      parameter.copy_(torch.randn_like(parameter) * scale + float("LayerNorm.weight" in name))
  rng = np.random.default_rng(0)
  tokens, types = rng.integers(0, 50, (3, 16)), np.sort(rng.integers(0, 2, (3, 16)))
  mask = (np.arange(16) < np.array([16, 11, 7])[:, None]).astype(np.int64)
  with torch.no_grad():
    out = model(
      torch.tensor(tokens),
      token_type_ids=torch.tensor(types),
      attention_mask=torch.tensor(mask),
      output_hidden_states=True,
    )
  weights = {f"weight/{name}": tensor.numpy() for name, tensor in model.state_dict().items()}
  config = np.frombuffer(json.dumps(model.config.to_dict()).encode(), np.uint8)
  arrays = {"hidden": out.hidden_states[-1].numpy(), "logits": out.logits.numpy()}
  np.savez_compressed(
    FOLDER / "tiny.npz", config=config, tokens=tokens, token_types=types, mask=mask, **arrays, **weights
  )


def minilm(folder):
  model = transformers.BertModel.from_pretrained(folder).eval()
  tokens = np.random.default_rng(0).integers(1000, 30_000, (2, 24))
  tokens[:, 0], tokens[:, -1] = 101, 102
  with torch.no_grad():
    hidden = model(torch.tensor(tokens)).last_hidden_state.numpy()
  np.savez_compressed(FOLDER / "minilm.npz", tokens=tokens, hidden=hidden[..., ::8])


if __name__ == "__main__":
  FOLDER.mkdir(exist_ok=True)
  tiny()
  if len(sys.argv) > 1:
    minilm(sys.argv[1])
