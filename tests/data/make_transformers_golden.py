"""Makes tests/data/transformers/*.npz, and checks both directions of conversion against transformers.

    pip install torch transformers -r requirements.txt
    PYTHONPATH=. python tests/data/make_transformers_golden.py

Each file holds a tiny model of transformers with random weights: `config` (its config.json), `weight/NAME`, `tokens`
[B, T] and its `logits` [B, T, V]. The script then exports each model with this project, loads the folder with
transformers again, and compares the logits of all three.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

from mixln_jax import config as config_lib
from mixln_jax.interop import hf
from mixln_jax.interop.safetensors_folder import write_folder
from mixln_jax.model import Transformer

FOLDER = Path(__file__).parent / "transformers"
SHAPE = {
  "vocab_size": 40,
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 4,
  "max_position_embeddings": 64,
  "tie_word_embeddings": False,
  "pad_token_id": None,
}
LLAMA_3 = {
  "rope_type": "llama3",
  "rope_theta": 500.0,
  "factor": 4.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 16,
}
CASES = {
  "llama": (transformers.LlamaConfig, {}),
  "llama_gqa": (transformers.LlamaConfig, {"num_key_value_heads": 2, "rms_norm_eps": 1e-5}),
  "llama_3_rope": (transformers.LlamaConfig, {"num_key_value_heads": 1, "rope_parameters": LLAMA_3}),
  "llama_tied": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
  "qwen2": (transformers.Qwen2Config, {"num_key_value_heads": 2}),
  "qwen3": (transformers.Qwen3Config, {"num_key_value_heads": 2, "head_dim": 6}),
  "olmo2": (transformers.Olmo2Config, {"num_key_value_heads": 2}),
}


def random_model(name: str) -> torch.nn.Module:
  """A model at which nothing is small."""
  kind, options = CASES[name]
  torch.manual_seed(len(name))
  model = transformers.AutoModelForCausalLM.from_config(kind(**{**SHAPE, **options}), attn_implementation="eager")
  for path, parameter in model.named_parameters():
    with torch.no_grad():
      if path.endswith("norm.weight"):
        parameter.uniform_(0.6, 1.4)
      else:
        parameter.normal_(0, 1.0 if "bias" in path else 0.3)
  return model.eval()


def logits_of(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
  with torch.no_grad():
    return model(torch.from_numpy(tokens)).logits.numpy()


def main() -> None:
  FOLDER.mkdir(exist_ok=True)
  tokens = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (2, 24))
  for name in CASES:
    model = random_model(name)
    logits = logits_of(model, tokens)
    weights = {path: tensor.numpy() for path, tensor in model.state_dict().items()}
    config = config_lib.base().model
    config.update(hf.model_fields(model.config.to_dict()))
    params = hf.import_weights(weights, config)
    ours = Transformer(config).apply({"params": params}, tokens)
    with tempfile.TemporaryDirectory() as folder:
      write_folder(folder, hf.export_weights(params, config), hf.hf_config(config, 64), shard_bytes=10_000)
      again, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
      )
      assert type(again) is type(model), (type(again), type(model))
      assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
      back = logits_of(again.eval(), tokens)
    print(
      f"{name:<14} largest logit {np.abs(logits).max():.2f}, difference: ours {np.abs(ours - logits).max():.1e}, "
      f"exported and loaded by transformers {np.abs(back - logits).max():.1e}"
    )
    assert np.abs(ours - logits).max() < 2e-5
    assert np.abs(back - logits).max() < 2e-5
    text = json.dumps(model.config.to_dict(), default=str).encode()
    if config.tied_embeddings:
      weights.pop("lm_head.weight", None)  # as its safetensors files have it
    arrays = {f"weight/{path}": array for path, array in weights.items()}
    np.savez_compressed(
      FOLDER / f"{name}.npz", config=np.frombuffer(text, np.uint8), tokens=tokens, logits=logits, **arrays
    )


if __name__ == "__main__":
  main()
