"""A corpus through the frozen compressor, once, into a store.

Three things go on at once: texts are tokenized ahead, the devices compress, and what they have made
is written by a thread.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import logging
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from clara_jax import distributed, sharding
from clara_jax.config import ClaraConfig, ConfigError, MeshConfig
from clara_jax.data.pipeline import pad_tokens
from clara_jax.data.prompt_tokenizer import PromptTokenizer
from clara_jax.data.schemas import Document
from clara_jax.errors import InputError
from clara_jax.inference.checkpoint import Checkpoint
from clara_jax.memory.store import (
  BLOCK,
  Manifest,
  MemoryStore,
  fingerprint,
  keys_of,
  read_manifest,
)
from clara_jax.model import Clara
from clara_jax.workers import Pool

log = logging.getLogger(__name__)

MANY_UNKNOWN = 0.05  # a share of unknown tokens that is worth a warning
GROUPS = ("base", "memory_embedding", "compressor")


@dataclasses.dataclass(frozen=True)
class CompressReport:
  """documents: in the store now; skipped: already there; replaced: there with another text; cut: of
  the new ones, longer than doc_max_length, whose end was left out; deleted: in the store, but not
  among the documents any more; bytes: of memory tokens on disk; documents_per_second: of the new
  ones; unknown_tokens: share of the new ones' tokens that the tokenizer has no entry for."""

  documents: int
  skipped: int
  replaced: int
  cut: int
  bytes: int
  seconds: float
  documents_per_second: float
  deleted: int = 0
  unknown_tokens: float = 0.0


def manifest_of(
  model: Clara, weights: dict[str, Any], encoding: str | None = None, text: bool = True
) -> Manifest:
  """What a store made by these weights says of itself; by default its encoding is the compute
  dtype."""
  config, parts = model.config, fingerprints(model.config, weights)
  return Manifest(
    hashlib.sha256("".join(parts.values()).encode()).hexdigest()[:16],
    model.num_memory_tokens,
    config.model.width,
    config.doc_max_length,
    encoding or config.model.dtype,
    text,
    parts=parts,
    dtype=config.model.dtype,
  )


def check_compressor(store: MemoryStore, model: Clara, weights: dict[str, Any]) -> None:
  """Refuses a store that other weights have made.

  Raises:
    StoreError: saying what differs.
  """
  store.manifest.same_compressor(
    _like(store.manifest, manifest_of(model, weights), weights), store.location
  )


def _like(existing: Manifest, manifest: Manifest, weights: dict[str, Any]) -> Manifest:
  """A store of version 2 names its compressor by a hash of all rows."""
  if not existing.parts and fingerprint(weights, GROUPS) == existing.compressor:
    return dataclasses.replace(manifest, compressor=existing.compressor)
  return manifest


def fingerprints(config: ClaraConfig, weights: dict[str, Any]) -> dict[str, str]:
  """Hashes of the weights that shape memory tokens, by group: of the base, the words' rows of the
  embedding and that of `<ENC>`, and the layers; the rows of the other special tokens are never
  read, and differ between formats."""
  base = weights["base"]
  table, first = distributed.to_host(base["embedding"]), config.model.vocab_size
  encode = first + config.num_memory_tokens + 1  # after <MEM…> and <AE>
  groups: dict[str, dict[str, Any]] = {
    "embedding": {"embedding": [table[:first], table[encode]]},
    "layers": {"layers": {k: v for k, v in base.items() if k not in ("embedding", "head")}},
    **{name: {name: weights[name]} for name in ("memory_embedding", "compressor")},
  }
  return {name: fingerprint(group, tuple(group)) for name, group in groups.items()}


