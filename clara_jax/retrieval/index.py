"""Search behind one protocol: unit vectors in, rows and cosines out.

Vectors are flattened memory tokens, normalised; the inner product is then the score of the paper (Eq. 3.1).
"""

import importlib.util
import json
from typing import Protocol

import numpy as np
from etils import epath

KINDS = ("exact", "scann")
FOLDER = "index"


class MissingIndexError(ValueError):
  """There is no index, or it does not fit its store."""


class Index(Protocol):
  """Finds the nearest vectors."""

  def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """queries: [Q, M·D] float32 -> (rows [Q, k] int, cosines [Q, k] float32), best first."""

  def save(self, directory: str) -> None:
    """Writes what `load` needs."""

  def __len__(self) -> int:
    """The number of vectors."""


def unit_vectors(memories: np.ndarray) -> np.ndarray:
  """Memory tokens [n, M, D] as unit vectors [n, M·D] float32."""
  flat = np.asarray(memories, np.float32).reshape(len(memories), -1)
  return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12)


def available(kind: str) -> bool:
  """Whether what an index needs is installed."""
  return kind == "exact" or importlib.util.find_spec("scann") is not None


def build(kind: str, vectors: np.ndarray) -> Index:
  """An index of that kind over unit vectors [n, d].

  Raises:
    MissingIndexError: an unknown kind, or no vectors.
  """
  if kind not in KINDS:
    raise MissingIndexError(f"index kind {kind!r}: expected one of {list(KINDS)}")
  if not len(vectors):
    raise MissingIndexError("the store has no documents to index")
  return _module(kind).build(vectors)


def save(index: Index, kind: str, store: str) -> None:
  """Saves an index beside its store."""
  folder = epath.Path(store) / FOLDER
  folder.mkdir(parents=True, exist_ok=True)
  index.save(str(folder))
  (folder / "index.json").write_text(json.dumps({"kind": kind, "documents": len(index)}))


def saved_bytes(store: str) -> int:
  """Size of the saved index on disk."""
  return sum(file.stat().length for file in (epath.Path(store) / FOLDER).iterdir())


def load(store: str, vectors: np.ndarray) -> Index:
  """The index beside a store.

  Args:
    store: the store's directory.
    vectors: the store's unit vectors; the exact index keeps none of its own.

  Raises:
    MissingIndexError: there is none, or the store has grown since.
  """
  file = epath.Path(store) / FOLDER / "index.json"
  if not file.exists():
    raise MissingIndexError(f"{store}: has no index; make one with clara index --store {store}")
  saved = json.loads(file.read_text())
  if saved["documents"] != len(vectors):
    raise MissingIndexError(f"{store}: the index has {saved['documents']} documents, the store {len(vectors)}; run clara index again")
  return _module(saved["kind"]).load(str(file.parent), vectors)


def _module(kind: str):
  if kind == "exact":
    from clara_jax.retrieval import exact
    return exact
  from clara_jax.retrieval import scann
  return scann
