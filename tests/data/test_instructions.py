"""Instructions: every example whole and once, only answers counted, and bad files named."""

import json
from pathlib import Path

import numpy as np
import pytest

from mixln_jax import config as config_lib
from mixln_jax.data import records as records_lib
from mixln_jax.data.loader import Loader
from mixln_jax.data.prepare import prepare
from mixln_jax.data.records import ExamplePacker, decode_record, encode_record, token_dtype
from mixln_jax.errors import InputError

# Written out here, so that another wording in the code is seen.
PLAIN = (
  "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
  "### Instruction:\n{}\n\n### Response:\n"
)
WITH_INPUT = (
  "Below is an instruction that describes a task, paired with an input that provides further context. Write a response "
  "that appropriately completes the request.\n\n### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:\n"
)
LENGTH = 512
EXAMPLES = [
  {
    "instruction": f"Say {'so ' * (index % 7)}how many: {index}?",
    "input": f"café {{x}} {index}" * (index % 3 == 0),
    "output": f"the correct answer is answer{index % 4}" + " indeed" * (index % 5),
    "answer": f"answer{index % 4}",
  }
  for index in range(60)
]


def expected_of(example):
  """(prompt, answer) as bytes."""
  text = WITH_INPUT.format(example["instruction"], example["input"])
  prompt = text if example["input"] else PLAIN.format(example["instruction"])
  return prompt.encode(), example["output"].encode()


def write(path, examples):
  lines = path.suffix == ".jsonl"
  path.write_text("\n".join(map(json.dumps, examples)) if lines else json.dumps(examples))
  return path


@pytest.fixture
def make(tmp_path):
  """`make(examples, **changes)`: a config of instructions, of a JSON list of the examples (or of a path)."""

  def config_of(examples, **changes):
    path = examples if not isinstance(examples, list) else write(tmp_path / "examples.json", examples)
    config = config_lib.base()
    config.model.vocab_size = 259
    config.data.update(source=str(path), tokenizer="bytes", sequence_length=LENGTH, validation_share=0.2)
    config.data.update(mode="instructions", document_mask=True, directory=str(tmp_path / "records"))
    config.update_from_flattened_dict({f"data.{name}": value for name, value in changes.items()})
    config_lib.validate(config)
    return config

  return config_of


def seen_by_the_model(corpus, split):
  """(prompt, counted labels) of every segment of a split, as bytes, from the batches that training reads."""
  loader = Loader(corpus, sequence_length=LENGTH, batch_size=1, document_mask=True)
  batches = loader.validation() if split == "validation" else None
  rows = batches or [next(loader.train(step)) for step in range(corpus.manifest.splits[split].records)]
  for batch in rows:
    tokens, labels, weights, segments, positions = (
      batch[f"{name}_BT"][0] for name in ("tokens", "labels", "weights", "segment_ids", "positions")
    )
    for segment in range(1, segments.max() + 1):
      where = np.flatnonzero(segments == segment)
      counted = where[weights[where] == 1]
      np.testing.assert_array_equal(positions[where], np.arange(len(where)))
      np.testing.assert_array_equal(counted, np.arange(counted[0], counted[-1] + 1))
      assert tokens[where[0]] == 1  # as `generate` begins a document
      assert labels[counted[-1]] == 1  # the answer's end counts
      prompt = tokens[where[0] + 1 : counted[0] + 1]  # the last token of the prompt predicts the answer's first
      yield bytes((prompt - 3).tolist()), bytes((labels[counted[:-1]] - 3).tolist())


def test_every_example_is_whole_and_stands_once_and_only_its_answer_counts(make):
  corpus = prepare(make(EXAMPLES), progress=False)
  found = {split: list(seen_by_the_model(corpus, split)) for split in ("train", "validation")}
  assert sorted(found["train"] + found["validation"]) == sorted(map(expected_of, EXAMPLES))
  assert found["validation"]
  for split, pairs in found.items():
    counts = corpus.manifest.splits[split]
    assert counts.documents == len(pairs)
    assert counts.counted == sum(len(answer) + 1 for _, answer in pairs)
    assert counts.tokens == sum(len(prompt) + len(answer) + 2 for prompt, answer in pairs)
    assert counts.records < 0.6 * len(pairs) + 1  # they share records
  assert corpus.manifest.cut_prompts == 0


