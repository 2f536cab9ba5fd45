"""Answers to every row of a file, with scores; a stage's loss on rows."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from clara_jax.batch import Tokens
from clara_jax.config import DataConfig
from clara_jax.data.pipeline import RowEncoder, evaluation_batches, pad_tokens
from clara_jax.data.schemas import DataError, Row
from clara_jax.data.tokens import Layout
from clara_jax.evaluation.metrics import answer_scores, retrieval_scores
from clara_jax.inference.answer import answer_from_memories
from clara_jax.inference.generate import make_generate
from clara_jax.model import Clara
from clara_jax.training import metrics as means
from clara_jax.training import stages
from clara_jax.training.step import evaluation_step


@dataclasses.dataclass
class Evaluation:
  """Mean scores and, for each row, its prediction with its scores."""

  scores: dict[str, float]
  predictions: list[dict[str, Any]]


def evaluate(model: Clara, layout: Layout, weights: dict[str, Any], rows: Sequence[Row], setting: str, *, batch_size: int = 16,
             max_new_tokens: int = 64, progress: bool = True) -> Evaluation:
  """Answers rows from their documents.

  Args:
    model, layout, weights: a checkpoint; 'joint' needs its query reasoner.
    rows: single questions with documents. 'joint' rows may differ in their number of candidates.
    setting: 'compressor' answers from all documents of the row, 'joint' from the K best by score.
    batch_size: rows a pass; rows with the same number of documents go together.
    max_new_tokens: longest answer.
    progress: whether lines go to standard error.

  Raises:
    DataError: a row is no single question, or has fewer than K documents.
  """
  k = model.config.top_k
  for row in rows:
    if row.is_question_list or row.data_type != "qa":
      raise DataError(f"{row.identifier}: expected one question a row")
    if setting == "joint" and len(row.documents) < k:
      raise DataError(f"{row.identifier}: {len(row.documents)} documents, but top_k={k}")
  compress, encode = jax.jit(model.compress), jax.jit(model.encode_query)
  select = jax.jit(lambda query, memories: (lambda s: (s, *model.select(s, memories)))(model.score(query, memories)))
  generate = make_generate(model, max_new_tokens, layout.eos_id, layout.pad_id)
  predictions: list[dict[str, Any] | None] = [None] * len(rows)
  order = sorted(range(len(rows)), key=lambda i: len(rows[i].documents))
  done = 0
  while done < len(order):
    count = len(rows[order[done]].documents)
    chosen = [i for i in order[done:done + batch_size] if len(rows[i].documents) == count]
    batch = [rows[i] for i in chosen]
    texts = [d for row in batch for d in row.documents]
    tokens = pad_tokens([layout.document(t) for t in texts], layout.pad_id, 32)
    shaped = Tokens(tokens.ids.reshape(len(batch), count, -1), tokens.lengths.reshape(len(batch), count))
    memories = compress(weights, shaped)
    ranked: list[Any] = [None] * len(batch)
    scores: list[Any] = ranked
    if setting == "joint":
      query = encode(weights, pad_tokens([layout.query(r.questions[0]) for r in batch], layout.pad_id, 16))
      scores, memories, _ = select(query, memories)
      scores = np.asarray(scores)
      ranked = np.argsort(-scores, axis=-1, kind="stable")
    answers = answer_from_memories(layout, generate, weights, [r.questions[0] for r in batch], memories)
    for i, row, answer, places, cosines in zip(chosen, batch, answers, ranked, scores, strict=True):
      prediction = {"id": row.identifier, "question": row.questions[0], "prediction": answer, "answers": list(row.answers)}
      prediction |= answer_scores(answer, row.answers)
      if places is not None:
        prediction |= {"ranked": places.tolist(), "scores": cosines.tolist(), "pos_index": list(row.gold)}
        if row.gold:
          prediction |= retrieval_scores(places.tolist(), row.gold)
      predictions[i] = prediction
    done += len(chosen)
    if progress:
      print(f"evaluate: {done}/{len(rows)} rows", file=sys.stderr, flush=True)
  named = {name for p in predictions for name, value in p.items() if isinstance(value, float)}
  scores = {name: float(np.mean([p[name] for p in predictions if name in p])) for name in sorted(named)}
  return Evaluation({"n": len(rows), **scores}, predictions)


def stage_loss(model: Clara, layout: Layout, weights: dict[str, Any], stage_name: str, rows: Sequence[Row],
               batch_size: int = 16) -> dict[str, Any]:
  """A stage's loss over all label tokens of the rows, without dropout or update.

  Returns:
    `loss` (CE, or the contrastive loss), `mse` and `total`; for joint also `rows`: [{`scores`, `selected`}].
  """
  stage = stages.get(stage_name)
  counts = {len(r.documents) for r in rows}
  if stage.data == "candidates" and len(counts) > 1:
    raise DataError(f"{rows[0].identifier}: rows have {sorted(counts)} candidates; all must have the same number")
  data = DataConfig(candidates=min(counts))
  encoder = RowEncoder(layout, stage.data, data, model.config.top_k)
  step = jax.jit(lambda w, b: evaluation_step(model, dataclasses.replace(stage, diagnostics=None), w, {}, b))
  retrieve = jax.jit(lambda w, b: _scores(model, w, b))
  total, listed = None, []
  for batch in evaluation_batches(rows, encoder, min(batch_size, len(rows))):
    total = means.add(total, step(weights, batch))
    if stage_name == "joint":
      scores, indices = jax.device_get(retrieve(weights, batch))
      listed += [{"scores": s.tolist(), "selected": i.tolist()} for s, i in zip(scores, indices, strict=True)]
  values = means.values(total)
  main = values["contrastive" if stage_name == "contrastive" else "ce"]
  mse = values.get("mse")
  report = {"loss": main, "mse": mse, "total": main + (model.config.mse_weight * mse if mse is not None else 0.0)}
  return report | ({"rows": listed[:len(rows)]} if stage_name == "joint" else {})


def _scores(model, weights, batch):
  query = model.encode_query(weights, batch.question)
  memories = stages.candidates(model, weights, batch, query).memories
  scores = model.score(query, memories)
  return scores, model.select(scores, memories)[1]


