"""The documents that a question's are selected from: given, compressed in the step, or retrieved
from a whole corpus."""

import dataclasses

import jax
import jax.numpy as jnp

from clara_jax.batch import Batch
from clara_jax.model import Clara, Weights
from clara_jax.ops.nearest import nearest, take
from clara_jax.training.metrics import Mean, Metrics


def valid(batch: Batch) -> jax.Array:
  """[B]: 1 for rows, 0 for what fills a batch up."""
  return jnp.ones(batch.prompt.labels.shape[0]) if batch.valid is None else batch.valid


def of_rows(batch: Batch, memories: jax.Array) -> jax.Array:
  """Memory tokens of a batch's documents, [U, M, D] or [B, K, M, D] in any leading shape -> those
  of each row's, [B, K, M, D] (or N)."""
  if batch.document_slots is not None:
    return memories[batch.document_slots]
  return memories.reshape(*batch.documents.lengths.shape, *memories.shape[-2:])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Candidates:
  """The documents that a question's are selected from.

  Attributes:
    memories: [B, N, M, D].
    is_gold: [B, N] bool, or None where it is not known.
    num_gold: [B] int32, the question's gold documents, among these or not.
  """

  memories: jax.Array
  is_gold: jax.Array | None
  num_gold: jax.Array | None


def candidates(model: Clara, weights: Weights, batch: Batch, query: jax.Array) -> Candidates:
  """A row's own N candidates, read from the store or compressed here by the frozen compressor; or
  the N nearest of a whole corpus.

  Args:
    model, weights: the method; with `weights['corpus']`, a `Corpus`, the nearest are retrieved from
      it.
    batch: the rows.
    query: [B, M, D].
  """
  if "corpus" not in weights:
    memories = batch.memories
    if memories is None:
      memories = of_rows(batch, jax.lax.stop_gradient(model.compress(weights, batch.documents)))
    count = None if batch.is_gold is None else batch.is_gold.sum(-1)
    return Candidates(memories.astype(model.config.model.dtype), batch.is_gold, count)
  # Which documents are near is no function that a gradient goes through; their scores are, in
  # `select`.
  corpus = jax.lax.stop_gradient(weights["corpus"])
  kept = corpus.memories[:, : query.shape[1]]
  flat, scale = kept.reshape(kept.shape[0], -1), corpus.scales[query.shape[1]]
  at = jax.lax.stop_gradient(query).reshape(query.shape[0], -1).astype(jnp.float32)
  slots, _ = nearest(flat, scale, at, corpus.candidates)
  memories = take(flat, slots).reshape(*slots.shape, *kept.shape[1:])
  gold = batch.gold_slots
  return Candidates(
    memories.astype(model.config.model.dtype),
    (slots[:, :, None] == gold[:, None]).any(-1),
    (gold >= 0).sum(-1),
  )


def recall(scores: jax.Array, pool: Candidates, valid: jax.Array) -> Metrics:
  """Recall@1, 3 and 5 = |top-k ∩ gold| / |gold|, over rows that have gold documents. scores: [B,
  N]."""
  order = jnp.argsort(-scores, axis=-1)
  taken = jnp.take_along_axis(pool.is_gold, order, axis=-1).astype(jnp.float32)
  weight = valid * (pool.num_gold > 0)
  return {
    f"recall_at_{k}": Mean.of(taken[:, :k].sum(-1) / jnp.maximum(pool.num_gold, 1), weight)
    for k in (1, 3, 5)
  }


def gold_selected(indices: jax.Array, pool: Candidates) -> jax.Array:
  """Whether every gold document of a row is among the selected: indices [B, K] -> [B] bool."""
  taken = jnp.take_along_axis(pool.is_gold, indices, axis=-1).sum(-1)
  return (taken == pool.num_gold) & (taken > 0)
