"""Pairs of answers: their three forms, whole and packed side by side, and each bad pair counted by its reason."""

import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from mixln_jax import config as config_lib
from mixln_jax.data import references
from mixln_jax.data.loader import Loader
from mixln_jax.data.prepare import prepare
from mixln_jax.errors import InputError

LENGTH = 320
# Written out here, so that another wording in the code is seen.
ASKED = (
  "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
  "### Instruction:\n{}\n\n### Response:\n"
)


def user(text):
  return {"role": "user", "content": text}


def assistant(text):
  return {"role": "assistant", "content": text}


EXPLICIT = [
  {"prompt": f"How many? {index} " + "so " * (index % 9), "chosen": f" {index} ü", "rejected": f"no{index}" * 2}
  for index in range(40)
]
IMPLICIT = [
  {"chosen": f"{pair['prompt']}A{index}", "rejected": f"{pair['prompt']}B"} for index, pair in enumerate(EXPLICIT)
]
# As ultrafeedback_binarized is published: the prompt stands once more beside the conversations.
PUBLISHED = [
  {
    "prompt": f"Question {index}?",
    "prompt_id": str(index),
    "chosen": [user(f"Question {index}?"), assistant(f"Yes {index}.")],
    "rejected": [user(f"Question {index}?"), assistant("No.")],
    "messages": [],
    "score_chosen": 8.0,
  }
  for index in range(40)
]


@pytest.fixture
def make(tmp_path):
  """`make(pairs, **changes)`: a config of JSON lines of the pairs (or of a path)."""

  def config_of(pairs, **changes):
    path = tmp_path / "pairs.jsonl" if isinstance(pairs, list) else pairs
    if isinstance(pairs, list):
      path.write_text("\n".join(map(json.dumps, pairs)))
    config = config_lib.base()
    config.model.vocab_size = 259
    config.data.update(source=str(path), tokenizer="bytes", sequence_length=LENGTH, validation_share=0.2)
    config.data.update(mode="preferences", document_mask=True, directory=str(tmp_path / "records"))
    config.preference.loss = "simpo"
    config.update_from_flattened_dict({f"data.{name}": value for name, value in changes.items()})
    config_lib.validate(config)
    return config

  return config_of


def seen_by_the_model(corpus, split):
  """(prompt, chosen, rejected) of every pair of a split, as text, from the batches that training reads."""
  for batch in Loader(corpus, sequence_length=LENGTH, batch_size=1, document_mask=True).once(split):
    tokens, labels, weights, segments, positions = (
      batch[f"{name}_BT"][0] for name in ("tokens", "labels", "weights", "segment_ids", "positions")
    )
    assert segments.max() % 2 == 0
    sequences = []
    for segment in range(1, segments.max() + 1):
      where = np.flatnonzero(segments == segment)
      counted = where[weights[where] == 1]
      np.testing.assert_array_equal(positions[where], np.arange(len(where)))
      np.testing.assert_array_equal(counted, np.arange(counted[0], counted[-1] + 1))
      assert tokens[where[0]] == labels[counted[-1]] == 1  # the ids that open a document and end an answer
      asked, answer = tokens[where[0] + 1 : counted[0] + 1], labels[counted[:-1]]
      sequences.append([bytes((ids - 3).tolist()).decode(errors="replace") for ids in (asked, answer)])
    for (prompt, chosen), (same, rejected) in zip(sequences[0::2], sequences[1::2], strict=True):
      assert prompt == same
      yield prompt, chosen, rejected


def all_seen(corpus):
  return sorted(pair for split in ("train", "validation") for pair in seen_by_the_model(corpus, split))


def test_an_explicit_prompt_stands_before_both_answers_as_it_is(make):
  """Answers that changed sides, a blank that was stripped, or a pair over two records would show."""
  corpus = prepare(make(EXPLICIT), progress=False)
  assert all_seen(corpus) == sorted((pair["prompt"], pair["chosen"], pair["rejected"]) for pair in EXPLICIT)
  for split in corpus.manifest.splits.values():
    assert split.documents > 0
    assert split.records < split.documents  # they share records
  assert corpus.manifest.cut_prompts == 0
  assert corpus.manifest.skipped == {}


