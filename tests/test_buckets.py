"""Paths in a bucket, against a Cloud Storage of the tests' own (`cloud_storage.py`)."""

import itertools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # asks a service of its own
pytest.importorskip("gcsfs")
pytest.importorskip("google.cloud.storage")

from etils import epath

from clara_jax import buckets, io
from clara_jax.checkpoints.workdir import CheckpointError
from clara_jax.cli import main as cli
from clara_jax.data import records
from clara_jax.data.schemas import Document, write_rows
from clara_jax.memory.store import Manifest, MemoryStore, StoreError
from clara_jax.retrieval import index as indices
from clara_jax.testing import tiny
from clara_jax.training import trainer
from clara_jax.training.hooks import Hook
from tests.cloud_storage import Server
from tests.helpers import refused

ROOT = pathlib.Path(__file__).parents[1]
BUCKET = "gs://my-bucket"
MANIFEST = Manifest("abc", 2, 4, 40, "float32")


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
  """A server, and the environment in which gcsfs, google-cloud-storage and TensorStore find it."""
  server = Server()
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("STORAGE_EMULATOR_HOST", server.url)
    patch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
    patch.setenv("CLARA_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield server
  server.close()


@pytest.fixture(autouse=True)
def no_fault(storage):
  yield
  storage.fault = lambda method, path: None


def upload(folder, to):
  for file in pathlib.Path(folder).rglob("*"):
    if file.is_file():
      (epath.Path(to) / str(file.relative_to(folder))).write_bytes(file.read_bytes())


def pretraining(workdir, hooks=(), **train):
  return trainer.Trainer(
    tiny.run_config("pretrain", steps=4, **train),
    tiny.prompt_tokenizer(),
    {},
    tiny.rows("pretrain"),
    workdir=str(workdir),
    progress=False,
    hooks=hooks,
  )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, storage):
  """On this machine and in the bucket: a pretrained base, rows, documents."""
  path = tmp_path_factory.mktemp("local")
  base = pretraining(path / "base").run()
  weights = tiny.weights() | {"base": base.weights["base"]}
  tiny.write_checkpoint(str(path / "start"), tiny.config(), weights)
  write_rows(tiny.raw_rows("joint"), str(path / "joint.jsonl"))
  write_rows(tiny.world().documents(test=True), str(path / "documents.jsonl"))
  upload(path, BUCKET)
  return path


def run(capsys, *arguments):
  status = cli.main([str(a) for a in arguments])
  out = capsys.readouterr()
  assert status == 0, out.err
  return out.out


# ---- what is read --------------------------------------------------------------------------------


def test_a_copy_follows_the_bucket(storage, tmp_path):
  upload_of = tmp_path / "model"
  for name, text in {"config.json": "{}", "deep/a.txt": "one", "b.txt": "two"}.items():
    (upload_of / name).parent.mkdir(parents=True, exist_ok=True)
    (upload_of / name).write_text(text)
  upload(upload_of, f"{BUCKET}/model")
  copy = pathlib.Path(buckets.local_copy(f"{BUCKET}/model"))
  assert {str(f.relative_to(copy)) for f in copy.rglob("*") if f.is_file()} == {
    "config.json",
    "deep/a.txt",
    "b.txt",
  }
  untouched = (copy / "config.json").stat().st_mtime_ns
  (epath.Path(f"{BUCKET}/model") / "deep/a.txt").write_text("1")
  (epath.Path(f"{BUCKET}/model") / "b.txt").unlink()
  assert buckets.local_copy(f"{BUCKET}/model/") == str(copy)
  assert (copy / "deep/a.txt").read_text() == "1" and not (copy / "b.txt").exists()
  assert (copy / "config.json").stat().st_mtime_ns == untouched


def test_what_a_bucket_cannot_do_is_said(folder, tmp_path):
  documents = folder / "documents.jsonl"
  assert f"{BUCKET}/nothing: there is nothing" in refused("index", "--store", f"{BUCKET}/nothing")
  said = refused("convert", f"{BUCKET}/nothing", tmp_path / "out", "--to", "clara")
  assert f"{BUCKET}/nothing: there is nothing" in said
  said = refused("quickstart", "--workdir", f"{BUCKET}/quickstart")
  assert f"{BUCKET}/quickstart: has to be on a disk" in said
  arguments = ("--endpoint", "http://127.0.0.1:1/v1", "--model", "m")
  said = refused("synthesize", "--documents", documents, "--out", f"{BUCKET}/rows", *arguments)
  assert f"{BUCKET}/rows: has to be on a disk" in said