def compress_corpus(
  checkpoint: Checkpoint,
  documents: Iterable[Document],
  directory: str,
  *,
  encoding: str | None = None,
  text: bool | None = None,
  replace: bool = False,
  delete_missing: Callable[[str], bool] | None = None,
  batch_size: int = 64,
  shard_size: int = 4096,
  bucket: int = 32,
  workers: int = 0,
  process: int = 0,
  processes: int = 1,
  mesh: MeshConfig | None = None,
  progress: bool = True,
) -> CompressReport:
  """Writes the documents' memory tokens into the store; those that it has are skipped, so that a
  stopped run goes on.

  Several processes may work on one corpus, each with devices of its own: every block of
  `shard_size` documents belongs to one of them. Where the checkpoint lies on a mesh of several
  processes, they compress every batch together and the first one writes.

  Args:
    checkpoint: with the compressor; a store that is there and has fewer memory tokens gets as many
      as it has.
    documents: the corpus; all processes get the same.
    directory: of the store.
    encoding: of a new store (`codecs.NAMES`, except 'pq'); by default the compute dtype, and what
      it is for an existing one.
    text: whether a new store keeps the documents' text; by default yes, and what it is for one that
      is there.
    replace: whether a document that is there with another title or text is compressed anew.
    delete_missing: whether a document that is there, but not among `documents`, is deleted; asked
      with its id when all else is done. One process only.
    batch_size: documents in a batch; rounded up to a multiple of the parts that the mesh divides a
      batch into.
    shard_size: documents a segment; sorted by length within.
    bucket: lengths are padded to a multiple of it.
    workers: processes that tokenize ahead; 0 does it in a thread.
    process, processes: which part of the corpus is this process's.
    mesh: of this process's devices, where the checkpoint lies on none; by default each has the
      whole compressor and a part of the batch.
    progress: whether progress is logged.

  Raises:
    StoreError: the store was made by another compressor or in another encoding.
  """
  devices = checkpoint.mesh or sharding.make_mesh(mesh, jax.local_devices())
  compressor = Compressor(checkpoint, devices, batch_size, bucket)
  existing = read_manifest(directory)
  together = devices.is_multi_process
  if delete_missing and (processes > 1 or together):
    raise ConfigError("delete_missing: one process has to see all documents")
  store = _open_store(directory, compressor.manifest(existing, encoding, text), process, together)
  chunks = _Chunks(documents, store, shard_size, replace, process, processes, delete_missing)
  report = _write(
    store,
    chunks,
    compressor.pipeline(chunks, workers),
    writes=not together or distributed.is_main(),
    progress=progress,
  )
  if together:
    distributed.barrier("compressed")
  if together and not distributed.is_main():  # with what the first one has written
    report = dataclasses.replace(report, documents=len(MemoryStore(directory)))
  return report


def compress_corpus_with(
  pool: Pool,
  documents: Iterable[Document],
  directory: str,
  *,
  encoding: str | None = None,
  text: bool | None = None,
  replace: bool = False,
  delete_missing: Callable[[str], bool] | None = None,
  shard_size: int = 4096,
  progress: bool = True,
) -> CompressReport:
  """`compress_corpus` by workers that come and go: blocks of `shard_size` documents are handed out,
  and handed out again where a worker has died; this process writes. The store is that of a straight
  run.

  Args:
    pool: of `Compressor`s (`make_compressor`).
    documents, directory, encoding, text, replace, delete_missing, shard_size, progress: see
      `compress_corpus`.
  """
  existing = read_manifest(directory)
  manifest = pool.result(pool.submit(0, "manifest", existing, encoding, text))
  store = MemoryStore(directory, manifest)
  chunks = _Chunks(documents, store, shard_size, replace, 0, 1, delete_missing)
  waiting: collections.deque[list[Document]] = collections.deque()

  def calls():
    for chunk in chunks:
      waiting.append(chunk)
      yield manifest.num_memory_tokens, [d.text for d in chunk]

  results = ((waiting.popleft(), *result) for result in pool.map("compress", calls()))
  return _write(store, chunks, results, writes=True, progress=progress)


class Counts(NamedTuple):
  """Of documents: how many were cut, tokens that were read, how many of these are unknown."""

  cut: int = 0
  tokens: int = 0
  unknown: int = 0