def test_an_implicit_prompt_is_what_both_texts_begin_with(make):
  """TRL's `extract_prompt`: the blank before the answers is theirs."""
  corpus = prepare(make([*IMPLICIT, {"chosen": "It is blue", "rejected": "It is red"}]), progress=False)
  expected = [(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in EXPLICIT]
  expected = [(prompt[:-1], f" A{index}", " B") for index, (prompt, _, _) in enumerate(expected)]
  assert all_seen(corpus) == sorted([*expected, ("It is", " blue", " red")])


def test_conversations_are_read_as_ultrafeedback_has_them(make, tmp_path):
  """JSON lines, a JSON list and Parquet (whose other columns nobody reads) say the same."""
  first = prepare(make(PUBLISHED), progress=False)
  expected = [(ASKED.format(f"Question {index}?"), f"Yes {index}.", "No.") for index in range(40)]
  assert all_seen(first) == sorted(expected)
  (tmp_path / "pairs.json").write_text(json.dumps(PUBLISHED))
  table = pyarrow.Table.from_pylist([{**pair, "messages": None} for pair in PUBLISHED])
  pyarrow.parquet.write_table(table, tmp_path / "pairs.parquet")
  for name in ("pairs.json", "pairs.parquet"):
    other = prepare(make(tmp_path / name, directory=str(tmp_path / name[-4:])), progress=False)
    assert other.manifest.fingerprint == first.manifest.fingerprint
  again = prepare(make(tmp_path / "pairs.parquet", directory=str(tmp_path / "quet")), progress=False)  # reused
  assert again.manifest.fingerprint == first.manifest.fingerprint


def test_turns_before_the_answer_and_a_system_message_belong_to_the_prompt(make):
  earlier = [{"role": "system", "content": "Be kind."}, user("Hi"), assistant("Hello."), user("Who?")]
  pairs = [
    {"chosen": [*earlier, assistant(f"me{index}")], "rejected": [*earlier, assistant("you")]} for index in range(20)
  ]
  pairs += [
    {"prompt": [user(f"{index}?")], "chosen": [assistant("a")], "rejected": [assistant("b")]} for index in range(20)
  ]
  seen = all_seen(prepare(make(pairs), progress=False))
  prompt = "Be kind.\n\n### Instruction:\nHi\n\n### Response:\nHello.\n\n### Instruction:\nWho?\n\n### Response:\n"
  assert [answers for asked, *answers in seen if asked == prompt] == sorted(
    [f"me{index}", "you"] for index in range(20)
  )
  assert (ASKED.format("7?"), "a", "b") in seen


BAD = {
  "not an object": ["text", 3],
  "no chosen or rejected answer": [
    {"prompt": "a", "chosen": "b"},
    {"prompt": "a", "chosen": "b", "rejected": " "},
    {"prompt": "a", "chosen": "b", "rejected": [assistant("c")]},
    {"chosen": "a b", "rejected": "a b c"},
    {"chosen": [user("a")], "rejected": [user("a"), assistant("c")]},
  ],
  "no prompt": [{"prompt": " ", "chosen": "a", "rejected": "b"}, {"prompt": 3, "chosen": "a", "rejected": "b"}],
  "no common prompt": [
    {"chosen": "yes", "rejected": "no"},
    {"chosen": [user("a"), assistant("c")], "rejected": [user("b"), assistant("d")]},
  ],
  "equal answers": [
    {"prompt": "a", "chosen": "b", "rejected": "b"},
    {"chosen": "a b", "rejected": "a b"},
    {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("b ")]},
  ],
  "not a conversation": [
    {"chosen": [user("a"), user("b")], "rejected": [user("a"), assistant("b")]},
    {"chosen": [user("a"), assistant("b"), user("c")], "rejected": [user("a"), assistant("c")]},
    {"chosen": [{"role": "robot", "content": "a"}], "rejected": [user("a")]},
    {"chosen": [assistant("a"), assistant("b")], "rejected": [assistant("a"), assistant("c")]},
    {"chosen": [user("a"), {"role": "assistant", "content": None}], "rejected": [user("a"), assistant("c")]},
  ],
  "answer too long": [{"prompt": "a", "chosen": "b" * LENGTH, "rejected": "c"}],
  "both answers together too long": [{"prompt": "a", "chosen": "b" * 160, "rejected": "c" * 160}],
  "not Unicode": [{"prompt": "a", "chosen": "\ud800", "rejected": "b"}],
}


