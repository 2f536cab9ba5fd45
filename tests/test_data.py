"""Rows, layouts and batches; the reference's token ids."""

import dataclasses
import gzip
import json

import jax
import numpy as np
import pytest

from clara_jax.config import ClaraConfig, DataConfig, ModelConfig
from clara_jax.data import prompts, schemas
from clara_jax.data.pipeline import RowEncoder, evaluation_batches, pad_prompts, training_batches
from clara_jax.data.tokens import Layout, PromptTokens
from tests import tiny


@pytest.fixture(scope="module")
def reference(golden):
  return json.loads((golden / "prompts.json").read_text()), json.loads((golden / "inputs.json").read_text())


@pytest.fixture(scope="module")
def layout(golden):
  config = ClaraConfig(ModelConfig(1024, 64, 3, 4, 2, 16, 160), doc_max_length=32, compression_rate=8, query_max_length=32)
  return Layout(str(golden / "tiny_mistral"), config)


def unpadded(entry):
  return [[i for i, m in zip(ids, mask, strict=True) if m] for ids, mask in zip(entry["input_ids"], entry["attention_mask"],
                                                                                strict=True)]


def test_encoder_inputs(reference, layout):
  wanted, inputs = reference
  assert [layout.document(t).tolist() for t in inputs["DOCS"]] == unpadded(wanted["encoder_inputs/max_length=32"])
  assert [layout.query(t).tolist() for t in inputs["QUESTIONS"]] == unpadded(
      wanted["query_inputs/generate (max_length=doc_max_length=32)"])


def test_special_tokens(reference, layout):
  wanted, _ = reference
  for token, number in wanted["special"].items():
    assert layout.tokenizer.convert_tokens_to_ids(token) == number
  assert layout.pad_id == wanted["pad_token_id"]


@pytest.mark.parametrize("k", [1, 2])
def test_prompts(reference, layout, k):
  wanted, inputs = reference
  for i, question in enumerate(inputs["QUESTIONS"]):
    with_answer = wanted["prompts"][f"standard+answer/top_k={k}"][i]
    made = layout.answer_prompt(question, k, inputs["ANSWERS"][i])
    assert (made.ids.tolist(), made.prompt_length) == (with_answer["ids"], with_answer["prompt_len"])
    assert layout.answer_prompt(question, k).ids.tolist() == wanted["prompts"][f"standard/top_k={k}"][i]["ids"]
    listed = wanted["prompts"][f"qa/top_k={k}"][i]
    row = schemas.Row(tuple(inputs["QA_QUESTIONS"][i]), tuple(inputs["QA_ANSWERS"][i]), ("d",), is_question_list=True)
    made = layout.row_prompt(row, layout.slots(k))
    assert (made.ids.tolist(), made.prompt_length) == (listed["ids"], listed["prompt_len"])


def test_a_template_that_refuses_a_system_message_gets_it_folded_in(golden):
  from transformers import AutoTokenizer
  tokenizer = AutoTokenizer.from_pretrained(golden / "tiny_mistral")
  folding = prompts.render(tokenizer, prompts.answer_messages("d", "q"), "a")
  tokenizer.chat_template = (
      "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
      "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
      "{% if m['role'] == 'user' %}{{ ' [INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}"
      "{% endif %}{% endfor %}")
  assert prompts.render(tokenizer, prompts.answer_messages("d", "q"), "a") == folding


def test_a_tokenizer_of_another_vocabulary_is_refused(golden):
  config = ClaraConfig(ModelConfig(1000, 64, 3, 4, 2, 16, 160), doc_max_length=32, compression_rate=8)
  with pytest.raises(schemas.DataError, match="vocabulary of 1000"):
    Layout(str(golden / "tiny_mistral"), config)


def test_too_long(layout):
  ids = layout.document("word " * 100)
  assert len(ids) == 32 + 3 + 4 and layout.eos_id not in ids
  with pytest.raises(schemas.DataError, match="file:3: the prompt has"):
    layout.answer_prompt("word " * 2000, 1, "a", "file:3")


