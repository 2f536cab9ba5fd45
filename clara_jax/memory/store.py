"""The memory store: every document of a corpus as memory tokens, encoded once.

    DIR/manifest.json                        what made it, M, D, encoding, generation
    DIR/codebook.npy                         of a product-quantized store
    DIR/ledger-0-003.jsonl                   the segments of generation 0 that writer 003 has written, with checksums of their records
    DIR/segments-0/000017-003/segment.json   number of documents, ids that are deleted, checksums of the files beside it
                             /documents.array_record   id, title and text of each document, as JSON
                             /memories.array_record    its memory tokens, in the store's encoding (`codecs.py`)
                             /keys.npy       [n, 2] uint64, hashes of the ids
    DIR/index/                               see `retrieval/index.py`
    DIR/damaged/                             what `repair` has moved there
    DIR/store.lock, writer-003.lock, index.lock, copy.lock   who is at work

A segment is written by one process (003 is its number) and never changed. It counts when its
segment.json is there, which is written last: a store that was interrupted goes on with the
documents that it lacks. The ledger tells what must be there. The order of the segments is the order
of time: an id that comes again replaces the earlier document, an id that a later segment deletes is
gone. `compact` writes what is left into the segments of the next generation and then changes the
manifest, which makes it the one that counts.

A document's *row* is its place in that order; once nobody else writes, it stays the same until
`compact` or `repair`. Ids are known by a 128-bit hash.

All who add segments, or read a store at length (`index`, `quantize`, `truncate`), share store.lock;
`delete` and `compact` hold it alone. Whoever does not get it is refused, and told who has it. What
another has written in the meantime is read before anything is added.

In a bucket (gs://…) a store is read as a copy on this machine's disk, and each writer has a copy of
its own without the memory tokens of others. A segment's folder has a name that no other can have
(000017-003-9f2c41), its files go there first, segment.json follows, and last the ledger, which has
to be the one that this writer has written before. A writer that comes with the same number rewrites
the ledger when it begins, and so takes over: the earlier one is refused at its next segment.
`compact` and `repair` are for a store on a disk.
"""  # noqa: E501

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import pathlib
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from array_record.python import array_record_module
from etils import epath

from clara_jax import buckets, distributed, io
from clara_jax.data.schemas import Document
from clara_jax.errors import InputError
from clara_jax.memory import codecs

log = logging.getLogger(__name__)

VERSION = 3
BLOCK = 4096  # documents that are read at once when a whole store is walked through
# Bytes that are compressed, checked and read together; a larger document stands alone.
_GROUP = 8192
_OPEN_FILES = 128
_MAX_RUNS = 32
_DELETER = 999  # a writer's number that no compress has: in a bucket they work at the same time
_FILES = ("documents.array_record", "memories.array_record", "keys.npy")


