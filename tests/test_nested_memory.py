"""The first m memory tokens: what a compressor with m tokens makes, in training, in a store and in
every command."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clara_jax.cli.main import main
from clara_jax.config import ClaraConfig, ConfigError, DataConfig
from clara_jax.data.pipeline import RowEncoder, TrainingBatches, evaluation_batches, pad_tokens
from clara_jax.data.prompt_tokenizer import PromptTokenizer
from clara_jax.data.schemas import Document, write_rows
from clara_jax.inference.answer import Answerer
from clara_jax.inference.checkpoint import Checkpoint
from clara_jax.inference.compress import compress_corpus
from clara_jax.memory.quantize import quantize, truncate
from clara_jax.memory.store import MemoryStore, StoreError
from clara_jax.model import Clara
from clara_jax.retrieval import index as index_lib
from clara_jax.testing import tiny
from clara_jax.training import stages, trainer

SIZES = (1, 2, 4)


def config(m: int = 4, **fields) -> ClaraConfig:
  return dataclasses.replace(tiny.config(), compression_rate=40 // m, **fields)


def prompt_tokenizer(m: int = 4, **fields) -> PromptTokenizer:
  return PromptTokenizer(tiny.world().tokenizer(), config(m, **fields))


def weights(m: int = 4) -> dict:
  """Of four memory tokens, or the same with those of the first m alone: embeddings of the special
  tokens in the places of another vocabulary."""
  tree = dict(jax.jit(Clara(config()).init)(jax.random.key(0)))
  for i, role in enumerate(("compressor", "query_reasoner", "generator")):
    tree[role] = jax.tree.map(
      lambda x, i=i: 0.1 * jax.random.normal(jax.random.key(i), x.shape), tree[role]
    )
  words = config().model.vocab_size
  table = tree["base"]["embedding"]
  tree["base"] = {
    **tree["base"],
    "embedding": jnp.concatenate([table[: words + m], table[words + 4 :]]),
  }
  tree["memory_embedding"] = tree["memory_embedding"][:m]
  return tree


def batch_of(stage: str, m: int, tokenizer: PromptTokenizer, count: int = 8):
  encoder = RowEncoder(tokenizer, stages.get(stage).data, DataConfig(**tiny.DATA), 2)
  return evaluation_batches(tiny.rows(stage)[:count], encoder, count)[0]


@pytest.mark.parametrize("m", SIZES)
def test_the_first_tokens_are_those_of_a_compressor_with_so_many(m):
  texts = [d["text"] for d in tiny.world().documents(False)[:6]]
  whole, few = Clara(config()), Clara(config(m))
  all_ids, ids = (
    pad_tokens(tokenizer.documents(texts), 0, 64)
    for tokenizer in (prompt_tokenizer(), prompt_tokenizer(m))
  )
  all_memories = jax.jit(whole.compress)(weights(), all_ids)
  np.testing.assert_array_equal(all_memories[:, :m], jax.jit(few.compress)(weights(m), ids))
  first = pad_tokens(prompt_tokenizer().first(m).documents(texts), 0, 64)
  np.testing.assert_array_equal(
    all_memories[:, :m], jax.jit(whole.first(m).compress)(weights(), first)
  )


@pytest.mark.parametrize("m", SIZES)
def test_a_prompt_with_the_first_tokens_is_the_prompt_with_so_many(m):
  whole = prompt_tokenizer()
  row = tiny.rows("instruct")[0]
  expected = prompt_tokenizer(m).row_prompt(row, 2)
  prompt = whole.first(m).row_prompt(row, 2)
  is_word = expected.ids < config().model.vocab_size + m
  np.testing.assert_array_equal(prompt.ids[is_word], expected.ids[is_word])
  assert (len(prompt.ids), prompt.prompt_length) == (len(expected.ids), expected.prompt_length)
  np.testing.assert_array_equal(whole.first_ids(whole.row_prompt(row, 2).ids, m), prompt.ids)


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("stage", ["scp", "instruct", "joint", "contrastive"])
def test_a_loss_with_the_first_tokens_is_that_of_a_model_with_so_many(stage, m):
  def loss(model, values, batch):
    terms, metrics = stages.get(stage).loss(model.reading(batch), values, {}, batch, None)
    return sum(t.value for t in terms.values()), metrics

  result = jax.jit(lambda w, b: loss(Clara(config()), w, b))(
    weights(), batch_of(stage, m, prompt_tokenizer().first(m))
  )
  expected = jax.jit(lambda w, b: loss(Clara(config(m)), w, b))(
    weights(m), batch_of(stage, m, prompt_tokenizer(m))
  )
  # The vocabularies differ by the memory tokens that one does not have: in the softmax only.
  np.testing.assert_allclose(result[0], expected[0], rtol=2e-3)
  if stage == "joint":
    assert float(result[1]["recall_at_1"].total) == float(expected[1]["recall_at_1"].total)


def nested_run(stage: str, estimator=None, steps=4, **data):
  """With two sizes: every size is a program to compile."""
  run = tiny.run_config(stage, steps=steps)
  return dataclasses.replace(
    run,
    clara=config(nested_memory=(1, 4)),
    data=dataclasses.replace(run.data, **data),
    estimator=estimator,
    estimator_args={},
  )


def test_sizes_are_drawn_from_seed_and_step_alone():
  encoder = RowEncoder(
    prompt_tokenizer(nested_memory=SIZES), "given", DataConfig(**tiny.DATA, length_window=2), 2
  )
  batches = TrainingBatches([[tiny.rows("scp")]], encoder, 3)
  drawn = [next(batches) for _ in range(9)]
  assert [b.batch.memory_tokens for b in drawn] == [
    batches.memory_tokens(step) for step in range(9)
  ]
  assert set(b.batch.memory_tokens for b in drawn) == set(SIZES)
  batches.set_state({"step": 5})
  again = next(batches)
  assert again.batch.memory_tokens == drawn[5].batch.memory_tokens and again.ids == drawn[5].ids
  np.testing.assert_array_equal(again.batch.prompt.tokens.ids, drawn[5].batch.prompt.tokens.ids)
  for training_batch in drawn:
    slots = training_batch.batch.prompt.tokens.ids - config().model.vocab_size
    assert ((slots >= 0) & (slots < 4)).sum(1).tolist() == [training_batch.batch.memory_tokens] * 8


def test_a_run_goes_on_with_the_same_sizes(tmp_path):
  run, rows = nested_run("scp"), tiny.rows("scp")
  drawn = nested_run("scp").clara.nested_memory
  whole = trainer.Trainer(
    run,
    prompt_tokenizer(nested_memory=drawn),
    weights(),
    rows,
    rows[:8],
    workdir=str(tmp_path / "run"),
    progress=False,
  ).run()
  assert {"ce", "ce_m1", "answers_m1"} <= set(whole.evaluations[-1][1])
  for stop in (1, None):
    parts = trainer.Trainer(
      run,
      prompt_tokenizer(nested_memory=drawn),
      weights(),
      rows,
      workdir=str(tmp_path / "parts"),
      progress=False,
      stop_at=stop,
    ).run()
  for a, b in zip(*(jax.tree.leaves(r.weights["compressor"]) for r in (whole, parts)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_any_estimator_teaches_every_size():
  run = nested_run("joint", "softmax")
  result = trainer.Trainer(
    run,
    prompt_tokenizer(nested_memory=run.clara.nested_memory),
    weights(),
    tiny.rows("joint"),
    progress=False,
  ).run()
  assert np.isfinite(result.metrics["loss"]) and result.metrics["gradient_norm_query_reasoner"] > 0


@pytest.fixture(scope="module")
def store(tmp_path_factory):
  folder = str(tmp_path_factory.mktemp("nested") / "store")
  documents = [Document(d["id"], d["text"], d["title"]) for d in tiny.world().documents(False)]
  compress_corpus(
    Checkpoint(Clara(config()), prompt_tokenizer(), weights()),
    documents,
    folder,
    bucket=64,
    progress=False,
  )
  return folder


def test_joint_training_searches_a_whole_store_with_every_size(store):
  run = nested_run("joint", steps=1, store=store, retrieve="store")
  known = MemoryStore(store)
  rows = [r for r in tiny.rows("joint") if all(r.document_ids[p] in known for p in r.gold)]
  tokenizer = prompt_tokenizer(nested_memory=run.clara.nested_memory)
  result = trainer.Trainer(
    run, tokenizer, weights(), rows, rows[:8], memories=known.lookup(), progress=False
  ).run()
  # Of one batch, the same as with candidates that are the whole store's nearest by the plain
  # formula.
  encoder = RowEncoder(tokenizer.first(1), "candidates", run.data, 2, known.lookup())
  batch = evaluation_batches(rows[:8], encoder, 8)[0]
  model = Clara(run.clara).first(1)
  query = np.asarray(jax.jit(model.encode_query)(weights(), batch.question))
  scores = index_lib.unit_vectors(query) @ index_lib.unit_vectors(known.memories()[:, :1]).T
  gold = [{known.row(r.document_ids[p]) for p in r.gold} for r in rows[:8]]
  expected_recall = np.mean(
    [
      len(set(known.rows[np.argsort(-s)[:5]]) & g) / len(g)
      for s, g in zip(scores, gold, strict=True)
    ]
  )
  assert result.evaluations[0][1]["recall_at_5_m1"] == pytest.approx(expected_recall)


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "pq"])
def test_a_truncated_store_holds_the_first_bytes(store, form, tmp_path):
  whole = MemoryStore(store)
  if form == "pq":
    pytest.importorskip("faiss")
    many = np.random.default_rng(0).normal(size=(300, 4, 16)).astype(np.float32)
    whole = MemoryStore(str(tmp_path / "many"), dataclasses.replace(whole.manifest))
    whole.append([Document(str(i), "text") for i in range(300)], many)
  whole = quantize(whole, str(tmp_path / "form"), form)
  small = truncate(whole, str(tmp_path / "small"), 2)
  assert small.manifest == dataclasses.replace(
    whole.manifest, num_memory_tokens=2, codebook=small.manifest.codebook
  )
  np.testing.assert_array_equal(small.memories(), whole.memories()[:, :2])
  np.testing.assert_array_equal(whole.first(2).memories(), whole.memories()[:, :2])
  assert small.documents() == whole.documents() and small.verify()["documents"] == len(whole)
  assert small.codec.nbytes * 2 == whole.codec.nbytes
  for m in (0, 5):
    with pytest.raises(StoreError, match=f"memory tokens {m}: expected 1 to 4"):
      whole.first(m)
  with pytest.raises(StoreError, match="the first 2 of 4 memory tokens, to read"):
    whole.first(2).delete([whole.documents()[0].id])
  with pytest.raises(StoreError, match="already is a store"):
    truncate(whole, str(tmp_path / "small"), 1)


def test_what_a_stopped_truncation_left_is_no_store(store, tmp_path):
  (tmp_path / "small.part").mkdir()
  (tmp_path / "small.part" / "manifest.json").write_text(
    (pathlib.Path(store) / "manifest.json").read_text()
  )
  assert len(truncate(MemoryStore(store), str(tmp_path / "small"), 1)) == len(MemoryStore(store))
  assert sorted(p.name for p in tmp_path.iterdir()) == ["small"]


def test_search_with_few_read_with_many(store):
  model, whole = Clara(config(nested_memory=SIZES)), MemoryStore(store)
  questions = [r.questions[0] for r in tiny.rows("joint")[:3]]
  for kind in ("exact", "scann"):
    if not index_lib.available(kind):
      continue
    index_lib.save(index_lib.build(whole.first(1), kind), kind, whole.first(1))
    answerer = Answerer(Checkpoint(model, prompt_tokenizer(), weights()), whole, max_new_tokens=4)
    assert answerer.search_tokens == 1 and answerer.model.num_memory_tokens == 4
    answers = answerer.answer(questions)
    query = jax.jit(model.first(1).encode_query)(
      weights(), pad_tokens([prompt_tokenizer().first(1).query(q) for q in questions], 0, 32)
    )
    scores = (
      index_lib.unit_vectors(np.asarray(query)) @ index_lib.unit_vectors(whole.memories()[:, :1]).T
    )
    for answer, row in zip(answers, scores, strict=True):
      best = np.argsort(-row)[:2]
      assert [d.id for d in answer.documents] == [d.id for d in whole.documents(whole.rows[best])]
      np.testing.assert_allclose([d.score for d in answer.documents], row[best], atol=1e-3)
    vectors = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
    np.testing.assert_array_equal(
      answerer.nearest_memories(vectors, 2), answerer.nearest_memories(vectors[:, :16], 2)
    )
    assert answerer.nearest_memories(vectors, 2).shape == (2, 2, 64)


def test_sizes_that_cannot_be_are_refused():
  for sizes in ((1, 2), (2, 1, 4), (0, 4), (1, 1, 4), (1, 4, 8)):
    with pytest.raises(ConfigError, match="ascending numbers of 1 or more that end with M"):
      config(nested_memory=sizes)
  for m in (0, 5):
    with pytest.raises(ConfigError, match=f"memory tokens {m}: expected 1 to 4"):
      Clara(config()).first(m)
    with pytest.raises(ConfigError, match="expected 1 to 4"):
      prompt_tokenizer().first(m)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A joint run, rows and documents."""
  path = tmp_path_factory.mktemp("commands")
  base = trainer.Trainer(
    dataclasses.replace(tiny.run_config("pretrain", steps=1), clara=config()),
    prompt_tokenizer(),
    {},
    tiny.rows("pretrain"),
    workdir=str(path / "base"),
    progress=False,
  ).run()
  run = dataclasses.replace(
    nested_run("joint", steps=1), clara=config(nested_memory=SIZES), base=str(path / "base")
  )
  trainer.Trainer(
    run,
    prompt_tokenizer(nested_memory=SIZES),
    {**weights(), "base": base.weights["base"]},
    tiny.rows("joint"),
    workdir=str(path / "joint"),
    progress=False,
  ).run()
  write_rows(tiny.world().question_rows(6, test=True), str(path / "joint.jsonl"))
  write_rows(tiny.world().documents(test=True), str(path / "documents.jsonl"))
  return path


