"""The best documents read as text, beside the memory tokens of the others."""

import dataclasses
import random

import numpy as np
import pytest

from clara_jax.config import ConfigError
from clara_jax.data.pipeline import RowEncoder, pad_tokens
from clara_jax.data.schemas import DataError
from clara_jax.evaluation import evaluator
from clara_jax.inference.answer import Question
from clara_jax.inference.generate import Greedy
from clara_jax.serving import server
from clara_jax.testing import tiny
from clara_jax.training import trainer
from tests.helpers import question, refused, running


def test_a_prompt_of_text_and_memory_tokens():
  tokenizer = tiny.prompt_tokenizer()
  texts = ["Mila is a baker.", "Jon helps her."]
  mixed = tokenizer.answer_prompt("Who?", 2, texts=texts[:1]).ids
  slots = mixed[mixed >= tokenizer.config.model.vocab_size]
  assert len(slots) == 2 * (tokenizer.num_memory_tokens + 1)  # with <SEP>
  whole = tokenizer.answer_prompt("Who?", 0, texts=texts).ids
  np.testing.assert_array_equal(whole, tokenizer.text_prompt("Who?", "\n".join(texts)).ids)
  evil = tokenizer.answer_prompt("Who?", 1, texts=["<MEM0><SEP>"]).ids  # a text is no slot
  assert (evil >= tokenizer.config.model.vocab_size).sum() == tokenizer.num_memory_tokens + 1


@pytest.mark.parametrize("expand", [0, 1, 2])
def test_answers_are_those_of_the_plain_formula(answerer, expand):
  """Alone and in a batch with others, without the prefix that is read once."""
  tokenizer, model = answerer.prompt_tokenizer, answerer.model
  greedy = Greedy(model, answerer.max_new_tokens, tokenizer.end_ids, tokenizer.pad_id, "generator")
  questions = [Question(question(i), top_k=2, expand=expand) for i in range(3)]
  batch = answerer.answer(questions)
  for asked, together in zip(questions, batch, strict=True):
    (alone,) = answerer.answer([asked])
    found = alone.documents
    texts = [d.text[: d.characters] for d in found[:expand]]
    prompt = tokenizer.answer_prompt(asked.text, 2 - expand, texts=texts).ids
    rows = answerer.store.locate([d.id for d in found[expand:]])
    memories = answerer.store.memories(rows)[None] if expand < 2 else None
    tokens = pad_tokens([prompt], tokenizer.pad_id, 128)
    ids = np.asarray(greedy(answerer.weights, tokens, memories))[0]
    assert alone.answer == together.answer == tokenizer.text(ids)
    assert alone.prompt_tokens == len(prompt)
  shown = answerer.answer([Question(question(), expand=0), Question(question(1), expand=1)])
  assert [a.answer for a in shown] == [
    answerer.answer([Question(question(i), expand=i)])[0].answer for i in range(2)
  ]


def test_a_server_reads_text_where_it_is_asked_to(answerer):
  with running(answerer, server.Limits()) as (client, _):
    plain, shown = (
      client.post("/answer", json={"question": question(), "expand": n}).json() for n in (0, 1)
    )
  best = plain["documents"][0]
  assert shown["prompt_tokens"] > plain["prompt_tokens"] and shown["documents"][0] == best


def test_evaluation_counts_what_was_read(answerer):
  rows = tiny.rows("joint")[:3]
  results = {}
  for expand in (0, 1, 2):
    results[expand] = evaluator.evaluate(
      answerer.checkpoint, rows, "joint", max_new_tokens=2, progress=False, expand=expand
    ).predictions
  read = [[p["context_tokens"] for p in results[n]] for n in results]
  assert read[0] == [4, 4, 4] and all(a < b < c for a, b, c in zip(*read, strict=True))
  assert [p["ranked"] for p in results[0]] == [p["ranked"] for p in results[2]]
  with pytest.raises(ConfigError, match="'no_documents' reads no memory tokens"):
    evaluator.evaluate(answerer.checkpoint, rows, "no_documents", expand=1)


def test_rows_of_training_are_expanded_by_chance():
  config = tiny.run_config("instruct")
  data = dataclasses.replace(config.data, expand=0.5, expand_documents=2)
  rows = [
    dataclasses.replace(row, documents=row.documents[:1] * 1 + ("One.", "Two.", "Three."))
    for row in tiny.rows("scp")[:1]
  ]
  encoder = RowEncoder(tiny.prompt_tokenizer(), "given", data, 2)
  counts = [len(encoder.encode(rows[0], random.Random(i))["documents"]) for i in range(200)]
  assert set(counts) == {2, 3, 4} and 70 < counts.count(4) < 130
  same = [encoder.encode(rows[0], random.Random(7))["prompt"].ids for _ in range(2)]
  np.testing.assert_array_equal(*same)
  plain = RowEncoder(tiny.prompt_tokenizer(), "given", config.data, 2)
  assert len(plain.encode(rows[0], random.Random(0))["documents"]) == 4


def test_the_instruct_stage_learns_from_both():
  rows = [
    dataclasses.replace(row, documents=row.documents * 3) for row in tiny.rows("instruct")[:16]
  ]
  config = tiny.run_config("instruct", steps=2)
  config = dataclasses.replace(config, data=dataclasses.replace(config.data, expand=0.5))
  result = trainer.Trainer(
    config, tiny.prompt_tokenizer(), tiny.weights(), rows, progress=False
  ).run()
  assert np.isfinite(result.metrics["loss"])
  joint = tiny.run_config("joint")
  joint = dataclasses.replace(joint, data=dataclasses.replace(joint.data, expand=0.5))
  with pytest.raises(ConfigError, match="stage 'joint' chooses its documents in the step"):
    trainer.Trainer(
      joint, tiny.prompt_tokenizer(), tiny.weights(), tiny.rows("joint"), progress=False
    ).run()


def test_wrong_options_are_named(answerer, tmp_path):
  with pytest.raises(ConfigError, match="expected a share"):
    dataclasses.replace(tiny.run_config("instruct").data, expand=2.0)
  long = Question("word " * 60, expand=2)
  with pytest.raises(DataError, match="decoder_max_length"):
    answerer.answer([long, Question("word " * 230, expand=2)])
  tiny.write_checkpoint(str(tmp_path / "c"), tiny.config(), tiny.weights())
  arguments = ("--rows", "x", "--setting", "joint", "--report", "r", "--expand", 1)
  said = refused("evaluate", "--checkpoint", tmp_path / "c", *arguments)
  assert "--expand: of one setting" in said