def test_each_bad_pair_is_counted_by_its_reason(make, tmp_path):
  """A pair that is dropped in silence, or under another's name, would show."""
  pairs = [*EXPLICIT, *(pair for pairs in BAD.values() for pair in pairs)]
  corpus = prepare(make(pairs, max_bad_share=0.5), progress=False)
  assert corpus.manifest.skipped == {reason: len(pairs) for reason, pairs in sorted(BAD.items())}
  assert sum(split.documents for split in corpus.manifest.splits.values()) == len(EXPLICIT)
  with pytest.raises(InputError, match=r"22 of 62 documents can't be used \(not an object: .*byte"):
    prepare(make(pairs, directory=str(tmp_path / "other")), progress=False)


def test_pairs_of_which_none_can_be_used_are_no_empty_corpus(make):
  """Would catch "the corpus is empty" about a file full of pairs, which says neither how many nor why."""
  pairs = [{"chosen": f"{index} a", "rejected": f"x{index}"} for index in range(5)]
  with pytest.raises(InputError, match=r"none of 5 documents can be used \(no common prompt: .*byte 0; no common"):
    prepare(make(pairs, max_bad_share=1.0), progress=False)


def test_a_long_prompt_loses_the_same_beginning_in_both_sequences(make):
  pairs = [*EXPLICIT, {"prompt": "x" * 300 + "?", "chosen": "good", "rejected": "bad"}]
  corpus = prepare(make(pairs), progress=False)
  assert corpus.manifest.cut_prompts == 1
  (cut,) = (pair for pair in all_seen(corpus) if "xxx" in pair[0])
  assert cut == ("x" * 153 + "?", "good", "bad")  # 2 × (154 + 2) + 4 + 3 = 319


def test_a_question_is_on_one_side_of_the_split(make):
  twice = [*EXPLICIT, *({**pair, "chosen": "another"} for pair in EXPLICIT)]
  corpus = prepare(make(twice), progress=False)
  sides = [{prompt for prompt, _, _ in seen_by_the_model(corpus, split)} for split in ("train", "validation")]
  assert sides[0]
  assert sides[1]
  assert not sides[0] & sides[1]


@pytest.mark.parametrize(
  ("name", "content", "words"),
  [
    (
      "pairs.txt",
      "text",
      "is not a file of preferences; with config.data.mode=preferences give a path, folder or glob",
    ),
    ("pairs.json", '[{"prompt": "a"}', "is not a JSON list (Expecting"),
    ("pairs.jsonl", '{"prompt": ', "(not JSON: "),
    ("pairs.parquet", "PAR1", "is not a Parquet file"),
  ],
)
def test_bad_files_are_named(name, content, words, make, tmp_path):
  (tmp_path / name).write_text(content)
  with pytest.raises(InputError) as error:
    prepare(make(tmp_path / name), progress=False)
  assert words in str(error.value)
  assert not (tmp_path / "records").exists()


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"data.mode": "pack"}, "preference.loss=simpo with config.data.mode=pack"),
    ({"preference.loss": "none"}, "preference.loss=none with config.data.mode=preferences"),
    ({"data.document_mask": False}, "mode=preferences needs config.data.document_mask=True"),
    ({"preference.dpo_beta": 0.5}, "preference.dpo_beta=0.5 is read by dpo and not by config.preference.loss=simpo"),
    ({"preference.loss": "orpo", "preference.label_smoothing": 0.1}, "label_smoothing=0.1 is read by dpo and simpo"),
    ({"preference.loss": "dpo", "data.mixture": "a:1,b:1"}, "config.data.mixture with config.preference.loss=dpo"),
    ({"train.stop_when_diverged": True}, "stop_when_diverged=True with config.preference.loss=simpo"),
    ({"evaluate.official_compat": True}, "official_compat=True with config.preference.loss=simpo"),
    ({"model.bidirectional": True}, "can't be combined with config.data.document_mask or mode=instructions or"),
  ],
)
def test_fields_that_contradict_the_loss_are_named(fields, words, make):
  config = make(EXPLICIT)
  config.update_from_flattened_dict(fields)
  with pytest.raises(InputError) as error:
    config_lib.validate(config)
  assert words in str(error.value)


