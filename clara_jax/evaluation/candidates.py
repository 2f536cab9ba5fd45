"""A first-stage retriever gives each question its candidates, which the query reasoner then ranks.

*normal* candidates are what the retriever found; *oracle* ones have the gold documents among them
(upstream's `no_pos` and `with_pos`).
"""

import dataclasses
import importlib
import logging
import os
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from clara_jax.config import ConfigError
from clara_jax.data.schemas import DataError, Document, Row
from clara_jax.evaluation import sentence_encoder
from clara_jax.retrieval.base import unit_vectors
from clara_jax.retrieval.exact import ExactIndex


class FirstStage(Protocol):
  """Finds texts of a corpus."""

  def search(self, questions: Sequence[str], k: int) -> np.ndarray:
    """Rows of the corpus [Q, k], best first."""


class Bm25:
  """BM25 through bm25s (Lucene's variant, k1 = 1.5, b = 0.75, English stop words).

  Raises:
    ConfigError: bm25s is missing.
  """

  def __init__(self, texts: Sequence[str]):
    try:
      import bm25s
    except ImportError:
      raise ConfigError("BM25 needs bm25s: pip install 'clara_jax[evaluate]'") from None
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets DEBUG itself
    self._tokenize = lambda t: bm25s.tokenize(list(t), stopwords="en", show_progress=False)
    self._index = bm25s.BM25()
    self._index.index(self._tokenize(texts), show_progress=False)

  def search(self, questions: Sequence[str], k: int) -> np.ndarray:
    return np.asarray(
      self._index.retrieve(
        self._tokenize(questions), k=k, show_progress=False, return_as="documents"
      )
    )


class Dense:
  """A dense encoder with exact search by cosine.

  Args:
    texts: the corpus.
    encode: (texts, kind) -> [n, d]; kind is 'document' or 'question'.
  """

  def __init__(self, texts: Sequence[str], encode: Callable[[Sequence[str], str], Any]):
    self._encode = encode
    vectors = unit_vectors(np.asarray(encode(list(texts), "document"), np.float32))
    self._index = ExactIndex(vectors.shape[1])
    self._index.fill(np.arange(len(vectors)), lambda rows: vectors[rows])

  def search(self, questions: Sequence[str], k: int) -> np.ndarray:
    return self._index.search(
      unit_vectors(np.asarray(self._encode(list(questions), "question"), np.float32)), k
    )[0]


def open_retriever(name: str, texts: Sequence[str]) -> FirstStage:
  """'bm25', the directory or hub id of a sentence-transformers model, or MODULE:FUNCTION with an
  encoder (see `Dense`), which is found on the Python path.

  Raises:
    ConfigError: there is no such model or function.
  """
  if name == "bm25":
    return Bm25(texts)
  module, colon, function = name.partition(":")
  if not colon or os.path.exists(name):
    return Dense(texts, sentence_encoder.load(name))
  try:
    encode = getattr(importlib.import_module(module), function)
  except (ImportError, AttributeError, ValueError) as error:
    raise ConfigError(
      f"--retriever {name}: {error}; expected bm25, a sentence-transformers model, or "
      f"MODULE:FUNCTION"
    ) from None
  try:
    return Dense(texts, encode)
  except (TypeError, ValueError, IndexError) as error:
    raise ConfigError(
      f"--retriever {name}: {error}; expected encode(texts, kind) -> vectors [n, d]"
    ) from None


def own_corpus(rows: Sequence[Row]) -> list[Document]:
  """The rows' own documents, each once; ids are their numbers."""
  texts = dict.fromkeys(text for row in rows for text in row.documents)
  return [Document(str(i), text) for i, text in enumerate(texts)]


