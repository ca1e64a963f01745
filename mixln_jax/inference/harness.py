"""An adapter of this project's models to EleutherAI's lm-evaluation-harness (`pip install -r requirements-eval.txt`).

Importing this module imports the harness, which takes seconds. It needs neither torch nor transformers.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mixln_jax.config import ModelConfig
from mixln_jax.data.tokenizer import Tokenizer
from mixln_jax.errors import InputError
from mixln_jax.inference.generate import check_decoder, continue_rows
from mixln_jax.inference.sampling import Sampling
from mixln_jax.inference.scoring import score

try:
  from lm_eval.api.model import TemplateLM
  from lm_eval.evaluator import evaluate  # noqa: F401 (other modules import it from here)
  from lm_eval.tasks import TaskManager  # noqa: F401
  from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
  raise InputError(
    f"tasks need the lm-evaluation-harness ({error.name} is missing): pip install -r requirements-eval.txt"
  ) from error

NEW_TOKENS = 256  # tokens to generate if the task does not say, as in the harness's own models
GENERATION_OPTIONS = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")


class HarnessModel(TemplateLM):
  """A model with the interface of the harness. All processes of a run make the same requests and compute them together.

  Attributes:
    keep_L: 0 removes a layer, 1 keeps it; None = keep all.
  """

  def __init__(self, model: ModelConfig, params: Any, tokenizer: Tokenizer, max_length: int, batch_size: int):
    """
    Args:
      model: config.model.
      params: the parameters, on the mesh of the context in which the harness runs.
      tokenizer: the run's tokenizer.
      max_length: the most tokens to read at a time; only the end of a longer context is read.
      batch_size: rows at a time.
    """
    super().__init__()
    check_decoder(model)
    self.keep_L: Any = None
    self._model, self._params, self._text = model, params, tokenizer
    self._max_length, self._batch_size = max_length, batch_size

  @property
  def eot_token_id(self) -> int:
    return self._text.eos_id

  @property
  def tokenizer_name(self) -> str:
    return self._text.name

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
    """Ids of a text, without any special tokens."""
    del add_special_tokens
    return self._text.encode(string)

  def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
    """Log-likelihood of each request's continuation after its context, and whether it is the greedy one."""
    del disable_tqdm
    encoded = [(request.args, *self._encode_pair(*request.args)) for request in requests]
    return self._loglikelihood_tokens(encoded)

  def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of a context and of its continuation, at least one each.

    As in the harness, spaces at the end of a context belong to the continuation, and the continuation's ids are those
    that both texts together have after the ids of the context alone. Three cases are not defined by the harness. A
    context without tokens (empty, or only spaces) becomes the prefix token. A continuation that merges with the last
    token of the context ("Stat" + "es" in a vocabulary with "States") has no ids of its own, and is encoded alone. A
    continuation without tokens has no likelihood.

    Raises:
      InputError: the continuation has no token.
    """
    kept = context.rstrip()
    rest = context[len(kept) :] + continuation
    context_ids = self.tok_encode(kept)
    continuation_ids = self.tok_encode(kept + rest)[len(context_ids) :] or self.tok_encode(rest)
    if not self.tok_encode(continuation) or not continuation_ids:
      raise InputError(
        f"tasks: the answer {continuation!r} to {context[-60:]!r} has no token in the run's tokenizer, so it has no "
        "likelihood; fix the task's choices, or leave the task out"
      )
    return context_ids or [self.prefix_token_id], continuation_ids

  def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
    pairs = [self._fitted(context, continuation) for _, context, continuation in requests]
    return [tuple(one) for one in self._score(pairs)]

  def _fitted(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
    """The pair, with only the end of the context that fits; the continuation's last token is predicted, not read."""
    room = self._max_length + 1 - len(continuation)
    if room < 1:
      raise InputError(
        f"tasks: a continuation of {len(continuation)} tokens does not fit into the {self._max_length} tokens that the "
        "run was trained on (config.data.sequence_length); leave the task out"
      )
    return context[-room:], continuation

  def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Any:
    return score(self._model, self._params, pairs, batch_size=self._batch_size, keep_L=self.keep_L)

  def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
    """Log-likelihood of whole texts, split into windows of the model's length; each token is predicted once."""
    del disable_tqdm
    windows: list[tuple[list[int], list[int]]] = []
    owners: list[int] = []
    for index, request in enumerate(requests):
      ids = self.tok_encode(request.args[0])
      for window in get_rolling_token_windows(ids, self.prefix_token_id, self._max_length, context_len=1):
        windows.append(make_disjoint_window(window))
        owners.append(index)
    totals = [0.0] * len(requests)
    for owner, one in zip(owners, self._score(windows), strict=True):
      totals[owner] += one.log_likelihood
    return totals

  def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
    """Continuations up to the first text of each request's `until`. A request's number determines its draws."""
    del disable_tqdm
    settings = [_Generation.of(request.args[1], self._max_length) for request in requests]
    texts: dict[int, str] = {}
    for kind in dict.fromkeys(settings):
      indices = [index for index, one in enumerate(settings) if one == kind]
      room = self._max_length - kind.num_tokens
      contexts = [self.tok_encode(requests[index].args[0]) or [self.prefix_token_id] for index in indices]
      added = continue_rows(
        self._model,
        self._params,
        self._text,
        [context[-room:] for context in contexts],
        kind.num_tokens,
        sampling=kind.sampling,
        stop_ids=[self.eot_token_id],
        stop_texts=kind.until,
        batch_size=self._batch_size,
        numbers=indices,
      )
      texts |= {index: one.text for index, one in zip(indices, added, strict=True)}
    return [texts[index] for index in range(len(requests))]


class _Generation(NamedTuple):
  """The options of a generation request."""

  until: tuple[str, ...]
  num_tokens: int
  sampling: Sampling

  @classmethod
  def of(cls, options: Mapping[str, Any], max_length: int) -> "_Generation":
    unknown = sorted(set(options) - set(GENERATION_OPTIONS))
    if unknown:
      known = ", ".join(GENERATION_OPTIONS)
      raise InputError(f"tasks: generation_kwargs has {unknown[0]!r}, which is not supported; supported: {known}")
    until = options.get("until") or []
    num_tokens = int(options.get("max_gen_toks", min(NEW_TOKENS, max_length // 2)))
    if num_tokens >= max_length:
      raise InputError(
        f"tasks: max_gen_toks={num_tokens} leaves no room for a context in the {max_length} tokens that the run was "
        "trained on (config.data.sequence_length); lower it in the task's file"
      )
    ends = [until] if isinstance(until, str) else until
    sampling = Sampling()
    if options.get("do_sample"):
      sampling = Sampling(float(options.get("temperature", 1.0)))
    if sampling.temperature:
      sampling = sampling._replace(top_k=int(options.get("top_k", 0)), top_p=float(options.get("top_p", 1.0)))
    return cls(tuple(end for end in ends if end), num_tokens, sampling)
