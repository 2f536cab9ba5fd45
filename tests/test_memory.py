"""The store: exactly once, resumable, changed in place, refused where it does not fit; forms; a corpus through the compressor."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clara_jax.config import ConfigError
from clara_jax.data.schemas import Document
from clara_jax.memory import forms
from clara_jax.memory.compress import compress_corpus
from clara_jax.memory.quantise import quantise
from clara_jax.memory.store import Manifest, MemoryStore, StoreError, _Keys, fingerprint
from clara_jax.model import Clara
from tests import tiny

MANIFEST = Manifest("x", 2, 16, 40, "float32")


def documents(count, first=0):
  return [Document(d["id"], d["text"], d["title"]) for d in tiny.world().documents(False)[first:first + count]]


def compress(directory, corpus, **options):
  return compress_corpus(Clara(tiny.config()), tiny.layout(), tiny.weights(), corpus, str(directory), progress=False,
                         **{"bucket": 64, **options})


def numbered(*numbers):
  """Documents 'd<n>' with memory tokens that say so."""
  return [Document(f"d{n}", f"text {n}", "") for n in numbers], np.stack([np.full((2, 16), n, np.float32) for n in numbers])


def content(store):
  return {d.id: (d.text, m.tobytes()) for d, m in zip(store.documents(), store.memories(), strict=True)}


def test_interrupted_and_straight_runs_are_equal(tmp_path):
  corpus = documents(23)

  def stops_after(count):
    yield from corpus[:count]
    raise KeyboardInterrupt

  for count in (7, 16):
    with pytest.raises(KeyboardInterrupt):
      compress(tmp_path / "stopped", stops_after(count), shard_size=3, batch_size=4)
  report = compress(tmp_path / "stopped", corpus, shard_size=3, batch_size=4)
  assert report.documents == 23 and report.skipped >= 6 and report.skipped % 3 == 0 and report.cut == 0
  compress(tmp_path / "straight", corpus, shard_size=3, batch_size=4)
  stopped, straight = (MemoryStore(str(tmp_path / name)) for name in ("stopped", "straight"))
  assert stopped.documents() == straight.documents() == corpus
  np.testing.assert_array_equal(stopped.memories(), straight.memories())
  assert stopped.verify() == {"documents": 23, "segments": 8, "dead": 0, "bytes": stopped.nbytes()}


def test_several_processes_make_one_store(tmp_path):
  corpus = documents(23)
  compress(tmp_path / "one", corpus, shard_size=3, batch_size=4)
  assert compress(tmp_path / "many", corpus, shard_size=3, batch_size=4, process=1, processes=3, workers=1).documents == 8
  for process in (2, 0):
    report = compress(tmp_path / "many", corpus, shard_size=3, batch_size=4, process=process, processes=3)
  assert report.documents == 23
  one, many = (MemoryStore(str(tmp_path / name)) for name in ("one", "many"))
  assert content(one) == content(many)
  assert compress(tmp_path / "many", corpus).skipped == 23


def test_changed_documents_are_replaced(tmp_path):
  corpus = documents(7)
  compress(tmp_path, corpus)
  changed = [*corpus[:3], dataclasses.replace(corpus[3], text=corpus[4].text), *corpus[4:]]
  assert compress(tmp_path, changed).skipped == 7
  report = compress(tmp_path, changed, replace=True)
  assert (report.documents, report.skipped, report.replaced) == (7, 6, 1)
  store = MemoryStore(str(tmp_path))
  np.testing.assert_allclose(store.memories([store.row(corpus[3].id)]), store.memories([store.row(corpus[4].id)]), atol=1e-6)


def test_a_half_written_segment_does_not_count(tmp_path):
  store = MemoryStore(str(tmp_path), MANIFEST)
  store.append(*numbered(1, 2))
  store.append(*numbered(3))
  (tmp_path / "segments-0" / "000001-000" / "segment.json").unlink()
  store.close()
  store = MemoryStore(str(tmp_path))
  assert len(store) == 2 and "d3" not in store
  store.append(*numbered(3))
  assert list(content(MemoryStore(str(tmp_path)))) == ["d1", "d2", "d3"]


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from(["upsert", "delete", "compact", "reopen"]), st.sets(st.integers(0, 9), min_size=1)), max_size=12))
def test_changes_equal_a_dict(tmp_path_factory, changes):
  """Upserts, deletions and compaction in any order leave what a dict would hold."""
  folder = str(tmp_path_factory.mktemp("store"))
  store, expected = MemoryStore(folder, MANIFEST), {}
  for version, (action, numbers) in enumerate(changes):
    ids = [f"d{n}" for n in sorted(numbers)]
    if action == "upsert":
      memories = np.full((len(ids), 2, 16), version, np.float32)
      store.upsert([Document(i, f"{version}", "") for i in ids], memories)
      expected |= {i: (f"{version}", m.tobytes()) for i, m in zip(ids, memories, strict=True)}
    elif action == "delete":
      assert store.delete(ids) == len(expected.keys() & set(ids))
      expected = {i: v for i, v in expected.items() if i not in ids}
    elif action == "compact":
      store.compact(segment_size=3)
    else:
      store.close()
      store = MemoryStore(folder)
    assert content(store) == expected and len(store) == len(expected)
  store.verify()
  store.close()


def test_ids_whose_hashes_share_a_half():
  keys = _Keys()
  keys.put(np.array([[5, 1], [5, 2], [5, 3], [7, 1]], np.uint64), np.array([10, 11, 12, 13]))
  keys.put(np.array([[5, 2], [6, 0]], np.uint64), np.array([-1, 14]))
  assert keys.find(np.array([[5, 3], [5, 2], [5, 1], [5, 9], [7, 1], [6, 0], [8, 8]], np.uint64)).tolist() == [12, -1, 10, -1, 13, 14, -1]
  assert sorted(keys.rows()) == [10, 12, 13, 14]


def test_reads_by_row_id_and_text(tmp_path):
  corpus = documents(7)
  compress(tmp_path, corpus, shard_size=3)
  store = MemoryStore(str(tmp_path))
  everything = store.memories()
  np.testing.assert_array_equal(store.memories([6, 0, 3]), everything[[6, 0, 3]])
  np.testing.assert_array_equal(store.lookup()([corpus[4].text]), everything[4:5])
  assert store.row(corpus[5].id) == 5 and corpus[5].id in store and store.documents([5]) == [corpus[5]]
  assert [len(rows) for rows, _ in store.blocks(3)] == [3, 3, 1]
  with pytest.raises(KeyError):
    store.row("nobody")
  with pytest.raises(IndexError, match="expected rows from 0 to 6"):
    store.memories([7])
  with pytest.raises(StoreError, match="lacks the document 'nothing'"):
    store.lookup()(["nothing"])
  lookup = pickle.loads(pickle.dumps(store.lookup()))  # as a worker process gets it
  np.testing.assert_array_equal(lookup(["", ""], [corpus[6].id, corpus[2].id]), everything[[6, 2]])
  with pytest.raises(StoreError, match="lacks the id 'no such'"):
    lookup([""], ["no such"])
  store.delete([corpus[0].id])
  assert store.lookup().slots([], [corpus[1].id, corpus[0].id]).tolist() == [0, -1]


def test_a_store_without_text(tmp_path):
  compress(tmp_path, documents(3), text=False)
  store = MemoryStore(str(tmp_path))
  assert [d.text for d in store.documents()] == [""] * 3 and store.documents()[0].id == documents(1)[0].id
  with pytest.raises(StoreError, match="keeps no text; rows need doc_ids"):
    store.lookup()(["x"])
  with pytest.raises(ConfigError, match="keeps no text"):
    compress(tmp_path, documents(3), text=False, replace=True)


def test_forms(tmp_path):
  """Errors are bounded by each form's own step, and what is written is what `encode` makes."""
  rng = np.random.default_rng(0)
  memories = rng.normal(size=(600, 2, 16)).astype(np.float32) * np.array([0.01, 30.0], np.float32)[:, None]
  corpus = [Document(f"d{i}", "t", "") for i in range(600)]
  whole = MemoryStore(str(tmp_path / "float32"), MANIFEST)
  whole.append(corpus, memories)
  np.testing.assert_array_equal(whole.memories(), memories)
  half = quantise(whole, str(tmp_path / "bfloat16"), "bfloat16")
  np.testing.assert_allclose(half.memories().astype(np.float32), memories, rtol=2**-8)
  small = quantise(whole, str(tmp_path / "int8"), "int8")
  step = np.abs(memories).max(-1, keepdims=True) / 127
  assert (np.abs(small.memories() - memories) <= 0.51 * step).all()
  assert [forms.make(name, 2, 16).nbytes for name in ("float32", "bfloat16", "int8")] == [128, 64, 36]
  assert MemoryStore(str(tmp_path / "int8")).manifest.form == "int8"


