"""A server over a store that changes; several models; a port that is open before all is read."""

import itertools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
import pytest

from clara_jax.data.schemas import Document
from clara_jax.inference.answer import Answerer
from clara_jax.inference.checkpoint import Checkpoint
from clara_jax.inference.compress import manifest_of
from clara_jax.memory.store import MemoryStore
from clara_jax.model import Clara
from clara_jax.retrieval import index as indices
from clara_jax.retrieval.base import unit_vectors
from clara_jax.serving import server
from clara_jax.testing import tiny
from tests.helpers import free_port, question, running

ROOT = pathlib.Path(__file__).parents[1]
LAG = 10.0  # seconds that a server on a busy machine may be behind


def checkpoint():
  return Checkpoint(Clara(tiny.config()), tiny.prompt_tokenizer(), tiny.weights())


def documents(ids, version, chance):
  vectors = chance.normal(size=(len(ids), 2, 16)).astype(np.float32)
  return [Document(i, f"{i} in version {version}.") for i in ids], vectors


def new_store(path, count=50):
  loaded = checkpoint()
  store = MemoryStore(str(path), manifest_of(loaded.model, loaded.weights))
  store.upsert(*documents([f"d{i}" for i in range(count)], 0, np.random.default_rng(0)))
  store.close()
  return store


class History:
  """The store's states, each with the time from which it counted."""

  def __init__(self, directory):
    self._directory = directory
    self.states = []
    self.note()

  def note(self):
    before = time.monotonic()
    store = MemoryStore(self._directory)
    texts = {d.id: d.text for d in store.documents()}
    ids = [d.id for d in store.documents()]
    vectors = unit_vectors(store.memories())
    self.states.append((before, time.monotonic(), texts, ids, vectors))

  def is_right(self, found, query, start, end):
    """Whether these are the nearest documents of a state that counted meanwhile, or shortly
    before."""
    for number, (_, since, texts, ids, vectors) in enumerate(self.states):
      later = self.states[number + 1 :]
      until = later[0][1] if later else float("inf")
      if since > end + 0.5 or until < start - LAG:
        continue
      order = np.argsort(-(vectors @ query), kind="stable")[: len(found)]
      if [(d["id"], d["text"]) for d in found] == [(ids[i], texts[ids[i]]) for i in order]:
        return True
    return False


@pytest.mark.parametrize("kind", ["exact", "scann"])
def test_a_store_that_changes_while_it_is_asked(tmp_path, kind):
  """A thousand upserts and deletions, compactions, indices; sixteen clients, no wrong answer."""
  if not indices.available(kind):
    pytest.skip(f"{kind} is not installed")
  path = tmp_path / "store"
  new_store(path)
  indices.update(MemoryStore(str(path)), "exact")
  if kind == "scann":  # the tiny store is searched as a whole: results are exact
    indices.update(MemoryStore(str(path)), "scann")
  answerer = Answerer(checkpoint(), MemoryStore(str(path)), max_new_tokens=2)
  queries = {q: unit_vectors(answerer._queries([_asked(q)]))[0] for q in map(question, range(4))}
  history, wrong, done, asked = History(str(path)), [], threading.Event(), []
  with running(answerer, server.Limits(batch=8), follow=0.02) as (client, _):
    client.post("/answer", json={"question": question(), "k": 3})  # compiles

    def ask(number):
      chance = random.Random(number)
      while not done.is_set():
        q, start = chance.choice(list(queries)), time.monotonic()
        whole = chance.random() < 0.2
        response = client.post("/answer" if whole else "/search", json={"question": q, "k": 3})
        asked.append((q, start, time.monotonic(), response))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
    for thread in threads:
      thread.start()
    chance = np.random.default_rng(1)
    # Twenty changes, or as many as a busy machine needs to answer in between.
    for version in itertools.count(1):
      if version > 20 and len(asked) > 100 and len(versions(asked)) > 5 or version > 200:
        break
      writer = MemoryStore(str(path))
      changed = chance.choice(80, 45, replace=False)
      writer.upsert(*documents([f"d{i}" for i in changed], version, chance))
      history.note()
      writer.delete([f"d{i}" for i in chance.choice(80, 20, replace=False)])
      history.note()
      if version % 5 == 0:
        writer.compact()
        indices.update(MemoryStore(str(path)), kind)
        history.note()
      time.sleep(0.3)
    time.sleep(0.5)
    done.set()
    for thread in threads:
      thread.join()
    for q, start, end, response in asked:
      found = response.json().get("documents")
      if response.status_code != 200 or not history.is_right(found, queries[q], start, end):
        wrong.append(response.text)
    deadline = time.monotonic() + 30
    while client.get("/healthz").json()["documents"] != len(MemoryStore(str(path))):
      assert time.monotonic() < deadline
      time.sleep(0.05)
  assert not wrong, (len(wrong), wrong[:2])
  assert len(asked) > 100 and len(versions(asked)) > 5