# ---- objects -------------------------------------------------------------------------------------


def test_an_object_is_written_in_the_place_of_the_one_that_was_read(storage):
  objects = buckets.Objects(f"{BUCKET}/objects")
  first = objects.write("a", b"one", 0)
  with pytest.raises(buckets.ConflictError, match=f"{BUCKET}/objects/a: somebody else"):
    objects.write("a", b"two", 0)
  assert objects.write("a", b"two", first) == objects.generation("a") != first
  assert storage.objects["my-bucket", "objects/a"][0] == b"two"


@pytest.mark.parametrize("fault", ["503", "before", "after", "half"])
def test_a_request_that_fails_is_tried_again(storage, tmp_path, fault):
  objects, asked = buckets.Objects(f"{BUCKET}/faults-{fault}"), itertools.count()
  large = tmp_path / "large"  # as a resumable upload, in parts
  large.write_bytes(random.Random(0).randbytes(9_000_000))
  generation = objects.write("small", b"one", 0)
  storage.fault = lambda method, path: fault if next(asked) % 2 == 0 else None
  assert objects.write("small", b"two", generation) == objects.generation("small")
  objects.write("large", large, 0)
  objects.read("large", tmp_path / "again")
  storage.fault = lambda method, path: None
  assert storage.objects["my-bucket", f"faults-{fault}/small"][0] == b"two"
  assert (tmp_path / "again").read_bytes() == large.read_bytes()


# ---- stores --------------------------------------------------------------------------------------


def corpus(first, last):
  documents = [Document(f"d{i}", f"text {i}", f"title {i}") for i in range(first, last)]
  memories = np.stack([np.full((2, 4), i, np.float32) for i in range(first, last)])
  return documents, memories


def content(store):
  """Documents and memory tokens, by id."""
  memories = store.memories()
  return {
    d.id: (d.text, d.title, m.tobytes()) for d, m in zip(store.documents(), memories, strict=True)
  }


# A writer that may be killed: blocks of ten documents, every second one, those that are there not.
WRITER = """
import sys
from clara_jax.memory.store import MemoryStore
from tests.test_buckets import MANIFEST, corpus
directory, writer, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
store = MemoryStore(directory, MANIFEST, writer=writer)
print("open", flush=True)
for first in range(writer * 10, last, 20):
  documents, memories = corpus(first, first + 10)
  if "d%d" % first not in store:
    store.upsert(documents, memories)
store.close()
"""


def writer(directory, number, last):
  return subprocess.Popen(
    [sys.executable, "-c", WRITER, directory, str(number), str(last)],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    text=True,
  )


def test_two_writers_that_are_killed_lose_nothing(storage, tmp_path):
  """Ten kills at random moments of a slow network: the store is that of a straight run."""
  last, chance = 600, random.Random(0)
  directory = f"{BUCKET}/killed"

  def slow(method, path):
    time.sleep(0.002)
    return "503" if chance.random() < 0.02 else None

  storage.fault = slow
  kills = 0
  while kills < 10:
    processes = [writer(directory, number, last) for number in (0, 1)]
    for process in processes:
      process.stdout.readline()
    time.sleep(chance.uniform(0, 0.6))
    for process in processes:
      kills += process.poll() is None
      process.send_signal(signal.SIGKILL)
      process.wait()
  for process in [writer(directory, number, last) for number in (0, 1)]:
    assert process.wait() == 0
  straight = MemoryStore(str(tmp_path / "straight"), MANIFEST)
  straight.upsert(*corpus(0, last))
  store = MemoryStore(directory)
  assert store.verify()["dead"] == 0
  assert content(store) == content(straight)


