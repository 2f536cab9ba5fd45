"""Checkpoints, stores, indices and predictions that version 0.1 wrote are read, and its run is
resumed."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import tarfile

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

import clara_jax
from clara_jax.checkpoints.workdir import read_config
from clara_jax.data import schemas
from clara_jax.evaluation import evaluator
from clara_jax.inference.compress import check_compressor
from clara_jax.retrieval import index
from clara_jax.testing import tiny

KEPT = pathlib.Path(__file__).with_name("kept") / "v0.1.tar.gz"


@pytest.fixture
def kept(tmp_path, monkeypatch):
  """The files, in the working directory."""
  with tarfile.open(KEPT) as archive:
    archive.extractall(tmp_path, filter="data")
  monkeypatch.chdir(tmp_path)
  return np.load("expected.npz")


def test_a_run_of_before_is_resumed_to_the_same_end(kept):
  """Its configuration has the field `train.temperature`, which is `temperature_schedule` now."""
  config, base = read_config("joint")
  assert (
    json.loads(pathlib.Path("joint/config.json").read_text())["run"]["train"]["temperature"]
    == "learned"
  )
  assert config.train.temperature_schedule == "learned" and base == "base"
  with np.load("init.npz") as initial:
    weights = unflatten_dict({tuple(name.split("/")): initial[name] for name in initial.files})
  weights["base"] = clara_jax.load("base").weights["base"]
  result = clara_jax.train(
    dataclasses.replace(config, base=base), "joint", init_weights=weights, progress=False
  )
  assert result.metrics["step"] == 4
  resumed = np.concatenate(
    [np.ravel(x) for x in jax.tree.leaves(jax.device_get(result.weights["generator"]))]
  )
  # To the bit where JAX is that which wrote it.
  np.testing.assert_allclose(resumed, kept["generator"], atol=1e-6)


def test_a_store_of_before_is_read_searched_and_extended(kept):
  checkpoint = clara_jax.load("joint")
  store = clara_jax.MemoryStore("store")
  assert store.manifest.encoding == "int8" and len(store) == 12
  np.testing.assert_array_equal(
    np.asarray(store.memories(store.rows), np.float32), kept["memories"]
  )
  check_compressor(store, checkpoint.model, checkpoint.weights)
  assert store.verify()["documents"] == 12 and index.state(store) == "current"
  (answer,) = clara_jax.Answerer(checkpoint, store, max_new_tokens=2).answer(["Who?"])
  assert len(answer.documents) == 2
  more = [schemas.Document(**d) for d in tiny.world().documents(False)][:13]
  report = clara_jax.compress_corpus(checkpoint, more, "store", bucket=64, progress=False)
  assert (report.documents, report.skipped) == (13, 12)


def test_predictions_of_before_are_not_made_again(kept):
  checkpoint = clara_jax.load("joint")
  rows, before = (
    schemas.read_rows(["rows.jsonl"])[:4],
    pathlib.Path("predictions.jsonl").read_text(),
  )
  evaluator.evaluate(
    checkpoint,
    rows,
    "joint",
    batch_size=4,
    max_new_tokens=3,
    path="predictions.jsonl",
    progress=False,
  )
  assert pathlib.Path("predictions.jsonl").read_text() == before


def test_module_paths_of_before_still_work():
  """With a warning, each once; code of 0.1 that only moved runs unchanged."""
  code = """
import warnings
warnings.simplefilter("error", ImportWarning)
with warnings.catch_warnings(record=True) as seen:
  warnings.simplefilter("always")
  from clara_jax.interop import checkpoints, families
  from clara_jax.data.tokens import Layout
  from clara_jax.data.world import World
  from clara_jax.memory import quantise
  from clara_jax.quickstart.recipe import Sizes
  from clara_jax.synthesis.offline import Offline
  from clara_jax.training.checkpoint import Checkpointer
  import clara_jax.gradients.audit
said = [str(w.message) for w in seen if "clara_jax" in str(w.message)]
assert "clara_jax.interop.checkpoints is clara_jax.checkpoints.formats now" in said or (
  "clara_jax.checkpoints.checkpoints is clara_jax.checkpoints.formats now" in said), said
import clara_jax.checkpoints.formats as formats
from clara_jax.data.prompt_tokenizer import PromptTokenizer
assert checkpoints is formats and checkpoints.Opened is formats.LazyCheckpoint
assert Layout is PromptTokenizer
assert quantise.quantise is quantise.quantize
assert formats.__spec__.name == "clara_jax.checkpoints.formats"
try:
  import clara_jax.interop.nothing
except ModuleNotFoundError as error:
  assert "clara_jax.checkpoints.nothing" in str(error), error
"""
  subprocess.run([sys.executable, "-c", code], check=True)
