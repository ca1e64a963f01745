"""The lm-evaluation-harness on our models: scores, tasks from local files, and two controls."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params, small_model, tokenizer_with_dummy_prefix
from lm_eval.api.instance import Instance

from mixln_jax.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from mixln_jax.data.tokenizer_training import train_hugging_face
from mixln_jax.errors import InputError
from mixln_jax.inference.harness import HarnessModel, TaskManager
from mixln_jax.inference.scoring import score, score_batch
from mixln_jax.inference.tasks import PAPER_TASKS, Tasks, main_metric, report, table
from mixln_jax.model import Transformer

DATA = Path(__file__).parents[1] / "data"
GOLDEN = DATA / "harness.npz"
LETTERS = np.array([3 + byte for byte in b"abcdefghijklmnopqrstuvwxyz"])
NUM_QUESTIONS = 120
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 1.0}}
"""


@pytest.fixture(scope="module")
def byte_model():
  model = small_model(vocab_size=259, placement="mix:0.5")
  return model, random_params(model)


def test_scores_are_the_sums_of_log_probabilities(byte_model):
  """Of rows of several lengths, whole and with a layer removed; a greedy one is told from others."""
  model, params = byte_model
  rng = np.random.default_rng(0)
  pairs = [(rng.integers(3, 259, a).tolist(), rng.integers(3, 259, b).tolist()) for a, b in [(1, 1), (5, 3), (9, 2)]]
  apply = jax.jit(Transformer(model).apply)
  for keep_L in (None, jnp.array([1, 0, 1, 1])):
    for greedy in (False, True):
      expected = []
      for index, (context, rest) in enumerate(pairs):
        padded = jnp.zeros((1, 24), jnp.int32).at[0, : len(context + rest)].set(jnp.array(context + rest))
        logits = apply({"params": params}, padded, keep_L=keep_L)[0]
        start = len(context) - 1
        if greedy and index < 2:  # its first token becomes the likeliest one
          pairs[index] = (context, [int(jnp.argmax(logits[start]))])
          rest = pairs[index][1]
        chosen = jax.nn.log_softmax(logits)[jnp.arange(start, start + len(rest)), jnp.array(rest)]
        expected.append(float(chosen.sum()))
      scores = score(model, params, pairs, batch_size=2, keep_L=keep_L)
      np.testing.assert_allclose([one.log_likelihood for one in scores], expected, atol=2e-5)
      assert [one.greedy for one in scores] == ([True, True, False] if greedy else [False] * 3)


def test_answers_equal_those_of_the_harnesss_own_hugging_face_model():
  """On an exported checkpoint, by torch: tests/data/make_export_golden.py."""
  data = np.load(GOLDEN)
  texts = json.loads(str(data["texts"]))
  tokenizer = HuggingFaceTokenizer(data["tokenizer"].tobytes(), GOLDEN.name)
  model = small_model(placement="mix:0.5", vocab_size=280)
  asked = HarnessModel(model, random_params(model), tokenizer, max_length=24, batch_size=8)

  def ask(kind, arguments):
    return getattr(asked, kind)([Instance(kind, {}, tuple(one), index) for index, one in enumerate(arguments)])

  values, greedy = zip(*ask("loglikelihood", texts["pairs"]), strict=True)
  np.testing.assert_allclose(values, data["log_likelihoods"], atol=1e-4)
  assert list(greedy) == data["greedy"].tolist()
  whole = ask("loglikelihood_rolling", [(text,) for text in texts["whole"]])
  np.testing.assert_allclose(whole, data["whole"], rtol=1e-6, atol=1e-4)
  assert ask("generate_until", texts["prompts"]) == texts["added"]


def test_any_split_of_a_text_scores_as_the_harnesss_own_hugging_face_model_scores_it():
  """Would catch another cut between context and answer: short contexts, blanks, words cut anywhere, 1,028 pairs.

  By torch: tests/data/make_export_golden.py. Where the harness's model fails (no token in the context, or none left for
  the answer) ours must have an answer that is a likelihood.
  """
  data = np.load(DATA / "harness_splits.npz")
  tokenizer = HuggingFaceTokenizer(data["tokenizer"].tobytes(), "harness_splits.npz")
  model = small_model(placement="mix:0.5", vocab_size=500)
  asked = HarnessModel(model, random_params(model), tokenizer, max_length=24, batch_size=64)
  pairs = json.loads(str(data["pairs"]))
  requests = [Instance("loglikelihood", {}, tuple(pair), index) for index, pair in enumerate(pairs)]
  values = np.array([value for value, _ in asked.loglikelihood(requests)])
  expected = data["log_likelihoods"]
  known = ~np.isnan(expected)
  assert known.sum() > 900
  np.testing.assert_allclose(values[known], expected[known], atol=1e-4)
  assert (values[~known] < -0.1).all()


