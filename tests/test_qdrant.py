"""The index in a Qdrant database: embedded, and through the client's calls to a server that reads
them with the published schema."""

import re
import threading
import time

import numpy as np
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

qdrant_client = pytest.importorskip("qdrant_client")
from qdrant_client import models  # noqa: E402

from clara_jax.cli import main as cli  # noqa: E402
from clara_jax.config import ConfigError  # noqa: E402
from clara_jax.data.schemas import Document  # noqa: E402
from clara_jax.memory.store import Manifest, MemoryStore  # noqa: E402
from clara_jax.retrieval import index, qdrant  # noqa: E402
from clara_jax.retrieval.base import unit_vectors  # noqa: E402
from tests.helpers import free_port, refused  # noqa: E402

MANIFEST = Manifest("a compressor", 2, 16, 24, "float32")


def fill(store, names, version=0):
  rng = np.random.default_rng([version, len(names), names[0]])
  store.upsert(
    [Document(f"d{n}", f"text {n}, {version}", f"title {n}") for n in names],
    rng.normal(size=(len(names), 2, 16)).astype(np.float32),
  )


def recall(built, store, queries, k=10):
  rows, _ = built.search(queries, k)
  truth = np.argsort(-queries @ unit_vectors(store.memories()).T, 1, kind="stable")[:, :k]
  return np.mean([len(set(a) & set(b)) / k for a, b in zip(rows, store.rows[truth], strict=True)])


def queries(count=20):
  return unit_vectors(np.random.default_rng(9).normal(size=(count, 2, 16)))


def test_twenty_thousand_documents_and_a_thousand_changes(tmp_path):
  store = MemoryStore(str(tmp_path), MANIFEST)
  for start in range(0, 20_000, 2_000):
    fill(store, range(start, start + 2_000))
  built, changed = index.update(store, "qdrant")
  assert changed == 20_000 and recall(built, store, queries()) >= 0.99
  fill(store, range(0, 500), 1)
  store.delete([f"d{n}" for n in range(500, 1000)])
  built, changed = index.update(store, "qdrant")
  assert changed == 500 + 2 * 500 and len(built) == 19_500  # an upsert is a new row and an old one
  assert recall(built, store, queries()) >= 0.99
  among = store.rows[100:140]
  rows, scores = built.search(queries(), 10, among)
  expected = queries() @ unit_vectors(store.memories(among)).T
  np.testing.assert_array_equal(rows, among[np.argsort(-expected, 1)[:, :10]])
  np.testing.assert_allclose(scores, -np.sort(-expected, 1)[:, :10], atol=1e-5)
  store.close()


class Server:
  """A Qdrant server: requests are read by the client's published models and answered by its
  embedded mode."""

  def __init__(self):
    self.database = qdrant_client.QdrantClient(":memory:")
    self.requests, self.fails_after = [], None

  def routes(self):
    one = "/collections/{name}"
    return [
      Route("/collections", self.collections, methods=["GET"]),
      Route(f"{one}/exists", self.exists, methods=["GET"]),
      Route(one, self.create, methods=["PUT"]),
      Route(one, self.drop, methods=["DELETE"]),
      Route(f"{one}/points", self.upsert, methods=["PUT"]),
      Route(f"{one}/points/delete", self.delete, methods=["POST"]),
      Route(f"{one}/points/scroll", self.scroll, methods=["POST"]),
      Route(f"{one}/points/count", self.count, methods=["POST"]),
      Route(f"{one}/points/query/batch", self.query, methods=["POST"]),
    ]

  def respond(self, request, result):
    self.requests.append((request.method, re.sub(r"clara-[\w-]+", "NAME", request.url.path)))
    value = result.model_dump() if hasattr(result, "model_dump") else result
    return JSONResponse({"result": value, "status": "ok", "time": 0.0})

  async def collections(self, request):
    return self.respond(request, self.database.get_collections())

  async def exists(self, request):
    exists = self.database.collection_exists(request.path_params["name"])
    return self.respond(request, {"exists": exists})

  async def create(self, request):
    body = models.CreateCollection(**await request.json())
    name = request.path_params["name"]
    return self.respond(request, self.database.create_collection(name, body.vectors))

  async def drop(self, request):
    return self.respond(request, self.database.delete_collection(request.path_params["name"]))

  async def upsert(self, request):
    if self.fails_after == 0:
      return JSONResponse({"status": {"error": "out of disk"}}, 500)
    self.fails_after = None if self.fails_after is None else self.fails_after - 1
    assert request.query_params["wait"] == "true"
    body = models.PointsBatch(**await request.json())
    return self.respond(request, self.database.upsert(request.path_params["name"], body.batch))

  async def delete(self, request):
    body = models.PointIdsList(**await request.json())
    return self.respond(request, self.database.delete(request.path_params["name"], body))

  async def scroll(self, request):
    body = models.ScrollRequest(**await request.json())
    points, after = self.database.scroll(
      request.path_params["name"], limit=body.limit, offset=body.offset, with_payload=False
    )
    listed = [p.model_dump() for p in points]
    return self.respond(request, {"points": listed, "next_page_offset": after})

  async def count(self, request):
    models.CountRequest(**await request.json())
    return self.respond(request, self.database.count(request.path_params["name"]))

  async def query(self, request):
    body = models.QueryRequestBatch(**await request.json())
    responses = self.database.query_batch_points(request.path_params["name"], body.searches)
    return self.respond(request, [r.model_dump() for r in responses])


