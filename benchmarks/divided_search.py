"""The exact index over eight devices: what vectors of fewer bits, and an approximate top-k, cost in
recall.

    python benchmarks/divided_search.py [--vectors 1000000] [--queries 256]

Vectors of 512 dimensions as in benchmarks/search.py, on eight devices of this machine's processor.
Recall@10 beside float32 and an exact top-k: as the devices find them, and with the best 100
re-ranked on the full vectors, as `clara index --vectors` and `--recall` do. The approximate top-k
is exact on a processor, so what a TPU does is done by hand: every block's scores fall into the bins
of arXiv 2206.14286 (as many as its expected recall asks for), of which each keeps its largest.
Prints one JSON object.
"""

import argparse
import json
import math
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import time

import numpy as np
import search

from clara_jax.ops.nearest import BLOCK
from clara_jax.retrieval.base import unit_vectors
from clara_jax.retrieval.exact import ExactIndex
from clara_jax.retrieval.projection import RERANKED

K, CHUNK = 10, 20_000
DIMENSION = search.M * search.D


def binned(scores: np.ndarray, k: int, recall: float) -> np.ndarray:
  """Places [Q, k] of the best of [Q, n], block by block as a TPU's partial reduction finds them."""
  bins = math.ceil(1 / (1 - recall ** (1 / max(1, k - 1))))
  kept = []
  for start in range(0, scores.shape[1], BLOCK):
    block = scores[:, start : start + BLOCK]
    each = max(1, block.shape[1] // bins)
    width = -(-block.shape[1] // each)
    padded = np.full((len(block), width * each), -np.inf, np.float32)
    padded[:, : block.shape[1]] = block
    # Neighbors go into different bins.
    places = padded.reshape(len(block), each, width).argmax(1) * width + np.arange(width)
    kept.append(places + start)
  places = np.concatenate(kept, 1)
  places = np.minimum(places, scores.shape[1] - 1)
  best = np.argsort(-np.take_along_axis(scores, places, 1), 1, kind="stable")[:, :k]
  return np.take_along_axis(places, best, 1)


def recall(rows: np.ndarray, truth: np.ndarray) -> float:
  """Share of the true K."""
  return float(
    np.mean([len(set(a[:K]) & set(b[:K])) / K for a, b in zip(rows, truth, strict=True)])
  )


def main() -> None:
  """Runs all of it."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--vectors", type=int, default=1_000_000)
  parser.add_argument("--queries", type=int, default=256)
  options = parser.parse_args()
  centers = search.make_centers()
  corpus = np.empty((options.vectors, DIMENSION), np.float32)
  for chunk in range(options.vectors // CHUNK):
    corpus[chunk * CHUNK : (chunk + 1) * CHUNK] = unit_vectors(
      search.vectors(chunk, CHUNK, centers)
    )
  queries = search.queries(options.queries)

  def reranked(rows):
    scores = np.einsum("qd,qnd->qn", queries, corpus[rows])
    return np.take_along_axis(rows, np.argsort(-scores, 1, kind="stable"), 1)

  report: dict = {"vectors": options.vectors, "dimensions": DIMENSION, "queries": options.queries}
  truth = None
  for dtype in ("float32", "bfloat16", "int8"):
    index = ExactIndex(DIMENSION, dtype=dtype)
    index.fill(np.arange(options.vectors), lambda rows: corpus[rows])
    start = time.monotonic()
    rows, _ = index.search(queries, RERANKED * K)
    seconds = time.monotonic() - start
    truth = rows if truth is None else truth
    report[dtype] = {
      "recall_at_10": recall(rows, truth),
      "reranked": recall(reranked(rows), truth),
      "seconds_with_compilation": round(seconds, 1),
    }
    del index
  approximate: dict = {}
  for target in (0.99, 0.95, 0.9):
    places = [
      binned(queries[i : i + 32] @ corpus.T, RERANKED * K, target)
      for i in range(0, options.queries, 32)
    ]
    rows = np.concatenate(places)
    approximate[str(target)] = {
      "recall_at_10": recall(rows, truth),
      "reranked": recall(reranked(rows), truth),
    }
  print(json.dumps(report | {"approximate": approximate}, indent=2))


if __name__ == "__main__":
  main()