def test_who_comes_later_takes_a_number_over(storage, tmp_path, monkeypatch):
  directory = f"{BUCKET}/taken"
  monkeypatch.setenv("CLARA_CACHE", str(tmp_path / "machine-1"))
  first = MemoryStore(directory, MANIFEST)
  first.upsert(*corpus(0, 5))
  monkeypatch.setenv("CLARA_CACHE", str(tmp_path / "machine-2"))
  second = MemoryStore(directory, MANIFEST)
  second.upsert(*corpus(5, 10))
  with pytest.raises(StoreError, match=f"{directory}: another process .* has taken it over"):
    first.upsert(*corpus(10, 15))
  second.upsert(*corpus(15, 20))
  ids = {f"d{i}" for i in [*range(10), *range(15, 20)]}
  assert set(content(MemoryStore(directory))) == ids
  second.close()
  MemoryStore(directory, MANIFEST).upsert(*corpus(20, 21))
  assert len(MemoryStore(directory)) == 16


def test_a_store_in_a_bucket_changes(storage, tmp_path):
  directory = f"{BUCKET}/changing"
  with pytest.raises(buckets.BucketError, match=f"{directory}: there is nothing"):
    MemoryStore(directory)
  store = MemoryStore(directory, MANIFEST)
  store.upsert(*corpus(0, 30))
  reader = MemoryStore(directory)
  assert store.nbytes() == reader.nbytes() > 0
  documents, memories = corpus(3, 4)
  store.upsert(documents, memories + 1)
  assert reader.delete(["d5", "unknown"]) == 1  # by a reader, which writes for that moment
  reader.refresh()
  changed = content(reader)
  assert len(changed) == 29 and changed["d3"][2] == (memories + 1).tobytes()
  with pytest.raises(StoreError, match=f"{directory}: compact: only on a disk"):
    reader.compact()
  with pytest.raises(StoreError, match="opened to read"):
    reader.upsert(documents, memories)


@pytest.mark.parametrize("kind", ["exact", "scann"])
def test_an_index_in_a_bucket(storage, tmp_path, kind):
  if not indices.available(kind):
    pytest.skip(f"{kind} is not installed")
  directory = f"{BUCKET}/indexed-{kind}"
  with MemoryStore(directory, MANIFEST)._writing():
    pass
  chance = np.random.default_rng(0)
  documents, _ = corpus(0, 300)
  store = MemoryStore(directory, MANIFEST)
  store.upsert(documents, chance.normal(size=(300, 2, 4)).astype(np.float32))
  store.close()
  store = MemoryStore(directory)
  built, changed = indices.update(store, kind)
  assert changed == 300
  loaded = indices.load(MemoryStore(directory))
  queries = chance.normal(size=(5, 8)).astype(np.float32)
  np.testing.assert_array_equal(loaded.search(queries, 3)[0], built.search(queries, 3)[0])
  store.delete(["d0"])
  assert indices.state(store) == "out of date"
  indices.update(store, kind)
  assert indices.state(MemoryStore(directory)) == "current"
  folders = {name.split("/")[0] for name in buckets.Objects(f"{directory}/index").listed()}
  assert len(folders - {"index.json"}) == (1 if kind == "scann" else len(folders) - 1)


def test_of_two_indices_at_once_one_counts(storage):
  directory = f"{BUCKET}/indexed-twice"
  store = MemoryStore(directory, MANIFEST)
  store.upsert(*corpus(1, 30))
  store.close()
  reader, other = MemoryStore(directory), MemoryStore(directory)

  class Meanwhile:
    """An index during whose saving another one is saved."""

    def __init__(self, index):
      self._index, self.rows = index, index.rows

    def __len__(self):
      return len(self._index)

    def save(self, folder):
      indices.save(indices.build(other), "exact", other)
      self._index.save(folder)

  with pytest.raises(indices.MissingIndexError, match="another process has made an index"):
    indices.save(Meanwhile(indices.build(reader)), "exact", reader)
  assert indices.state(MemoryStore(directory)) == "current"


# ---- runs ----------------------------------------------------------------------------------------


RUN = """
import sys
from tests.test_buckets import pretraining
pretraining(sys.argv[1], checkpoint_every=1).run()
"""


