"""A smaller store of the same documents: in another encoding, or with fewer memory tokens.

It is written beside its place, as DIR.part, and moved there when it is whole.
"""

import dataclasses
import os
import shutil
from collections.abc import Callable

import numpy as np

from clara_jax import io
from clara_jax.memory import codecs
from clara_jax.memory.store import BLOCK, VERSION, Manifest, MemoryStore, StoreError, read_manifest

_COPY = ("copy", "quantizes or truncates it")


def quantize(
  store: MemoryStore, directory: str, encoding: str, sub_width: int = 4, segment_size: int = BLOCK
) -> MemoryStore:
  """Copies a store into another encoding.

  Args:
    store: the store.
    directory: of the new one.
    encoding: one of `codecs.NAMES`; 'pq' learns its centers on a sample of the store.
    sub_width: dimensions that share a byte of 'pq'.
    segment_size: documents a segment.

  Raises:
    StoreError: the directory is there and not empty.
    ConfigError: the encoding does not fit.
  """
  _check_free(directory)
  manifest = dataclasses.replace(store.manifest, encoding=encoding, generation=0, version=VERSION)
  codebook = None
  with store.reading(*_COPY):
    if encoding == "pq":
      count = codecs.training_sample(manifest.num_memory_tokens, manifest.width)
      sample = np.sort(np.random.default_rng(0).permutation(store.rows)[:count])
      codebook = codecs.learn_pq(store.memories(sample), sub_width)
    to = codebook or codecs.make(encoding, manifest.num_memory_tokens, manifest.width)
    return _copied(
      store,
      directory,
      manifest,
      codebook,
      lambda rows: to.encode(np.asarray(store.memories(rows), np.float32)),
      segment_size,
    )


def truncate(
  store: MemoryStore, directory: str, memory_tokens: int, segment_size: int = BLOCK
) -> MemoryStore:
  """Copies the first memory tokens of each document into a store of their own; no number changes.

  Args:
    store: the store.
    directory: of the new one.
    memory_tokens: m.
    segment_size: documents a segment.

  Raises:
    StoreError: the directory is there and not empty, or the store has no m memory tokens.
    ConfigError: of product-quantized memory tokens, m do not end with a byte.
  """
  _check_free(directory)
  kept = store.first(memory_tokens)
  codebook = kept.codec if isinstance(kept.codec, codecs.ProductQuantized) else None
  with kept.reading(*_COPY):
    return _copied(
      kept,
      directory,
      dataclasses.replace(kept.manifest, generation=0, version=VERSION),
      codebook,
      kept.codes,
      segment_size,
    )


def _check_free(directory: str) -> None:
  if "://" in directory:
    raise StoreError(f"{directory}: a store is written to a local or mounted directory")
  if os.path.exists(directory) and not (os.path.isdir(directory) and not os.listdir(directory)):
    what = "already is a store" if read_manifest(directory) else "already exists"
    raise StoreError(f"{directory}: {what}; choose another directory")


def _copied(
  store: MemoryStore,
  directory: str,
  manifest: Manifest,
  codebook: codecs.ProductQuantized | None,
  codes_of: Callable[[np.ndarray], np.ndarray],
  segment_size: int,
) -> MemoryStore:
  part = f"{directory.rstrip('/')}.part"
  if os.path.exists(part):
    if os.path.samefile(part, store.directory) or not (
      os.path.exists(os.path.join(part, "writer-000.lock"))
      or os.path.exists(os.path.join(part, "manifest.json"))
    ):
      raise StoreError(
        f"{part}: is in the way; remove it, or choose another directory than {directory}"
      )
    if who := io.holder(os.path.join(part, "writer-000.lock")):
      raise StoreError(f"{part}: another process writes there ({who})")
    shutil.rmtree(part)  # of a run that was stopped
  new = MemoryStore(part, manifest, codebook=codebook)
  for start in range(0, len(store), segment_size):
    rows = store.rows[start : start + segment_size]
    new.upsert_codes(store.documents(rows), codes_of(rows))
  new.close()
  os.rename(part, directory)
  return MemoryStore(directory)