class StoreError(InputError):
  """A directory is not a memory store, or not one of this compressor, or it is damaged."""


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a store holds.

  Attributes:
    compressor: `fingerprint` of the weights that made it.
    num_memory_tokens: M.
    width: D.
    doc_max_length: tokens of a document, the rest was cut off.
    encoding: of the memory tokens (`codecs.NAMES`); `form` in manifest.json.
    text: whether the documents' text is kept.
    version: of this layout; 2 had no ledger.
    generation: of the segments that count.
    parts: hashes of the weights by group, to say in what another compressor differs.
    dtype: that they were computed in.
    codebook: SHA-256 of codebook.npy.
  """

  compressor: str
  num_memory_tokens: int
  width: int
  doc_max_length: int
  encoding: str
  text: bool = True
  version: int = VERSION
  generation: int = 0
  parts: Mapping[str, str] = dataclasses.field(default_factory=dict)
  dtype: str = ""
  codebook: str = ""

  @property
  def compression_rate(self) -> float:
    """Tokens of the longest document for each memory token."""
    return self.doc_max_length / self.num_memory_tokens

  def same_compressor(self, other: "Manifest", directory: str) -> None:
    """Refuses memory tokens of another compressor.

    Args:
      other: what a checkpoint would write.
      directory: of the store, for the error.

    Raises:
      StoreError: saying what differs.
    """
    if self.compressor == other.compressor:
      return
    said = (
      f"{directory}: the store was made by compressor {self.compressor}, this checkpoint's "
      f"is {other.compressor}"
    )
    if self.dtype and other.dtype and self.dtype != other.dtype:
      raise StoreError(
        f"{said}: it was computed in {self.dtype}, this one computes in {other.dtype}; name "
        f"--dtype {self.dtype}, or make "
        "a store with this one"
      )
    differing = [
      name for name in other.parts if self.parts and self.parts.get(name) != other.parts[name]
    ]
    raise StoreError(said + (f": other weights in {', '.join(differing)}" if differing else ""))


def read_manifest(directory: str) -> Manifest | None:
  """The manifest of the store in a directory, None where there is none."""
  file = epath.Path(directory) / "manifest.json"
  return _read_manifest(file) if file.exists() else None


def fingerprint(weights: dict[str, Any], groups: Sequence[str]) -> str:
  """A content hash of groups of weights."""
  digest = hashlib.sha256()
  for group in groups:
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights[group]):
      digest.update(f"{group}{jax.tree_util.keystr(path)}".encode())
      digest.update(np.ascontiguousarray(distributed.to_host(leaf)).tobytes())
  return digest.hexdigest()[:16]


def keys_of(ids: Iterable[str]) -> np.ndarray:
  """Hashes of ids, [n, 2] uint64."""
  digests = b"".join(hashlib.blake2b(i.encode(), digest_size=16).digest() for i in ids)
  return np.frombuffer(digests, np.uint64).reshape(-1, 2)


class MemoryStore:
  """Reads and extends a store.

  Args:
    directory: where it is.
    manifest: what the store must hold, to create or extend it: it is locked for this writer until
      `close`. None opens an existing store as it is; a change locks it for as long as the change
      takes.
    writer: number of this process among those that write at the same time.
    codebook: of a new product-quantized store.
    memory_tokens: m; opens an existing store to read the first m memory tokens of each document, as
      if it had no more.
    damaged: opens an existing store without its segments, for `repair`.

  Raises:
    StoreError: there is no store, its manifest is another, segments of it are missing, or another
      process is at work on it.
  """

  def __init__(
    self,
    directory: str,
    manifest: Manifest | None = None,
    *,
    writer: int = 0,
    codebook: codecs.ProductQuantized | None = None,
    memory_tokens: int | None = None,
    damaged: bool = False,
  ):
    self.location, self._writer = directory, writer
    self._is_remote, self._upload = buckets.is_remote(directory), None
    if self._is_remote:
      owner = "" if manifest is None else f"writer-{writer:03}"
      self.directory = str(buckets.copy_folder(directory, owner))
      if manifest is not None:
        self._upload = _Upload(buckets.Objects(directory))
    else:
      self.directory = directory
    self._folder = epath.Path(self.directory)
    self._locks: list[io.Lock] = []  # a name of one's own, a share in the store
    self._alone = False
    self._readers: collections.OrderedDict[str, Any] = collections.OrderedDict()
    self._open_files = _OPEN_FILES
    file = self._folder / "manifest.json"
    if manifest is not None:
      os.makedirs(self.directory, exist_ok=True)
      self._locks = self._lock()
    try:
      self._copy()
      self._is_new = manifest is not None and not file.exists()
      if self._is_new:
        self._create(file, manifest, codebook)
      if not file.exists():
        raise StoreError(
          f"{directory}: not a memory store (no manifest.json); make one with clara compress"
        )
      stored_manifest = _read_manifest(file)
      if manifest is not None:
        _same(stored_manifest, manifest, directory)
      manifest = stored_manifest
      centers = self._codebook(manifest)
      self.codec = codecs.make(
        manifest.encoding, manifest.num_memory_tokens, manifest.width, centers
      )
      self.manifest = manifest
      self._whole = manifest.num_memory_tokens
      if memory_tokens is not None:
        if not 1 <= memory_tokens <= self._whole:
          raise StoreError(
            f"{directory}: memory tokens {memory_tokens}: expected 1 to {self._whole}, which the "
            f"store has"
          )
        self.codec = self.codec.first(memory_tokens)
        self.manifest = dataclasses.replace(manifest, num_memory_tokens=memory_tokens)
      if not damaged:
        self._read_segments_that_count(file)
      if self._locks and self.manifest.version < VERSION:
        with self._writing():
          pass
      if self._locks:
        self._segment_folder().begin()
    except BaseException:
      self.close()
      raise

  def __reduce__(self):  # opened again in worker processes
    m = self.manifest.num_memory_tokens
    return functools.partial(MemoryStore, memory_tokens=None if m == self._whole else m), (
      self.directory,
    )

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
    return MemoryStore(self.location, memory_tokens=m)

  # ---- what is there -----------------------------------------------------------------------------

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
    documents: list[Any] = [None] * len(rows)
    for segment, places, local in self._parts(rows):
      for place, record in zip(places, self._records(segment, _FILES[0], local), strict=True):
        documents[place] = Document(**json.loads(record))
    return documents

  def memories(self, rows: Iterable[int] | None = None) -> np.ndarray:
    """Memory tokens [n, M, D] of rows, or of all documents; float32 or bfloat16."""
    rows = self.rows if rows is None else np.asarray(list(rows), np.int64)
    return self.codec.decode(self.codes(rows))

  def codes(self, rows: np.ndarray) -> np.ndarray:
    """Memory tokens in the store's encoding: [n, nbytes] uint8.

    Raises:
      StoreError: a file is damaged.
    """
    out = np.empty((len(rows), self.codec.nbytes), np.uint8)
    for segment, places, local in self._parts(rows):
      for place, record in zip(places, self._records(segment, _FILES[1], local), strict=True):
        out[place] = np.frombuffer(record, np.uint8, self.codec.nbytes)
    return out

  def blocks(self, size: int = BLOCK) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Walks through the store: (rows [n], memory tokens [n, M, D])."""
    for start in range(0, len(self), size):
      rows = self.rows[start : start + size]
      yield rows, self.memories(rows)

  @property
  def has_memories(self) -> bool:
    """Whether memory tokens can be read; a writer to a bucket has those of others not."""
    return self._upload is None

  @property
  def segments(self) -> int:
    """How many there are."""
    return len(self._segments)

  def identity(self, segments: int | None = None) -> str:
    """A hash of what the store holds, or of its first segments."""
    held = [
      (s.folder.name, s.deleted, sorted(s.checksums.items())) for s in self._segments[:segments]
    ]
    return hashlib.sha256(
      repr((self.manifest.compressor, self.manifest.generation, held)).encode()
    ).hexdigest()

  def nbytes(self) -> int:
    """Bytes of the memory tokens' files."""
    if self._upload:  # which are not here
      listed = self._upload.objects.listed(f"segments-{self.manifest.generation}/")
      return sum(blob.size for name, blob in listed.items() if name.endswith(_FILES[1]))
    return sum((s.folder / _FILES[1]).stat().length for s in self._segments if s.documents)

  def lookup(self) -> "MemoryLookup":
    """Memory tokens of documents by id, or by text where a row names no ids."""
    return MemoryLookup(self)

  def verify(self) -> dict[str, int]:
    """Reads everything once: the ledgers, checksums, counts, ids.

    Raises:
      StoreError: naming the file that is damaged or missing.
    """
    if self.manifest.version > 2:
      for writer in sorted({int(s.folder.name.split("-")[1]) for s in self._segments}):
        if not (ledger := self._segment_folder().ledger(writer)).exists():
          raise StoreError(
            f"{ledger}: is missing: whether all segments of writer {writer} are there cannot be "
            f"told"
          )
    for segment in self._segments:
      segment.verify()
    for start in range(0, len(self), BLOCK):
      rows = self.rows[start : start + BLOCK]
      ids = [d.id for d in self.documents(rows)]
      if not np.array_equal(self.locate(ids), rows):
        raise StoreError(
          f"{self.location}: the ids of rows {rows[0]} to {rows[-1]} are not those of their keys"
        )
      self.codes(rows)
    return {
      "documents": len(self),
      "segments": len(self._segments),
      "dead": self.dead,
      "bytes": self.nbytes(),
    }

  # ---- changes -----------------------------------------------------------------------------------

  def append(self, documents: Sequence[Document], memories: np.ndarray) -> np.ndarray:
    """Adds documents, all or none.

    Args:
      documents: with ids that the store does not have.
      memories: [n, M, D].

    Returns:
      Their rows.

    Raises:
      StoreError: an id already exists, or another process writes with this writer's number.
    """
    with self._writing():
      places = np.flatnonzero(self.locate([d.id for d in documents]) >= 0)
      if len(places):
        raise StoreError(
          f"{self.location}: the id {documents[places[0]].id!r} already exists; upsert replaces a "
          f"document"
        )
      return self.upsert(documents, memories)

  def upsert(self, documents: Sequence[Document], memories: np.ndarray) -> np.ndarray:
    """As `append`; an id that is there is replaced."""
    expected = (len(documents), self.manifest.num_memory_tokens, self.manifest.width)
    if memories.shape != expected:
      raise StoreError(
        f"{self.location}: expected memory tokens of shape {expected}, got {memories.shape}"
      )
    return self.upsert_codes(documents, self.codec.encode(memories))

  def upsert_codes(self, documents: Sequence[Document], codes: np.ndarray) -> np.ndarray:
    """As `upsert`, with memory tokens that are in the store's encoding already: [n, nbytes]
    uint8."""
    if codes.shape != (len(documents), self.codec.nbytes):
      raise StoreError(
        f"{self.location}: expected codes of shape {(len(documents), self.codec.nbytes)}, got "
        f"{codes.shape}"
      )
    if len({d.id for d in documents}) < len(documents):
      raise StoreError(f"{self.location}: a duplicate id in one call")
    if not self.manifest.text:
      documents = [dataclasses.replace(d, text="") for d in documents]
    records = [_record(d) for d in documents]
    with self._writing():
      return self._write_segment(records, codes, keys_of(d.id for d in documents))

  def delete(self, ids: Iterable[str]) -> int:
    """Deletes documents; returns how many there were. The files shrink with `compact`."""
    ids = list(dict.fromkeys(ids))
    if self._is_remote and self._upload is None:
      with contextlib.closing(MemoryStore(self.location, self.whole, writer=_DELETER)) as writer:
        deleted = writer.delete(ids)
      self.refresh()
      return deleted
    with self._writing(alone=True):
      existing_ids = [i for i, row in zip(ids, self.locate(ids), strict=True) if row >= 0]
      if existing_ids:
        self._write_segment(
          (), np.zeros((0, self.codec.nbytes), np.uint8), keys_of(()), deleted=existing_ids
        )
    return len(existing_ids)

  def compact(self, segment_size: int = BLOCK) -> None:
    """Writes the documents that are left, in order, into new segments, and removes the old ones.
    Rows are counted anew.

    A process that reads the store has to open it again.

    Raises:
      StoreError: another process writes, or reads at length; says which. The store is in a bucket.
    """
    self._refuse_in_bucket("compact")
    with self._writing(alone=True):
      rows = self.rows
      new = dataclasses.replace(
        self.manifest, generation=self.manifest.generation + 1, version=VERSION
      )
      self._remove_other_generations()
      target = self._segment_folder(new.generation)
      target.path.mkdir()
      target.begin()
      for start in range(0, len(rows), segment_size):
        chosen = rows[start : start + segment_size]
        records = [_record(d) for d in self.documents(chosen)]
        target.write(records, self.codes(chosen), keys_of(json.loads(r)["id"] for r in records))
      _write_manifest(self._folder / "manifest.json", new)
      self.manifest = new
      self._close_readers()
      self._remove_other_generations()
      self._read_segments()

  def repair(self) -> dict[str, int]:
    """Moves segments that are damaged to DIR/damaged, takes those that are missing off the ledger,
    and compacts what is left, so that their documents can be compressed again. A document that such
    a segment deleted is back, one that it replaced is the earlier one.

    Returns:
      `lost`: documents of these segments; `segments`: how many they were.
    """
    self._refuse_in_bucket("repair")
    with self._writing(alone=True, damaged=True):
      folder = self._segment_folder()
      lost = segments = 0
      for entry, problem in folder.problems():
        log.warning(f"store repair: {problem}")
        lost, segments = lost + entry.documents, segments + 1
        if entry.folder.exists():
          aside = self._folder / "damaged"
          aside.mkdir(exist_ok=True)
          shutil.move(
            os.fspath(entry.folder), os.fspath(aside / f"{entry.folder.name}-{int(time.time())}")
          )
      self._close_readers()
      folder.rewrite_ledgers()
      self._read_segments()
      # Rows are others now: a new generation says so to all who have the store open, and to its
      # index.
      self.compact()
    return {"lost": lost, "segments": segments}

  @contextlib.contextmanager
  def reading(self, name: str, what: str) -> Iterator[None]:
    """Keeps others from compacting or deleting, for a reader that takes long; it first reads what
    was written meanwhile.

    Args:
      name: of the reader; two of one name do not work at the same time.
      what: another of this name does, for the error.

    Raises:
      StoreError: another process compacts, or reads under this name.
    """
    if not os.access(self.directory, os.W_OK):  # nobody writes there from here
      yield
      return
    locks = self._lock(f"{name}.lock", f"{self.location}: another process {what}")
    try:
      self.refresh()
      yield
    finally:
      for lock in locks:
        lock.release()

  # ---- files -------------------------------------------------------------------------------------

  def _segment_folder(self, generation: int | None = None) -> "_Folder":
    return _Folder(
      self._folder,
      self.manifest.generation if generation is None else generation,
      self._writer,
      self.manifest.version,
      self._upload,
    )

  def _copy(self) -> None:
    """The copy of what lies in a bucket, as that is now."""
    if self._upload:
      owner = f"writer-{self._writer:03}"
      buckets.local_copy(self.location, owner, without=(_FILES[1],), may_be_new=True)
    elif self._is_remote:
      buckets.local_copy(self.location)

  def _create(self, file: Any, manifest: Manifest, codebook: Any) -> None:
    """An empty store; in a bucket another may be there first."""
    (self._folder / f"segments-{manifest.generation}").mkdir(exist_ok=True)
    if codebook is not None:
      centers = codebook.to_bytes()
      manifest = dataclasses.replace(manifest, codebook=hashlib.sha256(centers).hexdigest())
      io.write(self._folder / "codebook.npy", centers)
    _write_manifest(file, manifest)
    if self._upload:
      try:
        self._upload.create(self._folder)
      except buckets.ConflictError:
        self._copy()

  def discard_if_new(self) -> None:
    """Takes back a store that this object made, as long as it has no segment: a first run that
    failed does not stand in the way of the next, with other settings perhaps."""
    if not self._is_new or self._segment_folder().names():
      return
    self._close_readers()
    if self._upload:
      self._upload.discard([f.name for f in self._folder.glob("ledger-*.jsonl")])
    for name in ("manifest.json", "codebook.npy"):
      (self._folder / name).unlink(missing_ok=True)
    for ledger in self._folder.glob("ledger-*.jsonl"):
      ledger.unlink()
    shutil.rmtree(os.fspath(self._segment_folder().path), ignore_errors=True)

  def _refuse_in_bucket(self, what: str) -> None:
    if self._is_remote:
      raise StoreError(
        f"{self.location}: {what}: only on a disk, where others can be kept away; copy the store "
        f"there, and the result to another place in the bucket"
      )

  def _remove_other_generations(self) -> None:
    """What a compaction left that was stopped, or has left behind."""
    for path in self._folder.iterdir():
      kind, *rest = path.name.removesuffix(".jsonl").split("-")
      if kind in ("segments", "ledger") and rest and rest[0] != str(self.manifest.generation):
        shutil.rmtree(os.fspath(path)) if path.is_dir() else path.unlink()

  def _read_segments(self) -> None:
    self._segments: list[_Segment] = []
    self._starts: list[int] = []
    self._end, self._rows = 0, None
    self._keys = _Keys()
    keys, rows = [], []
    for segment in self._segment_folder().segments():
      more_keys, more_rows = self._add(segment)
      keys.append(more_keys)
      rows.append(more_rows)
    if keys:
      self._keys.put(np.concatenate(keys), np.concatenate(rows))

  def _read_segments_that_count(self, file: Any) -> None:
    """Again, where another process has compacted the store meanwhile."""
    while True:
      try:
        return self._read_segments()
      except (StoreError, OSError):
        if (manifest := _read_manifest(file)).generation == self.manifest.generation:
          raise
        self.manifest = dataclasses.replace(
          self.manifest, generation=manifest.generation, version=manifest.version
        )

  def is_current(self) -> bool:
    """Whether the store is what it was when this was opened, or refreshed."""
    self._copy()
    manifest = _read_manifest(self._folder / "manifest.json")
    return manifest.generation == self.manifest.generation and self._segment_folder().names() == [
      s.folder.name for s in self._segments
    ]

  def pin(self) -> None:
    """Opens all files, so that they can be read also when a compaction has removed them."""
    self._open_files = max(self._open_files, 2 * len(self._segments))
    for segment in self._segments:
      for name in _FILES[:2] if segment.documents else ():
        self._reader(segment, name)

  def refresh(self) -> None:
    """Takes in what others have written since this store was opened."""
    self._copy()
    manifest = _read_manifest(self._folder / "manifest.json")
    if manifest.generation != self.manifest.generation or self._segment_folder().names() != [
      s.folder.name for s in self._segments
    ]:
      self._close_readers()
      self.manifest = dataclasses.replace(
        self.manifest, generation=manifest.generation, version=manifest.version
      )
      self._read_segments()

  def _codebook(self, manifest: Manifest) -> bytes | None:
    if manifest.encoding != "pq":
      return None
    file = self._folder / "codebook.npy"
    try:
      content = file.read_bytes()
    except OSError as error:
      raise StoreError(f"{file}: not readable: {error.strerror}") from None
    if manifest.codebook and (checksum := hashlib.sha256(content).hexdigest()) != manifest.codebook:
      raise StoreError(f"{file}: its checksum is {checksum}, expected {manifest.codebook}")
    return content

  # ---- locks -------------------------------------------------------------------------------------

  def _lock(self, name: str | None = None, what: str = "") -> list[io.Lock]:
    """A name of one's own, and a share in the store."""
    name = name or f"writer-{self._writer:03}.lock"
    what = (
      what
      or f"{self.location}: another process writes to this store with this number; give each a "
      f"--process of its own"
    )
    try:
      own = io.Lock(self._folder / name)
    except io.LockedError as error:
      raise StoreError(f"{what} ({error})") from None
    try:
      return [own, io.Lock(self._folder / "store.lock", shared=True)]
    except io.LockedError as error:
      own.release()
      raise StoreError(
        f"{self.location}: the store is being changed ({error}); try again when that has ended"
      ) from None

  @contextlib.contextmanager
  def _writing(self, alone: bool = False, damaged: bool = False) -> Iterator[None]:
    """Around every change: locked, and with what others have written. `damaged`: what is there need
    not be whole."""
    if self.manifest.num_memory_tokens < self._whole:
      raise StoreError(
        f"{self.location}: opened for the first {self.manifest.num_memory_tokens} of "
        f"{self._whole} memory tokens, to read"
      )
    if self._is_remote:
      if self._upload is None or self.manifest.version < VERSION:
        raise StoreError(f"{self.location}: opened to read; compress extends a store in a bucket")
      alone = False  # whoever writes later counts
    alone = alone or self.manifest.version < VERSION  # ledgers are written while nobody else writes
    if self._alone or self._locks and not alone:
      yield
      return
    if kept := bool(self._locks):
      own, shared = self._locks
    else:
      busy = f"{self.location}: another process is at work on this store" if alone else ""
      own, shared = self._locks = self._lock(what=busy)
    exclusive = None
    try:
      if alone:
        shared.release()
        try:
          exclusive = io.Lock(self._folder / "store.lock")
        except io.LockedError as error:
          others = [
            who
            for f in sorted(self._folder.glob("*.lock"), key=lambda f: f.name)
            if f.name != os.path.basename(own.path) and (who := io.holder(f))
          ]
          raise StoreError(
            f"{self.location}: another process is at work on this store "
            f"({'; '.join(others) or error}); try again when "
            "that has ended"
          ) from None
        self._alone = True
      if (alone or not kept) and not damaged:
        self.refresh()
      if self.manifest.version < VERSION and not damaged:
        self._segment_folder().rewrite_ledgers()
        self.manifest = dataclasses.replace(self.manifest, version=VERSION)
        _write_manifest(self._folder / "manifest.json", self.manifest)
      if not (kept or damaged):
        self._segment_folder().begin()
      yield
    finally:
      if exclusive is not None:
        exclusive.release()
        self._alone = False
      if not kept:
        self._locks = []
        own.release()
        shared.release()
      elif alone:
        self._locks = [own, io.Lock(self._folder / "store.lock", shared=True, wait=True)]
        self.refresh()
        self._segment_folder().begin()  # a compaction has removed the one before

  def _add(self, segment: "_Segment") -> tuple[np.ndarray, np.ndarray]:
    """Takes a segment in; returns its keys with their rows, -1 for deleted ones."""
    self._segments.append(segment)
    self._starts.append(self._end)
    rows = np.arange(self._end, self._end + segment.documents)
    self._end += segment.documents
    self._rows = None
    return (
      np.concatenate([keys_of(segment.deleted), segment.keys()]),
      np.concatenate([np.full(len(segment.deleted), -1), rows]),
    )

  def _write_segment(
    self, records: Iterable[bytes], codes: np.ndarray, keys: np.ndarray, deleted: Sequence[str] = ()
  ) -> np.ndarray:
    changed = self._add(self._segment_folder().write(records, codes, keys, deleted))
    self._keys.put(*changed)
    return changed[1][len(deleted) :]

  def _parts(self, rows: np.ndarray) -> Iterator[tuple["_Segment", np.ndarray, np.ndarray]]:
    """Groups rows by segment: (segment, places among `rows`, rows within the segment)."""
    rows = np.asarray(rows, np.int64)
    if len(rows) and not 0 <= rows.min() <= rows.max() < self._end:
      raise IndexError(
        f"{self.location}: expected rows from 0 to {self._end - 1}, got {rows.min()} … {rows.max()}"
      )
    segments = np.searchsorted(self._starts, rows, side="right") - 1
    order = np.argsort(segments, kind="stable")
    for places in (
      np.split(order, np.flatnonzero(np.diff(segments[order])) + 1) if len(rows) else ()
    ):
      number = segments[places[0]]
      yield self._segments[number], places, rows[places] - self._starts[number]

  def _records(self, segment: "_Segment", name: str, local: np.ndarray) -> list[bytes]:
    path = os.fspath(segment.folder / name)
    try:
      return self._reader(segment, name).read(local.tolist())
    except (RuntimeError, ValueError, IndexError) as error:
      raise StoreError(
        f"{path}: not readable: {error}; a store that was compacted meanwhile has to be opened "
        f"again"
      ) from None

  def _reader(self, segment: "_Segment", name: str) -> Any:
    path = os.fspath(segment.folder / name)
    if path not in self._readers:
      if len(self._readers) >= self._open_files:
        self._readers.popitem(last=False)[1].close()
      self._readers[path] = array_record_module.ArrayRecordReader(path)
    self._readers.move_to_end(path)
    return self._readers[path]

  def _close_readers(self) -> None:
    for reader in self._readers.values():
      reader.close()
    self._readers.clear()

  def close(self) -> None:
    """Closes the files and lets another process write with this number."""
    self._close_readers()
    for lock in self._locks:
      lock.release()
    self._locks = []


