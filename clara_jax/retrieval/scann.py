"""ScaNN (arXiv 1908.10396): partition, score with anisotropic quantization, re-rank exactly."""

import math
import os
from typing import Any

import numpy as np

from clara_jax.config import ConfigError

# ScaNN's docs/algorithms.md: brute force below 20,000 vectors, quantized scores of all of them
# below 100,000, a tree from there on.
BRUTE_FORCE_BELOW = 20_000
TREE_FROM = 100_000
NEIGHBOURS = 10
# The share of leaves that is searched, and how many of what they hold is re-ranked with exact
# scores.
LEAVES_SEARCHED = 0.03
REORDERED = 200
# A filter keeps whatever it lets through of that many times as many neighbors.
OVERSAMPLING = 4


def _library():
  try:
    from scann.scann_ops.py import scann_ops_pybind
  except ImportError:
    raise ConfigError(
      "ScaNN is not installed here: pip install 'clara_jax[scann]', or use clara index --kind exact"
    ) from None
  return scann_ops_pybind


class ScannIndex:
  """A ScaNN searcher, with the store's row of each of its points."""

  def __init__(self, searcher: Any, rows: np.ndarray):
    self._searcher, self._rows = searcher, np.asarray(rows, np.int64)

  @property
  def rows(self) -> np.ndarray:
    """See `base.Retriever`."""
    return np.sort(self._rows)

  def __len__(self) -> int:
    return len(self._rows)

  def add(self, rows: np.ndarray, vectors: np.ndarray) -> None:
    """See `base.Retriever`; the partition stays as it was trained, so build anew after the corpus
    has changed much."""
    self._searcher.searcher.upsert([None] * len(rows), np.asarray(vectors, np.float32), len(rows))
    self._rows = np.concatenate([self._rows, rows])

  def remove(self, rows: np.ndarray) -> None:
    """See `base.Retriever`."""
    # ScaNN fills the place of a removed point with the last one, one after the other.
    places = np.sort(np.flatnonzero(np.isin(self._rows, rows)))[::-1]
    for place in places:
      self._rows[place] = self._rows[-1]
      self._rows = self._rows[:-1]
    self._searcher.searcher.delete(places.tolist())

  def search(
    self, queries: np.ndarray, k: int, among: np.ndarray | None = None
  ) -> tuple[np.ndarray, np.ndarray]:
    """See `base.Retriever`. With a filter, more and more neighbors are asked for until enough of
    them pass."""
    queries = np.asarray(queries, np.float32)
    rows, scores = (
      np.full((len(queries), k), -1, np.int64),
      np.full((len(queries), k), -np.inf, np.float32),
    )
    if among is None:
      count = min(k, len(self))
      if count:
        rows[:, :count], scores[:, :count] = self._search(queries, count)
      return rows, scores
    possible = int(np.isin(self._rows, among).sum())
    unfinished, neighbor_count = np.arange(len(queries)), min(len(self), k * OVERSAMPLING)
    while len(unfinished) and possible:
      neighbors, cosines = self._search(queries[unfinished], neighbor_count)
      passed = np.isin(neighbors, among)
      for query, keep, r, s in zip(unfinished, passed, neighbors, cosines, strict=True):
        r, s = r[keep][:k], s[keep][:k]
        rows[query, : len(r)], scores[query, : len(s)] = r, s
      unfinished = unfinished[(rows[unfinished] >= 0).sum(1) < min(k, possible)]
      if neighbor_count == len(self):
        break
      neighbor_count = min(len(self), neighbor_count * OVERSAMPLING)
    return rows, scores

  def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    # Where much is asked for, all leaves are searched and everything found is re-ranked.
    much = {"leaves_to_search": 1 << 20} if k > REORDERED else {}
    places, scores = self._searcher.search_batched_parallel(
      queries, final_num_neighbors=k, pre_reorder_num_neighbors=max(k, REORDERED), **much
    )
    places, scores = np.asarray(places, np.int64), np.asarray(scores)
    mask = np.isfinite(scores) & (places < len(self._rows)) & (places >= 0)
    return np.where(mask, self._rows[np.where(mask, places, 0)], -1), np.where(
      mask, scores, -np.inf
    )

  def save(self, directory: str) -> None:
    """ScaNN's own files; they name each other relative to the directory, so that a store can be
    moved."""
    self._searcher.serialize(directory, relative_path=True)
    np.save(os.path.join(directory, "rows.npy"), self._rows)


def build(rows: np.ndarray, vectors: np.ndarray) -> ScannIndex:
  """An index with parameters by ScaNN's own guidance for the number of vectors.

  Args:
    rows: [n].
    vectors: [n, d] float32.
  """
  n = len(vectors)
  builder = _library().builder(vectors, NEIGHBOURS, "dot_product")
  if n < BRUTE_FORCE_BELOW:
    return ScannIndex(builder.score_brute_force().build(), rows)
  if n >= TREE_FROM:
    leaves = round(math.sqrt(n))
    builder = builder.tree(
      num_leaves=leaves,
      num_leaves_to_search=max(1, round(LEAVES_SEARCHED * leaves)),
      training_sample_size=min(n, 250_000),
      soar_lambda=1.5,
    )
  return ScannIndex(
    builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(REORDERED).build(), rows
  )


def load(directory: str) -> ScannIndex:
  """A saved searcher."""
  return ScannIndex(
    _library().load_searcher(directory), np.load(os.path.join(directory, "rows.npy"))
  )