def test_json_lines_and_a_list_say_the_same_and_a_question_is_on_one_side(make, tmp_path):
  twice = [*EXAMPLES, *({**example, "output": "another"} for example in EXAMPLES)]
  first = prepare(make(twice), progress=False)
  lines = write(tmp_path / "examples.jsonl", twice)
  second = prepare(make(lines, directory=str(tmp_path / "other")), progress=False)
  assert second.manifest.fingerprint == first.manifest.fingerprint
  sides = [{prompt for prompt, _ in seen_by_the_model(first, split)} for split in ("train", "validation")]
  assert not sides[0] & sides[1]


def test_a_long_prompt_loses_its_beginning_and_an_answer_never_a_token(make):
  examples = [
    *EXAMPLES,
    {"instruction": "x" * 600, "output": "short"},
    {"instruction": "?", "input": None, "output": "y" * 511},
  ]
  manifest = prepare(make(examples, max_bad_share=0.1), progress=False).manifest
  assert manifest.cut_prompts == 1
  assert manifest.skipped == {"answer too long": 1}
  corpus = records_lib.open_corpus(prepare(make(examples, max_bad_share=0.1), progress=False).folder)
  pairs = dict(pair for split in ("train", "validation") for pair in seen_by_the_model(corpus, split))
  (cut,) = (prompt for prompt in pairs if b"xxx" in prompt)
  assert len(cut) == LENGTH - len("short") - 2
  assert PLAIN.format("x" * 600).encode().endswith(cut)
  assert pairs[cut] == b"short"


def test_records_round_trip_and_are_filled_first_fit():
  packer = ExamplePacker(8, 0)
  examples = [([1, 5, 6, 1], 2), ([1, 5, 6, 7, 8, 1], 3), ([1, 9], 1), ([1, 4, 4, 1], 1)]
  records = [record for ids, num_answer in examples for record in packer.add(ids, num_answer)] + list(packer.finish())
  assert [list(record.tokens) for record in records] == [
    [1, 5, 6, 1, 1, 9, 0, 0],
    [1, 5, 6, 7, 8, 1, 0, 0],
    [1, 4, 4, 1] + [0] * 4,
  ]
  assert [record.counted for record in records] == [3, 3, 1]
  again = decode_record(encode_record(records[0], token_dtype(259)), 8, token_dtype(259))
  np.testing.assert_array_equal(again.answers, [0, 0, 1, 1, 0, 1, 0, 0])
  np.testing.assert_array_equal(again.starts, [1, 0, 0, 0, 1, 0, 0, 0])
  many = ExamplePacker(4, 0)  # no room for a second one: those that waited longest come out
  early = [record for number in range(ExamplePacker.OPEN + 3) for record in many.add([1, 5, number], 1)]
  assert [record.tokens[2] for record in early] == [0, 1, 2]
  assert len(list(many.finish())) == ExamplePacker.OPEN


@pytest.mark.parametrize(
  ("content", "words"),
  [
    (None, "examples.json': there are no instructions; with config.data.mode=instructions give a path"),
    ('[{"instruction": "a", "output": "b"},', "examples.json is not a JSON list (Expecting"),
    ("[]", "the corpus is empty"),
    ('{"data": [1]}', "1 of 1 documents can't be used (no instruction: "),
    ('["text"]', "(not an object: "),
    ('[{"instruction": "a", "input": "", "output": " "}]', "examples.json, number 0"),
    ('[{"instruction": "a", "input": 3, "output": "b"}]', "(input is no text: "),
    ('[{"instruction": "a", "output": "\\ud800"}]', "(not Unicode: "),
    ('{"instruction": "a", "output": "b"}\n{"instruction": "a"', "(not JSON: "),
  ],
)
def test_bad_files_are_named(content, words, make, tmp_path):
  path = tmp_path / "examples.json"
  if content is not None:
    path.write_text(content)
  with pytest.raises(InputError) as error:
    prepare(make(path), progress=False)
  assert words in str(error.value)
  assert not (tmp_path / "records").exists()


def test_a_few_bad_examples_are_counted(make):
  manifest = prepare(make([*EXAMPLES, {"instruction": "no answer"}], max_bad_share=0.05), progress=False).manifest
  assert manifest.skipped == {"no output": 1}


def test_a_tokenizer_is_never_trained_on_instructions_and_examples_are_kept_apart(make):
  with pytest.raises(InputError, match=r"set config.train.start_from to its run"):
    prepare(make(EXAMPLES, tokenizer="sentencepiece"), progress=False)
  with pytest.raises(InputError, match=r"needs config.data.document_mask=True"):
    make(EXAMPLES, document_mask=False)


def test_other_records_are_as_they_were(make_config):
  corpus = records_lib.open_corpus(Path(make_config().data.directory))
  assert "cut_prompts" not in (corpus.folder / "manifest.json").read_text()
  assert next(iter(corpus.rows("train"))).answers is None
