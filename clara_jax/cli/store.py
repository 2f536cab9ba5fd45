"""`clara store ACTION`: inspects, checks and changes a memory store."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from clara_jax.cli import arguments

if TYPE_CHECKING:
  from clara_jax.memory.store import MemoryStore

HELP = "Looks at a store or changes it."
OUTPUTS = {"to": "local"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's options."""
  parser.add_argument(
    "action",
    choices=("info", "verify", "delete", "compact", "quantize", "quantise", "truncate", "repair"),
    help="info: what it is and holds; verify: reads all of it, checks checksums, counts and ids; "
    "delete: documents by id; "
    "compact: removes what was deleted or replaced from the files; quantize (or quantise): copies "
    "it in another encoding; "
    "truncate: copies the first m memory tokens of each document; repair: gives up segments that "
    "are damaged, so "
    "that their documents can be compressed again",
  )
  parser.add_argument("--store", required=True, metavar="DIR")
  parser.add_argument(
    "--ids",
    metavar="F",
    help="delete: a file with one id a line; of *.jsonl, JSON strings or objects with an id",
  )
  parser.add_argument("--to", metavar="DIR", help="quantize, truncate: the new store")
  parser.add_argument(
    "--memory-tokens", type=arguments.positive, metavar="m", help="truncate: how many are kept"
  )
  parser.add_argument(
    "--encoding",
    "--form",
    choices=("float32", "bfloat16", "int8", "pq"),
    help="quantize: its encoding",
  )
  parser.add_argument(
    "--sub-width",
    type=arguments.positive,
    default=4,
    help="quantize: dimensions that share a byte of pq; default 4",
  )


def run(options: argparse.Namespace) -> dict[str, Any]:
  """Returns what the action found or did; for info, compact, quantize and truncate what the store
  is now."""
  from clara_jax.config import ConfigError
  from clara_jax.data import schemas
  from clara_jax.memory.quantize import quantize, truncate
  from clara_jax.memory.store import MemoryStore

  if options.action == "repair":
    return MemoryStore(options.store, damaged=True).repair()
  opened = MemoryStore(options.store)
  if options.action == "verify":
    return opened.verify()
  if options.action == "delete":
    if not options.ids:
      raise ConfigError("--ids: name a file with one id a line")
    ids = schemas.read_ids(options.ids)
    deleted = opened.delete(ids)
    return {"deleted": deleted, "unknown": len(ids) - deleted, "documents": len(opened)}
  if options.action == "compact":
    opened.compact()
  elif options.action in ("quantize", "quantise"):
    if not options.to or not options.encoding:
      raise ConfigError("--to and --encoding: name the new store and its encoding")
    opened = quantize(opened, options.to, options.encoding, options.sub_width)
  elif options.action == "truncate":
    if not options.to or not options.memory_tokens:
      raise ConfigError(
        "--to and --memory-tokens: name the new store and how many memory tokens it keeps"
      )
    opened = truncate(opened, options.to, options.memory_tokens)
  return _info(opened)


def _info(store: MemoryStore) -> dict[str, Any]:
  from clara_jax.retrieval import index

  manifest = store.manifest
  return {
    **dataclasses.asdict(manifest),
    "form": manifest.encoding,
    "compression_rate": manifest.compression_rate,
    "documents": len(store),
    "dead": store.dead,
    "bytes": store.nbytes(),
    "bytes_per_document": store.nbytes() / max(1, len(store)),
    "index": index.state(store),
  }
