"""The store: exactly once, resumable, refused where it does not fit; the two indices agree."""

import json
import pickle

import numpy as np
import pytest

from clara_jax.data.schemas import Document
from clara_jax.memory.compress import compress_corpus
from clara_jax.memory.store import Manifest, MemoryStore, StoreError, fingerprint
from clara_jax.model import Clara
from clara_jax.retrieval import index
from tests import tiny


def documents(count):
  return [Document(d["id"], d["text"], d["title"]) for d in tiny.world().documents(False)[:count]]


def compress(directory, corpus, **options):
  return compress_corpus(Clara(tiny.config()), tiny.layout(), tiny.weights(), corpus, str(directory), progress=False, **options)


def test_interrupted_and_straight_runs_are_equal(tmp_path):
  corpus = documents(23)

  def stops_after(count):
    yield from corpus[:count]
    raise KeyboardInterrupt

  for count in (7, 12):
    with pytest.raises(KeyboardInterrupt):
      compress(tmp_path / "stopped", stops_after(count), shard_size=3, batch_size=4, bucket=64)
  report = compress(tmp_path / "stopped", corpus, shard_size=3, batch_size=4, bucket=64)
  assert report.documents == 23 and report.skipped == 12 and report.cut == 0
  compress(tmp_path / "straight", corpus, shard_size=3, batch_size=4, bucket=64)
  stopped, straight = (MemoryStore(str(tmp_path / name)) for name in ("stopped", "straight"))
  assert [d.id for d in stopped.documents] == [d.id for d in straight.documents] == [d.id for d in corpus]
  np.testing.assert_allclose(stopped.memories(), straight.memories(), atol=1e-6)


def test_a_half_written_shard_does_not_count(tmp_path):
  corpus = documents(6)
  compress(tmp_path, corpus[:3], shard_size=3)
  np.save(tmp_path / "memories-00001.npy", np.zeros((3, 2, 16), np.float32))  # its documents were never written
  assert len(MemoryStore(str(tmp_path))) == 3
  assert compress(tmp_path, corpus, shard_size=3).documents == 6


def test_reads_by_row_and_text(tmp_path):
  corpus = documents(7)
  compress(tmp_path, corpus, shard_size=3)
  store = MemoryStore(str(tmp_path))
  everything = store.memories()
  np.testing.assert_array_equal(store.memories([6, 0, 3]), everything[[6, 0, 3]])
  np.testing.assert_array_equal(store.lookup()([corpus[4].text]), everything[4:5])
  assert store.row(corpus[5].id) == 5 and corpus[5].id in store
  with pytest.raises(StoreError, match="lacks the document 'nothing'"):
    store.lookup()(["nothing"])
  lookup = pickle.loads(pickle.dumps(store.lookup()))  # as a worker process gets it
  np.testing.assert_array_equal(lookup(["", ""], [corpus[6].id, corpus[2].id]), everything[[6, 2]])
  with pytest.raises(StoreError, match="lacks the id 'no such'"):
    lookup([""], ["no such"])


def test_bfloat16_is_half_as_large(tmp_path):
  memories = np.random.default_rng(0).normal(size=(5, 2, 16)).astype(np.float32)
  store = MemoryStore(str(tmp_path), Manifest("x", 2, 16, "bfloat16"))
  store.append(documents(5), memories)
  again = MemoryStore(str(tmp_path))
  assert again.nbytes() == memories.nbytes // 2
  np.testing.assert_allclose(again.memories().astype(np.float32), memories, rtol=1e-2)


def test_refusals(tmp_path):
  with pytest.raises(StoreError, match="not a memory store"):
    MemoryStore(str(tmp_path))
  compress(tmp_path, documents(2))
  with pytest.raises(StoreError, match="compressor="):
    MemoryStore(str(tmp_path), Manifest("other", 2, 16, "float32"))
  shard = tmp_path / "memories-00000.npy"
  shard.write_bytes(shard.read_bytes()[:100])
  with pytest.raises(StoreError, match="memories-00000.npy"):
    MemoryStore(str(tmp_path))


def test_the_fingerprint_depends_on_the_compressor_only():
  weights = tiny.weights()
  first = fingerprint(weights)
  assert fingerprint({**weights, "generator": weights["compressor"]}) == first
  assert fingerprint({**weights, "compressor": weights["generator"]}) != first


@pytest.mark.parametrize("kind", ["exact", "scann"])
def test_indices_find_the_nearest(tmp_path, kind):
  if not index.available(kind):
    pytest.skip(f"{kind} is not installed")
  rng = np.random.default_rng(0)
  vectors = index.unit_vectors(rng.normal(size=(300, 2, 16)))
  queries = index.unit_vectors(rng.normal(size=(5, 2, 16)))
  truth = np.argsort(-queries @ vectors.T, axis=1)[:, :4]
  built = index.build(kind, vectors)
  index.save(built, kind, str(tmp_path))
  for found in (built, index.load(str(tmp_path), vectors)):
    rows, scores = found.search(queries, 4)
    np.testing.assert_array_equal(rows, truth)
    np.testing.assert_allclose(scores, np.take_along_axis(queries @ vectors.T, truth, 1), atol=1e-4)
  saved = json.loads((tmp_path / "index" / "index.json").read_text())
  assert saved == {"kind": kind, "documents": 300}
  with pytest.raises(index.MissingIndexError, match="has 300 documents, the store 299"):
    index.load(str(tmp_path), vectors[1:])


def test_a_missing_index_says_how_to_make_one(tmp_path):
  with pytest.raises(index.MissingIndexError, match="clara index --store"):
    index.load(str(tmp_path), np.zeros((1, 2)))
  with pytest.raises(index.MissingIndexError, match="'tree'"):
    index.build("tree", np.zeros((1, 2)))


@pytest.mark.parametrize("kind", ["exact", "scann"])
def test_an_index_saved_under_a_relative_path_can_be_moved(tmp_path, monkeypatch, kind):
  if not index.available(kind):
    pytest.skip(f"{kind} is not installed")
  vectors = index.unit_vectors(np.random.default_rng(0).normal(size=(50, 2, 8)))
  monkeypatch.chdir(tmp_path)
  built = index.build(kind, vectors)
  index.save(built, kind, "store")
  (tmp_path / "store").rename(tmp_path / "elsewhere")
  monkeypatch.chdir("/")
  rows, _ = index.load(str(tmp_path / "elsewhere"), vectors).search(vectors[:5], 3)
  np.testing.assert_array_equal(rows[:, 0], np.arange(5))


def test_documents_that_are_cut_are_counted(tmp_path):
  layout = tiny.layout()
  short = tiny.world().document(tiny.world().side(False)[0])
  documents = [Document("a", short), Document("b", " ".join([short] * 5))]
  report = compress_corpus(Clara(tiny.config()), layout, tiny.weights(), documents, str(tmp_path / "store"), progress=False)
  assert (report.documents, report.cut) == (2, 1)
