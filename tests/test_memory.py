"""The store: exactly once, resumable, changed in place, refused where it does not fit; forms; a
corpus through the compressor."""

import dataclasses
import errno
import json
import pickle
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clara_jax import io
from clara_jax.cli import main as cli
from clara_jax.config import ConfigError
from clara_jax.data.schemas import Document
from clara_jax.inference.checkpoint import Checkpoint
from clara_jax.inference.compress import compress_corpus, fingerprints
from clara_jax.memory import codecs
from clara_jax.memory.quantize import quantize
from clara_jax.memory.store import Manifest, MemoryStore, StoreError, _Keys
from clara_jax.model import Clara
from clara_jax.retrieval import index
from clara_jax.testing import tiny

MANIFEST = Manifest("x", 2, 16, 40, "float32")


def documents(count, first=0):
  return [
    Document(d["id"], d["text"], d["title"])
    for d in tiny.world().documents(False)[first : first + count]
  ]


def compress(directory, corpus, **options):
  return compress_corpus(
    Checkpoint(Clara(tiny.config()), tiny.prompt_tokenizer(), tiny.weights()),
    corpus,
    str(directory),
    progress=False,
    **{"bucket": 64, **options},
  )


def numbered(*numbers):
  """Documents 'd<n>' with memory tokens that say so."""
  return [Document(f"d{n}", f"text {n}", "") for n in numbers], np.stack(
    [np.full((2, 16), n, np.float32) for n in numbers]
  )


def content(store):
  return {
    d.id: (d.text, m.tobytes()) for d, m in zip(store.documents(), store.memories(), strict=True)
  }


def test_interrupted_and_straight_runs_are_equal(tmp_path):
  corpus = documents(23)

  def stops_after(count):
    yield from corpus[:count]
    raise KeyboardInterrupt

  for count in (7, 16):
    with pytest.raises(KeyboardInterrupt):
      compress(tmp_path / "stopped", stops_after(count), shard_size=3, batch_size=4)
  report = compress(tmp_path / "stopped", corpus, shard_size=3, batch_size=4)
  assert (
    report.documents == 23 and report.skipped >= 6 and report.skipped % 3 == 0 and report.cut == 0
  )
  compress(tmp_path / "straight", corpus, shard_size=3, batch_size=4)
  stopped, straight = (MemoryStore(str(tmp_path / name)) for name in ("stopped", "straight"))
  assert stopped.documents() == straight.documents() == corpus
  np.testing.assert_array_equal(stopped.memories(), straight.memories())
  assert stopped.verify() == {"documents": 23, "segments": 8, "dead": 0, "bytes": stopped.nbytes()}


def test_several_processes_make_one_store(tmp_path):
  corpus = documents(23)
  compress(tmp_path / "one", corpus, shard_size=3, batch_size=4)
  assert (
    compress(
      tmp_path / "many", corpus, shard_size=3, batch_size=4, process=1, processes=3, workers=1
    ).documents
    == 8
  )
  for process in (2, 0):
    report = compress(
      tmp_path / "many", corpus, shard_size=3, batch_size=4, process=process, processes=3
    )
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
  np.testing.assert_allclose(
    store.memories([store.row(corpus[3].id)]), store.memories([store.row(corpus[4].id)]), atol=1e-6
  )


def test_a_half_written_segment_does_not_count(tmp_path):
  store = MemoryStore(str(tmp_path), MANIFEST)
  store.append(*numbered(1, 2))
  store.append(*numbered(3))
  (tmp_path / "segments-0" / "000001-000" / "segment.json").unlink()
  store.close()
  # As a kill between the files and their record leaves it, or one within a line.
  ledger = tmp_path / "ledger-0-000.jsonl"
  ledger.write_bytes(ledger.read_bytes()[:-30])
  store = MemoryStore(str(tmp_path))
  assert len(store) == 2 and "d3" not in store
  store.append(*numbered(3))
  assert list(content(MemoryStore(str(tmp_path)))) == ["d1", "d2", "d3"]


@settings(max_examples=25)
@given(
  st.lists(
    st.tuples(
      st.sampled_from(["upsert", "delete", "compact", "reopen"]),
      st.sets(st.integers(0, 9), min_size=1),
    ),
    max_size=12,
  )
)
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
  assert keys.find(
    np.array([[5, 3], [5, 2], [5, 1], [5, 9], [7, 1], [6, 0], [8, 8]], np.uint64)
  ).tolist() == [12, -1, 10, -1, 13, 14, -1]
  assert sorted(keys.rows()) == [10, 12, 13, 14]


