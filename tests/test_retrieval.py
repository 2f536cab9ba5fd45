"""Search: every kind finds what the plain formula finds, on any number of devices, while the store
changes."""

import json
import os
import random
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clara_jax.config import ConfigError
from clara_jax.data.schemas import Document
from clara_jax.memory.store import Manifest, MemoryStore
from clara_jax.ops.nearest import nearest, slots_needed, take
from clara_jax.retrieval import base, index
from clara_jax.retrieval.exact import ExactIndex
from clara_jax.sharding import make_mesh
from tests.helpers import free_port

MANIFEST = Manifest("x", 2, 16, 40, "float32")


def memories_of(names, version=0):
  return np.stack(
    [np.random.default_rng([n, version]).normal(size=(2, 16)).astype(np.float32) for n in names]
  )


def documents(names):
  return [Document(f"d{n}", f"text {n}", "") for n in names]


@pytest.fixture
def store(tmp_path):
  memory_store = MemoryStore(str(tmp_path), MANIFEST)
  memory_store.append(documents(range(300)), memories_of(range(300)))
  return memory_store


def queries(count=5):
  return base.unit_vectors(np.random.default_rng(7).normal(size=(count, 2, 16)))


def truth(store, among=None, k=4):
  """Ids and cosines by the plain formula."""
  rows = store.rows if among is None else np.intersect1d(store.rows, among)
  scores = queries() @ base.unit_vectors(store.memories(rows)).T
  order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
  return rows[order], np.take_along_axis(scores, order, 1)


KINDS = [
  ("exact", None),
  ("scann", None),
  ("exact", 30),
  ("scann", 30),
  ("exact", None, "bfloat16"),
  ("exact", 30, "int8"),
  ("qdrant", None),
  ("qdrant", 30),
]


def settings(kind):
  return dict(zip(("kind", "dimensions", "vectors"), kind, strict=False))


@pytest.fixture(params=KINDS, ids=lambda p: "-".join(map(str, p)))
def kind(request):
  name, dimensions, *_ = request.param
  if not index.available(name):
    pytest.skip(f"{name} is not installed")
  if dimensions:
    pytest.importorskip("faiss")
  return request.param


def test_indices_find_the_nearest(store, kind):
  built = index.build(store, **settings(kind))
  index.save(built, store=store, **settings(kind))
  for retriever in (built, index.load(store)):
    rows, scores = retriever.search(queries(), 4)
    expected, cosines = truth(store)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(scores, cosines, atol=1e-5)
    assert len(retriever) == 300 and retriever.rows.tolist() == store.rows.tolist()
  store.delete(["d7"])
  with pytest.raises(
    index.MissingIndexError,
    match="has changed since its index was made .300 documents then, 299 now",
  ):
    index.load(store)


def test_filters(store, kind):
  built = index.build(store, **settings(kind))
  among = np.array([3, 77, 150, 151, 299])
  rows, scores = built.search(queries(), 4, among)
  expected, cosines = truth(store, among)
  np.testing.assert_array_equal(rows, expected)
  np.testing.assert_allclose(scores, cosines, atol=1e-5)
  rows, scores = built.search(queries(), 4, among[:2])
  assert (
    (rows[:, :2] == truth(store, among[:2])[0]).all()
    and (rows[:, 2:] == -1).all()
    and np.isneginf(scores[:, 2:]).all()
  )
  assert built.search(queries(), 400)[0].shape == (5, 400)


def test_a_thousand_changes_equal_a_store_built_afresh(store, kind, tmp_path):
  built, changes = index.build(store, **settings(kind)), random.Random(0)
  live, version = set(range(300)), 0
  for _ in range(10):
    for _ in range(10):
      version += 1
      names = changes.sample(range(400), 10)
      rows_before = store.rows
      if changes.random() < 0.6:
        store.upsert(documents(names), memories_of(names, version))
        live |= set(names)
      else:
        store.delete([f"d{n}" for n in names])
        live -= set(names)
      gone, new = np.setdiff1d(rows_before, store.rows), np.setdiff1d(store.rows, rows_before)
      built.remove(gone)
      if len(new):
        built.add(new, base.unit_vectors(store.memories(new)))
    assert len(store) == len(live) == len(built)
    expected, cosines = truth(store)
    rows, scores = built.search(queries(), 4)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(scores, cosines, atol=1e-5)
  afresh = MemoryStore(str(tmp_path / "afresh"), MANIFEST)
  afresh.append(store.documents(), store.memories())
  ids = [
    [d.id for d in s.documents(r)]
    for s, r in (
      (store, rows[0]),
      (afresh, index.build(afresh, kind[0]).search(queries(), 4)[0][0]),
    )
  ]
  assert ids[0] == ids[1]
  store.compact()
  assert [
    d.id for d in store.documents(index.build(store, kind[0]).search(queries(), 4)[0][0])
  ] == ids[0]


def test_an_index_is_brought_up_to_date(store, kind):
  index.save(index.build(store, **settings(kind)), store=store, **settings(kind))
  store.upsert(documents([5, 1000]), memories_of([5, 1000], 1))
  store.delete(["d9"])
  refreshed_index, changed = index.refresh(store, **settings(kind))
  assert changed == (300 if kind[0] == "exact" else 4)
  index.save(refreshed_index, store=store, **settings(kind))
  np.testing.assert_array_equal(index.load(store).search(queries(), 4)[0], truth(store)[0])


def test_refusals(store, tmp_path):
  with pytest.raises(index.MissingIndexError, match="clara index --store"):
    index.load(store)
  with pytest.raises(index.MissingIndexError, match="'tree'"):
    index.build(store, "tree")
  with pytest.raises(index.MissingIndexError, match="no documents to index"):
    index.build(MemoryStore(str(tmp_path / "empty"), MANIFEST), "exact")
  with pytest.raises(ConfigError, match="dimensions=33: expected 1 to 32"):
    index.build(store, "exact", 33)


