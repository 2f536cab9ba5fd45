"""Search in fewer dimensions, re-ranked on the full memory tokens.

The projection is learned on the corpus (PCA). With A its components and μ the mean, ⟨q, v⟩ = ⟨q, v
- μ⟩ + ⟨q, μ⟩, whose last term is the same for every document: documents are searched as A (v - μ),
queries as A q.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable

import numpy as np

from clara_jax.config import ConfigError
from clara_jax.retrieval.base import Retriever

FILE = "projection.npz"
RERANKED = 10  # times k
# Documents that it is learned on: as many as PCA by their inner products takes, whatever their
# dimension.
SAMPLE = 8_192


@dataclasses.dataclass(frozen=True)
class Projection:
  """components: [d', d]; offset: [d'], -A μ."""

  components: np.ndarray
  offset: np.ndarray

  @property
  def digest(self) -> str:
    """Of its numbers."""
    return hashlib.blake2b(
      self.components.tobytes() + self.offset.tobytes(), digest_size=8
    ).hexdigest()

  def of_documents(self, vectors: np.ndarray) -> np.ndarray:
    """[n, d] -> [n, d'] float32."""
    return np.ascontiguousarray(vectors @ self.components.T + self.offset, np.float32)

  def of_queries(self, vectors: np.ndarray) -> np.ndarray:
    """[Q, d] -> [Q, d'] float32."""
    return np.ascontiguousarray(vectors @ self.components.T, np.float32)


def learn(sample: np.ndarray, dimensions: int) -> Projection:
  """PCA by faiss (extra `compact`).

  Args:
    sample: [n, d] unit vectors of the corpus.
    dimensions: d'.

  Raises:
    ConfigError: d' is not in 1 … min(n, d), or faiss is missing.
  """
  if not 1 <= dimensions <= min(sample.shape):
    raise ConfigError(
      f"dimensions={dimensions}: expected 1 to {min(sample.shape)} ({sample.shape[0]} documents "
      f"of dimension "
      f"{sample.shape[1]})"
    )
  try:
    import faiss
  except ImportError:
    raise ConfigError(
      "a projection is learned by faiss: pip install 'clara_jax[compact]'"
    ) from None
  pca = faiss.PCAMatrix(sample.shape[1], dimensions)
  pca.train(np.ascontiguousarray(sample, np.float32))
  components = faiss.vector_to_array(pca.A)[: dimensions * sample.shape[1]].reshape(dimensions, -1)
  return Projection(components.copy(), faiss.vector_to_array(pca.b)[:dimensions].copy())


class RerankedIndex:
  """An index over less than the full vectors, whose best are re-ranked by these.

  Args:
    inner: over projected vectors, or such of few bits.
    projection: what made them; None where all dimensions are searched.
    vectors_of: rows [n] -> full unit vectors [n, d], from the store.

  Attributes:
    inner: as given.
  """

  def __init__(
    self,
    inner: Retriever,
    projection: Projection | None,
    vectors_of: Callable[[np.ndarray], np.ndarray],
  ):
    self.inner, self._projection, self._vectors_of = inner, projection, vectors_of

  @property
  def rows(self) -> np.ndarray:
    """See `base.Retriever`."""
    return self.inner.rows

  def __len__(self) -> int:
    return len(self.inner)

  def add(self, rows: np.ndarray, vectors: np.ndarray) -> None:
    """See `base.Retriever`."""
    self.inner.add(
      rows, vectors if self._projection is None else self._projection.of_documents(vectors)
    )

  def remove(self, rows: np.ndarray) -> None:
    """See `base.Retriever`."""
    self.inner.remove(rows)

  def search(
    self, queries: np.ndarray, k: int, among: np.ndarray | None = None
  ) -> tuple[np.ndarray, np.ndarray]:
    """See `base.Retriever`."""
    queries = np.asarray(queries, np.float32)
    searched = queries if self._projection is None else self._projection.of_queries(queries)
    rows, _ = self.inner.search(searched, min(len(self), RERANKED * k), among)
    needed, place = np.unique(rows, return_inverse=True)
    vectors = np.zeros((len(needed), queries.shape[1]), np.float32)
    vectors[needed >= 0] = self._vectors_of(needed[needed >= 0])
    scores = np.einsum("qd,qnd->qn", queries, vectors[place.reshape(rows.shape)])
    scores = np.where(rows >= 0, scores, -np.inf)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    missing = ((0, 0), (0, k - order.shape[1]))
    return (
      np.pad(np.take_along_axis(rows, order, 1), missing, constant_values=-1),
      np.pad(np.take_along_axis(scores, order, 1), missing, constant_values=-np.inf),
    )

  def save(self, directory: str) -> None:
    """Beside the inner index's files."""
    if self._projection is not None:
      np.savez(os.path.join(directory, FILE), **dataclasses.asdict(self._projection))
    self.inner.save(directory)


def load(directory: str) -> Projection:
  """A saved projection."""
  with np.load(os.path.join(directory, FILE)) as values:
    return Projection(values["components"], values["offset"])
