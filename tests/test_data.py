"""Rows, layouts and batches; the reference's token ids."""

import dataclasses
import gzip
import json

import jax
import numpy as np
import pytest

from clara_jax.config import ClaraConfig, ConfigError, DataConfig, ModelConfig
from clara_jax.data import records, schemas
from clara_jax.data.pipeline import RowEncoder, TrainingBatches, evaluation_batches, pad_prompts
from clara_jax.data.prompt_tokenizer import PromptTokenizer, PromptTokens
from clara_jax.testing import tiny


@pytest.fixture(scope="module")
def reference(golden):
  return json.loads((golden / "prompts.json").read_text()), json.loads(
    (golden / "inputs.json").read_text()
  )


@pytest.fixture(scope="module")
def prompt_tokenizer(golden):
  config = ClaraConfig(
    ModelConfig(1024, 64, 3, 4, 2, 16, 160),
    doc_max_length=32,
    compression_rate=8,
    query_max_length=32,
  )
  return PromptTokenizer(str(golden / "tiny_mistral"), config)


def unpadded(entry):
  return [
    [i for i, m in zip(ids, mask, strict=True) if m]
    for ids, mask in zip(entry["input_ids"], entry["attention_mask"], strict=True)
  ]


def test_encoder_inputs(reference, prompt_tokenizer):
  expected, inputs = reference
  assert [prompt_tokenizer.document(t).tolist() for t in inputs["DOCS"]] == unpadded(
    expected["encoder_inputs/max_length=32"]
  )
  assert [prompt_tokenizer.query(t).tolist() for t in inputs["QUESTIONS"]] == unpadded(
    expected["query_inputs/generate (max_length=doc_max_length=32)"]
  )


def test_special_tokens(reference, prompt_tokenizer):
  expected, _ = reference
  for token, number in expected["special"].items():
    assert prompt_tokenizer.tokenizer.convert_tokens_to_ids(token) == number
  assert prompt_tokenizer.pad_id == expected["pad_token_id"]


@pytest.mark.parametrize("k", [1, 2])
def test_prompts(reference, prompt_tokenizer, k):
  expected, inputs = reference
  for i, question in enumerate(inputs["QUESTIONS"]):
    with_answer = expected["prompts"][f"standard+answer/top_k={k}"][i]
    prompt = prompt_tokenizer.answer_prompt(question, k, inputs["ANSWERS"][i])
    assert (prompt.ids.tolist(), prompt.prompt_length) == (
      with_answer["ids"],
      with_answer["prompt_len"],
    )
    assert (
      prompt_tokenizer.answer_prompt(question, k).ids.tolist()
      == expected["prompts"][f"standard/top_k={k}"][i]["ids"]
    )
    listed = expected["prompts"][f"qa/top_k={k}"][i]
    row = schemas.Row(
      tuple(inputs["QA_QUESTIONS"][i]),
      tuple(inputs["QA_ANSWERS"][i]),
      ("d",),
      is_question_list=True,
    )
    prompt = prompt_tokenizer.row_prompt(row, k)
    assert (prompt.ids.tolist(), prompt.prompt_length) == (listed["ids"], listed["prompt_len"])


def test_a_tokenizer_of_another_vocabulary_is_refused(golden):
  config = ClaraConfig(
    ModelConfig(1000, 64, 3, 4, 2, 16, 160), doc_max_length=32, compression_rate=8
  )
  with pytest.raises(schemas.DataError, match="<MEM0> became token 1024, expected 1000"):
    PromptTokenizer(str(golden / "tiny_mistral"), config)


def test_too_long(prompt_tokenizer):
  ids = prompt_tokenizer.document("word " * 100)
  assert len(ids) == 32 + 3 + 4 and prompt_tokenizer.tokenizer.eos_token_id not in ids
  with pytest.raises(schemas.DataError, match="file:3: the prompt has"):
    prompt_tokenizer.answer_prompt("word " * 2000, 1, "a", "file:3")


