"""The joint stage over a whole store in the step: the same loss and gradient as the plain formula,
on any mesh."""

import dataclasses

import jax
import numpy as np
import pytest

from clara_jax.config import ConfigError
from clara_jax.data.pipeline import RowEncoder, evaluation_batches
from clara_jax.data.schemas import DataError, Document
from clara_jax.inference.checkpoint import Checkpoint
from clara_jax.inference.compress import compress_corpus
from clara_jax.memory.store import MemoryStore
from clara_jax.model import Clara
from clara_jax.sharding import make_mesh, put_batch
from clara_jax.testing import tiny
from clara_jax.training import corpus, stages, trainer
from clara_jax.training.program import Program


@pytest.fixture(scope="module")
def store(tmp_path_factory):
  folder = str(tmp_path_factory.mktemp("corpus"))
  documents = [Document(d["id"], d["text"], d["title"]) for d in tiny.world().documents(False)]
  compress_corpus(
    Checkpoint(Clara(tiny.config()), tiny.prompt_tokenizer(), tiny.weights()),
    documents,
    folder,
    bucket=64,
    progress=False,
  )
  memory_store = MemoryStore(folder)
  memory_store.delete([documents[2].id])
  memory_store.close()
  return MemoryStore(folder)


def config(store, candidates, **train):
  run = tiny.run_config("joint", **train)
  return dataclasses.replace(
    run,
    data=dataclasses.replace(
      run.data, candidates=candidates, store=store.directory, retrieve="store"
    ),
  )


def rows(store, count=8):
  return [r for r in tiny.rows("joint") if all(r.document_ids[p] in store for p in r.gold)][:count]


def batch_of(run, store, count=8):
  encoder = RowEncoder(
    tiny.prompt_tokenizer(), "candidates", run.data, run.clara.top_k, store.lookup()
  )
  return evaluation_batches(rows(store, count), encoder, count)[0]


def loss_and_gradient(run, batch, frozen, mesh):
  program = Program(run, 4, mesh)
  with program.context():
    weights = program.place_weights(tiny.weights())
    trainable = {"query_reasoner": weights.pop("query_reasoner")}
    if frozen is None:
      shapes = program.frozen_shapes()["corpus"]
      weights["corpus"] = corpus.place(shapes, MemoryStore(run.data.store))

    def loss(trainable, weights, batch):
      terms, metrics = stages.joint_loss(program.model, trainable, weights, batch, None)
      return terms["ce"].value, metrics

    placed = put_batch(batch, program.batch_sharding, len(batch.valid), None)
    (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
      trainable, weights, placed
    )
    return float(value), jax.device_get(metrics), jax.tree.leaves(jax.device_get(gradient))


@pytest.mark.parametrize("candidates", [None, 5])
def test_loss_and_gradient_equal_the_dense_formula(store, candidates):
  """Retrieved in the step, N of the store, or given as a row's candidates: one and the same."""
  count = candidates or len(store)
  run = config(store, count)
  batch = batch_of(run, store)
  value, metrics, gradient = loss_and_gradient(
    run, batch, None, make_mesh(devices=jax.devices()[:1])
  )
  # The dense formula: every document is a candidate, or the `count` best by the plain cosine.
  model, weights = Clara(run.clara), tiny.weights()
  query = np.asarray(model.encode_query(weights, batch.question)).reshape(8, -1)
  memories = store.memories()
  flat = memories.reshape(len(memories), -1)
  cosines = query @ flat.T / np.linalg.norm(query, axis=1)[:, None] / np.linalg.norm(flat, axis=1)
  chosen = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
  is_gold = (chosen[:, :, None] == batch.gold_slots[:, None]).any(-1)
  row_batch = batch.replace(memories=memories[chosen], is_gold=is_gold, gold_slots=None)
  plain = dataclasses.replace(run, data=dataclasses.replace(run.data, retrieve="row"))
  expected, expected_metrics, expected_gradient = loss_and_gradient(
    plain, row_batch, {}, make_mesh(devices=jax.devices()[:1])
  )
  assert value == pytest.approx(expected, rel=1e-6)
  for a, b in zip(gradient, expected_gradient, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * max(1e-3, np.abs(b).max()))
  if candidates is None:
    assert float(metrics["recall_at_3"].value) == pytest.approx(
      float(expected_metrics["recall_at_3"].value)
    )
  ranks = [
    np.flatnonzero(np.isin(np.argsort(-c, kind="stable"), g[g >= 0]))
    for c, g in zip(cosines, batch.gold_slots, strict=True)
  ]
  assert float(metrics["recall_at_1"].value) == pytest.approx(
    np.mean([(r < 1).mean() for r in ranks])
  )
  # And on two devices.
  other, _, other_gradient = loss_and_gradient(run, batch, None, make_mesh())
  assert other == pytest.approx(value, rel=1e-5)
  for a, b in zip(other_gradient, gradient, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * max(1e-3, np.abs(b).max()))


def test_a_run_over_the_whole_store(store, tmp_path):
  run = config(store, 4, steps=2)
  result = trainer.Trainer(
    run,
    tiny.prompt_tokenizer(),
    tiny.weights(),
    rows(store, 16),
    rows(store, 8),
    memories=store.lookup(),
    progress=False,
    workdir=str(tmp_path),
  ).run()
  assert "corpus" not in result.weights and 0 <= result.metrics["recall_at_1"] <= 1
  assert not any("corpus" in p.name for p in tmp_path.rglob("*"))


def test_refusals(store):
  with pytest.raises(ConfigError, match="names no store"):
    dataclasses.replace(tiny.run_config("joint").data, retrieve="store")
  for change, message in (({"candidates": 10_000}, "but data.candidates=10000"),):
    with pytest.raises(ConfigError, match=message):
      Program(config(store, **change), 1).frozen_shapes()
  contrastive = dataclasses.replace(config(store, 4), train=tiny.run_config("contrastive").train)
  with pytest.raises(ConfigError, match="stage 'contrastive' takes the rows' own candidates"):
    Program(contrastive, 1)
  missing = next(
    r for r in tiny.rows("joint") if any(r.document_ids[p] not in store for p in r.gold)
  )
  with pytest.raises(DataError, match="a gold document is not in the store"):
    RowEncoder(
      tiny.prompt_tokenizer(), "candidates", config(store, 4).data, 2, store.lookup()
    ).encode(missing, None)
