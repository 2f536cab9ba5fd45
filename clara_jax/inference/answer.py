"""Questions to answers: encode, search, splice, generate."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from clara_jax.config import ConfigError
from clara_jax.data.pipeline import pad_tokens
from clara_jax.data.schemas import Document
from clara_jax.inference.checkpoint import Checkpoint
from clara_jax.inference.compress import check_compressor
from clara_jax.inference.generate import Greedy, make_stream
from clara_jax.memory.store import MemoryStore
from clara_jax.nn import linear
from clara_jax.nn.decoder import KeyValues
from clara_jax.retrieval import index as index_lib
from clara_jax.retrieval.base import Searcher, unit_vectors


@dataclasses.dataclass(frozen=True)
class Question:
  """A question, and what it may differ in from others of its batch.

  Attributes:
    text: the question.
    top_k: K; None for the answerer's.
    ids: documents that may be found; None for all.
    max_new_tokens: of its answer; None for the answerer's.
    expand: how many of the best documents are read as text; None for the answerer's.
  """

  text: str
  top_k: int | None = None
  ids: tuple[str, ...] | None = None
  max_new_tokens: int | None = None
  expand: int | None = None


@dataclasses.dataclass(frozen=True)
class Found:
  """A retrieved document.

  Attributes:
    id, title, text: the document's; no text where the store keeps none.
    score: its cosine.
    tokens: of its text that the compressor has read.
    whole_tokens: of all of its text; the rest was cut.
    characters: of its text that were read.
    place: where it stands in its file, if it is a piece of one.
  """

  id: str
  score: float
  title: str
  text: str
  tokens: int
  whole_tokens: int
  characters: int
  place: str = ""


@dataclasses.dataclass(frozen=True)
class Answer:
  """An answer, the documents it was read from, and milliseconds: encode, search, generate.

  Attributes:
    prompt_tokens: that the generator has read, memory tokens among them.
    completion_tokens: that it has written.
    is_whole: whether it came to an end by itself.
  """

  question: str
  answer: str
  documents: list[Found]
  timings_ms: dict[str, float]
  prompt_tokens: int = 0
  completion_tokens: int = 0
  is_whole: bool = True


class _Generated(NamedTuple):
  text: str
  prompt_tokens: int
  tokens: int
  is_whole: bool


class Answerer:
  """Answers questions over a store.

  Args:
    checkpoint: with query reasoner and generator.
    store: memory tokens made by the same compressor; what is read of each document is what it was
      opened for (`MemoryStore.first`).
    index: over the store; None loads the one beside it, which may search with more or fewer memory
      tokens than are read.
    top_k: K; by default the configuration's.
    max_new_tokens: longest answer.
    stream_every: tokens between two calls of `on_text`.
    expand: how many of the best documents are read as text, as far as their compressor has read
      them, beside the memory tokens of the others; the generator has to be trained to
      (`data.expand`).
    merge: whether the generator is merged into a copy of the base: faster, for the memory of a
      second base and its rounding.

  Raises:
    StoreError: the store was made by another compressor.
    ConfigError: K is more than there are documents.
  """

  def __init__(
    self,
    checkpoint: Checkpoint,
    store: MemoryStore,
    *,
    index: Searcher | None = None,
    top_k: int | None = None,
    max_new_tokens: int = 64,
    stream_every: int = 4,
    expand: int = 0,
    merge: bool = False,
  ):
    model, prompt_tokenizer, weights = (
      checkpoint.model,
      checkpoint.prompt_tokenizer,
      checkpoint.weights,
    )
    check_compressor(store, model, weights)
    read = store.manifest.num_memory_tokens
    self.search_tokens = read
    if index is None:
      index, self.search_tokens = (
        index_lib.load(store),
        index_lib.saved_settings(store)["memory_tokens"],
      )
    self.checkpoint = checkpoint.first(read)
    self._asking = prompt_tokenizer.first(self.search_tokens)
    encode = model.first(self.search_tokens).encode_query
    model, prompt_tokenizer = self.checkpoint.model, self.checkpoint.prompt_tokenizer
    self.model, self.prompt_tokenizer, self.weights, self.store = (
      model,
      prompt_tokenizer,
      weights,
      store,
    )
    self.top_k, self.max_new_tokens = top_k or model.config.top_k, max_new_tokens
    if expand and not store.manifest.text:
      raise ConfigError(f"expand={expand}: {store.location} keeps no text")
    self.expand = expand
    if self.top_k > len(store):
      raise ConfigError(f"top_k={self.top_k} documents of a store with {len(store)}")
    self._index, self._encode = index, checkpoint.jit(encode)
    greedy = Greedy(
      model,
      max_new_tokens,
      prompt_tokenizer.end_ids,
      prompt_tokenizer.pad_id,
      None if merge else "generator",
    )
    self._generator = weights
    if merge:
      merge_roles = checkpoint.jit(
        functools.partial(linear.merge, scale=model.config.lora.scale), gather=False
      )
      merged = merge_roles(weights["base"], weights["generator"])
      self._generator = {"base": merged, "memory_embedding": weights["memory_embedding"]}
    self._prefill_prefix = checkpoint.jit(greedy.prefill_prefix, gather=False)
    self._stream = make_stream(greedy, checkpoint.mesh)
    self._instruction: KeyValues | None = None
    self._prefixes: dict[int, KeyValues] = {}  # by their length
    self._stream_every = stream_every

  def follow(self, store: MemoryStore, index: Searcher) -> None:
    """Goes on with a later state of the store, opened for as many memory tokens, and an index over
    it. Not while it answers."""
    self.store, self._index = store, index

  def search(self, questions: Sequence[Question]) -> list[list[Found]]:
    """The documents nearest to each question, best first."""
    rows, scores = self._search(questions, self._queries(questions))
    return self._retrieved_documents(rows, scores)

  def nearest_memories(self, vectors: np.ndarray, k: int) -> np.ndarray:
    """The memory tokens nearest to flattened queries: [Q, M·D] -> [Q, k, M·D] float32 (the released
    code's retrieval protocol).

    Queries may have more memory tokens than are searched with.
    """
    unit = unit_vectors(vectors[:, : self.search_tokens * self.store.manifest.width])
    rows, _ = self._index.search(unit, k)
    return self.store.memories(rows.reshape(-1)).astype(np.float32).reshape(*rows.shape, -1)

  def answer(
    self,
    questions: Sequence[Question | str] | str,
    on_text: Callable[[int, str], None] | None = None,
    on_found: Callable[[int, list[Found]], None] | None = None,
  ) -> list[Answer]:
    """Answers several questions as one batch.

    Args:
      questions: what is asked; one text is one question.
      on_text: called with the place of a question and its answer so far, every few tokens.
      on_found: called with the place of a question and its documents, before the answer is made.

    Raises:
      ConfigError: a question names ids of which none is in the store, or more documents than there
        are.
      DataError: a question does not fit the prompt.
    """
    if isinstance(questions, str):
      questions = [questions]
    requests = [Question(q) if isinstance(q, str) else q for q in questions]
    clock = [time.perf_counter()]
    query = self._queries(requests)
    clock.append(time.perf_counter())
    rows, scores = self._search(requests, query)
    retrieved_documents = self._retrieved_documents(rows, scores)
    if on_found:
      for place, documents in enumerate(retrieved_documents):
        on_found(place, documents)
    memories = np.zeros(
      (
        _padded(len(requests)),
        max(self.top_k, _padded(rows.shape[1])),
        self.model.num_memory_tokens,
        self.store.manifest.width,
      ),
      np.float32,
    )
    texts = [
      [d.text[: d.characters] for d in documents[: self.expand if q.expand is None else q.expand]]
      for q, documents in zip(requests, retrieved_documents, strict=True)
    ]
    for place, shown in enumerate(texts):  # the others move to the front
      rows[place] = np.append(rows[place, len(shown) :], np.full(len(shown), -1))
    memories[: len(requests), : rows.shape[1]][rows >= 0] = self.store.memories(rows[rows >= 0])
    clock.append(time.perf_counter())
    generated = self._generate(requests, (rows >= 0).sum(1), memories, texts, on_text)
    clock.append(time.perf_counter())
    timings = dict(
      zip(("encode", "search", "generate"), np.round(np.diff(clock) * 1e3, 2).tolist(), strict=True)
    )
    return [
      Answer(q.text, one.text, documents, timings, one.prompt_tokens, one.tokens, one.is_whole)
      for q, one, documents in zip(requests, generated, retrieved_documents, strict=True)
    ]

  def _queries(self, questions: Sequence[Question]) -> np.ndarray:
    tokens = [self._asking.query(q.text) for q in questions]
    tokens += tokens[:1] * (_padded(len(tokens)) - len(tokens))
    query = self._encode(
      self.weights, pad_tokens(tokens, self.prompt_tokenizer.pad_id, _QUERY_BUCKET)
    )
    return np.asarray(query, np.float32)[: len(questions)]

  def _search(
    self, questions: Sequence[Question], query: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Rows and scores [Q, K], K the largest that is asked for; -1 beyond a question's own."""
    ks = np.array([q.top_k or self.top_k for q in questions])
    if ks.max() > len(self.store):
      raise ConfigError(f"top_k={ks.max()} documents of a store with {len(self.store)}")
    vectors = unit_vectors(query)
    rows = np.full((len(questions), ks.max()), -1, np.int64)
    scores = np.full(rows.shape, -np.inf, np.float32)
    free = [i for i, q in enumerate(questions) if q.ids is None]
    if free:
      rows[free], scores[free] = self._index.search(vectors[free], int(ks.max()))
    for i, question in enumerate(questions):
      if question.ids is not None:
        among = self.store.locate(question.ids)
        if not (among >= 0).any():
          raise ConfigError(f"none of the {len(question.ids)} ids is in the store")
        rows[i], scores[i] = (
          x[0] for x in self._index.search(vectors[i : i + 1], int(ks.max()), among[among >= 0])
        )
    rows[np.arange(ks.max()) >= ks[:, None]] = -1
    return rows, scores

  def _retrieved_documents(self, rows: np.ndarray, scores: np.ndarray) -> list[list[Found]]:
    documents = iter(self.store.documents(rows[rows >= 0]))
    return [
      [
        self._found(next(documents), float(score))
        for row, score in zip(*pair, strict=True)
        if row >= 0
      ]
      for pair in zip(rows, scores, strict=True)
    ]

  def _found(self, document: Document, score: float) -> Found:
    limit = self.store.manifest.doc_max_length
    tokens, whole, characters = self.prompt_tokenizer.read_part(document.text, limit)
    return Found(
      document.id,
      round(score, 4),
      document.title,
      document.text,
      tokens,
      whole,
      characters,
      document.place,
    )

  def _generate(
    self,
    questions: Sequence[Question],
    counts: np.ndarray,
    memories: np.ndarray,
    shown: Sequence[Sequence[str]],
    on_text: Callable[[int, str], None] | None,
  ) -> list["_Generated"]:
    prompt_tokenizer = self.prompt_tokenizer
    prompts = [
      prompt_tokenizer.answer_prompt(
        q.text, int(k), where=f"question {q.text!r:.60}", texts=texts
      ).ids
      for q, k, texts in zip(questions, counts, shown, strict=True)
    ]
    same_documents = (
      len(prompts) > 1
      and not any(shown)
      and len(set(counts)) == 1
      and (memories[: len(prompts)] == memories[0]).all()
    )
    prefix_cache = (
      self._common_prefix(prompts)
      if any(shown)
      else self._prefix_cache(prompts[0], memories[0], int(counts[0]) if same_documents else 0)
    )
    lengths = [len(prompt) for prompt in prompts]
    prompts += prompts[:1] * (len(memories) - len(prompts))
    limits = [min(q.max_new_tokens or self.max_new_tokens, self.max_new_tokens) for q in questions]
    generated = [_Generated("", n, 0, True) for n in lengths]
    every = self._stream_every if on_text else self.max_new_tokens
    for ids in self._stream(
      self._generator,
      pad_tokens(prompts, prompt_tokenizer.pad_id, _PROMPT_BUCKET),
      memories,
      every,
      prefix_cache,
    ):
      for place, (row, limit) in enumerate(zip(ids, limits, strict=False)):
        ended = prompt_tokenizer.truncate_at_eos(row[:limit])
        generated[place] = _Generated(
          prompt_tokenizer.text(row[:limit]), lengths[place], len(ended), len(ended) < limit
        )
        if on_text:
          on_text(place, generated[place].text)
    return generated

  def _common_prefix(self, prompts: Sequence[np.ndarray]) -> KeyValues:
    """The instruction, where texts follow it: their first tokens may melt into its last."""
    plain = self.prompt_tokenizer.answer_prompt("", 1).ids
    length = min(
      int((a[: min(len(a), len(plain))] == plain[: len(a)]).cumprod().sum()) for a in prompts
    )
    if length not in self._prefixes:
      self._prefixes[length] = self._prefill_prefix(self._generator, plain[:length], None)
    return self._prefixes[length]

  def _prefix_cache(self, prompt: np.ndarray, memories: np.ndarray, documents: int) -> KeyValues:
    """What all prompts begin with, read once: the instruction, for good, and then so many documents
    that all share."""
    m = self.model.num_memory_tokens
    slot = prompt - self.model.config.model.vocab_size
    places = np.flatnonzero((slot >= 0) & (slot < m))
    if documents:
      return self._prefill_prefix(
        self._generator, prompt[: places[documents * m - 1] + 1], memories
      )
    if self._instruction is None:
      self._instruction = self._prefill_prefix(self._generator, prompt[: places[0]], None)
    return self._instruction


# Few different shapes, few compilations: texts are padded to multiples of these, batches and more
# than K documents to powers of two.
_QUERY_BUCKET, _PROMPT_BUCKET = 32, 128


def _padded(rows: int) -> int:
  return 1 << (rows - 1).bit_length()
