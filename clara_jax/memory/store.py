"""The memory store: every document of a corpus as memory tokens, encoded once.

    DIR/manifest.json                        what made it, M, D, form, generation
    DIR/codebook.npy                         of a product-quantised store
    DIR/segments-0/000017-003/segment.json   number of documents, ids that are deleted, checksums of the files beside it
                             /documents.array_record   id, title and text of each document, as JSON
                             /memories.array_record    its memory tokens, in the store's form (`forms.py`)
                             /keys.npy       [n, 2] uint64, hashes of the ids

A segment is written by one process (003 is its number) and never changed. It counts when its segment.json is there, which is written
last: a store that was interrupted goes on with the documents that it lacks. The order of the segments is the order of time: an id
that comes again replaces the earlier document, an id that a later segment deletes is gone. `compact` writes what is left into the
segments of the next generation and then changes the manifest, which makes it the one that counts.

A document's *row* is its place in that order; it stays the same until `compact`. Ids are known by a 128-bit hash.
"""

import collections
import dataclasses
import fcntl
import functools
import hashlib
import io
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from array_record.python import array_record_module
from etils import epath

from clara_jax.data.schemas import Document
from clara_jax.memory import forms

VERSION = 2
BLOCK = 4096  # documents that are read at once when a whole store is walked through
_GROUP = 8192  # bytes that are compressed, checked and read together; a larger document stands alone
_OPEN_FILES = 128
_MAX_RUNS = 32
_FILES = ("documents.array_record", "memories.array_record", "keys.npy")


