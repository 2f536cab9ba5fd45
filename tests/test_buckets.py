"""Paths in a bucket, against an emulator of Cloud Storage on this machine."""

import json
import pathlib
import subprocess
import sys
import time
import urllib.request

import pytest

gcsfs = pytest.importorskip("gcsfs")
pytest.importorskip("gcp_storage_emulator")

from etils import epath  # noqa: E402

from clara_jax import buckets  # noqa: E402
from clara_jax.cli import main as cli  # noqa: E402
from clara_jax.data.schemas import write_rows  # noqa: E402
from clara_jax.memory.store import MemoryStore  # noqa: E402
from clara_jax.testing import tiny  # noqa: E402
from clara_jax.training import trainer  # noqa: E402
from tests.helpers import free_port, refused  # noqa: E402

ROOT = pathlib.Path(__file__).parents[1]
BUCKET = "gs://my-bucket"


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
  """The environment in which gcsfs and TensorStore find the emulator."""
  port = free_port()
  address = f"http://127.0.0.1:{port}"
  emulator = subprocess.Popen(
    [
      *(sys.executable, "-m", "gcp_storage_emulator", "start", "--in-memory"),
      *(f"--port={port}", "--host=127.0.0.1", "--default-bucket=my-bucket"),
    ],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("STORAGE_EMULATOR_HOST", address)
    patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
    patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # the emulator does not know
    patch.setenv("CLARA_CACHE", str(tmp_path_factory.mktemp("cache")))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
      try:
        urllib.request.urlopen(f"{address}/storage/v1/b/my-bucket", timeout=5)
        break
      except OSError:
        time.sleep(0.1)
    yield address
  emulator.kill()
  emulator.wait()


def upload(folder, to):
  for file in pathlib.Path(folder).rglob("*"):
    if file.is_file():
      (epath.Path(to) / str(file.relative_to(folder))).write_bytes(file.read_bytes())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, storage):
  """On this machine and in the bucket: a pretrained base, rows, documents."""
  path = tmp_path_factory.mktemp("local")
  base = trainer.Trainer(
    tiny.run_config("pretrain", steps=2),
    tiny.prompt_tokenizer(),
    {},
    tiny.rows("pretrain"),
    workdir=str(path / "base"),
    progress=False,
  ).run()
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


def test_documents_checkpoint_and_store_in_a_bucket(folder, tmp_path, capsys):
  start = f"{BUCKET}/start"
  report = {}
  for name, documents, checkpoint in (
    ("local", folder / "documents.jsonl", folder / "start"),
    ("bucket", f"{BUCKET}/documents.jsonl", start),
  ):
    store = tmp_path / name
    arguments = ("--documents", documents, "--store", store, "--json")
    report[name] = json.loads(run(capsys, "compress", "--checkpoint", checkpoint, *arguments))
    run(capsys, "index", "--store", store, "--kind", "exact")
  assert report["local"]["documents"] == report["bucket"]["documents"] > 5
  assert (
    MemoryStore(str(tmp_path / "local")).memories()
    == MemoryStore(str(tmp_path / "bucket")).memories()
  ).all()
  upload(tmp_path / "local", f"{BUCKET}/store")
  question = next(iter(tiny.world().question_rows(1, test=True)))["question"]
  ask = ("--max-new-tokens", 4, "--json", question)
  answers = [
    json.loads(run(capsys, "ask", "--checkpoint", c, "--store", s, *ask))["answers"][0]
    for c, s in ((folder / "start", tmp_path / "local"), (start, f"{BUCKET}/store"))
  ]
  for answer in answers:
    answer.pop("timings_ms")
  assert answers[0] == answers[1]


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
  given = ("--checkpoint", folder / "start", "--documents", folder / "documents.jsonl")
  said = refused("compress", *given, "--store", f"{BUCKET}/new")
  assert f"{BUCKET}/new" in said and "local directory" in said
  assert f"{BUCKET}/nothing: there is nothing" in refused("index", "--store", f"{BUCKET}/nothing")
  said = refused("convert", f"{BUCKET}/nothing", tmp_path / "out", "--to", "clara")
  assert f"{BUCKET}/nothing: there is nothing" in said
