"""Search in a Qdrant database: a server, or its embedded mode beside the store.

One collection a store: points are the store's rows, vectors its unit vectors (or their projection),
scores inner products. What was written when a run stopped is not written again: DIR/qdrant.json
says which collection belongs to which state of the store.
"""

import atexit
import json
import os
import re
import sqlite3
import uuid
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath

from clara_jax import buckets, io
from clara_jax.config import ConfigError
from clara_jax.memory.store import MemoryStore

MOST_DIMENSIONS = 65_535
API_KEY = "QDRANT_API_KEY"
SECONDS = 60
PAGE = 10_000
# Numbers in a request: about 10 MB as JSON, of the 32 MB that a server takes.
NUMBERS = 500_000


class QdrantIndex:
  """A collection as a `base.Retriever`.

  Args:
    url: of the server; None: embedded, in DIR/qdrant.
    store: whose rows it has.
    collection: its name.

  Attributes:
    changed: rows that `fill` has written or removed.
  """

  def __init__(self, url: str | None, store: MemoryStore, collection: str):
    if url is None and buckets.is_remote(store.location):
      raise ConfigError(f"{store.location}: the embedded database is on a disk; name --url")
    self._url, self._store, self._collection = url, store, collection
    self._where = url or os.path.join(store.directory, "qdrant")
    self._client = _client(url, self._where)
    self.changed = 0

  @property
  def rows(self) -> np.ndarray:
    """See `base.Retriever`; asks the server."""
    return np.sort(np.fromiter(self._ids(), np.int64))

  def _ids(self) -> Iterator[int]:
    offset = None
    while True:
      points, offset = self._call(
        "scroll",
        self._collection,
        limit=PAGE,
        offset=offset,
        with_payload=False,
        with_vectors=False,
      )
      yield from (point.id for point in points)
      if offset is None:
        return

  def __len__(self) -> int:
    return self._call("count", self._collection, exact=True).count

  def exists(self) -> bool:
    """Whether the server has the collection."""
    return self._call("collection_exists", self._collection)

  def create(self, dimension: int) -> None:
    """Makes the collection where there is none."""
    from qdrant_client import models

    if not self.exists():
      self._call(
        "create_collection",
        self._collection,
        vectors_config=models.VectorParams(size=dimension, distance=models.Distance.DOT),
      )

  def fill(self, rows: np.ndarray, vectors_of: Callable[[np.ndarray], np.ndarray]) -> None:
    """Makes the collection's rows these: writes what it lacks, removes what is not among them."""
    existing = self.rows
    gone, lacking = np.setdiff1d(existing, rows), np.setdiff1d(rows, existing)
    self.changed = len(gone) + len(lacking)
    self.remove(gone)
    for start in range(0, len(lacking), 4096):
      part = lacking[start : start + 4096]
      self.add(part, vectors_of(part))

  def add(self, rows: np.ndarray, vectors: np.ndarray) -> None:
    """See `base.Retriever`."""
    from qdrant_client import models

    size = max(1, NUMBERS // vectors.shape[1])
    for start in range(0, len(rows), size):
      part = rows[start : start + size]
      payloads = [{"id": d.id, "title": d.title} for d in self._store.documents(part)]
      self._call(
        "upsert",
        self._collection,
        points=models.Batch(
          ids=part.tolist(),
          vectors=np.asarray(vectors[start : start + size], np.float32).tolist(),
          payloads=payloads,
        ),
        wait=True,
      )

  def remove(self, rows: np.ndarray) -> None:
    """See `base.Retriever`."""
    from qdrant_client import models

    for start in range(0, len(rows), PAGE):
      points = models.PointIdsList(points=np.asarray(rows[start : start + PAGE]).tolist())
      self._call("delete", self._collection, points_selector=points, wait=True)

  def search(
    self, queries: np.ndarray, k: int, among: np.ndarray | None = None
  ) -> tuple[np.ndarray, np.ndarray]:
    """See `base.Retriever`."""
    from qdrant_client import models

    only = None
    if among is not None:
      only = models.Filter(must=[models.HasIdCondition(has_id=np.asarray(among).tolist())])
    requests = [
      models.QueryRequest(query=q, limit=k, filter=only, with_payload=False)
      for q in np.asarray(queries, np.float32).tolist()
    ]
    rows = np.full((len(queries), k), -1, np.int64)
    scores = np.full((len(queries), k), -np.inf, np.float32)
    for place, response in enumerate(
      self._call("query_batch_points", self._collection, requests=requests)
    ):
      # The server's order of equal scores is its own.
      points = sorted(response.points, key=lambda p: (-p.score, p.id))
      rows[place, : len(points)] = [p.id for p in points]
      scores[place, : len(points)] = [p.score for p in points]
    return rows, scores

  def save(self, directory: str) -> None:
    """Nothing: the database has it. Collections of the store that no longer count are dropped."""
    prefix = self._collection.rpartition("-")[0] + "-"
    for other in self._call("get_collections").collections:
      if other.name.startswith(prefix) and other.name != self._collection:
        self._call("delete_collection", other.name)

  def _call(self, name: str, *arguments: Any, **options: Any) -> Any:
    from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

    try:
      return getattr(self._client, name)(*arguments, **options)
    except (ResponseHandlingException, UnexpectedResponse) as error:
      text = " ".join(str(error).split())
      raise ConfigError(
        f"qdrant {self._where}: {name}: {text[:200]}; what was written is kept, rerun the command "
        f"to resume"
      ) from None


def check_dimension(dimension: int) -> None:
  """Refuses what a collection cannot hold, before any work.

  Raises:
    ConfigError: naming the option that helps.
  """
  if dimension > MOST_DIMENSIONS:
    raise ConfigError(
      f"index kind 'qdrant': vectors have {dimension} dimensions, Qdrant takes {MOST_DIMENSIONS} "
      f"at most; name --dimensions (PCA) or --memory-tokens"
    )


def build(
  url: str | None,
  store: MemoryStore,
  dimension: int,
  digest: str,
  vectors_of: Callable[[np.ndarray], np.ndarray],
) -> QdrantIndex:
  """The store's collection, made or brought up to date.

  Args:
    url: of the server, None: embedded.
    store: whose memory tokens it searches.
    dimension: of the vectors.
    digest: of what makes the vectors from memory tokens.
    vectors_of: rows [n] -> [n, dimension].
  """
  check_dimension(dimension)
  index = QdrantIndex(url, store, _collection(store, digest))
  index.create(dimension)
  index.fill(store.rows, vectors_of)
  return index


def load(url: str | None, store: MemoryStore) -> QdrantIndex | None:
  """The store's collection as it is; None where it is not whole."""
  record = _record(store)
  if record is None:
    return None
  index = QdrantIndex(url, store, record["collection"])
  return index if index.exists() and len(index) == len(store) else None


def _collection(store: MemoryStore, digest: str) -> str:
  """The name of the collection for this state of the store, also if it has grown since: then the
  rows of before are the same."""
  record = _record(store)
  here = _place(store)  # a copy of the store gets a collection of its own
  if record is not None and record["directory"] != here:
    record = None
  if (
    record is not None
    and record["digest"] == digest
    and record["memory_tokens"] == store.manifest.num_memory_tokens
    and record["generation"] == store.manifest.generation
    and record["identity"] == store.identity(record["segments"])
  ):
    return record["collection"]
  owner = record["collection"].split("-")[1] if record else uuid.uuid4().hex
  name = f"clara-{owner}-{uuid.uuid4().hex[:8]}"
  values = {
    "collection": name,
    "directory": here,
    "digest": digest,
    "memory_tokens": store.manifest.num_memory_tokens,
    "generation": store.manifest.generation,
    "segments": store.segments,
    "identity": store.identity(),
  }
  io.write(_file(store), json.dumps(values))
  return name


def _place(store: MemoryStore) -> str:
  return store.location if buckets.is_remote(store.location) else os.path.realpath(store.directory)


def _file(store: MemoryStore) -> epath.Path:
  return epath.Path(store.location) / "qdrant.json"


def _record(store: MemoryStore) -> dict[str, Any] | None:
  try:
    record = io.parse_json(_file(store).read_bytes())
  except (OSError, ValueError):  # a collection can be made again
    return None
  names = {
    "collection",
    "directory",
    "digest",
    "memory_tokens",
    "generation",
    "segments",
    "identity",
  }
  whole = isinstance(record, dict) and names <= set(record)
  return record if whole and re.fullmatch(r"clara-\w+-\w+", str(record["collection"])) else None


# The embedded mode has one client a folder; it lives as long as an index needs it.
_CLIENTS: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


@atexit.register
def _close() -> None:
  """A client cannot close itself when Python has ended."""
  for client in list(_CLIENTS.values()):
    client.close()


def _client(url: str | None, where: str) -> Any:
  if where not in _CLIENTS:
    _CLIENTS[where] = client = _connect(url, where)
    return client
  return _CLIENTS[where]


def _connect(url: str | None, where: str) -> Any:
  try:
    import qdrant_client
  except ImportError:
    raise ConfigError("index kind 'qdrant': pip install 'clara_jax[qdrant]'") from None
  if url is None:
    try:
      return qdrant_client.QdrantClient(path=where)
    except (ValueError, KeyError, sqlite3.Error) as error:
      raise ConfigError(
        f"{where}: damaged ({error}); remove it and run clara index again"
      ) from None
    except RuntimeError as error:
      raise ConfigError(
        f"{where}: {error}; the embedded mode is for one process, a server (--url) for several"
      ) from None
  try:
    return qdrant_client.QdrantClient(
      url=url, api_key=os.environ.get(API_KEY), timeout=SECONDS, check_compatibility=False
    )
  except ValueError as error:
    raise ConfigError(f"--url {url}: {error}") from None