WORDS = "the people of the United States and the Status of the people; " * 30
MERGING = train_hugging_face([WORDS], 287)
PREFIXED = tokenizer_with_dummy_prefix(WORDS, 320)


@pytest.mark.parametrize("tokenizer", [MERGING, PREFIXED], ids=["byte-level", "dummy prefix"])
def test_an_answer_without_a_token_of_its_own_is_not_free(tokenizer):
  """Would catch the answer that merges with its question and so scores 0.0 and "greedy", and unscored first tokens.

  "United Stat" + "es" is one token more than "United" and none more than "United Stat": "es" is encoded by itself.
  Contexts that are empty or blank become the end-of-document token, which every document follows.
  """
  model = small_model(placement="pre", vocab_size=tokenizer.vocab_size)
  params = random_params(model)
  asked = HarnessModel(model, params, tokenizer, max_length=32, batch_size=8)
  encode, start = tokenizer.encode, [tokenizer.eos_id]
  context = "the people of the United Stat"
  assert len(encode(context + "es")) <= len(encode(context))
  cases = [
    (context, "es", encode(context), encode("es")),
    (context, "zzzz", encode(context), encode(context + "zzzz")[len(encode(context)) :]),
    ("", "people", start, encode("people")),
    (" ", "people", start, encode(" people")),
    ("   ", "people", start, encode("   people")),
    ("\n\t ", "people", start, encode("\n\t people")),
    ("the ", "people", encode("the"), encode("the people")[len(encode("the")) :]),
  ]
  requests = [Instance("loglikelihood", {}, case[:2], index) for index, case in enumerate(cases)]
  expected = score(model, params, [case[2:] for case in cases], batch_size=8)
  answers = asked.loglikelihood(requests)
  np.testing.assert_allclose([value for value, _ in answers], [one.log_likelihood for one in expected], atol=1e-5)
  assert not any(greedy for _, greedy in answers)
  assert max(value for value, _ in answers) < -0.5


def test_an_answer_without_any_token_is_named(harness_model):
  """Would catch an empty choice that has likelihood 1 and beats every other."""
  for context in ("tea", "tea ", ""):
    with pytest.raises(InputError, match=r"^tasks: the answer '' to '.*' has no token"):
      harness_model.loglikelihood([Instance("loglikelihood", {}, (context, ""), 0)])


def test_samples_of_equal_requests_differ_and_do_not_depend_on_the_batch(byte_model):
  """Would catch pass@k over one text repeated: the draws of a batch were those of the batch before it."""
  options = {"until": ["\n"], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
  requests = [Instance("generate_until", {}, ("tea", options), 0)] * 12
  requests.insert(5, Instance("generate_until", {}, ("tea", {"until": ["e"], "max_gen_toks": 4}), 1))
  in_fours, at_once = (
    HarnessModel(*byte_model, ByteTokenizer(), 32, rows).generate_until(requests) for rows in (4, 16)
  )
  assert in_fours == at_once
  assert len(set(at_once[:5] + at_once[6:])) == 12


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"max_gen_toks": 32}, "max_gen_toks=32 leaves no room .* 32 tokens"),
    ({"num_beams": 4}, "generation_kwargs has 'num_beams'.*supported: until"),
  ],
)
def test_generation_that_can_not_be_done_is_named(harness_model, options, words):
  with pytest.raises(InputError, match=words):
    harness_model.generate_until([Instance("generate_until", {}, ("tea", options), 0)])


def test_a_continuation_that_does_not_fit_is_named(harness_model):
  with pytest.raises(InputError, match="continuation of 33 tokens does not fit into the 32"):
    harness_model.loglikelihood([Instance("loglikelihood", {}, ("tea", "x" * 33), 0)])


