"""What every search over memory tokens does: unit vectors in, the store's rows and cosines out."""

from typing import Protocol

import numpy as np


class Searcher(Protocol):
  """Finds the nearest vectors."""

  def search(
    self, queries: np.ndarray, k: int, among: np.ndarray | None = None
  ) -> tuple[np.ndarray, np.ndarray]:
    """The nearest documents, best first.

    Args:
      queries: [Q, d] float32.
      k: how many.
      among: rows that may be found; None for all.

    Returns:
      (rows [Q, k] int64, scores [Q, k] float32); where there are fewer than k, row -1 and score
      -inf.
    """


class Retriever(Searcher, Protocol):
  """A search that follows its store and is saved beside it."""

  @property
  def rows(self) -> np.ndarray:
    """Of the documents in it, ascending."""

  def add(self, rows: np.ndarray, vectors: np.ndarray) -> None:
    """Adds documents: rows [n] int64 that are not in it, their unit vectors [n, d]."""

  def remove(self, rows: np.ndarray) -> None:
    """Removes documents."""

  def save(self, directory: str) -> None:
    """Writes what loading needs."""

  def __len__(self) -> int:
    """The number of documents."""


def unit_vectors(memories: np.ndarray) -> np.ndarray:
  """Memory tokens [n, M, D] as unit vectors [n, M·D] float32."""
  flat = np.asarray(memories, np.float32).reshape(len(memories), -1)
  return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12)