def test_gzip_and_field_names(tmp_path):
  values = [
    {"context": ["d"], "question": "q", "golden_answers": ["a", "b"]},
    {"content": ["d"], "question": ["q"], "answers": ["a"], "answer": ""},
    {"docs": "d", "data_type": "paraphrase", "question": "", "answer": "p"},
  ]
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
  prompt = pad_prompts(
    [
      PromptTokens(np.arange(10, 17, dtype=np.int32), 4),
      PromptTokens(np.arange(20, 23, dtype=np.int32), 2),
    ],
    [4, 2],
    0,
    8,
    4,
  )
  assert prompt.tokens.ids.shape == (2, 8)
  assert prompt.labels[0, :3].tolist() == [14, 15, 16] and prompt.label_positions[
    0, :3
  ].tolist() == [3, 4, 5]
  assert prompt.label_weights.sum(1).tolist() == [3, 1]
  everything = pad_prompts([PromptTokens(np.arange(10, 17, dtype=np.int32), 4)], [1], 0, 8, 8)
  assert everything.label_weights.sum() == 6


def encoder(kind, **data):
  return RowEncoder(
    tiny.prompt_tokenizer(), kind, DataConfig(batch_size=4, candidates=6, bucket=16, **data), 2
  )


def test_rows_with_fewer_documents_are_filled_up():
  rows = [
    dataclasses.replace(r, documents=r.documents[:n])
    for r, n in zip(tiny.rows("instruct")[:2], (2, 1), strict=True)
  ]
  (batch,) = evaluation_batches(rows, encoder("given"), 2)
  assert batch.documents.ids.shape[:2] == (2, 2) and batch.documents.lengths[1, 1] == 0


def test_the_last_evaluation_batch_counts_each_row_once():
  batches = evaluation_batches(tiny.rows("joint")[:6], encoder("candidates"), 4)
  assert [b.valid.sum() for b in batches] == [4, 2]
  assert batches[1].prompt.label_weights[2:].sum() == 0 and not batches[1].is_gold[2:].any()


def test_the_position_is_exact():
  rows = tiny.rows("joint")
  first = TrainingBatches([[rows]], encoder("candidates"), seed=3)
  for _ in range(5):
    next(first)
  state = first.get_state()
  expected = [next(first) for _ in range(12)]  # over the end of an epoch
  second = TrainingBatches([[rows]], encoder("candidates"), seed=3)
  second.set_state(state)
  for want in expected:
    got = next(second)
    assert got.ids == want.ids
    jax.tree.map(np.testing.assert_array_equal, got.batch, want.batch)