def test_reads_by_row_id_and_text(tmp_path):
  corpus = documents(7)
  compress(tmp_path, corpus, shard_size=3)
  store = MemoryStore(str(tmp_path))
  everything = store.memories()
  np.testing.assert_array_equal(store.memories([6, 0, 3]), everything[[6, 0, 3]])
  np.testing.assert_array_equal(store.lookup()([corpus[4].text]), everything[4:5])
  assert (
    store.row(corpus[5].id) == 5 and corpus[5].id in store and store.documents([5]) == [corpus[5]]
  )
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
  assert [d.text for d in store.documents()] == [""] * 3 and store.documents()[0].id == documents(
    1
  )[0].id
  with pytest.raises(StoreError, match="keeps no text; rows need doc_ids"):
    store.lookup()(["x"])
  with pytest.raises(ConfigError, match="keeps no text"):
    compress(tmp_path, documents(3), text=False, replace=True)


def test_forms(tmp_path):
  """Errors are bounded by each form's own step, and what is written is what `encode` makes."""
  rng = np.random.default_rng(0)
  memories = (
    rng.normal(size=(600, 2, 16)).astype(np.float32) * np.array([0.01, 30.0], np.float32)[:, None]
  )
  corpus = [Document(f"d{i}", "t", "") for i in range(600)]
  whole = MemoryStore(str(tmp_path / "float32"), MANIFEST)
  whole.append(corpus, memories)
  np.testing.assert_array_equal(whole.memories(), memories)
  half = quantize(whole, str(tmp_path / "bfloat16"), "bfloat16")
  np.testing.assert_allclose(half.memories().astype(np.float32), memories, rtol=2**-8)
  small = quantize(whole, str(tmp_path / "int8"), "int8")
  step = np.abs(memories).max(-1, keepdims=True) / 127
  assert (np.abs(small.memories() - memories) <= 0.51 * step).all()
  assert [codecs.make(name, 2, 16).nbytes for name in ("float32", "bfloat16", "int8")] == [
    128,
    64,
    36,
  ]
  assert MemoryStore(str(tmp_path / "int8")).manifest.encoding == "int8"


def test_product_quantisation(tmp_path):
  pytest.importorskip("faiss")
  rng = np.random.default_rng(0)
  centers = rng.normal(size=(4, 8, 8)).astype(np.float32)  # each part of a vector is one of eight
  memories = np.stack(
    [centers[np.arange(4), rng.integers(0, 8, 4)].reshape(2, 16) for _ in range(400)]
  )
  whole = MemoryStore(str(tmp_path / "float32"), MANIFEST)
  whole.append([Document(f"d{i}", "t", "") for i in range(400)], memories)
  small = quantize(whole, str(tmp_path / "pq"), "pq", sub_width=8)
  assert small.codec.nbytes == 4
  np.testing.assert_allclose(MemoryStore(str(tmp_path / "pq")).memories(), memories, atol=1e-5)
  with pytest.raises(ConfigError, match="sub_width=5"):
    quantize(whole, str(tmp_path / "no"), "pq", sub_width=5)
  with pytest.raises(StoreError, match="already is a store"):
    quantize(whole, str(tmp_path / "pq"), "pq", sub_width=8)
  with pytest.raises(ConfigError, match="needs as many documents"):
    codecs.learn_pq(memories[:100], 8)


def test_refusals(tmp_path):
  with pytest.raises(StoreError, match="not a memory store"):
    MemoryStore(str(tmp_path))
  store = MemoryStore(str(tmp_path), MANIFEST)
  store.append(*numbered(1))
  with pytest.raises(StoreError, match="the id 'd1' already exists"):
    store.append(*numbered(2, 1))
  with pytest.raises(StoreError, match="a duplicate id in one call"):
    store.upsert(*numbered(2, 2))
  with pytest.raises(StoreError, match=r"expected memory tokens of shape \(1, 2, 16\)"):
    store.upsert(numbered(2)[0], np.zeros((1, 2, 8), np.float32))
  with pytest.raises(StoreError, match=r"another process writes .*process \d+ on "):
    MemoryStore(str(tmp_path)).append(*numbered(2))
  store.close()
  for field, value in {"compressor": "other", "encoding": "int8", "num_memory_tokens": 3}.items():
    with pytest.raises(StoreError, match=f"{field}"):
      MemoryStore(str(tmp_path), dataclasses.replace(MANIFEST, **{field: value}))
  (tmp_path / "manifest.json").write_text(json.dumps({"version": 1}))
  with pytest.raises(StoreError, match="version 1"):
    MemoryStore(str(tmp_path))


