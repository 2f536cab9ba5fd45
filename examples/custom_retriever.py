"""A retriever of one's own behind `Answerer`: cosine search that skips near duplicates of what it
has found.

    python examples/custom_retriever.py CHECKPOINT STORE "question" …

`Answerer(index=…)` takes anything that has `search` (`Searcher` in `clara_jax/retrieval/base.py`).
"""

import sys

import numpy as np

import clara_jax
from clara_jax.retrieval.base import unit_vectors


class Diverse:
  """Exact search; of documents more alike than `limit` only the best is kept."""

  def __init__(self, store: clara_jax.MemoryStore, limit: float = 0.98):
    self._rows, self._limit = store.rows, limit
    self._vectors = unit_vectors(store.memories(store.rows))

  def search(self, queries: np.ndarray, k: int, among: np.ndarray | None = None):
    """See `retrieval.base.Searcher.search`."""
    rows = np.full((len(queries), k), -1, np.int64)
    scores = np.full((len(queries), k), -np.inf, np.float32)
    allowed = np.ones(len(self._rows), bool) if among is None else np.isin(self._rows, among)
    for i, cosines in enumerate(queries @ self._vectors.T):
      chosen: list[int] = []
      for place in np.argsort(-cosines, kind="stable"):
        alike = self._vectors[chosen] @ self._vectors[place] if chosen else np.zeros(1)
        if allowed[place] and alike.max() < self._limit:
          chosen.append(int(place))
        if len(chosen) == k:
          break
      rows[i, : len(chosen)], scores[i, : len(chosen)] = self._rows[chosen], cosines[chosen]
    return rows, scores


def main(directory: str, store: str, questions: list[str]) -> None:
  """Prints answers from diverse documents."""
  opened = clara_jax.MemoryStore(store)
  answerer = clara_jax.Answerer(clara_jax.load(directory), opened, index=Diverse(opened))
  for answer in answerer.answer(questions):
    print(answer.question, answer.answer, [d.id for d in answer.documents], sep="\n  ")


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2], sys.argv[3:])
