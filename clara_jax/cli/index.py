"""`clara index`: the search index beside a store."""

import argparse
import time
from typing import Any

from clara_jax.cli import arguments

HELP = "Builds the search index beside a store, or brings it up to date."


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's options."""
  parser.add_argument("--store", required=True, metavar="DIR")
  parser.add_argument(
    "--kind",
    choices=("scann", "exact", "qdrant"),
    help="default: that of the existing index, else scann (millions, CPU)",
  )
  parser.add_argument(
    "--url",
    metavar="URL",
    help="qdrant: of the server, its key in QDRANT_API_KEY; default: as the existing index, else "
    "embedded in DIR/qdrant",
  )
  parser.add_argument(
    "--vectors",
    choices=("float32", "bfloat16", "int8"),
    help="exact: what the devices hold of the vectors, the best are re-ranked on all of it; "
    "default: as the existing index, else float32",
  )
  parser.add_argument(
    "--recall",
    type=float,
    metavar="R",
    help="exact: below 1, TPUs search approximately, with this expected recall; default: as the "
    "existing index, else 1",
  )
  parser.add_argument(
    "--memory-tokens",
    type=arguments.positive,
    metavar="m",
    help="searches with the first m memory tokens of a document, whatever "
    "is read; default: as the existing index, else all",
  )
  parser.add_argument(
    "--dimensions",
    type=int,
    metavar="N",
    help="searches in so many (PCA), re-ranks on all; 0: in all; "
    "default: as the existing index, else all",
  )


def run(options: argparse.Namespace) -> dict[str, Any]:
  """Returns documents, changed, dimension, memory_tokens, bytes, seconds, kind, and what else the
  kind has: vectors and recall, or url."""
  from clara_jax.memory.store import MemoryStore
  from clara_jax.retrieval import index

  start = time.monotonic()
  store = MemoryStore(options.store)
  saved = index.saved_settings(store)
  kind = options.kind or saved.get("kind", "scann")
  same = options.memory_tokens in (None, saved.get("memory_tokens"))
  dimensions = (
    options.dimensions
    if options.dimensions is not None
    else saved.get("dimensions")
    if same
    else None
  ) or None
  store = store.first(options.memory_tokens or saved.get("memory_tokens"))
  settings = {
    name: getattr(options, name)
    if getattr(options, name) is not None
    else (saved.get(name) if kind == saved.get("kind") else None)
    for name in ("vectors", "recall", "url")
  }
  settings = {name: value for name, value in settings.items() if value is not None}
  built, changed = index.update(store, kind, dimensions, **settings)
  full = store.manifest.num_memory_tokens * store.manifest.width
  return {
    "documents": len(built),
    "changed": changed,
    "dimension": dimensions or full,
    "memory_tokens": store.manifest.num_memory_tokens,
    "bytes": index.saved_bytes(store),
    "seconds": time.monotonic() - start,
    "kind": kind,
    **({"vectors": "float32", "recall": 1.0} if kind == "exact" else {}),
    **settings,
  }
