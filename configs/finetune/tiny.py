"""Fine-tuning on a laptop: tell passages from before 1860 and after 1960 apart, from a run of configs/tiny.py.

Command:  python -m benchmarks.finetuning --only_task (writes work/eras), then
          python -m mixln_jax prepare, then python -m mixln_jax finetune --workdir=DIR, both with
          --config=configs/finetune/tiny.py --config.train.start_from=RUN
Hardware: 2 CPU cores. Timed only on a busy machine: 17 and 20 minutes. By arithmetic, a minute and a half on idle
          cores: a step has as many tokens as one of configs/tiny.py, which takes half a second there.
Result:   held-out accuracy, two choices, data.seed 0 (measured): pre 50.0 -> 94.8 %, mix:0.25 50.0 -> 95.8 %.
Source:   ours; the embedded corpus.
"""

from mixln_jax.config import base


def get_config():
  config = base()
  config.data.update(source="work/eras/train.json", validation_source="work/eras/validation.json")
  config.data.update(mode="instructions", document_mask=True, sequence_length=256)
  config.train.update(num_steps=150, batch_size=8)
  config.optimizer.update(learning_rate=1e-3, schedule="linear")
  config.checkpoint.every_steps = 50
  config.evaluate.update(every_steps=50, batch_size=16)
  return config