def test_writers_see_each_other(tmp_path):
  """Whoever changes a store is alone with what the change needs, and has read what others wrote
  before."""
  folder = str(tmp_path / "store")
  early = MemoryStore(folder, MANIFEST)
  early.close()
  early, late = MemoryStore(folder), MemoryStore(folder)  # both open it before anything is there
  late.append(*numbered(1, 2))
  with pytest.raises(StoreError, match="the id 'd1' already exists"):
    early.append(*numbered(1))
  late.delete(["d2"])
  late.compact()
  early.append(*numbered(3))
  assert list(content(MemoryStore(folder))) == ["d1", "d3"]

  writer = MemoryStore(folder, MANIFEST)
  other = MemoryStore(folder, MANIFEST, writer=1)  # two may add
  for change in (
    other.compact,
    lambda: MemoryStore(folder).compact(),
    lambda: MemoryStore(folder, writer=2).delete(["d1"]),
  ):
    with pytest.raises(
      StoreError, match=r"another process is at work on this store \(process \d+ on "
    ):
      change()
  with writer.reading("index", "builds its index"):
    with pytest.raises(StoreError, match="another process builds its index"):
      index.update(MemoryStore(folder), "exact")
    other.close()
    with pytest.raises(StoreError, match="at work on this store"):
      writer.compact()
  writer.compact()
  other = MemoryStore(folder, MANIFEST, writer=1)
  writer.append(*numbered(4))
  other.append(*numbered(5))
  writer.close()
  with pytest.raises(StoreError, match="at work"):
    MemoryStore(folder).compact()
  other.close()
  MemoryStore(folder).compact()
  assert list(content(MemoryStore(folder))) == ["d1", "d3", "d4", "d5"]


def two_segments(folder):
  store = MemoryStore(str(folder), MANIFEST)
  store.append(*numbered(1, 2))
  store.append(*numbered(3))
  store.delete(["d1"])
  store.close()
  return folder / "segments-0"


def of_version_2(folder):
  """`two_segments` as stores were before there were ledgers and checksums of records."""
  segments = two_segments(folder)
  for file in (folder / "manifest.json", *segments.glob("*/segment.json")):
    values = io.unsealed(file.read_bytes())
    if file.name == "manifest.json":
      values = {k: v for k, v in values.items() if k not in ("parts", "dtype", "codebook")} | {
        "version": 2
      }
    file.write_text(json.dumps(values))
  (folder / "ledger-0-000.jsonl").unlink()
  return segments


def test_what_is_gone_is_named_and_given_up(tmp_path):
  segments = two_segments(tmp_path)
  shutil.rmtree(segments / "000000-000")
  with pytest.raises(StoreError, match="000000-000: is missing: 2 documents"):
    MemoryStore(str(tmp_path))
  assert cli.main(["store", "verify", "--store", str(tmp_path)]) == 2
  assert MemoryStore(str(tmp_path), damaged=True).repair() == {"lost": 2, "segments": 1}
  store = MemoryStore(str(tmp_path))
  assert list(content(store)) == ["d3"] and store.verify()["documents"] == 1
  store.append(*numbered(2))
  assert list(content(MemoryStore(str(tmp_path)))) == ["d3", "d2"]
  shutil.rmtree(tmp_path / "segments-1")
  with pytest.raises(StoreError, match="segments-1: is missing, with all documents"):
    MemoryStore(str(tmp_path))
  assert MemoryStore(str(tmp_path), damaged=True).repair()["lost"] == 2


def test_rows_after_a_repair_are_told_from_those_before(tmp_path):
  """Damage, repair, compress again: neither an open store nor an index goes on with rows that are
  others now."""
  store = MemoryStore(str(tmp_path), MANIFEST)
  for first in (0, 3, 6):
    store.append(*numbered(*range(first, first + 3)))
  store.close()
  index.update(MemoryStore(str(tmp_path)), "exact")
  early = MemoryStore(str(tmp_path))
  (tmp_path / "segments-0" / "000000-000" / "keys.npy").unlink()
  assert MemoryStore(str(tmp_path), damaged=True).repair()["lost"] == 3
  MemoryStore(str(tmp_path)).append(*numbered(0, 1, 2))
  store = MemoryStore(str(tmp_path))
  assert len(store) == 9 and index.state(store) == "out of date"
  with pytest.raises(StoreError, match="the id 'd1' already exists"):
    early.append(*numbered(1))
  built, changed = index.update(store, "exact")
  assert changed == 9 and index.state(MemoryStore(str(tmp_path))) == "current"


def test_a_segment_between_others_makes_an_index_anew(tmp_path):
  """Two writers at once: a number that one has taken may come after a later one of the other."""
  store = MemoryStore(str(tmp_path), MANIFEST)
  store.append(*numbered(1))
  other = MemoryStore(str(tmp_path), MANIFEST, writer=1)
  store.append(*numbered(2))
  other.append(*numbered(3))
  store.close()
  other.close()
  names = sorted(p.name for p in (tmp_path / "segments-0").iterdir())
  assert names == ["000000-000", "000001-000", "000002-001"]
  whole = MemoryStore(str(tmp_path))
  saved = {"identity": whole.identity(), "segments": whole.segments}
  grown = MemoryStore(str(tmp_path))
  grown.append(*numbered(4))
  assert index._has_grown(grown, saved) and not index._has_grown(grown, {**saved, "segments": 4})