def test_product_quantisation(tmp_path):
  pytest.importorskip("faiss")
  rng = np.random.default_rng(0)
  centres = rng.normal(size=(4, 8, 8)).astype(np.float32)  # each part of a vector is one of eight
  memories = np.stack([centres[np.arange(4), rng.integers(0, 8, 4)].reshape(2, 16) for _ in range(400)])
  whole = MemoryStore(str(tmp_path / "float32"), MANIFEST)
  whole.append([Document(f"d{i}", "t", "") for i in range(400)], memories)
  small = quantise(whole, str(tmp_path / "pq"), "pq", sub_width=8)
  assert small.form.nbytes == 4
  np.testing.assert_allclose(MemoryStore(str(tmp_path / "pq")).memories(), memories, atol=1e-5)
  with pytest.raises(ConfigError, match="sub_width=5"):
    quantise(whole, str(tmp_path / "no"), "pq", sub_width=5)
  with pytest.raises(StoreError, match="is a store already"):
    quantise(whole, str(tmp_path / "pq"), "pq", sub_width=8)
  with pytest.raises(ConfigError, match="needs as many documents"):
    forms.learn_pq(memories[:100], 8)


def test_refusals(tmp_path):
  with pytest.raises(StoreError, match="not a memory store"):
    MemoryStore(str(tmp_path))
  store = MemoryStore(str(tmp_path), MANIFEST)
  store.append(*numbered(1))
  with pytest.raises(StoreError, match="the id 'd1' is there already"):
    store.append(*numbered(2, 1))
  with pytest.raises(StoreError, match="comes twice"):
    store.upsert(*numbered(2, 2))
  with pytest.raises(StoreError, match=r"expected memory tokens of shape \(1, 2, 16\)"):
    store.upsert(numbered(2)[0], np.zeros((1, 2, 8), np.float32))
  with pytest.raises(StoreError, match="another process writes"):
    MemoryStore(str(tmp_path)).append(*numbered(2))
  for field, value in {"compressor": "other", "form": "int8", "num_memory_tokens": 3}.items():
    with pytest.raises(StoreError, match=f"{field}="):
      MemoryStore(str(tmp_path), dataclasses.replace(MANIFEST, **{field: value}))
  (tmp_path / "manifest.json").write_text(json.dumps({"version": 1}))
  with pytest.raises(StoreError, match="version 1"):
    MemoryStore(str(tmp_path))