@dataclasses.dataclass(frozen=True)
class _Segment:
  folder: Any
  documents: int
  deleted: tuple[str, ...] = ()
  checksums: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def keys(self) -> np.ndarray:
    if not self.documents:
      return keys_of(())
    path = self.folder / _FILES[2]
    try:
      self._check(_FILES[2])
      keys = np.load(os.fspath(path))
    except (OSError, ValueError) as error:
      raise StoreError(
        str(error) if isinstance(error, StoreError) else f"{path}: not readable: {error}"
      ) from None
    if keys.shape != (self.documents, 2):
      raise StoreError(f"{path}: expected shape {(self.documents, 2)}, got {keys.shape}")
    return keys

  def verify(self) -> None:
    for name in self.checksums:
      self._check(name)

  def _check(self, name: str) -> None:
    try:
      checksum = io.checksum(self.folder / name)
    except OSError as error:
      raise StoreError(f"{self.folder / name}: not readable: {error.strerror}") from None
    if checksum != self.checksums[name]:
      raise StoreError(
        f"{self.folder / name}: its checksum is {checksum}, expected {self.checksums[name]}"
      )


@dataclasses.dataclass(frozen=True)
class _Folder:
  """The segments of one generation, and the ledgers that say which there are."""

  store: Any
  generation: int
  writer: int
  version: int = VERSION
  upload: "_Upload | None" = None

  @property
  def path(self) -> Any:
    return self.store / f"segments-{self.generation}"

  def ledger(self, writer: int) -> Any:
    return self.store / f"ledger-{self.generation}-{writer:03}.jsonl"

  def names(self) -> list[str]:
    """Of the segments that are there, in the order of time."""
    if not self.path.exists():
      return []
    return sorted(f.name for f in self.path.iterdir() if (f / "segment.json").exists())

  def segments(self) -> list[_Segment]:
    """Those that count, in the order of time.

    Raises:
      StoreError: one is missing or its record is damaged.
    """
    if self.version > 2 and not self.path.exists():
      raise StoreError(f"{self.path}: is missing, with all documents of this store")
    entries = self._entries()
    names = self.names()
    for name in sorted(set(entries) - set(names)):
      raise StoreError(
        f"{self.path / name}: is missing: {entries[name]['documents']} documents of this store "
        f"are gone; clara store repair "
        "takes it off the books, so that they can be compressed again"
      )
    return [self._read(name, entries.get(name)) for name in names]

  def problems(self) -> Iterator[tuple[_Segment, str]]:
    """Segments that are missing or damaged, and what is wrong with them."""
    self.path.mkdir(exist_ok=True)
    entries = self._entries(damaged=True)
    for name in sorted({*entries, *self.names()}):
      count = entries.get(name, {}).get("documents", 0)
      try:
        if not (self.path / name / "segment.json").exists():
          raise StoreError(f"{self.path / name}: is missing")
        self._read(name, entries.get(name)).verify()
      except StoreError as error:
        yield _Segment(self.path / name, count), str(error)

  def rewrite_ledgers(self) -> None:
    """From the segments that are there."""
    lines: dict[int, list[bytes]] = {}
    for name in self.names():
      segment = self._read(name, None)
      lines.setdefault(int(name.split("-")[1]), []).append(
        self._entry(segment, io.checksum(self.path / name / "segment.json"))
      )
    for file in self.store.glob(f"ledger-{self.generation}-*.jsonl"):
      if int(file.name.removesuffix(".jsonl").split("-")[2]) not in lines:
        file.unlink()
    for writer, entries in lines.items():
      io.write(self.ledger(writer), b"".join(entries))

  def _entries(self, damaged: bool = False) -> dict[str, dict[str, Any]]:
    """What the ledgers say, by segment. A line that a kill has cut tells of a segment that may be
    there or not."""
    entries = {}
    for file in self.store.glob(f"ledger-{self.generation}-*.jsonl"):
      for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], 1):
        try:
          entry = io.unsealed(line)
          entries[entry["segment"]] = entry
        except (io.DamagedError, ValueError) as error:
          if not damaged:
            raise StoreError(
              f"{file}:{number}: the ledger is damaged ({error}); clara store repair writes it "
              f"anew from what is there"
            ) from None
    return entries

  def _read(self, name: str, entry: Mapping[str, Any] | None) -> _Segment:
    file = self.path / name / "segment.json"
    content = file.read_bytes()
    try:
      if entry is not None and hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise io.DamagedError("is not what the ledger says")
      values = (
        io.unsealed(content)
        if self.version > 2 and (entry is None or io.is_sealed(content))
        else io.parse_json(content)
      )
      return _Segment(
        file.parent, values["documents"], tuple(values["deleted"]), values["checksums"]
      )
    except (ValueError, KeyError, TypeError) as error:
      raise StoreError(f"{file}: damaged: {error}") from None

  def _entry(self, segment: _Segment, sha256: str) -> bytes:
    return io.sealed(
      {
        "segment": segment.folder.name,
        "documents": segment.documents,
        "deleted": len(segment.deleted),
        "sha256": sha256,
      }
    )

  def begin(self) -> None:
    """The writer's ledger is there before its first segment, and tells of all of them."""
    ledger = self.ledger(self.writer)
    if not ledger.exists():
      io.write(ledger, b"")
    io.cut_back(os.fspath(ledger))
    entries, own = self._entries(), f"{self.writer:03}"
    # A kill came between it and its entry.
    for name in [n for n in self.names() if n.split("-")[1] == own and n not in entries]:
      self._append(self._read(name, None), io.checksum(self.path / name / "segment.json"))
    if self.upload:
      self.upload.begin(ledger)

  def _append(self, segment: _Segment, sha256: str) -> None:
    descriptor = os.open(os.fspath(self.ledger(self.writer)), os.O_WRONLY | os.O_APPEND)
    try:
      io.append(descriptor, self._entry(segment, sha256))
    finally:
      os.close(descriptor)

  def write(
    self, records: Iterable[bytes], codes: np.ndarray, keys: np.ndarray, deleted: Sequence[str] = ()
  ) -> _Segment:
    """One more segment; the folder has begun (`begin`)."""
    numbers = [int(name.split("-")[0]) for name in self.names()]
    folder = self.path / f"{max(numbers, default=-1) + 1:06}-{self.writer:03}"
    if self.upload:
      folder = self.path / f"{folder.name}-{uuid.uuid4().hex[:6]}"
    if folder.exists():
      shutil.rmtree(os.fspath(folder))  # its segment.json was never written
    folder.mkdir(parents=True)
    try:
      checksums = {}
      if len(codes):
        _write_records(folder / _FILES[0], records, 1)
        _write_records(
          folder / _FILES[1], (code.tobytes() for code in codes), max(1, _GROUP // codes.shape[1])
        )
        np.save(os.fspath(folder / _FILES[2]), keys)
        checksums = {name: io.checksum(folder / name) for name in _FILES}
      content = io.sealed(
        {"documents": len(codes), "deleted": list(deleted), "checksums": checksums}
      )
      segment = _Segment(folder, len(codes), tuple(deleted), checksums)
      io.write(folder / "segment.json", content)
      if self.upload:
        self.upload.segment(folder, [*checksums, "segment.json"])
      self._append(segment, hashlib.sha256(content).hexdigest())
      if self.upload:
        self.upload.ledger(self.ledger(self.writer))
    except BaseException:
      (folder / "segment.json").unlink(missing_ok=True)
      shutil.rmtree(os.fspath(folder), ignore_errors=True)
      raise
    return segment


class _Upload:
  """One writer's segments into a bucket."""

  def __init__(self, objects: buckets.Objects):
    self.objects = objects
    self._ledger = 0  # its generation, by which another that takes over is noticed

  def create(self, store: Any) -> None:
    """The manifest of a new store; what it needs goes first."""
    if (centers := store / "codebook.npy").exists():
      self.objects.write(centers.name, centers.read_bytes(), self.objects.generation(centers.name))
    self.objects.write("manifest.json", (store / "manifest.json").read_bytes(), 0)

  def discard(self, ledgers: Sequence[str]) -> None:
    """Takes back what `create` and `begin` have written."""
    for name in ("manifest.json", "codebook.npy", *ledgers):
      self.objects.delete(name, self.objects.generation(name))

  def begin(self, ledger: Any) -> None:
    """Takes the ledger over."""
    self._ledger = self.objects.generation(ledger.name)
    self.ledger(ledger)

  def segment(self, folder: Any, files: Sequence[str]) -> None:
    """A segment's files, in the order in which they have to be there; memory tokens stay there
    alone."""
    for name in files:
      if name == "segment.json" and self.objects.generation(self._name) != self._ledger:
        raise self._taken_over()
      path = pathlib.Path(os.fspath(folder / name))
      self.objects.write(f"{folder.parent.name}/{folder.name}/{name}", path, 0)
    (folder / _FILES[1]).unlink(missing_ok=True)

  def ledger(self, ledger: Any) -> None:
    """The ledger, in the place of the one that this writer has written before."""
    self._name = ledger.name
    try:
      self._ledger = self.objects.write(ledger.name, ledger.read_bytes(), self._ledger)
    except buckets.ConflictError:
      raise self._taken_over() from None

  def _taken_over(self) -> StoreError:
    return StoreError(
      f"{self.objects.path}: another process writes to this store with this number and has taken "
      f"it over; give each a --process of its own"
    )


class _Keys:
  """Which row an id has. Sorted arrays of hashes, newest first, merged when they become many."""

  def __init__(self):
    self._runs: list[tuple[np.ndarray, np.ndarray]] = []

  def put(self, keys: np.ndarray, rows: np.ndarray) -> None:
    """keys: [n, 2] uint64, rows: [n], -1 for an id that is gone; of equal keys the last counts."""
    # A new list: another thread may be searching the old one.
    self._runs = [_last_of_each(keys, rows), *self._runs]
    if len(self._runs) > _MAX_RUNS:
      self._merge()

  def _merge(self) -> None:
    if len(self._runs) > 1:
      keys, rows = (np.concatenate([run[i] for run in reversed(self._runs)]) for i in (0, 1))
      self._runs = [_last_of_each(keys, rows)]

  def find(self, keys: np.ndarray) -> np.ndarray:
    """Rows of keys, -1 where there is none."""
    rows = np.full(len(keys), -1, np.int64)
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
        rows[unknown[equal]] = run_rows[places[equal]]
        if not (on := same & ~is_here).any():
          break
        places = places + on
      unknown = unknown[~is_here]
    return rows

  def rows(self) -> np.ndarray:
    """Rows of all ids that are there."""
    self._merge()
    return self._runs[0][1][self._runs[0][1] >= 0] if self._runs else np.zeros(0, np.int64)


def _last_of_each(keys: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  order = np.lexsort((np.arange(len(keys)), keys[:, 1], keys[:, 0]))
  keys, rows = keys[order], rows[order]
  is_last = np.append((keys[1:] != keys[:-1]).any(1), True)[: len(keys)]
  return keys[is_last], rows[is_last]


class MemoryLookup:
  """What the joint stage reads its candidates with (`pipeline.MemorySource`)."""

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
      raise StoreError(f"{self.store.location}: the store lacks {what}; compress it first")
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
        raise StoreError(f"{self.store.location}: the store keeps no text; rows need doc_ids")
      self._row_of_text = {
        d.text: int(row) for row, d in zip(self.store.rows, self.store.documents(), strict=True)
      }
    return np.array([self._row_of_text.get(t, -1) for t in texts], np.int64)


# How fields are called in manifest.json.
_IN_FILE = {"encoding": "form"}
_FROM_FILE = {stored: name for name, stored in _IN_FILE.items()}


def _read_manifest(file: Any) -> Manifest:
  content = file.read_bytes()
  try:
    values = io.unsealed(content) if io.is_sealed(content) else io.parse_json(content)
    version = values.get("version")
    if version == VERSION and not io.is_sealed(content):
      raise io.DamagedError("has no checksum at its end")
  except (ValueError, AttributeError) as error:
    raise StoreError(f"{file}: damaged: {error}") from None
  if version not in (2, VERSION):
    raise StoreError(
      f"{file}: a store of version {version}, expected {VERSION}; compress the corpus again"
    )
  try:
    return Manifest(**{_FROM_FILE.get(name, name): value for name, value in values.items()})
  except TypeError as error:
    raise StoreError(f"{file}: damaged: {error}") from None


def _write_manifest(file: Any, manifest: Manifest) -> None:
  io.write(
    file,
    io.sealed(
      {_IN_FILE.get(name, name): value for name, value in dataclasses.asdict(manifest).items()}
    ),
  )


def _same(stored_manifest: Manifest, requested_manifest: Manifest, directory: str) -> None:
  """Refuses to extend a store with what another run would write."""
  stored_manifest.same_compressor(requested_manifest, directory)
  for name in ("num_memory_tokens", "width", "doc_max_length", "encoding", "text"):
    if getattr(stored_manifest, name) != getattr(requested_manifest, name):
      raise StoreError(
        f"{directory}: the store has {name}={getattr(stored_manifest, name)!r}, this run would "
        f"write {getattr(requested_manifest, name)!r}; "
        "choose another --store"
      )


def _record(document: Document) -> bytes:
  """As it is stored; earlier versions know of no places."""
  values = dataclasses.asdict(document)
  if not values["place"]:
    del values["place"]
  return json.dumps(values, ensure_ascii=False).encode()


def _write_records(path: Any, records: Iterable[bytes], group: int) -> None:
  writer = array_record_module.ArrayRecordWriter(os.fspath(path), f"group_size:{group},zstd:3")
  try:
    for record in records:
      writer.write(record)
    writer.close()
  except RuntimeError as error:  # of a full disk, say
    raise OSError(f"{path}: {error}") from None