def test_an_index_saved_under_a_relative_path_can_be_moved(tmp_path, monkeypatch, kind):
  monkeypatch.chdir(tmp_path)
  memory_store = MemoryStore("store", MANIFEST)
  memory_store.append(documents(range(50)), memories_of(range(50)))
  index.save(index.build(memory_store, **settings(kind)), store=memory_store, **settings(kind))
  (tmp_path / "store").rename(tmp_path / "elsewhere")
  monkeypatch.chdir("/")
  moved = MemoryStore(str(tmp_path / "elsewhere"))
  rows, _ = index.load(moved).search(base.unit_vectors(moved.memories([0, 1, 2])), 3)
  np.testing.assert_array_equal(rows[:, 0], np.arange(3))


def test_nearest_in_blocks_with_ties_and_empty_slots(monkeypatch):
  monkeypatch.setattr("clara_jax.ops.nearest.BLOCK", 8)
  rng = np.random.default_rng(0)
  vectors = rng.integers(-2, 3, (slots_needed(50, 2), 4)).astype(np.float32)  # many equal scores
  scale = np.where(rng.random(len(vectors)) < 0.8, 1.0, 0.0).astype(np.float32)
  query_vectors = rng.integers(-2, 3, (3, 4)).astype(np.float32)
  scores = np.where(scale > 0, query_vectors @ vectors.T, -np.inf)
  for k in (1, 7, 40):
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    for devices in (1, 2):
      with jax.set_mesh(make_mesh(devices=jax.devices()[:devices])):
        slots, top_scores = jax.jit(nearest, static_argnums=3)(vectors, scale, query_vectors, k)
        taken = jax.jit(take)(vectors, slots)
      best = np.take_along_axis(scores, expected, 1)
      np.testing.assert_array_equal(top_scores, best)
      mask = np.isfinite(best)
      np.testing.assert_array_equal(np.asarray(slots)[mask], expected[mask])
      np.testing.assert_array_equal(taken, vectors[np.asarray(slots)])


def test_approximate_search_has_its_recall():
  vectors = jnp.asarray(np.random.default_rng(0).normal(size=(4096, 32)), jnp.float32)
  query_vectors = vectors[:64] + 0.1
  exact, _ = nearest(vectors, jnp.ones(4096), query_vectors, 10)
  approximate, _ = nearest(vectors, jnp.ones(4096), query_vectors, 10, recall_target=0.9)
  assert (
    np.mean(
      [
        len(set(a) & set(b)) / 10
        for a, b in zip(np.asarray(exact), np.asarray(approximate), strict=True)
      ]
    )
    >= 0.9
  )


_ON_DEVICES = """
import json, sys
import numpy as np
dtype, *who = sys.argv[1:]
from clara_jax import distributed
if who:
  distributed.initialize(who[0], int(who[1]), int(who[2]))
from clara_jax.retrieval.exact import ExactIndex
rng = np.random.default_rng(0)
vectors, queries = rng.normal(size=(2003, 24)).astype(np.float32), rng.normal(size=(6, 24)).astype(np.float32)
vectors[[40, 900, 1999]] = vectors[5]  # ties, on devices of their own
index, asked = ExactIndex(24, dtype=dtype), []
def vectors_of(rows):
  asked.extend(rows.tolist())
  return vectors[rows // 3]
index.fill(np.arange(2000) * 3, vectors_of)
read = len(asked)
index.add(np.array([7, 8, 10]), vectors[2000:])
index.remove(np.array([3, 8]))
found = [index.search(np.concatenate([queries, vectors[5:6]]), 9), index.search(queries, 3, np.arange(0, 500, 9))]
print("REPORT" + json.dumps([[[rows.tolist(), scores.tolist()] for rows, scores in found], read]))
"""  # noqa: E501


def search_on(devices, dtype, processes=1):
  """[(rows and scores of both searches, vectors that this process has read)], by process."""
  who = [[]]
  if processes > 1:
    coordinator = f"localhost:{free_port()}"
    who = [[coordinator, str(processes), str(i)] for i in range(processes)]
  environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)}
  runs = [
    subprocess.Popen(
      [sys.executable, "-c", _ON_DEVICES, dtype, *w],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for w in who
  ]
  outputs = [run.communicate(timeout=200) for run in runs]
  assert not any(run.returncode for run in runs), outputs[0][1][-2000:]
  return [json.loads(out[out.index("REPORT") + 6 :]) for out, _ in outputs]


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_devices_and_processes_return_what_one_returns(dtype):
  ((expected, everything),) = search_on(1, dtype)
  ties = expected[0][0][6][:4]
  assert ties == [15, 120, 2700, 5997] and everything == 2000
  for devices, processes in ((8, 1), (2, 4)):
    for searches, read in search_on(devices, dtype, processes):
      assert read <= -(-2000 // processes) + 16  # its own part only
      for (rows, scores), (want_rows, want_scores) in zip(searches, expected, strict=True):
        assert rows == want_rows
        np.testing.assert_allclose(scores, want_scores, rtol=1e-6)


def test_an_exact_index_grows():
  grows, vectors = ExactIndex(32), base.unit_vectors(memories_of(range(100)))
  for start in range(0, 100, 7):
    grows.add(np.arange(start, min(start + 7, 100)), vectors[start : start + 7])
  np.testing.assert_array_equal(
    grows.search(queries(), 4)[0], np.argsort(-queries() @ vectors.T, 1)[:, :4]
  )