class StoreError(ValueError):
  """A directory is not a memory store, or not one of this compressor, or it is damaged."""


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a store holds.

  Attributes:
    compressor: `fingerprint` of the weights that made it.
    num_memory_tokens: M.
    width: D.
    doc_max_length: tokens of a document, the rest was cut off.
    form: of the memory tokens (`forms.NAMES`).
    text: whether the documents' text is kept.
    version: of this layout.
    generation: of the segments that count.
  """

  compressor: str
  num_memory_tokens: int
  width: int
  doc_max_length: int
  form: str
  text: bool = True
  version: int = VERSION
  generation: int = 0

  @property
  def compression_rate(self) -> float:
    """Tokens of the longest document for each memory token."""
    return self.doc_max_length / self.num_memory_tokens


def read_manifest(directory: str) -> Manifest | None:
  """The manifest of the store in a directory, None where there is none."""
  file = epath.Path(directory) / "manifest.json"
  return _read_manifest(file) if file.exists() else None


def fingerprint(weights: dict[str, Any], groups: Sequence[str] = ("base", "memory_embedding", "compressor")) -> str:
  """A content hash of groups of weights, by default of those that shape memory tokens."""
  digest = hashlib.sha256()
  for group in groups:
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights[group]):
      digest.update(f"{group}{jax.tree_util.keystr(path)}".encode())
      digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
  return digest.hexdigest()[:16]


def keys_of(ids: Iterable[str]) -> np.ndarray:
  """Hashes of ids, [n, 2] uint64."""
  digests = b"".join(hashlib.blake2b(i.encode(), digest_size=16).digest() for i in ids)
  return np.frombuffer(digests, np.uint64).reshape(-1, 2)


class MemoryStore:
  """Reads and extends a store.

  Args:
    directory: where it is.
    manifest: what the store must hold, to create or extend it; None opens an existing store as it is.
    writer: number of this process among those that write at the same time.
    codebook: of a new product-quantised store.
    memory_tokens: m; opens an existing store to read the first m memory tokens of each document, as if it had no more.

  Raises:
    StoreError: there is no store, or its manifest is another.
  """

  def __init__(self, directory: str, manifest: Manifest | None = None, *, writer: int = 0,
               codebook: forms.ProductQuantised | None = None, memory_tokens: int | None = None):
    self.directory = directory
    self._folder, self._writer, self._lock = epath.Path(directory), writer, None
    file = self._folder / "manifest.json"
    if file.exists():
      found = _read_manifest(file)
      for field in dataclasses.fields(Manifest):
        if manifest is not None and field.name != "generation" and getattr(found, field.name) != getattr(manifest, field.name):
          raise StoreError(f"{directory}: the store has {field.name}={getattr(found, field.name)!r}, this run would write "
                           f"{getattr(manifest, field.name)!r}; choose another --store")
      manifest = found
    elif manifest is None:
      raise StoreError(f"{directory}: not a memory store (no manifest.json); make one with clara compress")
    else:
      self._folder.mkdir(parents=True, exist_ok=True)
      if codebook is not None:
        _write(self._folder / "codebook.npy", codebook.to_bytes())
      _write(file, json.dumps(dataclasses.asdict(manifest), indent=2).encode())
    self.manifest = manifest
    centres = (self._folder / "codebook.npy").read_bytes() if manifest.form == "pq" else None
    self.form = forms.make(manifest.form, manifest.num_memory_tokens, manifest.width, centres)
    self._whole = manifest.num_memory_tokens
    if memory_tokens is not None:
      if not 1 <= memory_tokens <= self._whole:
        raise StoreError(f"{directory}: memory tokens {memory_tokens}: expected 1 to {self._whole}, which the store has")
      self.form = self.form.first(memory_tokens)
      self.manifest = dataclasses.replace(manifest, num_memory_tokens=memory_tokens)
    self._readers: collections.OrderedDict[str, Any] = collections.OrderedDict()
    self._read_segments()

  def __reduce__(self):  # opened again in worker processes
    m = self.manifest.num_memory_tokens
    return functools.partial(MemoryStore, memory_tokens=None if m == self._whole else m), (self.directory,)

  @property
  def whole(self) -> Manifest:
    """What the store holds, however many memory tokens it was opened for."""
    return dataclasses.replace(self.manifest, num_memory_tokens=self._whole)

  def first(self, m: int | None) -> "MemoryStore":
    """The same with the first m memory tokens of each document (None: with all), to read.

    Raises:
      StoreError: m is not 1 to M.
    """
    if self.manifest.num_memory_tokens == (self._whole if m is None else m):
      return self
    return MemoryStore(self.directory, memory_tokens=m)

  # ---- what is there ---------------------------------------------------------------------------------------------------------

  def __len__(self) -> int:
    return len(self.rows)

  def __contains__(self, identifier: str) -> bool:
    return self.locate([identifier])[0] >= 0

  @property
  def rows(self) -> np.ndarray:
    """Rows of all documents, ascending: [n] int64."""
    if self._rows is None:
      self._rows = np.sort(self._keys.rows())
    return self._rows

  @property
  def dead(self) -> int:
    """Documents in the files that were replaced or deleted since."""
    return self._end - len(self)

  def locate(self, ids: Sequence[str]) -> np.ndarray:
    """Rows of documents by id, [n] int64; -1 where there is none."""
    return self._keys.find(keys_of(ids))

  def row(self, identifier: str) -> int:
    """The row of a document.

    Raises:
      KeyError: there is no such id.
    """
    row = int(self.locate([identifier])[0])
    if row < 0:
      raise KeyError(identifier)
    return row

  def documents(self, rows: Iterable[int] | None = None) -> list[Document]:
    """Documents of rows, or all of them; without text where the store keeps none."""
    rows = self.rows if rows is None else np.asarray(list(rows), np.int64)
    found: list[Any] = [None] * len(rows)
    for segment, places, local in self._parts(rows):
      for place, record in zip(places, self._records(segment, _FILES[0], local), strict=True):
        found[place] = Document(**json.loads(record))
    return found

  def memories(self, rows: Iterable[int] | None = None) -> np.ndarray:
    """Memory tokens [n, M, D] of rows, or of all documents; float32 or bfloat16."""
    rows = self.rows if rows is None else np.asarray(list(rows), np.int64)
    return self.form.decode(self.codes(rows))

  def codes(self, rows: np.ndarray) -> np.ndarray:
    """Memory tokens in the store's form: [n, nbytes] uint8.

    Raises:
      StoreError: a file is damaged.
    """
    out = np.empty((len(rows), self.form.nbytes), np.uint8)
    for segment, places, local in self._parts(rows):
      for place, record in zip(places, self._records(segment, _FILES[1], local), strict=True):
        out[place] = np.frombuffer(record, np.uint8, self.form.nbytes)
    return out

  def blocks(self, size: int = BLOCK) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Walks through the store: (rows [n], memory tokens [n, M, D])."""
    for start in range(0, len(self), size):
      rows = self.rows[start:start + size]
      yield rows, self.memories(rows)

  def nbytes(self) -> int:
    """Bytes of the memory tokens' files."""
    return sum((s.folder / _FILES[1]).stat().length for s in self._segments if s.documents)

  def lookup(self) -> "MemoryLookup":
    """Memory tokens of documents by id, or by text where a row names no ids."""
    return MemoryLookup(self)

  def verify(self) -> dict[str, int]:
    """Reads everything once: checksums, counts, ids.

    Raises:
      StoreError: naming the file that is damaged.
    """
    for segment in self._segments:
      record = json.loads((segment.folder / "segment.json").read_text())
      for name, expected in record["checksums"].items():
        if (found := _checksum(segment.folder / name)) != expected:
          raise StoreError(f"{segment.folder / name}: its checksum is {found}, expected {expected}")
    for start in range(0, len(self), BLOCK):
      rows = self.rows[start:start + BLOCK]
      ids = [d.id for d in self.documents(rows)]
      if not np.array_equal(self.locate(ids), rows):
        raise StoreError(f"{self.directory}: the ids of rows {rows[0]} to {rows[-1]} are not those of their keys")
      self.codes(rows)
    return {"documents": len(self), "segments": len(self._segments), "dead": self.dead, "bytes": self.nbytes()}

  # ---- changes ---------------------------------------------------------------------------------------------------------------

  def append(self, documents: Sequence[Document], memories: np.ndarray) -> np.ndarray:
    """Adds documents, all or none.

    Args:
      documents: with ids that the store does not have.
      memories: [n, M, D].

    Returns:
      Their rows.

    Raises:
      StoreError: an id is there already, or another process writes with this writer's number.
    """
    there = np.flatnonzero(self.locate([d.id for d in documents]) >= 0)
    if len(there):
      raise StoreError(f"{self.directory}: the id {documents[there[0]].id!r} is there already; upsert replaces a document")
    return self.upsert(documents, memories)

  def upsert(self, documents: Sequence[Document], memories: np.ndarray) -> np.ndarray:
    """As `append`; an id that is there is replaced."""
    expected = (len(documents), self.manifest.num_memory_tokens, self.manifest.width)
    if memories.shape != expected:
      raise StoreError(f"{self.directory}: expected memory tokens of shape {expected}, got {memories.shape}")
    return self.upsert_codes(documents, self.form.encode(memories))

  def upsert_codes(self, documents: Sequence[Document], codes: np.ndarray) -> np.ndarray:
    """As `upsert`, with memory tokens that are in the store's form already: [n, nbytes] uint8."""
    if codes.shape != (len(documents), self.form.nbytes):
      raise StoreError(f"{self.directory}: expected codes of shape {(len(documents), self.form.nbytes)}, got {codes.shape}")
    if len({d.id for d in documents}) < len(documents):
      raise StoreError(f"{self.directory}: an id comes twice in one call")
    if not self.manifest.text:
      documents = [dataclasses.replace(d, text="") for d in documents]
    records = (json.dumps(dataclasses.asdict(d), ensure_ascii=False).encode() for d in documents)
    return self._write_segment(records, codes, keys_of(d.id for d in documents))

  def delete(self, ids: Iterable[str]) -> int:
    """Deletes documents; returns how many there were. The files shrink with `compact`."""
    ids = list(dict.fromkeys(ids))
    there = [i for i, row in zip(ids, self.locate(ids), strict=True) if row >= 0]
    if there:
      self._write_segment((), np.zeros((0, self.form.nbytes), np.uint8), keys_of(()), deleted=there)
    return len(there)

  def compact(self, segment_size: int = BLOCK) -> None:
    """Writes the documents that are left, in order, into new segments, and removes the old ones. Rows are counted anew.

    No other process may write; one that reads has to open the store again.
    """
    self._check_whole()
    old, rows = self._segments_folder(), self.rows
    new = Manifest(**{**dataclasses.asdict(self.manifest), "generation": self.manifest.generation + 1})
    target = _Folder(self._segments_folder(new.generation), self._writer)
    if target.path.exists():
      shutil.rmtree(os.fspath(target.path))  # of a compaction that was stopped
    for start in range(0, len(rows), segment_size):
      chosen = rows[start:start + segment_size]
      records = [json.dumps(dataclasses.asdict(d), ensure_ascii=False).encode() for d in self.documents(chosen)]
      target.write(records, self.codes(chosen), keys_of(json.loads(r)["id"] for r in records))
    target.path.mkdir(parents=True, exist_ok=True)
    _write(self._folder / "manifest.json", json.dumps(dataclasses.asdict(new), indent=2).encode())
    self.manifest = new
    self._close_readers()
    shutil.rmtree(os.fspath(old), ignore_errors=True)
    self._read_segments()

  # ---- files -----------------------------------------------------------------------------------------------------------------

  def _segments_folder(self, generation: int | None = None) -> Any:
    return self._folder / f"segments-{self.manifest.generation if generation is None else generation}"

  def _read_segments(self) -> None:
    self._segments: list[_Segment] = []
    self._starts: list[int] = []
    self._end, self._rows = 0, None
    self._keys = _Keys()
    keys, rows = [], []
    for segment in _Folder(self._segments_folder(), self._writer).segments():
      more_keys, more_rows = self._add(segment)
      keys.append(more_keys)
      rows.append(more_rows)
    if keys:
      self._keys.put(np.concatenate(keys), np.concatenate(rows))

  def _add(self, segment: "_Segment") -> tuple[np.ndarray, np.ndarray]:
    """Takes a segment in; returns its keys with their rows, -1 for deleted ones."""
    self._segments.append(segment)
    self._starts.append(self._end)
    rows = np.arange(self._end, self._end + segment.documents)
    self._end += segment.documents
    self._rows = None
    return (np.concatenate([keys_of(segment.deleted), segment.keys()]),
            np.concatenate([np.full(len(segment.deleted), -1), rows]))

  def _write_segment(self, records: Iterable[bytes], codes: np.ndarray, keys: np.ndarray, deleted: Sequence[str] = ()) -> np.ndarray:
    self._check_whole()
    if self._lock is None:
      self._lock = _lock(self._folder / f"writer-{self._writer:03}.lock")
    folder = _Folder(self._segments_folder(), self._writer)
    changed = self._add(folder.write(records, codes, keys, deleted))
    self._keys.put(*changed)
    return changed[1][len(deleted):]

  def _check_whole(self) -> None:
    if self.manifest.num_memory_tokens < self._whole:
      raise StoreError(f"{self.directory}: opened for the first {self.manifest.num_memory_tokens} of {self._whole} memory tokens, to read")

  def _parts(self, rows: np.ndarray) -> Iterator[tuple["_Segment", np.ndarray, np.ndarray]]:
    """Groups rows by segment: (segment, places among `rows`, rows within the segment)."""
    rows = np.asarray(rows, np.int64)
    if len(rows) and not 0 <= rows.min() <= rows.max() < self._end:
      raise IndexError(f"{self.directory}: expected rows from 0 to {self._end - 1}, got {rows.min()} … {rows.max()}")
    segments = np.searchsorted(self._starts, rows, side="right") - 1
    order = np.argsort(segments, kind="stable")
    for places in np.split(order, np.flatnonzero(np.diff(segments[order])) + 1) if len(rows) else ():
      number = segments[places[0]]
      yield self._segments[number], places, rows[places] - self._starts[number]

  def _records(self, segment: "_Segment", name: str, local: np.ndarray) -> list[bytes]:
    path = os.fspath(segment.folder / name)
    try:
      if path not in self._readers:
        if len(self._readers) >= _OPEN_FILES:
          self._readers.popitem(last=False)[1].close()
        self._readers[path] = array_record_module.ArrayRecordReader(path)
      self._readers.move_to_end(path)
      return self._readers[path].read(local.tolist())
    except (RuntimeError, ValueError, IndexError) as error:
      raise StoreError(f"{path}: not readable: {error}; a store that was compacted meanwhile has to be opened again") from None

  def _close_readers(self) -> None:
    for reader in self._readers.values():
      reader.close()
    self._readers.clear()

  def close(self) -> None:
    """Closes the files and lets another process write with this number."""
    self._close_readers()
    if self._lock is not None:
      self._lock.close()
      self._lock = None


