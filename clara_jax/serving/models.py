"""What a server answers with: one model or several, each an answerer over a store that may change
while it is served."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import logging
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from clara_jax import sharding
from clara_jax.config import ConfigError, MeshConfig
from clara_jax.data.schemas import DataError, Document
from clara_jax.documents import pieces, reading
from clara_jax.errors import InputError
from clara_jax.inference.answer import Answer, Answerer, Found, Question
from clara_jax.inference.compress import Compressor
from clara_jax.memory.store import MemoryStore
from clara_jax.retrieval import index as index_lib
from clara_jax.serving import together
from clara_jax.serving.batcher import Batcher

log = logging.getLogger(__name__)

_UPLOADER = 998  # a writer's number that no compress has
_SHARE = 4  # a store that always changes takes one part of the time in so many


class Model:
  """An answerer and the queues before it.

  Args:
    name: by which requests choose it.
    answerer: answers; only `executor` uses it.
    executor: one thread, shared by all models.
    batching: of `Batcher`.
  """

  def __init__(
    self,
    name: str,
    answerer: Answerer,
    executor: concurrent.futures.Executor,
    batching: dict[str, Any],
  ):
    self.name, self.answerer, self._executor = name, answerer, executor
    self.created = int(time.time())
    self._compressor: Compressor | None = None
    self._changing = asyncio.Lock()
    self.answers = Batcher(self._answer, executor, **batching)
    self.searches = Batcher(self._search, executor, **batching)

  def start(self) -> None:
    """Call it in the running loop."""
    self.answers.start()
    self.searches.start()

  async def stop(self) -> None:
    """What waits is still answered."""
    await self.answers.stop()
    await self.searches.stop()

  def warm_up(self, most: int) -> None:
    """Compiles every size of batch, up to `most`, for questions and prompts of the usual length."""
    question, size = Question("Who is it?"), 1
    while True:
      self.answerer.answer([question] * size, on_text=lambda *_: None)
      if size >= most:
        break
      size = min(2 * size, most)

  def _answer(
    self, questions: Sequence[Question], emits: Sequence[Any]
  ) -> list[Answer | Exception]:
    streamed = any(emits)

    def emit(place, **line):
      if emits[place]:
        emits[place](line)

    on_text = (lambda place, text: emit(place, answer=text)) if streamed else None
    on_found = (
      (lambda place, documents: emit(place, documents=[dataclasses.asdict(f) for f in documents]))
      if streamed
      else None
    )
    try:
      return list(self.answerer.answer(questions, on_text, on_found))
    except (ConfigError, DataError) as error:
      if len(questions) == 1:
        return [error]
      # One that does not fit must not harm the others.
      return [self._answer([q], [e])[0] for q, e in zip(questions, emits, strict=True)]

  def _search(
    self, questions: Sequence[Question], emits: Sequence[Any]
  ) -> list[list[Found] | Exception]:
    try:
      return self.answerer.search(questions)
    except (ConfigError, DataError) as error:
      return [error] if len(questions) == 1 else [self._search([q], [None])[0] for q in questions]

  # ---- documents that are added ------------------------------------------------------------------

  async def add(self, name: str, content: bytes) -> list[str]:
    """Reads, compresses and stores a document of a user's, and goes on with the store that has it.

    Args:
      name: of its file; its ids begin with it.
      content: of its file.

    Returns:
      The ids of its pieces; an earlier one with the same id is replaced.

    Raises:
      InputError: it cannot be read, or the store not be written to.
    """
    loop = asyncio.get_running_loop()
    async with self._changing:
      documents = await loop.run_in_executor(None, self._read, name, content)
      ids = await loop.run_in_executor(self._executor, self._store, documents)
      state = await loop.run_in_executor(None, self._later_state)
      if state is not None:
        await loop.run_in_executor(self._executor, self.answerer.follow, *state)
    return ids

  def _read(self, name: str, content: bytes) -> list[Document]:
    if isinstance(self.answerer, together.Leader) or self._settings().get("kind") == "qdrant":
      raise ConfigError("documents are added to a store of one process, without a database")
    safe = re.sub(r"[^\w.()+ -]", "_", name.replace("\\", "/").rsplit("/", 1)[-1]).lstrip(". ")
    if not safe:
      raise ConfigError(f"name: {name!r:.60} is no name of a file")
    prompt_tokenizer = self.answerer.checkpoint.prompt_tokenizer
    with tempfile.TemporaryDirectory() as folder:
      file = pathlib.Path(folder) / safe
      file.write_bytes(content)
      try:
        return list(
          pieces.documents(
            reading.read(str(file)),
            prompt_tokenizer.config.doc_max_length,
            lambda text: len(prompt_tokenizer.ids(text)),
            "always",
          )
        )
      except InputError as error:
        raise DataError(str(error).replace(f"{folder}/", "")) from None

  def _store(self, documents: list[Document]) -> list[str]:
    """On the devices' thread."""
    if not documents:
      raise DataError("the document is empty")
    store = self.answerer.store
    if store.manifest.num_memory_tokens < store.whole.num_memory_tokens:
      raise ConfigError("documents are added where all memory tokens of each are read")
    if self._compressor is None:
      device = sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])
      checkpoint = self.answerer.checkpoint
      self._compressor = Compressor(checkpoint, checkpoint.mesh or device, batch_size=8)
    memories, _ = self._compressor.compress(
      store.whole.num_memory_tokens, [d.text for d in documents]
    )
    with contextlib.closing(MemoryStore(store.location, store.whole, writer=_UPLOADER)) as writer:
      writer.upsert(documents, memories)
    return [d.id for d in documents]

  # ---- a store that changes ----------------------------------------------------------------------

  async def follow(self, seconds: float, told: Callable[[], None] = lambda: None) -> None:
    """Goes on with what the store holds, looking every so many seconds, until it is cancelled.

    The index of the new state is made in memory, from the one that is saved where that can be; each
    batch is answered from one state. Stores of several processes, and databases, are not followed:
    a database is what it is at each moment.

    Args:
      seconds: between two looks.
      told: called after each change.
    """
    if isinstance(self.answerer, together.Leader) or self._settings().get("kind") == "qdrant":
      return
    self.answerer.store.pin()
    loop, pause, problem = asyncio.get_running_loop(), seconds, ""
    with concurrent.futures.ThreadPoolExecutor(1, "follower") as thread:
      while True:
        await asyncio.sleep(pause)
        start, cost = time.monotonic(), 0.0
        try:
          async with self._changing:
            state = await loop.run_in_executor(thread, self._later_state)
            cost = time.monotonic() - start
            if state is not None:
              await loop.run_in_executor(self._executor, self.answerer.follow, *state)
          if state is not None:
            log.info(
              "serve: the store has changed: %d documents (%.1f s)",
              len(state[0]),
              time.monotonic() - start,
            )
            told()
          problem = ""
        except (InputError, OSError) as error:  # in the middle of a change, perhaps
          if problem != str(error):
            problem = str(error)
            log.warning("serve: the store cannot be followed yet: %s", problem)
        pause = max(seconds, (_SHARE - 1) * cost)

  def _settings(self) -> dict[str, Any]:
    return index_lib.saved_settings(self.answerer.store)

  def _later_state(self) -> tuple[MemoryStore, Any] | None:
    """The store as it is now with an index over it; None where it is what it was."""
    old = self.answerer.store
    if old.is_current():
      return None
    read = old.manifest.num_memory_tokens
    store = MemoryStore(old.location, memory_tokens=read)
    if store.whole.compressor != old.whole.compressor:
      raise ConfigError(f"{old.location}: is another store now; start the server again")
    settings = index_lib.saved_settings(store)
    settings.pop("memory_tokens", None)
    searched = store.first(self.answerer.search_tokens)
    index, _ = index_lib.refresh(searched, **(settings or {"kind": "exact"}))
    store.pin()
    searched.pin()
    return store, index