def test_a_run_that_is_killed_goes_on_in_a_bucket(folder, storage):
  workdir = f"{BUCKET}/killed-run"
  process = subprocess.Popen([sys.executable, "-c", RUN, workdir], cwd=ROOT)
  deadline = time.monotonic() + 240
  while f"killed-run/checkpoints/2/{io.SUMS}" not in {n for _, n in list(storage.objects)}:
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.01)
  process.kill()
  process.wait()
  resumed = pretraining(workdir, checkpoint_every=1).run()
  straight = pretraining(folder / "straight", checkpoint_every=1).run()
  jax.tree.map(np.testing.assert_array_equal, resumed.weights, straight.weights)
  starts = (epath.Path(workdir) / "starts.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in starts][0] == 0 < json.loads(starts[-1])["step"]


def test_a_later_run_takes_a_working_directory_over(folder):
  workdir = f"{BUCKET}/run-taken"

  class Other(Hook):
    """Another run that begins after the first step."""

    def after_step(self, trainer, row_ids):
      if trainer.step == 1:
        buckets.Claim(f"{workdir}/run.lock", "this working directory")

  with pytest.raises(CheckpointError, match="another process has taken over this working dir"):
    pretraining(workdir, hooks=[Other()]).run()


# ---- commands ------------------------------------------------------------------------------------


def test_from_rows_to_answers_in_a_bucket(folder, tmp_path, capsys):
  """Records, training, compression, index, questions: as on this machine's disk."""
  answers = {}
  question = next(iter(tiny.world().question_rows(1, test=True)))["question"]
  for place in (str(folder), BUCKET):
    kind = ("--kind", "joint", "--files", 2)
    run(capsys, "records", "--rows", f"{place}/joint.jsonl", "--out", f"{place}/records", *kind)
    common = ("--checkpoint", f"{place}/start")
    store = f"{place}/store"
    for process in (0, 1):
      run(
        capsys,
        *("compress", *common, "--documents", f"{place}/documents.jsonl", "--store", store),
        *("--shard-size", 5, "--process", process, "--processes", 2),
      )
    run(capsys, "index", "--store", store, "--kind", "exact")
    ask = ("--max-new-tokens", 4, "--json", question)
    answers[place] = json.loads(run(capsys, "ask", *common, "--store", store, *ask))["answers"][0]
    answers[place].pop("timings_ms")
    run(
      capsys,
      *("evaluate", *common, "--rows", f"{place}/joint.jsonl", "--setting", "joint"),
      *("--limit", 3, "--predictions", f"{place}/predictions.jsonl"),
    )
  assert answers[str(folder)] == answers[BUCKET]
  assert len(answers[BUCKET]["documents"]) == 2
  ways = {place: next(epath.Path(f"{place}/records/joint").iterdir()) for place in answers}
  local, remote = (
    [source for sources in records.open_sources([str(way)], 1) for source in sources]
    for way in ways.values()
  )
  assert sorted(map(repr, *local)) == sorted(map(repr, *remote)) != []
  local = (folder / "predictions.jsonl").read_text()
  assert (epath.Path(BUCKET) / "predictions.jsonl").read_text() == local
  assert content(MemoryStore(f"{BUCKET}/store")) == content(MemoryStore(str(folder / "store")))


def test_a_checkpoint_is_converted_into_a_bucket(folder, tmp_path, capsys):
  target = f"{BUCKET}/converted"
  run(capsys, "convert", f"{BUCKET}/start", target, "--to", "hf", "--role", "generator")
  assert f"{target}: already exists" in refused("convert", folder / "start", target, "--to", "hf")
  run(capsys, "convert", folder / "start", tmp_path / "hf", "--to", "hf", "--role", "generator")
  copy = pathlib.Path(buckets.local_copy(target))
  for file in io.files(tmp_path / "hf"):
    assert io.checksum(copy / file.relative_to(tmp_path / "hf")) == io.checksum(file), file


def test_a_first_run_that_failed_leaves_nothing_in_a_bucket(storage):
  store = MemoryStore(f"{BUCKET}/failed", MANIFEST)
  store.discard_if_new()
  store.close()
  assert not buckets.Objects(f"{BUCKET}/failed").listed()
