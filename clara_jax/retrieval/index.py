"""The index of a store: built, saved beside it, loaded, kept up to date.

Vectors are flattened memory tokens, normalized; the inner product is then the score of the paper
(Eq. 3.1). An index lies beside its store and says of which rows it is:

    DIR/index/index.json      kind, settings, a digest of the rows, the folder of its files with their checksums
             /000003/         that folder; a new index gets the next one, and counts when index.json names it
"""  # noqa: E501

import contextlib
import dataclasses
import hashlib
import importlib.util
import pathlib
import shutil
import tempfile
import uuid
from typing import Any

import numpy as np
from etils import epath

from clara_jax import buckets, io
from clara_jax.config import ConfigError
from clara_jax.errors import InputError
from clara_jax.memory.store import MemoryStore
from clara_jax.retrieval import projection as projections
from clara_jax.retrieval import qdrant
from clara_jax.retrieval.base import Retriever, unit_vectors
from clara_jax.retrieval.projection import Projection

KINDS = ("exact", "scann", "qdrant")
VECTORS = ("float32", "bfloat16", "int8")
FOLDER = "index"
# More changed documents than this share, and the index is built anew.
CHANGED = 0.2


class MissingIndexError(InputError):
  """There is no index, or it does not fit its store."""


@dataclasses.dataclass(frozen=True)
class IndexSettings:
  """How an index is made.

  Attributes:
    kind: 'exact', 'scann' or 'qdrant'.
    dimensions: d' of a learned projection; None searches the full vectors.
    vectors: 'float32', 'bfloat16' or 'int8', what the devices hold of the vectors (exact); the
      best are re-ranked on the full ones.
    recall: below 1, the best are searched approximately on TPU, with this expected recall of a
      device's best (exact).
    url: of the database; None: embedded, beside the store (qdrant).

  Raises:
    MissingIndexError: an unknown kind.
    ConfigError: another value is none of those, or is not of the kind.
  """

  kind: str = "exact"
  dimensions: int | None = None
  vectors: str = "float32"
  recall: float = 1.0
  url: str | None = None

  def __post_init__(self):
    if self.kind not in KINDS:
      raise MissingIndexError(f"index kind {self.kind!r}: expected one of {list(KINDS)}")
    if self.vectors not in VECTORS:
      raise ConfigError(f"vectors={self.vectors!r}: expected one of {list(VECTORS)}")
    if not 0 < self.recall <= 1:
      raise ConfigError(f"recall={self.recall}: expected more than 0 and at most 1")
    if self.kind != "exact" and (self.vectors, self.recall) != ("float32", 1.0):
      raise ConfigError(f"vectors and recall are of the index kind 'exact', not of {self.kind!r}")
    if self.kind != "qdrant" and self.url is not None:
      raise ConfigError(f"url is of the index kind 'qdrant', not of {self.kind!r}")


def available(kind: str) -> bool:
  """Whether what an index needs is installed."""
  needs = {"scann": "scann", "qdrant": "qdrant_client"}
  return kind not in needs or importlib.util.find_spec(needs[kind]) is not None


def build(
  store: MemoryStore, kind: str = "exact", dimensions: int | None = None, **settings: Any
) -> Retriever:
  """An index over all documents of a store.

  Args:
    store: whose memory tokens it searches.
    kind, dimensions, settings: see `IndexSettings`.

  Raises:
    MissingIndexError: an unknown kind, or no documents.
    ConfigError: what it needs is not installed, or a setting does not fit.
  """
  how = IndexSettings(kind, dimensions, **settings)
  return _made(store, how)


def _made(store: MemoryStore, how: IndexSettings, projection: Projection | None = None):
  """An index; a projection is learned unless one is given."""
  dimensions = how.dimensions
  if not len(store):
    raise MissingIndexError(f"{store.location}: the store has no documents to index")
  if how.kind == "qdrant":
    qdrant.check_dimension(dimensions or store.manifest.num_memory_tokens * store.manifest.width)
  if dimensions is not None and projection is None:
    sample = np.random.default_rng(0).permutation(store.rows)[: projections.SAMPLE]
    projection = projections.learn(_vectors_of(store)(np.sort(sample)), dimensions)
  return _reranked(_build(how, store, projection), how, projection, store)


def _reranked(
  index: Retriever, how: IndexSettings, projection: Projection | None, store: MemoryStore
) -> Retriever:
  """Where less than the full vectors is searched, the best are re-ranked on these."""
  if projection is None and (how.vectors, how.recall) == ("float32", 1.0):
    return index
  return projections.RerankedIndex(index, projection, _vectors_of(store))


def _vectors_of(store: MemoryStore):
  return lambda rows: unit_vectors(store.memories(rows))