class Compressor:
  """A checkpoint's compressor on its devices.

  Args:
    checkpoint: with the compressor.
    devices: where it computes; the checkpoint lies there or on one device.
    batch_size: documents in a batch; rounded up to a multiple of the parts that the mesh divides a
      batch into.
    bucket: lengths are padded to a multiple of it.
  """

  def __init__(
    self,
    checkpoint: Checkpoint,
    devices: jax.sharding.Mesh,
    batch_size: int = 64,
    bucket: int = 32,
  ):
    self._checkpoint, self._devices, self._bucket = checkpoint, devices, bucket
    ways = sharding.num_batch_shards(devices)
    self._batch_size = -(-batch_size // ways) * ways
    self._weights = checkpoint.weights
    if checkpoint.mesh is None:
      self._weights = _place(checkpoint.model, checkpoint.weights, devices)
    self._use(checkpoint)

  def _use(self, checkpoint: Checkpoint) -> None:
    self._model, self._prompt_tokenizer = checkpoint.model, checkpoint.prompt_tokenizer
    self._compress = sharding.jit(checkpoint.model.compress, self._devices)

  def manifest(
    self, existing: Manifest | None, encoding: str | None, text: bool | None
  ) -> Manifest:
    """What the store that is there, or a new one, says of itself; from here on as many memory
    tokens are written as it has."""
    if existing is not None:
      encoding, text = encoding or existing.encoding, existing.text if text is None else text
      m, model = existing.num_memory_tokens, self._model
      if model.memory_tokens is None and m < model.num_memory_tokens:
        self._use(self._checkpoint.first(m))
    weights = self._checkpoint.weights
    manifest = manifest_of(self._model, weights, encoding, text is not False)
    return _like(existing, manifest, weights) if existing else manifest

  def compress(self, m: int, texts: list[str]) -> tuple[np.ndarray, "Counts"]:
    """Memory tokens [n, m, D] float32 of a block of texts, and what was read of these."""
    if m != self._model.num_memory_tokens:
      self._use(self._checkpoint.first(m))
    inputs = self._prompt_tokenizer.documents(texts)
    return self._collect(*self._dispatch(inputs)), self._count(inputs)

  def pipeline(
    self, chunks: Iterable[list[Document]], workers: int
  ) -> Iterator[tuple[list[Document], np.ndarray, "Counts"]]:
    """(documents, their memory tokens, what was read of them) of each chunk; the next one is
    tokenized and computed while one is written."""
    pending = None
    for chunk, inputs in _tokenized(chunks, self._prompt_tokenizer, workers):
      following = (chunk, self._dispatch(inputs), self._count(inputs))
      if pending:
        yield pending[0], self._collect(*pending[1]), pending[2]
      pending = following
    if pending:
      yield pending[0], self._collect(*pending[1]), pending[2]

  def _count(self, inputs: list[np.ndarray]) -> "Counts":
    unknown = self._prompt_tokenizer.unknown_id
    return Counts(
      sum(self._prompt_tokenizer.is_cut(x) for x in inputs),
      sum(len(x) for x in inputs),
      sum(int((x == unknown).sum()) for x in inputs) if unknown is not None else 0,
    )

  def _dispatch(self, inputs: list[np.ndarray]) -> tuple[np.ndarray, list[jax.Array]]:
    """Sorted by length, a batch has little padding; the segment keeps the corpus's order."""
    order = np.argsort([len(x) for x in inputs], kind="stable")
    by_row, size, parts = sharding.batch_sharding(self._devices), self._batch_size, []
    for first in range(0, len(order), size):
      chosen = order[first : first + size]
      padded = [inputs[i] for i in chosen] + [inputs[chosen[0]]] * (size - len(chosen))
      tokens = pad_tokens(padded, self._prompt_tokenizer.pad_id, self._bucket)
      if not self._devices.is_multi_process:
        tokens = jax.device_put(tokens, by_row)
      parts.append(self._compress(self._weights, tokens))
    return order, parts

  def _collect(self, order: np.ndarray, parts: list[jax.Array]) -> np.ndarray:
    model, size = self._model, self._batch_size
    memories = np.empty((len(order), model.num_memory_tokens, model.config.model.width), np.float32)
    for first, part in zip(range(0, len(order), size), parts, strict=True):
      chosen = order[first : first + size]
      memories[chosen] = np.asarray(part)[: len(chosen)]
    return memories


def _write(
  store: MemoryStore,
  chunks: "_Chunks",
  results: Iterable[tuple[list[Document], np.ndarray, Counts]],
  *,
  writes: bool,
  progress: bool,
) -> CompressReport:
  """Puts what is compressed into the store, in a thread of its own."""
  if chunks.replace and not store.manifest.text:
    store.close()
    raise ConfigError(
      f"{store.location}: the store keeps no text, so that changed documents cannot be told from "
      f"others"
    )
  start = time.monotonic()
  new_count, counts = 0, Counts()

  def write(chunk: list[Document], memories: np.ndarray) -> None:
    nonlocal new_count
    new_count += len(chunk)
    if writes:
      store.upsert(chunk, memories)
    if progress:
      log.info(
        f"compress: {new_count} new documents, {chunks.skipped} were there, "
        f"{new_count / (time.monotonic() - start):.0f} documents/s"
      )

  writing: concurrent.futures.Future | None = None
  with contextlib.ExitStack() as stack:
    stack.enter_context(contextlib.closing(store))
    stack.push(_discard(store))
    writer = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1))
    for chunk, memories, more in results:
      counts = Counts(*np.add(counts, more).tolist())
      if writing:
        writing.result()
      writing = writer.submit(write, chunk, memories)
    if writing:
      writing.result()
    chunks.move()
    deleted = chunks.delete_missing()
    store.refresh()  # what others have written counts, too
    documents, nbytes = len(store), store.nbytes()
  seconds = time.monotonic() - start
  if counts.cut and progress:
    log.warning(
      f"compress: {counts.cut} of {new_count} documents are longer than "
      f"doc_max_length={store.manifest.doc_max_length} tokens; their ends are "
      "left out (--split always makes pieces of them)"
    )
  unknown = counts.unknown / max(1, counts.tokens)
  if unknown > MANY_UNKNOWN and progress:
    log.warning(
      f"compress: {unknown:.0%} of the tokens are unknown to the tokenizer: the documents are in a "
      "language or script that this checkpoint does not read"
    )
  return CompressReport(
    documents,
    chunks.skipped,
    chunks.replaced,
    counts.cut,
    nbytes,
    seconds,
    new_count / max(seconds, 1e-9),
    deleted,
    unknown,
  )


