"""From rows to batches, through Grain: shuffle, repeat, tokenise, pad, batch; the position is saved with the checkpoint."""

import functools
import random
from collections.abc import Callable, Sequence

import grain
import numpy as np

from clara_jax.batch import Batch, Prompt, Tokens
from clara_jax.config import DataConfig
from clara_jax.data.schemas import DataError, Row
from clara_jax.data.tokens import Layout, PromptTokens

MemoryLookup = Callable[[Sequence[str]], np.ndarray]
"""Document texts -> memory tokens [n, M, D]."""


def round_up(length: int, bucket: int) -> int:
  """The next multiple of `bucket`: few different shapes, few compilations."""
  return -(-length // bucket) * bucket


def pad_tokens(rows: Sequence[np.ndarray], pad_id: int, bucket: int) -> Tokens:
  """Right-pads rows of ids to one length, a multiple of `bucket`."""
  lengths = np.array([len(r) for r in rows], np.int32)
  ids = np.full((len(rows), round_up(int(lengths.max()), bucket)), pad_id, np.int32)
  for row, values in zip(ids, rows, strict=True):
    row[:len(values)] = values
  return Tokens(ids, lengths)


def pad_prompts(prompts: Sequence[PromptTokens], pad_id: int, bucket: int, label_all: bool = False) -> Prompt:
  """Prompts with their label positions; everything up to the end of a prompt carries no loss unless `label_all`."""
  tokens = pad_tokens([p.ids for p in prompts], pad_id, bucket)
  starts = [1 if label_all else p.prompt_length for p in prompts]
  counts = [len(p.ids) - start for p, start in zip(prompts, starts, strict=True)]
  width = round_up(max(1, *counts), min(bucket, 8))
  positions, labels = np.zeros((2, len(prompts), width), np.int32)
  weights = np.zeros((len(prompts), width), np.float32)
  for i, (prompt, start, count) in enumerate(zip(prompts, starts, counts, strict=True)):
    positions[i, :count] = np.arange(start - 1, start - 1 + count)
    labels[i, :count] = prompt.ids[start:]
    weights[i, :count] = 1
  return Prompt(tokens, positions, labels, weights)


class RowEncoder:
  """Turns rows into tokens, for one kind of batch (`Stage.data`).

  Args:
    layout: token layouts.
    kind: 'text', 'given' or 'candidates'.
    data: sizes.
    top_k: K, the documents in a prompt of 'candidates'.
    memories: memory tokens of documents, by text; None to give the documents themselves.
  """

  def __init__(self, layout: Layout, kind: str, data: DataConfig, top_k: int, memories: MemoryLookup | None = None):
    self.layout, self.kind, self.data, self.top_k, self.memories = layout, kind, data, top_k, memories
    self._document = functools.lru_cache(maxsize=200_000)(layout.document)

  def check(self, rows: Sequence[Row]) -> None:
    """Refuses rows that this kind of batch cannot hold, before anything is spent on the run.

    Raises:
      DataError: naming the first such row.
    """
    for row in rows:
      if self.kind == "candidates":
        if len(row.documents) < self.data.candidates:
          raise DataError(f"{row.identifier}: {len(row.documents)} documents, but data.candidates={self.data.candidates}")
        if self.top_k > self.data.candidates:
          raise DataError(f"top_k={self.top_k} is more than data.candidates={self.data.candidates}")
        if row.is_question_list or row.data_type != "qa":
          raise DataError(f"{row.identifier}: this stage needs one question a row")
        if any(p >= self.data.candidates for p in row.gold):
          raise DataError(f"{row.identifier}: pos_index={list(row.gold)}, but only the first data.candidates="
                          f"{self.data.candidates} documents are read")

  def encode(self, row: Row, rng: random.Random) -> dict:
    """One row as token arrays; `rng` picks among a row's variants."""
    layout = self.layout
    if self.kind == "text":
      return {"prompt": layout.row_prompt(row, "\n".join(row.documents), rng.randrange(1 << 16))}
    if self.kind == "given":
      prompt = layout.row_prompt(row, layout.slots(len(row.documents)), rng.randrange(1 << 16))
      return {"prompt": prompt, "documents": [self._document(d) for d in row.documents]}
    documents = row.documents[:self.data.candidates]
    is_gold = np.zeros(len(documents), bool)
    is_gold[list(row.gold)] = True
    encoded = {
        "prompt": layout.answer_prompt(row.questions[0], self.top_k, row.answers[0], row.identifier),
        "question": layout.query(row.questions[0]),
        "is_gold": is_gold,
    }
    if self.memories is None:
      return encoded | {"documents": [self._document(d) for d in documents]}
    return encoded | {"memories": self.memories(documents)}

  def collate(self, rows: Sequence[dict], train: bool = True) -> Batch:
    """Pads encoded rows into one batch; rows with fewer documents than others get ones of length 0.

    Labels are the answer's tokens; in training, with `data.label_documents`, every token of the row.
    """
    pad, bucket = self.layout.pad_id, self.data.bucket
    documents = memories = question = is_gold = None
    if "documents" in rows[0]:
      most = max(len(r["documents"]) for r in rows)
      filler = np.zeros(0, np.int32)
      padded = [d for r in rows for d in [*r["documents"], *[filler] * (most - len(r["documents"]))]]
      flat = pad_tokens(padded, pad, min(bucket, 16))
      documents = Tokens(flat.ids.reshape(len(rows), most, -1), flat.lengths.reshape(len(rows), most))
    if "memories" in rows[0]:
      memories = np.stack([r["memories"] for r in rows])
    if "question" in rows[0]:
      question = pad_tokens([r["question"] for r in rows], pad, min(bucket, 16))
      is_gold = np.stack([r["is_gold"] for r in rows])
    valid = np.array([r.get("valid", 1.0) for r in rows], np.float32)
    prompt = pad_prompts([r["prompt"] for r in rows], pad, bucket, label_all=train and self.data.label_documents)
    return Batch(prompt, documents, memories, question, is_gold, valid)


def training_batches(rows: Sequence[Row], encoder: RowEncoder, batch_size: int, seed: int, prefetch: int = 2
                     ) -> grain.DatasetIterator:
  """An endless iterator of batches, each epoch shuffled anew; its `get_state` / `set_state` are exact.

  Raises:
    DataError: fewer rows than a batch, or a row that does not fit.
  """
  if len(rows) < batch_size:
    raise DataError(f"{len(rows)} rows are fewer than one batch of {batch_size}")
  encoder.check(rows)
  dataset = grain.MapDataset.source(rows).seed(seed).shuffle().repeat(None)
  dataset = dataset.random_map(lambda row, rng: encoder.encode(row, random.Random(int(rng.integers(1 << 62)))))
  dataset = dataset.batch(batch_size, drop_remainder=True, batch_fn=encoder.collate)
  return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=max(1, prefetch))))


def evaluation_batches(rows: Sequence[Row], encoder: RowEncoder, batch_size: int) -> list[Batch]:
  """All rows in order, once; the last batch is filled up with copies of its first row that do not count (`valid` = 0)."""
  encoder.check(rows)
  batches = []
  for start in range(0, len(rows), batch_size):
    encoded = [encoder.encode(row, random.Random(start)) for row in rows[start:start + batch_size]]
    filler = {**encoded[0], "valid": 0.0}
    filler["prompt"] = PromptTokens(filler["prompt"].ids, len(filler["prompt"].ids))  # no labels
    if "is_gold" in filler:
      filler["is_gold"] = np.zeros_like(filler["is_gold"])
    batches.append(encoder.collate(encoded + [filler] * (batch_size - len(encoded)), train=False))
  return batches