def run_command(capsys, *arguments):
  try:
    status = main([str(a) for a in (*arguments, "--json")])
  except SystemExit as stop:
    status = stop.code
  out, err = capsys.readouterr()
  return status, json.loads(out) if out.strip() else None, err


def test_commands(folder, capsys):
  def clara(*arguments):
    status, report, err = run_command(capsys, *arguments)
    assert status == 0, err
    return report, err

  checkpoint = ("--checkpoint", folder / "joint")
  rows = ("--rows", folder / "joint.jsonl", "--limit", 4, "--max-new-tokens", 4)
  store, small, fresh = (folder / name for name in ("store", "small", "fresh"))
  documents = ("--documents", folder / "documents.jsonl")
  clara("compress", *checkpoint, *documents, "--store", store)
  report, _ = clara("store", "truncate", "--store", store, "--memory-tokens", 2, "--to", small)
  assert (report["num_memory_tokens"], report["compression_rate"]) == (2, 20)
  clara("compress", *checkpoint, *documents, "--store", fresh, "--memory-tokens", 2)
  np.testing.assert_allclose(
    MemoryStore(str(fresh)).memories(), MemoryStore(str(small)).memories(), atol=1e-5
  )
  # Goes on with as many as the store has.
  report, _ = clara("compress", *checkpoint, *documents, "--store", small)
  assert report["skipped"] == report["documents"]
  report, _ = clara("index", "--store", store, "--kind", "exact", "--memory-tokens", 2)
  assert (report["memory_tokens"], report["dimension"]) == (2, 32)
  assert clara("index", "--store", store)[0]["memory_tokens"] == 2  # as it was
  clara("index", "--store", small, "--kind", "exact")
  answers = [
    clara("ask", *checkpoint, "--store", s, *more, "--max-new-tokens", 4, "Who?")[0]["answers"][0]
    for s, more in ((store, ("--memory-tokens", 2)), (small, ()))
  ]
  assert answers[0]["answer"] == answers[1]["answer"]
  assert [d["id"] for d in answers[0]["documents"]] == [d["id"] for d in answers[1]["documents"]]
  scores = {}
  for m in (1, 3, 4):
    scores[m], err = clara(
      "evaluate",
      *checkpoint,
      *rows,
      "--setting",
      "joint",
      "--memory-tokens",
      m,
      "--predictions",
      folder / f"p{m}.jsonl",
    )
    assert ("was trained to read 1 or 2 or 4" in err) == (m == 3)
  tokens = [
    json.loads((folder / f"p{m}.jsonl").read_text().splitlines()[0])["context_tokens"]
    for m in (1, 4)
  ]
  assert tokens == [2, 8]
  assert (
    run_command(
      capsys,
      "evaluate",
      *checkpoint,
      *rows,
      "--setting",
      "joint",
      "--predictions",
      folder / "p1.jsonl",
    )[0]
    == 2
  )
  loss = ("loss", *checkpoint, "--stage", "joint", "--rows", folder / "joint.jsonl")
  losses = {m: clara(*loss, "--memory-tokens", m)[0]["loss"] for m in (1, 4)}
  assert losses[1] != losses[4] == clara(*loss)[0]["loss"]
  clara(
    "paraphrase", *checkpoint, *documents, "--limit", 2, "--max-new-tokens", 4, "--memory-tokens", 1
  )
  clara(
    "explain", *checkpoint, *rows[:-4], "--limit", 1, "--max-new-tokens", 4, "--memory-tokens", 1
  )
  clara("lens", *checkpoint, "--memory-tokens", 1, "Who?")
  clara(
    "evaluate",
    *checkpoint,
    *rows,
    "--setting",
    "joint",
    "--memory-tokens",
    1,
    "--report",
    folder / "report",
  )
  assert (
    "1 memory tokens for documents of at most 40 tokens (ratio 40)"
    in (folder / "report" / "report.html").read_text()
  )
  for wrong in (
    ("evaluate", *checkpoint, *rows, "--setting", "joint", "--memory-tokens", 5),
    ("ask", *checkpoint, "--store", small, "--memory-tokens", 3, "Who?"),
    ("store", "truncate", "--store", store, "--to", small, "--memory-tokens", 1),
    ("store", "truncate", "--store", store),
    ("compress", *checkpoint, *documents, "--store", small, "--memory-tokens", 1),
  ):
    status, _, err = run_command(capsys, *wrong)
    assert status == 2 and err.count("\n") == 1, err