def test_an_epoch_has_every_row_once():
  rows = tiny.rows("joint")
  rows = rows[: len(rows) // 4 * 4]
  batches = TrainingBatches([[rows]], encoder("candidates"), seed=0)
  seen = [i for _ in range(len(rows) // 4) for i in next(batches).ids]
  assert sorted(seen) == sorted(r.identifier for r in rows)


def given_batches(data, **fields):
  rows = tiny.rows("scp")
  config = DataConfig(batch_size=8, bucket=16, **data)
  row_encoder = RowEncoder(tiny.prompt_tokenizer(), "given", config, 2)
  return TrainingBatches([records.divide(rows, config.shards)], row_encoder, seed=5, **fields)


def test_batches_do_not_depend_on_who_reads_them():
  """Parts that several processes read are the parts that one reads; the agreed sizes pad them
  alike."""
  data = {"shards": 4, "length_window": 3}
  whole = given_batches(data)
  parts = [given_batches(data, positions=np.arange(4 * i, 4 * i + 4)) for i in range(2)]
  for _ in range(7):
    batch, halves = next(whole), [next(p) for p in parts]
    assert sum((h.ids for h in halves), []) == batch.ids
    assert [h.positions.tolist() for h in halves] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    for i, half in enumerate(halves):
      lengths = half.batch.prompt.tokens.lengths
      np.testing.assert_array_equal(lengths, batch.batch.prompt.tokens.lengths[4 * i : 4 * i + 4])


def test_windows_put_rows_of_like_length_together():
  def spread(batches):
    return np.mean([np.ptp(next(batches).batch.prompt.tokens.lengths) for _ in range(8)])

  assert spread(given_batches({"length_window": 8})) < 0.6 * spread(given_batches({}))
  ids = given_batches({"length_window": 4, "shards": 2})
  epoch = sorted(i for _ in range(8) for i in next(ids).ids)
  # 64 rows, 8 batches: every row once
  assert epoch == sorted(r.identifier for r in tiny.rows("scp"))


@pytest.mark.parametrize("step", [0, 5])
def test_workers_give_the_same_batches(step):
  data = {"length_window": 2, "shards": 2}
  alone, helped = given_batches(data), given_batches({**data, "workers": 2})
  for batches in (alone, helped):
    batches.set_state({"step": step})
  try:
    for _ in range(5):
      a, b = next(alone), next(helped)
      assert a.ids == b.ids
      jax.tree.map(np.testing.assert_array_equal, a.batch, b.batch)
  finally:
    helped.close()


def test_sources_are_mixed_by_weight():
  rows = tiny.rows("scp")
  sources = [
    [[dataclasses.replace(r, identifier=f"{name}{i}") for i, r in enumerate(rows[:count])]]
    for name, count in (("a", 40), ("b", 7))
  ]
  config = DataConfig(batch_size=8, rows=("a", "b"), weights=(0.75, 0.25))
  batches = TrainingBatches(
    sources, RowEncoder(tiny.prompt_tokenizer(), "given", config, 2), seed=1
  )
  ids = [i for _ in range(20) for i in next(batches).ids]
  assert (
    sum(i.startswith("a") for i in ids) == 120 and len({i for i in ids if i.startswith("b")}) == 7
  )
  with pytest.raises(ConfigError, match="data.weights"):
    DataConfig(rows=("a",), weights=(1.0, 2.0))


def test_malformed_rows_are_counted_and_limited(tmp_path, caplog):
  good = [json.dumps(r) for r in tiny.raw_rows("scp")[:20]]
  path = tmp_path / "rows.jsonl"
  path.write_text("\n".join([*good[:5], "{", *good[5:9], '{"docs": ["x"]}', "[]", *good[9:]]))
  with pytest.raises(schemas.DataError, match=r"rows.jsonl:6: not valid JSON"):
    records.open_sources([str(path)], 1)
  with pytest.raises(
    schemas.DataError,
    match=r"rows.jsonl:12: expected a JSON object.*3 malformed rows, max_malformed=2",
  ):
    records.open_sources([str(path)], 1, max_malformed=2)
  ((rows,),) = records.open_sources([str(path)], 1, max_malformed=3)
  assert len(rows) == 20
  err = caplog.text
  assert (
    "rows.jsonl:6" in err
    and "rows.jsonl:11: the row has no answer" in err
    and "malformed row 3 of at most 3" in err
  )


def test_a_row_that_does_not_fit_is_replaced_and_counted(caplog):
  rows = tiny.rows("scp")[:16]
  # Too many memory slots.
  rows[3] = dataclasses.replace(rows[3], documents=rows[3].documents * 100, identifier="long")

  def batches(limit):
    config = DataConfig(batch_size=8, max_malformed=limit)
    return TrainingBatches(
      [[rows]], RowEncoder(tiny.prompt_tokenizer(), "given", config, 2), seed=1
    )

  training_batches = batches(1)
  ids = [i for _ in range(4) for i in next(training_batches).ids]
  assert (
    "long" not in ids and training_batches.malformed == 1 and "long: the prompt has" in caplog.text
  )
  with pytest.raises(schemas.DataError, match="long: the prompt has"):
    training_batches = batches(0)
    for _ in range(4):
      next(training_batches)


@pytest.mark.parametrize("kind", ["scp", "instruct", "joint"])
def test_records_hold_the_rows(tmp_path, kind):
  pytest.importorskip("tensorflow_datasets")
  path = tmp_path / "rows.jsonl"
  raw = tiny.raw_rows(kind)
  for i, row in enumerate(raw):
    row["doc_ids"] = [f"{i}-{j}" for j in range(len(row["docs"]))]
  path.write_text("\n".join(map(json.dumps, [*raw, {"docs": [], "question": "?", "answer": "!"}])))
  with pytest.raises(
    schemas.DataError, match=f"rows.jsonl:{len(raw) + 1}: the row has no documents"
  ):
    records.build(kind, [str(path)], str(tmp_path / "strict"), 3)
  report = records.build(kind, [str(path)], str(tmp_path / "data"), 3, max_malformed=1)
  assert (report.rows, report.malformed, report.files) == (len(raw), 1, 3)
  shards = records.open_sources([report.directory], 3)[0]
  read = {r.identifier: r for shard in shards for r in shard}
  assert read == {
    r.identifier: r for r in (schemas.parse_row(v, f"{path}:{i + 1}") for i, v in enumerate(raw))
  }
  with pytest.raises(schemas.DataError, match="3 files cannot be divided among data.shards=4"):
    records.open_sources([report.directory], 4)
  with pytest.raises(schemas.DataError, match="fewer rows than --files 400"):
    records.build(kind, [str(path)], str(tmp_path / "many"), 400, max_malformed=1)
  with pytest.raises(schemas.DataError, match="already exists"):
    records.build(kind, [str(path)], str(tmp_path / "data"), 3, max_malformed=1)