def _build(how: IndexSettings, store: MemoryStore, projection) -> Retriever:
  full, dimension = _vectors_of(store), store.manifest.num_memory_tokens * store.manifest.width
  vectors_of = full if projection is None else lambda rows: projection.of_documents(full(rows))
  dimension = dimension if projection is None else len(projection.components)
  if how.kind == "exact":
    from clara_jax.retrieval import exact

    index = exact.ExactIndex(dimension, recall_target=how.recall, dtype=how.vectors)
    index.fill(store.rows, vectors_of)
    return index
  if how.kind == "qdrant":
    digest = "" if projection is None else projection.digest
    return qdrant.build(how.url, store, dimension, digest, vectors_of)
  from clara_jax.retrieval import scann

  vectors = np.empty((len(store), dimension), np.float32)
  for start in range(0, len(store), 4096):
    vectors[start : start + 4096] = vectors_of(store.rows[start : start + 4096])
  return scann.build(store.rows, vectors)


def save(
  index: Retriever,
  kind: str,
  store: MemoryStore,
  dimensions: int | None = None,
  **settings: Any,
) -> None:
  """Saves an index beside its store, in the place of the one that is there; `store` is opened for
  the memory tokens that it searches (`MemoryStore.first`)."""
  how = IndexSettings(kind, dimensions, **settings)
  record = {
    **dataclasses.asdict(how),
    "memory_tokens": store.manifest.num_memory_tokens,
    "documents": len(index),
    "generation": store.manifest.generation,
    "rows": _digest(index.rows),
    "segments": store.segments,
    "identity": store.identity(),
  }
  if buckets.is_remote(store.location):
    with tempfile.TemporaryDirectory() as folder:
      _upload(index, record, store, epath.Path(folder))
    store.refresh()
    return
  top = epath.Path(store.directory) / FOLDER
  top.mkdir(exist_ok=True)
  number = max((int(f.name) for f in top.iterdir() if f.name.isdigit()), default=-1) + 1
  folder = top / f"{number:06}"
  folder.mkdir()
  try:
    io.write(top / "index.json", _written(index, record, folder))
  except BaseException:
    shutil.rmtree(str(folder), ignore_errors=True)
    raise
  for old in top.iterdir():
    if old.name not in ("index.json", folder.name):
      shutil.rmtree(str(old), ignore_errors=True) if old.is_dir() else old.unlink(missing_ok=True)


def _written(index: Retriever, record: dict[str, Any], folder: epath.Path) -> bytes:
  """Writes an index's files; returns what index.json says of them."""
  index.save(str(folder))
  checksums = {f.name: io.checksum(f) for f in io.files(folder)}
  return io.sealed({**record, "folder": folder.name, "checksums": checksums})


def _upload(
  index: Retriever, record: dict[str, Any], store: MemoryStore, temporary: epath.Path
) -> None:
  """Writes an index to a bucket: its files to a folder that is nobody else's, then index.json where
  nobody else has written it meanwhile."""
  objects = buckets.Objects(f"{store.location.rstrip('/')}/{FOLDER}")
  before = objects.listed()
  folder = temporary / uuid.uuid4().hex[:12]
  folder.mkdir()
  saying = _written(index, record, folder)
  for file in io.files(folder):
    objects.write(f"{folder.name}/{file.name}", pathlib.Path(str(file)), 0)
  generation = int(before["index.json"].generation) if "index.json" in before else 0
  try:
    objects.write("index.json", saying, generation)
  except buckets.ConflictError:
    raise MissingIndexError(
      f"{store.location}: another process has made an index meanwhile; that one counts"
    ) from None
  for name, blob in before.items():
    if name != "index.json":
      objects.delete(name, int(blob.generation))


def saved_bytes(store: MemoryStore) -> int:
  """Size of the saved index on disk."""
  return sum(file.stat().length for file in io.files(epath.Path(store.directory) / FOLDER))


def _files(store: MemoryStore, saved: dict) -> str:
  """The folder of a saved index, whole.

  Raises:
    MissingIndexError: naming the file that is damaged.
  """
  folder = epath.Path(store.directory) / FOLDER / saved["folder"]
  for name, expected in saved["checksums"].items():
    file = folder / name
    if not file.exists() or io.checksum(file) != expected:
      raise MissingIndexError(
        f"{file}: is {'damaged' if file.exists() else 'missing'}; run clara index again"
      )
  return str(folder)


def load(store: MemoryStore) -> Retriever:
  """The index beside a store.

  Raises:
    MissingIndexError: there is none, or the store has changed since.
  """
  saved = _saved(store)
  if saved is None:
    raise MissingIndexError(
      f"{store.location}: has no index; make one with clara index --store {store.location}"
    )
  if saved["generation"] != store.manifest.generation:
    raise MissingIndexError(
      f"{store.location}: the store was compacted since its index was made; run clara index again"
    )
  if not _is_current(store, saved):
    raise MissingIndexError(
      f"{store.location}: the store has changed since its index was made ({saved['documents']} "
      f"documents then, "
      f"{len(store)} now); run clara index again"
    )
  return _load(store, saved)


