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
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from clara_jax import distributed, sharding
from clara_jax.config import ClaraConfig, ConfigError, MeshConfig
from clara_jax.data.pipeline import pad_tokens
from clara_jax.data.prompt_tokenizer import PromptTokenizer
from clara_jax.data.schemas import Document
from clara_jax.inference.checkpoint import Checkpoint
from clara_jax.memory.store import Manifest, MemoryStore, fingerprint, read_manifest
from clara_jax.model import Clara

log = logging.getLogger(__name__)

GROUPS = ("base", "memory_embedding", "compressor")


@dataclasses.dataclass(frozen=True)
class CompressReport:
  """documents: in the store now; skipped: already there; replaced: there with another text; cut: of
  the new ones, longer than doc_max_length, whose end was left out; bytes: of memory tokens on disk;
  documents_per_second: of the new ones."""

  documents: int
  skipped: int
  replaced: int
  cut: int
  bytes: int
  seconds: float
  documents_per_second: float


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
    _like(store.manifest, manifest_of(model, weights), weights), store.directory
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
  table, first = sharding.to_host(base["embedding"]), config.model.vocab_size
  encode = first + config.num_memory_tokens + 1  # after <MEM…> and <AE>
  groups = {
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
  model, prompt_tokenizer, weights = (
    checkpoint.model,
    checkpoint.prompt_tokenizer,
    checkpoint.weights,
  )
  start = time.monotonic()
  if (existing := read_manifest(directory)) is not None:
    encoding, text = encoding or existing.encoding, existing.text if text is None else text
    if model.memory_tokens is None and existing.num_memory_tokens < model.num_memory_tokens:
      model, prompt_tokenizer = (
        model.first(existing.num_memory_tokens),
        prompt_tokenizer.first(existing.num_memory_tokens),
      )
  manifest = manifest_of(model, weights, encoding, text is not False)
  devices = checkpoint.mesh or sharding.make_mesh(mesh, jax.local_devices())
  together = devices.is_multi_process
  store = _open_store(
    directory, _like(existing, manifest, weights) if existing else manifest, process, together
  )
  if replace and not store.manifest.text:
    raise ConfigError(
      f"{directory}: the store keeps no text, so that changed documents cannot be told from others"
    )
  ways = sharding.num_batch_shards(devices)
  batch_size = -(-batch_size // ways) * ways
  by_row = sharding.batch_sharding(devices)
  compress = sharding.jit(model.compress, devices)
  chunks = _Chunks(documents, store, shard_size, replace, process, processes)
  new_count = cut = 0
  config = model.config

  def dispatch(inputs: list[np.ndarray]) -> tuple[np.ndarray, list[jax.Array]]:
    """Sorted by length, a batch has little padding; the segment keeps the corpus's order."""
    order = np.argsort([len(x) for x in inputs], kind="stable")
    parts = []
    for first in range(0, len(order), batch_size):
      chosen = order[first : first + batch_size]
      padded = [inputs[i] for i in chosen] + [inputs[chosen[0]]] * (batch_size - len(chosen))
      tokens = pad_tokens(padded, prompt_tokenizer.pad_id, bucket)
      parts.append(compress(placed, tokens if together else jax.device_put(tokens, by_row)))
    return order, parts

  def write(chunk: list[Document], order: np.ndarray, parts: list[jax.Array]) -> None:
    nonlocal new_count
    memories = np.empty((len(chunk), model.num_memory_tokens, config.model.width), np.float32)
    for first, part in zip(range(0, len(order), batch_size), parts, strict=True):
      chosen = order[first : first + batch_size]
      memories[chosen] = np.asarray(part)[: len(chosen)]
    new_count += len(chunk)
    if not together or distributed.is_main():
      store.upsert(chunk, memories)
    if progress:
      log.info(
        f"compress: {new_count} new documents, {chunks.skipped} were there, "
        f"{new_count / (time.monotonic() - start):.0f} documents/s"
      )

  writing: concurrent.futures.Future | None = None
  with (
    contextlib.closing(store),
    concurrent.futures.ThreadPoolExecutor(1) as writer,
  ):
    placed = weights if checkpoint.mesh else _place(model, weights, devices)
    for chunk, inputs in _tokenized(chunks, prompt_tokenizer, workers):
      cut += sum(prompt_tokenizer.is_cut(x) for x in inputs)
      work = dispatch(inputs)
      if writing:
        writing.result()
      writing = writer.submit(write, chunk, *work)
    if writing:
      writing.result()
  if together:
    distributed.barrier("compressed")
  if processes > 1 or together:
    store = MemoryStore(directory)  # with what the others have written
  seconds = time.monotonic() - start
  if cut and progress:
    log.warning(
      f"compress: {cut} of {new_count} documents are longer than "
      f"doc_max_length={config.doc_max_length} tokens; their ends are "
      "left out"
    )
  return CompressReport(
    len(store),
    chunks.skipped,
    chunks.replaced,
    cut,
    store.nbytes(),
    seconds,
    new_count / max(seconds, 1e-9),
  )


def _open_store(directory: str, manifest: Manifest, writer: int, together: bool) -> MemoryStore:
  """To write; where processes work together, the first one writes and the others only read."""
  if not together:
    return MemoryStore(directory, manifest, writer=writer)
  store = MemoryStore(directory, manifest) if distributed.is_main() else None
  distributed.barrier("store is there")
  store = store or MemoryStore(directory)
  distributed.barrier("store is open")
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
  ):
    self._documents, self._store, self._size, self._replace = iter(documents), store, size, replace
    self._process, self._processes = process, processes
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

  def _lacking(self, block: list[Document]) -> list[Document]:
    rows = self._find([d.id for d in block])
    positions = np.flatnonzero(rows >= 0)
    changed = set()
    if self._replace and len(positions):
      stored = self._store.documents(rows[positions])
      changed = {int(i) for i, old in zip(positions, stored, strict=True) if old != block[i]}
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