ABC, DEF = references.Reference("abc", "m"), references.Reference("def", "m")


def test_references_go_with_their_documents_in_every_epoch(make):
  """A shuffled record with another's references would train towards nothing, without any sign of it."""
  corpus = prepare(make(EXPLICIT), progress=False)
  numbers = {}
  for split, rows in ((split, list(corpus.rows(split))) for split in corpus.manifest.splits):
    numbers[split] = np.zeros((len(rows), 12), np.float32)
    for row, record in enumerate(rows):  # a number that tells the document: its tokens' sum
      begins = [*np.flatnonzero(record.starts), record.length]
      for column, (begin, end) in enumerate(itertools.pairwise(begins)):
        numbers[split][row, column] = record.tokens[begin:end].sum()
  assert references.with_stored(corpus, ABC) is None
  references.store(corpus, ABC, numbers)
  found = references.with_stored(corpus, ABC)
  assert found is not None
  batches = Loader(found, sequence_length=LENGTH, batch_size=2, document_mask=True).train()
  for _ in range(2 * len(numbers["train"])):
    batch = next(batches)
    for tokens, segments, given in zip(
      batch["tokens_BT"], batch["segment_ids_BT"], batch["references_BT"], strict=True
    ):
      for segment in range(1, segments.max() + 1):
        assert given[segments == segment].sum() == tokens[segments == segment].sum()
  batches.close()


def test_references_of_equal_weights_under_another_placement_are_others(make):
  """Two placements can start from equal bits, and one would be compared with what the other makes of them."""
  model = make(EXPLICIT).model
  first = references.model_hash(model)
  model.remat = "full"
  assert references.model_hash(model) == first  # up to rounding it computes the same
  model.placement = "post"
  assert references.model_hash(model) != first
  folder = Path("records")
  names = [references.file_of(folder, references.Reference("abc", of)).name for of in (first, "")]
  assert names == [f"references-abc-{first}.safetensors", "references-abc.safetensors"]


def test_references_of_other_weights_or_records_and_damaged_ones_are_rejected(make, tmp_path):
  """A file under another's name would be trained with in silence."""
  corpus = prepare(make(EXPLICIT), progress=False)
  numbers = {
    split: np.ones((corpus.manifest.splits[split].records, 4), np.float32) for split in ("train", "validation")
  }
  references.store(corpus, ABC, numbers)
  path = references.file_of(corpus.folder, ABC)
  path.rename(references.file_of(corpus.folder, DEF))
  with pytest.raises(InputError, match=r"references-def-m.safetensors: its start checkpoint is 'abc' and not 'def'"):
    references.with_stored(corpus, DEF)
  other = prepare(make([*EXPLICIT, *IMPLICIT], directory=str(tmp_path / "other")), progress=False)
  references.file_of(corpus.folder, DEF).rename(references.file_of(other.folder, ABC))
  with pytest.raises(InputError, match="its records is"):
    references.with_stored(other, ABC)
  path.write_bytes(b"damaged")
  with pytest.raises(InputError, match=r"can't be read .*; remove it, and it is computed again"):
    references.with_stored(corpus, ABC)
  references.store(corpus, ABC, {split: array[:-1] for split, array in numbers.items()})
  with pytest.raises(InputError, match=r"holds no finite numbers for the \d+ train records"):
    references.with_stored(corpus, ABC)