def versions(asked):
  """Of the documents that were found."""
  return {d["text"].split()[-1] for *_, r in list(asked) for d in r.json().get("documents", ())}


def _asked(q):
  from clara_jax.inference.answer import Question

  return Question(q)


def test_several_models(tmp_path):
  answerers = {}
  for name, count in (("small", 10), ("large", 60)):
    new_store(tmp_path / name, count)
    store = MemoryStore(str(tmp_path / name))
    answerers[name] = Answerer(
      checkpoint(), store, index=indices.build(store), max_new_tokens=2, top_k=2
    )
  with running(answerers, server.Limits()) as (client, _):
    assert client.get("/healthz").json()["models"] == {"small": 10, "large": 60}
    q = question()
    for name, answerer in answerers.items():
      (expected,) = answerer.search([_asked(q)])
      found = client.post("/search", json={"question": q, "model": name}).json()["documents"]
      assert [d["id"] for d in found] == [d.id for d in expected]
    first = client.post("/search", json={"question": q}).json()["documents"]
    assert [d["id"] for d in first] == [d.id for d in answerers["small"].search([_asked(q)])[0]]
    other = client.post("/answer", json={"question": q, "model": "other"})
    assert other.status_code == 404 and "one of ['small', 'large']" in other.json()["error"]
    assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["small", "large"]


@pytest.fixture
def served(tmp_path):
  """The command, over a checkpoint and two stores."""
  tiny.write_checkpoint(str(tmp_path / "checkpoint"), tiny.config(), tiny.weights())
  for name in ("one", "two"):
    new_store(tmp_path / name)
    indices.update(MemoryStore(str(tmp_path / name)), "exact")
  port = free_port()
  process = subprocess.Popen(
    [
      *(sys.executable, "-m", "clara_jax", "serve", "--checkpoint", tmp_path / "checkpoint"),
      *("--store", tmp_path / "one", "--port", str(port), "--max-batch", "2"),
      *("--model", "second", tmp_path / "checkpoint", tmp_path / "two"),
    ],
    cwd=ROOT,
    text=True,
    stderr=subprocess.PIPE,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
  )
  yield process, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
  process.kill()
  process.wait()


def first_health(process, client):
  deadline = time.monotonic() + 60
  while True:
    try:
      return client.get("/healthz")
    except httpx.TransportError:
      assert process.poll() is None and time.monotonic() < deadline
      time.sleep(0.02)


def test_the_port_is_open_before_all_is_read(served):
  process, client = served
  health = first_health(process, client)
  assert health.status_code == 503 and health.json()["status"] == "starting"
  refused = client.post("/answer", json={"question": "Who?"})
  assert refused.status_code == 503 and "not ready" in refused.json()["error"]
  chat = client.get("/v1/models")
  assert chat.status_code == 503 and chat.json()["error"]["type"] == "server_error"
  progress = set()
  while (health := client.get("/healthz")).status_code == 503:
    progress.add(health.json()["progress"].split()[0])
    time.sleep(0.02)
  assert {"reading", "compiling"} <= progress
  assert health.json()["models"] == {"clara": 50, "second": 50}
  ids = [{"question": question(), "model": name} for name in ("clara", "second")]
  assert [client.post("/search", json=body).status_code for body in ids] == [200, 200]
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=30) == 0


def test_it_may_be_stopped_while_it_starts(served):
  process, client = served
  first_health(process, client)
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=30) == 0
  assert "Traceback" not in process.stderr.read()


def test_what_cannot_be_served_is_a_line(tmp_path):
  given = [sys.executable, "-m", "clara_jax", "serve", "--checkpoint", str(tmp_path), "--store"]
  for more, said in (
    ([str(tmp_path), "--port", "99999"], "--port 99999: expected 0 to 65535"),
    ([str(tmp_path), "--port", str(free_port())], "not a memory store"),
    ([str(tmp_path), "--name", "a", "--model", "a", "b", "c"], "a name of its own"),
  ):
    run = subprocess.run([*given, *more], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert run.returncode == 2 and said in run.stderr and "Traceback" not in run.stderr, run.stderr


def test_what_is_served_is_described(tmp_path):
  new_store(tmp_path / "store")
  store = MemoryStore(str(tmp_path / "store"))
  answerer = Answerer(checkpoint(), store, index=indices.build(store), max_new_tokens=2)
  with running(answerer, server.Limits()) as (client, _):
    described = client.get("/openapi.json").json()
  assert "/v1/chat/completions" in described["paths"]
  assert json.dumps(described).count("whole_tokens")
