"""The memory store: every document of a corpus as memory tokens, encoded once.

    DIR/manifest.json             compressor's hash, M, D, dtype
    DIR/memories-00000.npy        [n, M, D], memory-mapped when read
    DIR/documents-00000.jsonl     id, title, text of the same n documents

A shard counts when its documents file is there: both files are written beside and renamed, memories first. A store that was
interrupted goes on with the documents that it lacks; one made by another compressor is refused.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
from etils import epath

from clara_jax.data.schemas import Document

VERSION = 1


class StoreError(ValueError):
  """A directory is not a memory store, or not one of this compressor."""


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a store holds.

  Attributes:
    compressor: `fingerprint` of the weights that made it.
    num_memory_tokens: M.
    width: D.
    dtype: type of the memory tokens, 'float32' or 'bfloat16'.
    version: of this layout.
  """

  compressor: str
  num_memory_tokens: int
  width: int
  dtype: str
  version: int = VERSION


def fingerprint(weights: dict[str, Any]) -> str:
  """A content hash of the weights that shape memory tokens: base, memory embedding, compressor."""
  digest = hashlib.sha256()
  for group in ("base", "memory_embedding", "compressor"):
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights[group]):
      digest.update(f"{group}{jax.tree_util.keystr(path)}".encode())
      digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
  return digest.hexdigest()[:16]


class MemoryStore:
  """Reads and extends a store.

  Args:
    directory: where it is.
    manifest: what the store must hold, to create or extend it; None opens an existing store as it is.

  Raises:
    StoreError: there is no store, or its manifest is another.
  """

  def __init__(self, directory: str, manifest: Manifest | None = None):
    self.directory = directory
    self._folder = epath.Path(directory)
    file = self._folder / "manifest.json"
    if file.exists():
      found = Manifest(**json.loads(file.read_text()))
      for field in dataclasses.fields(Manifest):
        if manifest is not None and getattr(found, field.name) != getattr(manifest, field.name):
          raise StoreError(f"{directory}: the store has {field.name}={getattr(found, field.name)!r}, this checkpoint makes "
                           f"{getattr(manifest, field.name)!r}; choose another --store")
      manifest = found
    elif manifest is None:
      raise StoreError(f"{directory}: not a memory store (no manifest.json); make one with clara compress")
    else:
      self._folder.mkdir(parents=True, exist_ok=True)
      _write(file, json.dumps(dataclasses.asdict(manifest), indent=2).encode())
    self.manifest = manifest
    self._dtype = np.dtype(ml_dtypes.bfloat16) if manifest.dtype == "bfloat16" else np.dtype(manifest.dtype)
    self.documents: list[Document] = []
    self._row_of: dict[str, int] = {}
    self._shards: list[np.ndarray] = []
    self._starts: list[int] = []
    while (self._folder / f"documents-{len(self._shards):05}.jsonl").exists():
      self._open_shard(len(self._shards))

  def __len__(self) -> int:
    return len(self.documents)

  def __contains__(self, identifier: str) -> bool:
    return identifier in self._row_of

  def _open_shard(self, index: int) -> None:
    lines = (self._folder / f"documents-{index:05}.jsonl").read_text().splitlines()
    documents = [Document(**json.loads(line)) for line in lines]
    path = self._folder / f"memories-{index:05}.npy"
    try:
      # numpy's format does not know bfloat16; its bits are stored as uint16.
      memories = np.load(os.fspath(path), mmap_mode="r").view(self._dtype)
    except (OSError, ValueError) as error:
      raise StoreError(f"{path}: not readable: {error}") from None
    expected = (len(documents), self.manifest.num_memory_tokens, self.manifest.width)
    if memories.shape != expected:
      raise StoreError(f"{path}: expected shape {expected}, got {memories.shape}")
    self._starts.append(len(self.documents))
    self._shards.append(memories)
    for document in documents:
      self._row_of[document.id] = len(self.documents)
      self.documents.append(document)

  def append(self, documents: Sequence[Document], memories: np.ndarray) -> None:
    """Adds a shard, whole or not at all. memories: [n, M, D]."""
    index = len(self._shards)
    bits = np.ascontiguousarray(memories.astype(self._dtype))
    if self.manifest.dtype == "bfloat16":
      bits = bits.view(np.uint16)
    part = self._folder / f"memories-{index:05}.npy.part"
    with part.open("wb") as file:
      np.save(file, bits)
    part.replace(self._folder / f"memories-{index:05}.npy")
    lines = "".join(json.dumps(dataclasses.asdict(d), ensure_ascii=False) + "\n" for d in documents)
    _write(self._folder / f"documents-{index:05}.jsonl", lines.encode())
    self._open_shard(index)

  def row(self, identifier: str) -> int:
    """The row of a document.

    Raises:
      KeyError: there is no such id.
    """
    return self._row_of[identifier]

  def memories(self, rows: Iterable[int] | None = None) -> np.ndarray:
    """Memory tokens [n, M, D] of rows, or of all documents."""
    if rows is None:
      if not self._shards:
        return np.zeros((0, self.manifest.num_memory_tokens, self.manifest.width), self._dtype)
      return np.concatenate(self._shards)
    rows = list(rows)
    out = np.empty((len(rows), self.manifest.num_memory_tokens, self.manifest.width), self._dtype)
    for i, row in enumerate(rows):
      shard = int(np.searchsorted(self._starts, row, side="right")) - 1
      out[i] = self._shards[shard][row - self._starts[shard]]
    return out

  def nbytes(self) -> int:
    """Bytes of memory tokens."""
    return sum(shard.nbytes for shard in self._shards)

  def __reduce__(self):  # opened again in worker processes
    return MemoryStore, (self.directory,)

  def lookup(self) -> "MemoryLookup":
    """Memory tokens of documents by id, or by text where a row names no ids."""
    return MemoryLookup(self)


class MemoryLookup:
  """What the joint stage reads its candidates with (`pipeline.MemoryLookup`)."""

  def __init__(self, store: MemoryStore):
    self._store = store
    self._row_of_text: dict[str, int] | None = None

  def __reduce__(self):
    return MemoryLookup, (self._store,)

  def __call__(self, texts: Sequence[str], ids: Sequence[str] = ()) -> np.ndarray:
    """Memory tokens [n, M, D].

    Raises:
      StoreError: a document is not in the store.
    """
    if not ids and self._row_of_text is None:
      self._row_of_text = {d.text: i for i, d in enumerate(self._store.documents)}
    rows = [self._store._row_of.get(i) for i in ids] if ids else [self._row_of_text.get(t) for t in texts]
    if None in rows:
      missing = rows.index(None)
      what = f"the id {ids[missing]!r}" if ids else f"the document {texts[missing][:60]!r}"
      raise StoreError(f"{self._store.directory}: the store lacks {what}; compress it first")
    return self._store.memories(rows)


def _write(file: Any, content: bytes) -> None:
  part = file.parent / f"{file.name}.part"
  part.write_bytes(content)
  part.replace(file)