def state(store: MemoryStore) -> str:
  """'none', 'current', or 'out of date'."""
  saved = _saved(store)
  if saved is None:
    return "none"
  return (
    "current"
    if saved["generation"] == store.manifest.generation and _is_current(store, saved)
    else "out of date"
  )


def _is_current(store: MemoryStore, saved: dict) -> bool:
  return saved["rows"] == _digest(store.rows) and saved["identity"] == store.identity()


def _has_grown(store: MemoryStore, saved: dict) -> bool:
  """Whether the store begins with what the index was made of: writers that work at the same time
  may put segments between others."""
  return saved["identity"] == store.identity(saved["segments"])


def saved_settings(store: MemoryStore) -> dict:
  """The fields of `IndexSettings` and `memory_tokens` (how many of each document it searches) of
  the saved index; empty where there is none."""
  saved = _saved(store)
  if saved is None:
    return {}
  return {**dataclasses.asdict(_settings(saved)), "memory_tokens": saved["memory_tokens"]}


def _settings(saved: dict) -> IndexSettings:
  """Those of version 0.1 lack the later fields."""
  names = [field.name for field in dataclasses.fields(IndexSettings)]
  return IndexSettings(**{name: saved[name] for name in names if name in saved})


def _load(store: MemoryStore, saved: dict) -> Retriever:
  store = store.first(saved["memory_tokens"])
  folder = _files(store, saved)
  projection = None
  if saved["dimensions"] is not None:
    projection = projections.load(folder)
  if saved["kind"] == "exact":
    index = _build(_settings(saved), store, projection)  # the store has the vectors
  elif saved["kind"] == "qdrant":
    index = qdrant.load(saved.get("url"), store)
    if index is None:
      raise MissingIndexError(
        f"{store.location}: the database has no whole collection of it; run clara index again"
      )
  else:
    from clara_jax.retrieval import scann

    index = scann.load(folder)
  return _reranked(index, _settings(saved), projection, store)


def update(
  store: MemoryStore, kind: str, dimensions: int | None = None, **settings: Any
) -> tuple[Retriever, int]:
  """Brings the saved index up to date, or builds it, and saves it; nobody else changes the store
  meanwhile.

  Returns:
    (index, number of documents that were added or removed; all of them for a new one).

  Raises:
    StoreError: another process is at it, or compacts the store.
    MissingIndexError, ConfigError: see `build`.
  """
  with store.reading("index", "builds its index"):
    built, changed = refresh(store, kind, dimensions, **settings)
    save(built, kind, store, dimensions, **settings)
  return built, changed


def refresh(
  store: MemoryStore, kind: str, dimensions: int | None = None, **settings: Any
) -> tuple[Retriever, int]:
  """The saved index with the store's changes, or a new one where there is none, it is damaged, or
  much has changed.

  Returns:
    (index, number of documents that were added or removed; all of them for a new one).
  """
  saved, how = _saved(store), IndexSettings(kind, dimensions, **settings)
  like = saved is not None and (
    _settings(saved),
    saved["memory_tokens"],
    saved["generation"],
  ) == (how, store.manifest.num_memory_tokens, store.manifest.generation)
  if kind == "qdrant":  # what the database has is written once
    projection = None
    if like and dimensions is not None and _has_grown(store, saved):
      with contextlib.suppress(MissingIndexError):
        projection = projections.load(_files(store, saved))
    index = _made(store, how, projection)
    return index, getattr(index, "inner", index).changed
  if not like or kind == "exact" or not _has_grown(store, saved):
    return build(store, **dataclasses.asdict(how)), len(store)
  try:
    index = _load(store, saved)
  except MissingIndexError:
    return build(store, **dataclasses.asdict(how)), len(store)
  gone, new = np.setdiff1d(index.rows, store.rows), np.setdiff1d(store.rows, index.rows)
  if len(gone) + len(new) > CHANGED * len(store):
    return build(store, **dataclasses.asdict(how)), len(store)
  if len(gone):
    index.remove(gone)
  for start in range(0, len(new), 4096):
    index.add(new[start : start + 4096], _vectors_of(store)(new[start : start + 4096]))
  return index, len(gone) + len(new)


def _saved(store: MemoryStore) -> dict[str, Any] | None:
  """What index.json says; None where there is none, or it is damaged or has no checksum: an index
  can be made again."""
  file = epath.Path(store.directory) / FOLDER / "index.json"
  try:
    return io.unsealed(file.read_bytes()) if file.exists() else None
  except ValueError:
    return None


def _digest(rows: np.ndarray) -> str:
  return hashlib.blake2b(np.ascontiguousarray(rows, np.int64).tobytes(), digest_size=16).hexdigest()


class Index:
  """The search index of a store, as one name: `Index.build(store)` and `Index.load(store)` return a
  `base.Retriever`, `Index.update(store, kind)` returns it with the number of changed documents.
  """

  build = staticmethod(build)
  update = staticmethod(update)
  load = staticmethod(load)
