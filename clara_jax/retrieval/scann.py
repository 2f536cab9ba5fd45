"""ScaNN (arXiv 1908.10396): partition, score with anisotropic quantisation, re-rank exactly."""

import math
from typing import Any

import numpy as np

from clara_jax.config import ConfigError

# Below this many vectors a tree has nothing to divide, and brute force is exact and fast (ScaNN's docs/algorithms.md).
SMALL = 20_000
NEIGHBOURS = 10


def _library():
  try:
    from scann.scann_ops.py import scann_ops_pybind
  except ImportError:
    raise ConfigError("ScaNN is not installed here: pip install 'clara_jax[scann]', or use clara index --kind exact") from None
  return scann_ops_pybind


class ScannIndex:
  """A ScaNN searcher."""

  def __init__(self, searcher: Any, size: int):
    self._searcher, self._size = searcher, size

  def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """See `index.Index`."""
    rows, scores = self._searcher.search_batched(np.asarray(queries, np.float32), final_num_neighbors=min(k, self._size))
    return np.asarray(rows, np.int64), np.asarray(scores)

  def save(self, directory: str) -> None:
    """ScaNN's own files; they name each other relative to the directory, so that a store can be moved."""
    self._searcher.serialize(directory, relative_path=True)

  def __len__(self) -> int:
    return self._size


def build(vectors: np.ndarray) -> ScannIndex:
  """Parameters by ScaNN's own guidance: brute force for small sets, else √n leaves, of which a tenth is searched, and re-ranking.

  Args:
    vectors: [n, d] unit vectors.
  """
  builder = _library().builder(vectors, NEIGHBOURS, "dot_product")
  if len(vectors) < SMALL:
    return ScannIndex(builder.score_brute_force().build(), len(vectors))
  leaves = round(math.sqrt(len(vectors)))
  builder = builder.tree(num_leaves=leaves, num_leaves_to_search=max(1, leaves // 10), training_sample_size=min(len(vectors), 250_000))
  return ScannIndex(builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(100).build(), len(vectors))


def load(directory: str, vectors: np.ndarray) -> ScannIndex:
  """A saved searcher."""
  return ScannIndex(_library().load_searcher(directory), len(vectors))
