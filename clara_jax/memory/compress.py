"""A corpus through the frozen compressor, once, into a store."""

import dataclasses
import sys
import time
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from clara_jax.data.pipeline import pad_tokens
from clara_jax.data.schemas import Document
from clara_jax.data.tokens import Layout
from clara_jax.memory.store import Manifest, MemoryStore, fingerprint
from clara_jax.model import Clara
from clara_jax.sharding import activation_rules, batch_sharding, make_mesh


@dataclasses.dataclass(frozen=True)
class CompressReport:
  """documents: in the store now; skipped: there already; cut: of the new ones, longer than doc_max_length, whose end was left out;
  bytes: of memory tokens; documents_per_second: of the new ones."""

  documents: int
  skipped: int
  cut: int
  bytes: int
  seconds: float
  documents_per_second: float


def manifest_of(model: Clara, weights: dict[str, Any]) -> Manifest:
  """What a store made by these weights says of itself."""
  config = model.config
  return Manifest(fingerprint(weights), config.num_memory_tokens, config.model.width, config.model.dtype)


def compress_corpus(model: Clara, layout: Layout, weights: dict[str, Any], documents: Iterable[Document], directory: str, *,
                    batch_size: int = 64, shard_size: int = 4096, bucket: int = 32, progress: bool = True
                    ) -> CompressReport:
  """Writes the documents' memory tokens into the store; those that it has are skipped, so that a stopped run goes on.

  Args:
    model, layout, weights: the compressor.
    documents: the corpus.
    directory: of the store.
    batch_size: documents a pass; rounded up to a multiple of the devices.
    shard_size: documents a file.
    bucket: lengths are padded to a multiple of it.
    progress: whether lines go to standard error.
  """
  start = time.monotonic()
  store = MemoryStore(directory, manifest_of(model, weights))
  mesh = make_mesh()
  batch_size = -(-batch_size // mesh.size) * mesh.size
  compress = jax.jit(model.compress)
  skipped = made = cut = 0
  waiting: list[Document] = []

  def write():
    nonlocal made, cut
    # Sorted by length, a batch has little padding; the shard keeps the corpus's order.
    inputs = [layout.document(d.text) for d in waiting]
    cut += sum(layout.is_cut(x) for x in inputs)
    order = np.argsort([len(x) for x in inputs], kind="stable")
    config = model.config
    memories = np.empty((len(waiting), config.num_memory_tokens, config.model.width), np.float32)
    for first in range(0, len(order), batch_size):
      chosen = order[first:first + batch_size]
      padded = [inputs[i] for i in chosen] + [inputs[chosen[0]]] * (batch_size - len(chosen))
      tokens = jax.device_put(pad_tokens(padded, layout.pad_id, bucket), batch_sharding(mesh))
      memories[chosen] = np.asarray(compress(weights, tokens)[:len(chosen)], np.float32)
    store.append(waiting, memories)
    made += len(waiting)
    waiting.clear()
    if progress:
      print(f"compress: {len(store)} documents in the store, {made / (time.monotonic() - start):.0f} documents/s", file=sys.stderr,
            flush=True)

  with jax.set_mesh(mesh), activation_rules():
    for document in documents:
      if document.id in store:
        skipped += 1
        continue
      waiting.append(document)
      if len(waiting) == shard_size:
        write()
    if waiting:
      write()
  seconds = time.monotonic() - start
  if cut and progress:
    print(f"compress: {cut} of {made} documents are longer than doc_max_length={model.config.doc_max_length} tokens; their ends are "
          "left out", file=sys.stderr)
  return CompressReport(len(store), skipped, cut, store.nbytes(), seconds, made / max(seconds, 1e-9))