@dataclasses.dataclass(frozen=True)
class CandidatesReport:
  """What a retriever gave, before any gold documents were put there.

  Attributes:
    rows: written; rows_with_gold: those that recall is over.
    documents: in the corpus.
    recall_at_5, recall_at_count: mean share of a row's gold documents among the first 5, and among
      all candidates; None without gold.
    gold_not_in_corpus: gold documents that no retriever could find.
  """

  rows: int
  rows_with_gold: int
  documents: int
  recall_at_5: float | None
  recall_at_count: float | None
  gold_not_in_corpus: int


def make(
  rows: Sequence[Row],
  corpus: Sequence[Document],
  count: int,
  setting: Literal["normal", "oracle"],
  retriever: str = "bm25",
  seed: int = 0,
  batch: int = 256,
) -> Iterator[dict[str, Any] | CandidatesReport]:
  """Rows with candidates, in order, and then the report.

  Args:
    rows: questions; the gold documents are known by their text, or by `document_ids` where rows
      have no documents.
    corpus: what is searched; a document's text goes into the row below its title, if it has one.
    count: candidates a row.
    setting: 'oracle' puts gold documents that were not found in the place of the last ones and
      shuffles the row.
    retriever: see `open_retriever`.
    seed: of the shuffle.
    batch: questions a search.

  Raises:
    DataError: fewer documents than `count`; 'oracle' without the text of a gold document.
  """
  if count > len(corpus):
    named = "" if corpus else "; the questions have none of their own: name --corpus F"
    raise DataError(f"{count} candidates a row, but the corpus has {len(corpus)} documents{named}")
  texts = [f"{d.title}\n{d.text}" if d.title else d.text for d in corpus]
  by_text, by_id = {t: i for i, t in enumerate(texts)}, {d.id: i for i, d in enumerate(corpus)}
  first_stage = open_retriever(retriever, texts)
  recall: list[tuple[float, float]] = []
  lost = 0
  own: dict[str, int] = {}  # gold documents of rows that the corpus lacks, behind it
  for start in range(0, len(rows), batch):
    block = rows[start : start + batch]
    for row, places in zip(
      block, _search(first_stage, retriever, [r.questions[0] for r in block], count), strict=True
    ):
      keys = [
        by_text.get(row.documents[g]) if row.documents else by_id.get(row.document_ids[g])
        for g in row.gold
      ]
      gold = list(dict.fromkeys(key for key in keys if key is not None))
      lost += keys.count(None)
      if keys:
        recall.append(
          tuple(len(set(places[:k]) & set(gold)) / len(set(row.gold)) for k in (5, count))
        )
      if setting == "oracle":
        for g in row.gold:
          if keys[row.gold.index(g)] is None:
            if not row.documents:
              raise DataError(
                f"{row.identifier}: its gold document {row.document_ids[g]!r} is not in the corpus"
              )
            text = row.documents[g]
            if text not in own:
              own[text] = len(texts)
              texts.append(text)
            gold.append(own[text])
        kept = gold[:count]
        places = kept + [p for p in places if p not in kept][: count - len(kept)]
        random.Random(f"{seed}:{row.identifier}").shuffle(places)
      yield {
        "id": row.identifier,
        "question": row.questions[0],
        "answer": row.answers[0],
        "golden_answers": list(row.answers),
        "docs": [texts[p] for p in places],
        "doc_ids": [corpus[p].id if p < len(corpus) else f"gold {p}" for p in places],
        "pos_index": [i for i, p in enumerate(places) if p in gold],
      }
  at_5, at_count = np.mean(recall, axis=0).round(4).tolist() if recall else (None, None)
  yield CandidatesReport(
    len(rows), len(recall), len(corpus), at_5 if count >= 5 else None, at_count, lost
  )


def _search(
  first_stage: FirstStage, name: str, questions: Sequence[str], count: int
) -> list[list[int]]:
  try:
    return first_stage.search(questions, count).tolist()
  except (TypeError, ValueError, IndexError) as error:
    raise ConfigError(
      f"--retriever {name}: {error}; expected encode(texts, kind) -> vectors [n, d]"
    ) from None