@pytest.fixture
def server():
  served, port = Server(), free_port()
  config = uvicorn.Config(
    Starlette(routes=served.routes()), port=port, log_level="error", lifespan="off"
  )
  running = uvicorn.Server(config)
  thread = threading.Thread(target=running.run)
  thread.start()
  while not running.started:
    time.sleep(0.01)
  served.url = f"http://127.0.0.1:{port}"
  yield served
  running.should_exit = True
  thread.join()


def test_a_server_is_written_to_once(server, tmp_path, monkeypatch):
  monkeypatch.setattr(qdrant, "NUMBERS", 32 * 50)
  store = MemoryStore(str(tmp_path), MANIFEST)
  fill(store, range(300))
  server.fails_after = 3
  with pytest.raises(ConfigError, match="upsert: .*out of disk.*rerun the command to resume"):
    index.update(store, "qdrant", url=server.url)
  server.fails_after = None
  built, changed = index.update(store, "qdrant", url=server.url)
  assert changed == 150 and recall(built, store, queries()) == 1
  fill(store, [5], 1)
  assert index.update(store, "qdrant", url=server.url)[1] == 2
  loaded = index.load(store)
  np.testing.assert_array_equal(loaded.search(queries(), 4)[0], built.search(queries(), 4)[0])
  assert {path for _, path in server.requests} == {
    "/collections",
    *(f"/collections/NAME{tail}" for tail in ("", "/exists", "/points", "/points/delete")),
    *(f"/collections/NAME/points/{tail}" for tail in ("scroll", "count", "query/batch")),
  }
  point = server.database.retrieve(
    server.database.get_collections().collections[0].name, [int(store.row("d7"))]
  )[0]
  assert point.payload == {"id": "d7", "title": "title 7"}
  store.compact()  # other rows: another collection, and the old one goes
  index.update(store, "qdrant", url=server.url)
  assert len(server.database.get_collections().collections) == 1
  assert recall(index.load(store), store, queries()) == 1
  server.database.delete_collection(server.database.get_collections().collections[0].name)
  with pytest.raises(index.MissingIndexError, match="no whole collection"):
    index.load(store)
  store.close()


def test_the_command_and_its_refusals(server, tmp_path, capsys):
  wide = MemoryStore(str(tmp_path / "wide"), Manifest("c", 16, 4096, 256, "bfloat16"))
  wide.append([Document("a", "text")], np.zeros((1, 16, 4096), np.float32))
  wide.close()
  said = refused("index", "--store", tmp_path / "wide", "--kind", "qdrant", "--url", server.url)
  assert "65536 dimensions" in said and "--dimensions" in said and not server.requests
  store = MemoryStore(str(tmp_path / "store"), MANIFEST)
  fill(store, range(40))
  store.close()
  command = ["index", "--store", str(tmp_path / "store"), "--json"]
  assert cli.main([*command, "--kind", "qdrant", "--url", server.url]) == 0
  assert f'"url": "{server.url}"' in capsys.readouterr().out
  assert cli.main(command) == 0  # the same again
  assert '"kind": "qdrant"' in capsys.readouterr().out
  said = refused(*command, "--kind", "qdrant", "--url", f"http://127.0.0.1:{free_port()}")
  assert "qdrant http://127.0.0.1" in said and "refused" in said.lower()
  assert "is of the index kind 'qdrant'" in refused(
    *command, "--kind", "exact", "--url", "http://x"
  )