@pytest.fixture(scope="module")
def folder(byte_model, tmp_path_factory):
  """Two tasks over the same questions: `sure`, whose right answer is the model's likeliest letter, the others its three
  least likely ones, and `chance`, whose labels have nothing to do with the answers."""
  model, params = byte_model
  root = tmp_path_factory.mktemp("tasks")
  rng = np.random.default_rng(0)
  questions = rng.choice(LETTERS, (NUM_QUESTIONS, 9))
  logits = jax.jit(Transformer(model).apply)({"params": params}, questions)[:, -1, LETTERS]
  order = np.argsort(-np.asarray(logits), axis=-1)
  decode = ByteTokenizer().decode
  rows: dict[str, list[str]] = {"sure": [], "chance": []}
  for question, ranked in zip(questions, order, strict=True):
    label = int(rng.integers(4))
    choices = [decode([LETTERS[i]]) for i in np.insert(ranked[-3:], label, ranked[0])]
    for name, gold in (("sure", label), ("chance", int(rng.integers(4)))):
      rows[name].append(json.dumps({"question": decode(question), "choices": choices, "label": gold}))
  for name, lines in rows.items():
    (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (root / f"{name}.yaml").write_text(TASK.format(name=name, file=root / f"{name}.jsonl"))
  return root


@pytest.fixture(scope="module")
def harness_model(byte_model):
  return HarnessModel(*byte_model, ByteTokenizer(), max_length=32, batch_size=64)


def test_a_sure_task_scores_all_and_one_without_sense_scores_chance(harness_model, folder):
  tasks = Tasks(str(folder))
  assert set(tasks) == {"sure", "chance"}
  results = tasks.run(harness_model)
  assert main_metric(results["sure"]) == 1.0
  bound = 4 * np.sqrt(0.25 * 0.75 / NUM_QUESTIONS)
  assert abs(main_metric(results["chance"]) - 0.25) < bound
  assert results["chance"]["metrics"]["acc"]["stderr"] == pytest.approx(bound / 4, rel=0.2)
  assert results["sure"]["num_documents"] == NUM_QUESTIONS
  written = report(tasks, results, step=3)
  assert str(folder) not in json.dumps(written)
  assert written["harness"].startswith("lm_eval 0.4")
  rows = [line.split() for line in table(written).splitlines()]
  assert ["sure", "120", "0", "acc", "1.0000", "±", "0.0000"] in rows


def test_a_limit_shots_and_removed_layers(harness_model, folder):
  """A removal is data: no new program. Shots lengthen the questions."""
  tasks = Tasks(f"{folder / 'sure.yaml'},{folder / 'chance.yaml'}")
  assert tasks.run(harness_model, limit=5, only="sure")["sure"]["num_documents"] == 5
  alone = HarnessModel(harness_model._model, harness_model._params, ByteTokenizer(), 32, 64)
  values, programs = [], []
  for keep in ([1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 1, 1]):
    alone.keep_L = jnp.array(keep)
    values.append(main_metric(tasks.run(alone, only="sure")["sure"]))
    programs.append(score_batch._cache_size())
  assert programs[0] == programs[2]
  assert values[0] == 1.0
  assert max(values[1:]) < 1.0
  with_shots = Tasks(str(folder / "sure.yaml")).run(harness_model, limit=20, num_fewshot=2)["sure"]
  assert with_shots["num_fewshot"] == 2


@pytest.mark.parametrize(
  ("names", "words"),
  [
    (" , ", "names no task"),
    ("no/such/task.yaml", "no such file or folder"),
    ("{folder}/empty", "has no task file"),
    ("{folder}/missing.yaml", r"missing\.yaml: can't be loaded .*dataset_path and data_files"),
    ("{folder}/broken.yaml", r"broken\.yaml: can't be loaded"),
  ],
)
def test_tasks_that_are_not_there_are_named(names, words, folder, tmp_path):
  (folder / "empty").mkdir(exist_ok=True)
  (tmp_path / "missing.yaml").write_text(TASK.format(name="missing", file=tmp_path / "no.jsonl"))
  (tmp_path / "broken.yaml").write_text("task: [")
  root = folder if "empty" in names else tmp_path
  with pytest.raises(InputError, match=words):
    Tasks(names.format(folder=root))


@pytest.mark.slow
def test_the_papers_tasks_have_the_harnesss_names_and_others_are_named():
  """Reads all of the harness's task files, and fetches nothing."""
  assert set(PAPER_TASKS) <= set(TaskManager().all_tasks)
  with pytest.raises(InputError, match=r"^tasks=arc_eazy: the harness has no such task; did you mean 'arc_easy'"):
    Tasks("arc_eazy")
