"""Questions to answers: encode, search, splice, generate."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from clara_jax.batch import Tokens
from clara_jax.config import ConfigError
from clara_jax.data.pipeline import pad_tokens
from clara_jax.data.tokens import Layout
from clara_jax.inference.generate import make_generate
from clara_jax.memory.store import MemoryStore, StoreError, fingerprint
from clara_jax.model import Clara
from clara_jax.retrieval import index as index_lib


@dataclasses.dataclass(frozen=True)
class Found:
  """A retrieved document with its cosine."""

  id: str
  score: float
  title: str
  text: str


@dataclasses.dataclass(frozen=True)
class Answer:
  """An answer, the documents it was read from, and milliseconds: encode, search, generate."""

  question: str
  answer: str
  documents: list[Found]
  timings_ms: dict[str, float]


class Answerer:
  """Answers questions over a store.

  Args:
    model, layout, weights: a checkpoint with query reasoner and generator.
    store: memory tokens made by the same compressor.
    index: over the store; None loads the one beside it.
    top_k: K; by default the configuration's.
    max_new_tokens: longest answer.

  Raises:
    StoreError: the store was made by another compressor.
    ConfigError: K is more than there are documents.
  """

  def __init__(self, model: Clara, layout: Layout, weights: dict[str, Any], store: MemoryStore, *,
               index: index_lib.Index | None = None, directory: str | None = None, top_k: int | None = None,
               max_new_tokens: int = 64):
    made_by = fingerprint(weights)
    if store.manifest.compressor != made_by:
      raise StoreError(f"the store was made by compressor {store.manifest.compressor}, this checkpoint's is {made_by}")
    self._model, self._layout, self._weights, self._store = model, layout, weights, store
    self._index = index or index_lib.load(directory, index_lib.unit_vectors(store.memories()))
    self._top_k = top_k or model.config.top_k
    if self._top_k > len(store):
      raise ConfigError(f"top_k={self._top_k} documents of a store with {len(store)}")
    self._encode = jax.jit(model.encode_query)
    self._generate = make_generate(model, max_new_tokens, layout.eos_id, layout.pad_id)

  def answer(self, questions: Sequence[str]) -> list[Answer]:
    """Answers several questions as one batch."""
    clock = [time.perf_counter()]
    tokens = pad_tokens([self._layout.query(q) for q in questions], self._layout.pad_id, 16)
    query = np.asarray(self._encode(self._weights, tokens), np.float32)
    clock.append(time.perf_counter())
    rows, scores = self._index.search(index_lib.unit_vectors(query), self._top_k)
    memories = self._store.memories(rows.reshape(-1)).astype(np.float32).reshape(*rows.shape, *query.shape[1:])
    clock.append(time.perf_counter())
    texts = answer_from_memories(self._layout, self._generate, self._weights, questions, memories)
    clock.append(time.perf_counter())
    timings = dict(zip(("encode", "search", "generate"), np.round(np.diff(clock) * 1e3, 2).tolist(), strict=True))
    answers = []
    for question, text, found, score in zip(questions, texts, rows, scores, strict=True):
      documents = [self._store.documents[r] for r in found]
      answers.append(Answer(question, text, [
          Found(d.id, round(float(s), 4), d.title, d.text) for d, s in zip(documents, score, strict=True)], timings))
    return answers


def answer_from_memories(layout: Layout, generate: Any, weights: dict[str, Any], questions: Sequence[str], memories: Any
                         ) -> list[str]:
  """Answers from given memory tokens [B, K, M, D]; `generate` is what `make_generate` made."""
  prompts = [layout.answer_prompt(q, memories.shape[1], where=f"question {q!r:.60}").ids for q in questions]
  tokens: Tokens = pad_tokens(prompts, layout.pad_id, 32)
  return [layout.text(ids) for ids in np.asarray(generate(weights, tokens, memories))]
