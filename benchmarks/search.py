"""A million vectors: ScaNN against exact search, in the same run on the same cores.

    python benchmarks/search.py --scratch DIR

Writes a store of 1,000,000 documents of 4 memory tokens of width 128 (512 dimensions) from a
generator, in chunks, then builds both indices in processes of their own and searches with the same
queries. The vectors have the structure that encoders give them: clusters of clusters with noise,
and queries that are noisy copies of documents. Prints one JSON object.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time

import numpy as np

from clara_jax.data.schemas import Document
from clara_jax.memory.store import Manifest, MemoryStore
from clara_jax.retrieval import index as index_lib

M, D = 4, 128
CHUNK = 20_000
TOPICS, SUBTOPICS = 200, 40


def vectors(seed: int, count: int, centers: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
  """[count, M, D]: a topic, a part of it, and noise."""
  rng = np.random.default_rng([1, seed])
  topics, parts = centers
  topic = rng.integers(0, TOPICS, count)
  points = (
    topics[topic]
    + 0.7 * parts[topic, rng.integers(0, SUBTOPICS, count)]
    + 0.7 * rng.normal(size=(count, M * D)).astype(np.float32)
  )
  return points.reshape(count, M, D).astype(np.float32)


def make_centers() -> tuple[np.ndarray, np.ndarray]:
  """Of topics and of their parts."""
  rng = np.random.default_rng(0)
  return (
    rng.normal(size=(TOPICS, M * D)).astype(np.float32),
    rng.normal(size=(TOPICS, SUBTOPICS, M * D)).astype(np.float32),
  )


def write(store: str, documents: int) -> dict:
  """The store, in chunks."""
  start, centers = time.monotonic(), make_centers()
  memory_store = MemoryStore(store, Manifest("generated", M, D, 128, "float32"))
  for chunk in range(len(memory_store) // CHUNK, documents // CHUNK):
    ids = [Document(f"v{chunk * CHUNK + i}", "", "") for i in range(CHUNK)]
    memory_store.append(ids, vectors(chunk, CHUNK, centers))
  return {"seconds": time.monotonic() - start, "bytes": memory_store.nbytes(), "peak_mb": peak_mb()}


def peak_mb() -> float:
  """Largest memory of this process."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def queries(count: int) -> np.ndarray:
  """Noisy copies of documents."""
  centers = make_centers()
  base = vectors(3, count, centers)
  return index_lib.unit_vectors(
    base + 0.3 * np.random.default_rng(5).normal(size=base.shape).astype(np.float32)
  )


def build(store: str, kind: str) -> dict:
  """Builds and saves an index."""
  start = time.monotonic()
  opened = MemoryStore(store)
  index = index_lib.build(opened, kind)
  index_lib.save(index, kind, opened)
  return {
    "seconds": time.monotonic() - start,
    "bytes": index_lib.saved_bytes(store),
    "peak_mb": peak_mb(),
  }


def search(store: str, kind: str, count: int, batch: int, out: str) -> dict:
  """Loads an index and searches."""
  opened = MemoryStore(store)
  start = time.monotonic()
  index = index_lib.load(opened) if kind == "scann" else index_lib.build(opened, kind)
  loaded = time.monotonic() - start
  query_vectors = queries(count)
  index.search(query_vectors[:batch], 10)  # compiles
  start = time.monotonic()
  rows = np.concatenate(
    [index.search(query_vectors[i : i + batch], 10)[0] for i in range(0, count, batch)]
  )
  seconds = time.monotonic() - start
  single = []
  for i in range(20):
    begun = time.monotonic()
    index.search(query_vectors[i : i + 1], 10)
    single.append(time.monotonic() - begun)
  np.save(out, rows)
  return {
    "load_seconds": loaded,
    "queries_per_second": count / seconds,
    "batch": batch,
    "single_query_ms": 1e3 * float(np.median(single)),
    "peak_mb": peak_mb(),
  }


def main() -> None:
  """Prints one JSON object."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--scratch", required=True, metavar="DIR")
  parser.add_argument("--documents", type=int, default=1_000_000)
  parser.add_argument("--queries", type=int, default=512)
  parser.add_argument("--batch", type=int, default=64)
  parser.add_argument(
    "--step", choices=("write", "build", "search-exact", "search-scann"), help=argparse.SUPPRESS
  )
  options = parser.parse_args()
  store = os.path.join(options.scratch, "store")

  def rows_file(kind):
    return os.path.join(options.scratch, f"{kind}.npy")

  if options.step:
    step, _, kind = options.step.partition("-")
    report = (
      write(store, options.documents)
      if step == "write"
      else build(store, "scann")
      if step == "build"
      else search(store, kind, options.queries, options.batch, rows_file(kind))
    )
    print(json.dumps(report))
    return
  report = {"documents": options.documents, "dimension": M * D, "cores": os.cpu_count()}
  for step in ("write", "build", "search-exact", "search-scann"):
    command = [
      sys.executable,
      __file__,
      "--scratch",
      options.scratch,
      "--documents",
      str(options.documents),
      "--queries",
      str(options.queries),
      "--batch",
      str(options.batch),
      "--step",
      step,
    ]
    report[step] = json.loads(
      subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout.splitlines()[-1]
    )
    print(step, report[step], file=sys.stderr, flush=True)
  exact, approximate = np.load(rows_file("exact")), np.load(rows_file("scann"))
  report["recall_at_10"] = float(
    np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, approximate, strict=True)])
  )
  report["times_faster"] = (
    report["search-scann"]["queries_per_second"] / report["search-exact"]["queries_per_second"]
  )
  print(json.dumps(report, indent=2))


if __name__ == "__main__":
  main()
