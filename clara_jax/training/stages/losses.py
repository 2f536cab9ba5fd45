"""The losses of the stages (paper §3): (model, trainable, frozen, batch, rng) -> (terms,
metrics)."""

from typing import Any

import jax
import jax.numpy as jnp

from clara_jax.batch import Batch, Prompt, Tokens
from clara_jax.model import Clara, Weights
from clara_jax.ops import estimators, losses
from clara_jax.ops.topk import push
from clara_jax.training.metrics import Mean, Metrics
from clara_jax.training.stages.candidates import candidates, gold_selected, of_rows, recall, valid


def answer_terms(
  model: Clara, weights: Weights, states: jax.Array, prompt: Prompt
) -> tuple[Mean, jax.Array, jax.Array]:
  """Cross entropy over all label tokens, and whether each row's labels are all predicted (which
  greedy decoding would repeat).

  With `model.logits_chunk` the logits of that many label positions are formed at a time, and again
  in the backward pass.

  Args:
    model, weights: for the head.
    states: [B, A, D] hidden states at the label positions.
    prompt: its labels.

  Returns:
    (Mean over label tokens, [B] bool, [B] the rows' sums).
  """
  matrix = model.output_matrix(weights)

  def one(states, labels, counted):
    loss, right = losses.cross_entropy(model.logits(weights, states, matrix), labels)
    return (loss * counted).sum(-1), (right | (counted == 0)).all(-1)

  values = (states, prompt.labels, prompt.label_weights)
  chunk, length = model.config.model.logits_chunk, prompt.labels.shape[1]
  if not chunk or chunk >= length:
    rows, right = one(*values)
  else:

    def chunked(x):
      x = jnp.pad(x, [(0, 0), (0, -length % chunk), *[(0, 0)] * (x.ndim - 2)])
      return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    parts, rights = jax.lax.map(lambda xs: jax.checkpoint(one)(*xs), jax.tree.map(chunked, values))
    rows, right = parts.sum(0), rights.all(0)
  return Mean(rows.sum(), prompt.label_weights.sum()), right, rows


def given_documents_loss(
  model: Clara, trainable: Weights, frozen: Weights, batch: Batch, rng: jax.Array | None
) -> tuple[Metrics, Metrics]:
  """CE of the answer from K given documents + λ · MSE of document and memory means (paper Eq. for
  L_SCP; §3.1)."""
  weights = {**frozen, **trainable}
  compress_key, answer_key = (None, None) if rng is None else jax.random.split(rng)
  ids, lengths = batch.documents.ids, batch.documents.lengths
  documents = Tokens(ids.reshape(-1, ids.shape[-1]), lengths.reshape(-1))
  memories, hidden = model.encode(weights, "compressor", documents, compress_key)
  is_memory, _ = model.memory_slot(documents.ids)
  # Rows with fewer documents than others are filled up with documents of length 0; one that several
  # rows have counts for each.
  counted = documents.lengths > 0
  if batch.document_slots is not None:
    counted *= jnp.zeros(len(memories)).at[batch.document_slots.reshape(-1)].add(1.0)
  mse = Mean.of(
    losses.alignment_mse(hidden, documents.is_real() & ~is_memory, documents.is_real() & is_memory),
    counted,
  )
  states = model.answer_states(weights, batch.prompt, of_rows(batch, memories), dropout=answer_key)
  ce, right, _ = answer_terms(model, weights, states, batch.prompt)
  terms = {"ce": ce, "mse": Mean(mse.total * model.config.mse_weight, mse.count)}
  return terms, {"ce": ce, "mse": mse, "answers": Mean.of(right, valid(batch))}


def joint_loss(
  model: Clara, trainable: Weights, frozen: Weights, batch: Batch, rng: jax.Array | None
) -> tuple[Metrics, Metrics]:
  """CE of the answer from the K best of N candidates; the straight-through top-k teaches the query
  reasoner (paper §3.2).

  `model.estimator` may choose and teach in another way in training; evaluation always takes the K
  best.
  """
  weights = {**frozen, **trainable}
  query_key, answer_key, nested_key = (
    (None, None, None) if rng is None else jax.random.split(rng, 3)
  )
  query = model.encode_query(weights, batch.question, query_key)
  pool = candidates(model, weights, batch, query)
  scores = model.score(query, pool.memories)
  draws = 1
  if rng is None:
    selected, indices = model.select(scores, pool.memories)
    log_prob = None
  else:
    estimator = estimator_of(model)
    draws = estimator.samples
    batch, pool, scores = (repeat(x, draws) for x in (batch, pool, scores))
    # Not split off: the other keys are as without an estimator.
    choice = estimator(
      scores, model.config.top_k, model.temperature(weights), jax.random.fold_in(rng, 3)
    )
    selected, indices, log_prob = choice.rows(pool.memories), choice.indices, choice.log_prob
  if nested_key is not None and model.config.nested_dropout:
    selected = nested_dropout(selected, model.config.nested_dropout, nested_key)
  states = model.answer_states(weights, batch.prompt, selected, dropout=answer_key)
  ce, right, losses_of_rows = answer_terms(model, weights, states, batch.prompt)
  terms = {"ce": ce}
  if log_prob is not None:  # of value 0; by the label tokens of the rows themselves, as CE is
    term = estimators.leave_one_out(losses_of_rows, log_prob, draws)
    terms["score_function"] = Mean(term, ce.count / draws)
  metrics = {"ce": ce, "answers": Mean.of(right, valid(batch))}
  if "temperature" in weights:
    metrics["temperature"] = Mean(jnp.asarray(model.temperature(weights)), jnp.ones(()))
  if pool.is_gold is not None:
    metrics |= recall(scores, pool, valid(batch))
    metrics["answers_given_gold"] = Mean.of(right, valid(batch) * gold_selected(indices, pool))
  return terms, metrics