@dataclasses.dataclass(frozen=True)
class _Segment:
  folder: Any
  documents: int
  deleted: tuple[str, ...] = ()

  def keys(self) -> np.ndarray:
    if not self.documents:
      return keys_of(())
    path = self.folder / _FILES[2]
    try:
      keys = np.load(os.fspath(path))
    except (OSError, ValueError) as error:
      raise StoreError(f"{path}: not readable: {error}") from None
    if keys.shape != (self.documents, 2):
      raise StoreError(f"{path}: expected shape {(self.documents, 2)}, got {keys.shape}")
    return keys


@dataclasses.dataclass(frozen=True)
class _Folder:
  """The segments of one generation."""

  path: Any
  writer: int

  def segments(self) -> list[_Segment]:
    """Those that count, in the order of time."""
    if not self.path.exists():
      return []
    found = []
    for folder in sorted(self.path.iterdir(), key=lambda f: f.name):
      record = folder / "segment.json"
      if record.exists():
        values = json.loads(record.read_text())
        found.append(_Segment(folder, values["documents"], tuple(values["deleted"])))
    return found

  def write(self, records: Iterable[bytes], codes: np.ndarray, keys: np.ndarray, deleted: Sequence[str] = ()) -> _Segment:
    """One more segment."""
    numbers = [int(f.name.split("-")[0]) for f in self.path.iterdir() if (f / "segment.json").exists()] if self.path.exists() else []
    folder = self.path / f"{max(numbers, default=-1) + 1:06}-{self.writer:03}"
    if folder.exists():
      shutil.rmtree(os.fspath(folder))  # its segment.json was never written
    folder.mkdir(parents=True)
    checksums = {}
    if len(codes):
      _write_records(folder / _FILES[0], records, 1)
      _write_records(folder / _FILES[1], (code.tobytes() for code in codes), max(1, _GROUP // codes.shape[1]))
      np.save(os.fspath(folder / _FILES[2]), keys)
      checksums = {name: _checksum(folder / name) for name in _FILES}
    record = {"documents": len(codes), "deleted": list(deleted), "checksums": checksums}
    _write(folder / "segment.json", json.dumps(record).encode())
    return _Segment(folder, len(codes), tuple(deleted))


class _Keys:
  """Which row an id has. Sorted arrays of hashes, newest first, merged when they become many."""

  def __init__(self):
    self._runs: list[tuple[np.ndarray, np.ndarray]] = []

  def put(self, keys: np.ndarray, rows: np.ndarray) -> None:
    """keys: [n, 2] uint64, rows: [n], -1 for an id that is gone; of equal keys the last counts."""
    self._runs = [_last_of_each(keys, rows), *self._runs]  # a new list: another thread may be searching the old one
    if len(self._runs) > _MAX_RUNS:
      self._merge()

  def _merge(self) -> None:
    if len(self._runs) > 1:
      keys, rows = (np.concatenate([run[i] for run in reversed(self._runs)]) for i in (0, 1))
      self._runs = [_last_of_each(keys, rows)]

  def find(self, keys: np.ndarray) -> np.ndarray:
    """Rows of keys, -1 where there is none."""
    found = np.full(len(keys), -1, np.int64)
    unknown = np.arange(len(keys))
    for run_keys, run_rows in self._runs:
      if not len(unknown):
        break
      places = np.searchsorted(run_keys[:, 0], keys[unknown, 0])
      is_here = np.zeros(len(unknown), bool)
      # Two ids that share the first half of their hash stand side by side.
      while True:
        inside = places < len(run_keys)
        candidates = np.where(inside, places, 0)
        same = inside & (run_keys[candidates, 0] == keys[unknown, 0])
        is_here |= (equal := same & (run_keys[candidates, 1] == keys[unknown, 1]))
        found[unknown[equal]] = run_rows[places[equal]]
        if not (on := same & ~is_here).any():
          break
        places = places + on
      unknown = unknown[~is_here]
    return found

  def rows(self) -> np.ndarray:
    """Rows of all ids that are there."""
    self._merge()
    return self._runs[0][1][self._runs[0][1] >= 0] if self._runs else np.zeros(0, np.int64)


def _last_of_each(keys: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  order = np.lexsort((np.arange(len(keys)), keys[:, 1], keys[:, 0]))
  keys, rows = keys[order], rows[order]
  is_last = np.append((keys[1:] != keys[:-1]).any(1), True)[:len(keys)]
  return keys[is_last], rows[is_last]


class MemoryLookup:
  """What the joint stage reads its candidates with (`pipeline.MemoryLookup`)."""

  def __init__(self, store: MemoryStore):
    self.store = store
    self._row_of_text: dict[str, int] | None = None

  def __reduce__(self):
    return MemoryLookup, (self.store,)

  def __call__(self, texts: Sequence[str], ids: Sequence[str] = ()) -> np.ndarray:
    """Memory tokens [n, M, D].

    Raises:
      StoreError: a document is not in the store.
    """
    rows = self.rows(texts, ids)
    if (missing := np.flatnonzero(rows < 0)).size:
      first = missing[0]
      what = f"the id {ids[first]!r}" if ids else f"the document {texts[first][:60]!r}"
      raise StoreError(f"{self.store.directory}: the store lacks {what}; compress it first")
    return self.store.memories(rows)

  def slots(self, texts: Sequence[str], ids: Sequence[str] = ()) -> np.ndarray:
    """Places of documents in `store.rows`, [n] int64, -1 where there is none."""
    rows = self.rows(texts, ids)
    return np.where(rows < 0, -1, np.searchsorted(self.store.rows, rows))

  def rows(self, texts: Sequence[str], ids: Sequence[str] = ()) -> np.ndarray:
    """Rows of documents [n] int64, -1 where there is none."""
    if ids:
      return self.store.locate(ids)
    if self._row_of_text is None:
      if not self.store.manifest.text:
        raise StoreError(f"{self.store.directory}: the store keeps no text; rows need doc_ids")
      self._row_of_text = {d.text: int(row) for row, d in zip(self.store.rows, self.store.documents(), strict=True)}
    return np.array([self._row_of_text.get(t, -1) for t in texts], np.int64)


def _read_manifest(file: Any) -> Manifest:
  values = json.loads(file.read_text())
  if values.get("version") != VERSION:
    raise StoreError(f"{file}: a store of version {values.get('version')}, expected {VERSION}; compress the corpus again")
  return Manifest(**values)


def _write_records(path: Any, records: Iterable[bytes], group: int) -> None:
  writer = array_record_module.ArrayRecordWriter(os.fspath(path), f"group_size:{group},zstd:3")
  for record in records:
    writer.write(record)
  writer.close()


def _checksum(path: Any) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _write(file: Any, content: bytes) -> None:
  part = file.parent / f"{file.name}.{uuid.uuid4().hex}.part"
  part.write_bytes(content)
  part.replace(file)


def _lock(path: Any) -> io.IOBase:
  """Held until the file is closed or its process ends, however it ends."""
  file = open(os.fspath(path), "ab")
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    file.close()
    raise StoreError(f"{path}: another process writes to this store with this number; give each a --process of its own") from None
  return file