def _discard(store: MemoryStore) -> Callable[..., None]:
  """On the way out of a `with` that has failed."""

  def leave(kind: Any, *_: Any) -> None:
    if kind is not None and issubclass(kind, InputError):
      store.discard_if_new()

  return leave


def _open_store(directory: str, manifest: Manifest, writer: int, together: bool) -> MemoryStore:
  """To write; where processes work together, the first one writes and the others only read."""
  if not together:
    return MemoryStore(directory, manifest, writer=writer)
  store = problem = None
  for turn in (True, False):  # the first process makes it, if it is not there
    try:
      if distributed.is_main() == turn and problem is None:
        store = MemoryStore(directory, manifest) if turn else MemoryStore(directory)
    except (InputError, OSError) as error:
      problem = error
    distributed.succeed(problem, f"opening {directory}")
  return store


def _place(model: Clara, weights: dict[str, Any], mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """The compressor's weights where the mesh wants them, once."""
  boxed = jax.eval_shape(lambda: model.init_boxed(jax.random.key(0), GROUPS))
  shardings = sharding.tree_shardings(boxed, mesh)
  return {group: jax.tree.map(jax.device_put, weights[group], shardings[group]) for group in GROUPS}


class _Chunks:
  """Lists of `size` documents that the store lacks, in this process's part of the corpus."""

  def __init__(
    self,
    documents: Iterable[Document],
    store: MemoryStore,
    size: int,
    replace: bool,
    process: int,
    processes: int,
    is_missing: Callable[[str], bool] | None,
  ):
    self._documents, self._store, self._size, self.replace = iter(documents), store, size, replace
    self._process, self._processes, self._is_missing = process, processes, is_missing
    self._moved: list[tuple[Document, int]] = []  # with their rows
    self._seen: set[bytes] = set()  # ids' hashes, where those that are not seen are deleted
    # Rows as they were at the start: the writer adds to the store meanwhile.
    self._find = store.locate
    self.skipped = self.replaced = 0

  def __iter__(self) -> Iterator[list[Document]]:
    waiting: list[Document] = []
    for number in itertools.count():
      block = list(itertools.islice(self._documents, self._size))
      if not block:
        break
      if number % self._processes != self._process:
        continue
      waiting += self._lacking(block)
      while len(waiting) >= self._size:
        yield waiting[: self._size]
        waiting = waiting[self._size :]
    if waiting:
      yield waiting

  def move(self) -> None:
    """Writes documents that have only another place in their file, with the memory tokens that they
    have."""
    for start in range(0, len(self._moved), self._size):
      block = self._moved[start : start + self._size]
      codes = self._store.codes(np.array([row for _, row in block]))
      self._store.upsert_codes([document for document, _ in block], codes)

  def delete_missing(self) -> int:
    """Deletes what is in the store and was not seen; returns how many."""
    if self._is_missing is None:
      return 0
    self._store.refresh()
    missing: list[str] = []
    for start in range(0, len(self._store), BLOCK):
      ids = [d.id for d in self._store.documents(self._store.rows[start : start + BLOCK])]
      missing += [
        identifier
        for identifier, key in zip(ids, keys_of(ids), strict=True)
        if key.tobytes() not in self._seen and self._is_missing(identifier)
      ]
    return self._store.delete(missing) if missing else 0

  def _lacking(self, block: list[Document]) -> list[Document]:
    if self._is_missing is not None:
      self._seen.update(key.tobytes() for key in keys_of(d.id for d in block))
    rows = self._find([d.id for d in block])
    positions = np.flatnonzero(rows >= 0)
    changed = set()
    if self.replace and len(positions):
      stored = self._store.documents(rows[positions])
      for i, row, old in zip(positions.tolist(), rows[positions].tolist(), stored, strict=True):
        if old == block[i]:
          continue
        same_text = (old.text, old.title) == (block[i].text, block[i].title)
        if same_text and self._store.has_memories:
          self._moved.append((block[i], row))
        else:
          changed.add(i)
    self.skipped += len(positions) - len(changed)
    self.replaced += len(changed)
    return [d for i, d in enumerate(block) if rows[i] < 0 or i in changed]


def _tokenized(
  chunks: Iterable[list[Document]], prompt_tokenizer: PromptTokenizer, workers: int
) -> Iterator[tuple[list[Document], list[np.ndarray]]]:
  """Chunks with their encoder inputs, made ahead by processes or by a thread."""
  if workers:
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads of JAX
    pool: Any = concurrent.futures.ProcessPoolExecutor(
      workers, context, _start_worker, (prompt_tokenizer,)
    )
    task = _encode_in_worker
  else:
    pool, task = concurrent.futures.ThreadPoolExecutor(1), prompt_tokenizer.documents
  ahead: collections.deque = collections.deque()
  with pool:
    for chunk in chunks:
      ahead.append((chunk, pool.submit(task, [d.text for d in chunk])))
      if len(ahead) > workers + 1:
        chunk, future = ahead.popleft()
        yield chunk, future.result()
    while ahead:
      chunk, future = ahead.popleft()
      yield chunk, future.result()


_tokenizer_of_worker: PromptTokenizer | None = None


def _start_worker(prompt_tokenizer: PromptTokenizer) -> None:
  global _tokenizer_of_worker
  _tokenizer_of_worker = prompt_tokenizer


def _encode_in_worker(texts: list[str]) -> list[np.ndarray]:
  return _tokenizer_of_worker.documents(texts)