def estimator_of(model: Clara) -> estimators.Estimator:
  """What teaches the scores: the straight-through top-k where no other is named."""
  return model.estimator or estimators.get(model.config.masking)


def repeat(tree: Any, times: int) -> Any:
  """Every row so many times, side by side."""
  return tree if times == 1 else jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), tree)


def nested_dropout(selected: jax.Array, rate: float, rng: jax.Array) -> jax.Array:
  """With probability `rate` a row keeps only its first k documents, k uniform in 1 … K-1; the
  others become zeros.

  Once the gold document is among the K, the answer's loss is indifferent to its place. Cutting the
  list off at random makes the order matter (nested dropout, Rippel et al., arXiv 1402.0915) and
  still needs no label.

  Args:
    selected: [B, K, M, D], in order of score.
    rate: probability.
    rng: key.

  Returns:
    [B, K, M, D].
  """
  b, k = selected.shape[:2]
  if k == 1:
    return selected
  cut_key, kept_key = jax.random.split(rng)
  kept = jnp.where(
    jax.random.bernoulli(cut_key, rate, (b,)), jax.random.randint(kept_key, (b,), 1, k), k
  )
  return jnp.where((jnp.arange(k) < kept[:, None])[..., None, None], selected, 0)


def joint_diagnostics(model: Clara, weights: Weights, batch: Batch) -> Metrics:
  """Is the straight-through signal right? The gold document's place in the order of the push, where
  it was not selected.

  `gold_gradient_top1` and `gold_gradient_top3` are the shares of such rows in which the gold
  document is pulled up more strongly than all other candidates, or than all but two. Chance is 1/N
  and 3/N.
  """
  query = model.encode_query(weights, batch.question)
  pool = candidates(model, weights, batch, query)
  if pool.is_gold is None:
    return {}
  scores = model.score(query, pool.memories)
  selected, indices = model.select(scores, pool.memories)

  def loss(selected):
    mean, *_ = answer_terms(
      model, weights, model.answer_states(weights, batch.prompt, selected), batch.prompt
    )
    return mean.total

  config = model.config
  pushes = jax.vmap(lambda s, m, i, d: push(s, m, i, d, config.temperature, config.masking))(
    scores, pool.memories, indices, jax.grad(loss)(selected)
  )
  gold = jnp.argmax(pool.is_gold, axis=-1)
  place = (pushes > jnp.take_along_axis(pushes, gold[:, None], axis=-1)).sum(-1)
  missed = valid(batch) * ~gold_selected(indices, pool) * pool.is_gold.any(-1)
  ordered = jnp.sort(scores, axis=-1)
  return {
    "gold_gradient_top1": Mean.of(place == 0, missed),
    "gold_gradient_top3": Mean.of(place < 3, missed),
    "score_spread": Mean.of(ordered[:, -1] - ordered[:, 0], valid(batch)),
  }


def contrastive_loss(
  model: Clara, trainable: Weights, frozen: Weights, batch: Batch, rng: jax.Array | None
) -> tuple[Metrics, Metrics]:
  """Retrieval with labels (the paper's Sup-Instruct baseline): the ceiling that the joint stage is
  held against."""
  weights = {**frozen, **trainable}
  query = model.encode_query(weights, batch.question, rng)
  pool = candidates(model, weights, batch, query)
  scores = model.score(query, pool.memories)
  has_gold = batch.is_gold.any(-1).sum().astype(jnp.float32)
  loss = Mean(
    losses.contrastive(scores, batch.is_gold, model.config.temperature) * has_gold, has_gold
  )
  return {"contrastive": loss}, {"contrastive": loss} | recall(scores, pool, valid(batch))


def pretrain_loss(
  model: Clara, trainable: Weights, frozen: Weights, batch: Batch, rng: jax.Array | None
) -> tuple[Metrics, Metrics]:
  """Next-token cross entropy of the plain base on prompts with the documents as text."""
  del rng  # the base has no dropout
  return _text_loss(model, {**frozen, **trainable}, batch, None, None)


def full_text_loss(
  model: Clara, trainable: Weights, frozen: Weights, batch: Batch, rng: jax.Array | None
) -> tuple[Metrics, Metrics]:
  """CE of the answer where the generator reads the documents as text: the ceiling that memory
  tokens are held against."""
  return _text_loss(model, {**frozen, **trainable}, batch, "generator", rng)


def _text_loss(model, weights, batch, role, rng):
  states = model.answer_states(weights, batch.prompt, None, role=role, dropout=rng)
  ce, right, _ = answer_terms(model, weights, states, batch.prompt)
  return {"ce": ce}, {"ce": ce, "answers": Mean.of(right, valid(batch))}