def test_gzip_and_field_names(tmp_path):
  values = [{"context": ["d"], "question": "q", "golden_answers": ["a", "b"]},
            {"content": ["d"], "question": ["q"], "answers": ["a"], "answer": ""},
            {"docs": "d", "data_type": "paraphrase", "question": "", "answer": "p"}]
  path = tmp_path / "rows.jsonl.gz"
  path.write_bytes(gzip.compress("\n".join(json.dumps(v) for v in values).encode()))
  a, b, c = schemas.read_rows([str(path)])
  assert a.answers == ("a", "b") and not a.is_question_list
  assert b.is_question_list and b.identifier == f"{path}:2"
  assert c.data_type == "paraphrase" and c.questions == ()
  path.write_bytes(b"not gzip")
  with pytest.raises(schemas.DataError, match="rows.jsonl.gz"):
    schemas.read_rows([str(path)])


def test_documents_must_have_one_id_each(tmp_path):
  path = tmp_path / "documents.jsonl"
  path.write_text('{"id": "a", "text": "x"}\n{"id": "a", "text": "y"}\n')
  with pytest.raises(schemas.DataError, match="documents.jsonl:2: id 'a' was already used at .*:1"):
    list(schemas.read_documents(str(path)))
  path.write_text('{"id": "a"}\n')
  with pytest.raises(schemas.DataError, match="documents.jsonl:1: the document has no 'text'"):
    list(schemas.read_documents(str(path)))


def test_labels_are_the_answer_only():
  prompt = pad_prompts([PromptTokens(np.arange(10, 17, dtype=np.int32), 4), PromptTokens(np.arange(20, 23, dtype=np.int32), 2)], [4, 2],
                       0, 8, 4)
  assert prompt.tokens.ids.shape == (2, 8)
  assert prompt.labels[0, :3].tolist() == [14, 15, 16] and prompt.label_positions[0, :3].tolist() == [3, 4, 5]
  assert prompt.label_weights.sum(1).tolist() == [3, 1]
  everything = pad_prompts([PromptTokens(np.arange(10, 17, dtype=np.int32), 4)], [1], 0, 8, 8)
  assert everything.label_weights.sum() == 6


def encoder(kind, **data):
  return RowEncoder(tiny.layout(), kind, DataConfig(batch_size=4, candidates=6, bucket=16, **data), 2)


def test_rows_with_fewer_documents_are_filled_up():
  rows = [dataclasses.replace(r, documents=r.documents[:n]) for r, n in zip(tiny.rows("instruct")[:2], (2, 1), strict=True)]
  (batch,) = evaluation_batches(rows, encoder("given"), 2)
  assert batch.documents.ids.shape[:2] == (2, 2) and batch.documents.lengths[1, 1] == 0


def test_the_last_evaluation_batch_counts_each_row_once():
  batches = evaluation_batches(tiny.rows("joint")[:6], encoder("candidates"), 4)
  assert [b.valid.sum() for b in batches] == [4, 2]
  assert batches[1].prompt.label_weights[2:].sum() == 0 and not batches[1].is_gold[2:].any()


def test_the_position_is_exact():
  rows = tiny.rows("joint")
  first = training_batches(rows, encoder("candidates"), seed=3)
  for _ in range(5):
    next(first)
  state = first.get_state()
  expected = [next(first) for _ in range(12)]  # over the end of an epoch
  second = training_batches(rows, encoder("candidates"), seed=3)
  second.set_state(state)
  for want in expected:
    got = next(second)
    assert got.ids == want.ids
    jax.tree.map(np.testing.assert_array_equal, got.batch, want.batch)


def test_an_epoch_has_every_row_once():
  rows = tiny.rows("joint")
  rows = rows[:len(rows) // 4 * 4]
  batches = training_batches(rows, encoder("candidates"), seed=0)
  seen = [i for _ in range(len(rows) // 4) for i in next(batches).ids]
  assert sorted(seen) == sorted(r.identifier for r in rows)