def test_a_store_of_version_2_with_a_damaged_segment_is_repaired(tmp_path):
  segments = of_version_2(tmp_path)
  (segments / "000001-000" / "segment.json").write_text("{")
  with pytest.raises(StoreError, match="segment.json: damaged"):
    MemoryStore(str(tmp_path))
  MemoryStore(str(tmp_path), damaged=True).repair()
  assert list(content(MemoryStore(str(tmp_path)))) == ["d2"]
  writer = MemoryStore(str(tmp_path), MANIFEST)
  assert writer.manifest.version == 3


def test_every_flipped_bit_is_named_or_harmless(tmp_path):
  """One bit anywhere in a store: it is named when the store is opened, read or verified, or all
  documents are as before."""
  two_segments(tmp_path)
  whole = content(MemoryStore(str(tmp_path)))
  random = np.random.default_rng(0)
  files = sorted(f for f in tmp_path.rglob("*") if f.is_file() and f.suffix != ".lock")
  for file in files:
    before = file.read_bytes()
    for place in random.choice(len(before), min(len(before), 25), replace=False):
      damaged = bytearray(before)
      damaged[place] ^= 1 << int(random.integers(8))
      file.write_bytes(damaged)
      try:
        store = MemoryStore(str(tmp_path))
        assert content(store) == whole, (file, place)
        if file.name != "manifest.json":
          store.verify()
          # The end of the last line alone.
          assert file.suffix == ".jsonl" and place == len(before) - 1, (file, place)
      except StoreError:
        pass
    file.write_bytes(before)


def test_a_full_disk_leaves_the_store_as_it_was(tmp_path, monkeypatch):
  store = MemoryStore(str(tmp_path), MANIFEST)
  store.append(*numbered(1))
  for number, broken in enumerate(("_write_records", "io.write", "io.append"), 3):
    with monkeypatch.context() as patch:

      def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

      patch.setattr(f"clara_jax.memory.store.{broken}", full)
      with pytest.raises(OSError, match="No space"):
        store.upsert(*numbered(2))
    expected_ids = {"d1", *(f"d{n}" for n in range(3, number))}
    assert expected_ids <= set(content(MemoryStore(str(tmp_path)))) <= expected_ids | {"d2"}
    store.upsert(*numbered(number))
    assert MemoryStore(str(tmp_path)).verify()["documents"] >= number - 1


def test_a_store_of_version_2_is_read_and_goes_on(tmp_path):
  segments = of_version_2(tmp_path)
  assert list(content(MemoryStore(str(tmp_path)))) == ["d2", "d3"]
  MemoryStore(str(tmp_path), MANIFEST).append(*numbered(4))
  assert (
    list(content(MemoryStore(str(tmp_path)))) == ["d2", "d3", "d4"]
    and MemoryStore(str(tmp_path)).verify()["documents"] == 3
  )
  shutil.rmtree(segments / "000001-000")
  with pytest.raises(StoreError, match="000001-000: is missing"):
    MemoryStore(str(tmp_path))


@pytest.mark.parametrize(
  "name, reads",
  [
    ("memories.array_record", MemoryStore.memories),
    ("documents.array_record", MemoryStore.documents),
    ("keys.npy", MemoryStore.documents),
  ],
)
def test_damage_is_named(tmp_path, name, reads):
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
    reads(MemoryStore(str(tmp_path)))
  store.close()
  assert MemoryStore(str(tmp_path), damaged=True).repair() == {"lost": 50, "segments": 1}
  assert len(MemoryStore(str(tmp_path))) == 0


def test_the_fingerprint_depends_on_the_compressor_only():
  weights, config = tiny.weights(), tiny.config()
  first = fingerprints(config, weights)
  assert fingerprints(config, {**weights, "generator": weights["compressor"]}) == first
  other = fingerprints(config, {**weights, "compressor": weights["generator"]})
  assert [name for name in first if first[name] != other[name]] == ["compressor"]


def test_documents_that_are_cut_are_counted(tmp_path):
  prompt_tokenizer = tiny.prompt_tokenizer()
  short = tiny.world().document(tiny.world().side(False)[0])
  corpus = [Document("a", short), Document("b", " ".join([short] * 5))]
  report = compress_corpus(
    Checkpoint(Clara(tiny.config()), prompt_tokenizer, tiny.weights()),
    corpus,
    str(tmp_path / "store"),
    progress=False,
  )
  assert (report.documents, report.cut) == (2, 1)