@pytest.mark.parametrize("name", ["memories.array_record", "documents.array_record", "keys.npy"])
def test_damage_is_named(tmp_path, name):
  store = MemoryStore(str(tmp_path), MANIFEST)
  store.append(*numbered(*range(50)))
  file = tmp_path / "segments-0" / "000000-000" / name
  damaged = bytearray(file.read_bytes())
  damaged[len(damaged) // 2] ^= 1
  file.write_bytes(damaged)
  with pytest.raises(StoreError, match=f"{name}: its checksum is"):
    MemoryStore(str(tmp_path)).verify()
  file.write_bytes(file.read_bytes()[:100])
  with pytest.raises(StoreError, match=name):
    MemoryStore(str(tmp_path)).memories()
    MemoryStore(str(tmp_path)).documents()


def test_the_fingerprint_depends_on_the_compressor_only():
  weights = tiny.weights()
  first = fingerprint(weights)
  assert fingerprint({**weights, "generator": weights["compressor"]}) == first
  assert fingerprint({**weights, "compressor": weights["generator"]}) != first


def test_documents_that_are_cut_are_counted(tmp_path):
  layout = tiny.layout()
  short = tiny.world().document(tiny.world().side(False)[0])
  corpus = [Document("a", short), Document("b", " ".join([short] * 5))]
  report = compress_corpus(Clara(tiny.config()), layout, tiny.weights(), corpus, str(tmp_path / "store"), progress=False)
  assert (report.documents, report.cut) == (2, 1)
