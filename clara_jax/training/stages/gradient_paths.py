"""What the gradient of the selection is made of (paper's gradient analysis): the probability path
and the representation path.

The answer's loss reaches a candidate's memory tokens m_n, and with them the shared space, in two
ways: (I) through the scores, by how likely the document is to be selected, and (II) through what
the generator reads of it. Both are vectors on the memory tokens [N, M, D] of a row, so that they
can be compared; where the compressor is frozen, (II) is what it would get.
"""

import jax
import jax.numpy as jnp

from clara_jax.batch import Batch
from clara_jax.model import Clara, Weights
from clara_jax.ops import estimators
from clara_jax.ops.topk import soft_choice
from clara_jax.training.metrics import Mean, Metrics
from clara_jax.training.stages.candidates import candidates, valid
from clara_jax.training.stages.losses import answer_terms, estimator_of, repeat

SATURATED = 1e-3  # of 1 - Σ p²: the softmax passes less than that of a difference on


def selection_gradients(model: Clara, weights: Weights, batch: Batch, rng: jax.Array) -> Metrics:
  """Metrics of one batch; without dropout.

  Args:
    model, weights: the method.
    batch: of the joint stage.
    rng: key of the estimator's draws.

  Returns:
    path_i, path_ii: norms of ∂L/∂m of each path, L a row's mean cross entropy; path_cosine: of the
      angle between them.
    query_gradient: norm of ∂L/∂q, all of it path (I).
    soft_mass_on_taken: of the backward softmax of slots after the first, on documents of earlier
      slots.
    saturation: largest probability of a slot's softmax, on average.
    vanishing: share of rows in which 1 - Σ p² < 0.001 in every slot: no difference between
      documents reaches their scores.
    All are means over rows.
  """
  estimator, tau = estimator_of(model), model.temperature(weights)
  query = model.encode_query(weights, batch.question)
  pool = candidates(model, weights, batch, query)
  scores, back = jax.vjp(model.score, query, pool.memories)
  draws = estimator.samples
  prompt = repeat(batch.prompt, draws)

  def objective(scores, memories):
    choice = estimator(repeat(scores, draws), model.config.top_k, tau, rng)
    states = model.answer_states(weights, prompt, choice.rows(repeat(memories, draws)))
    *_, rows = answer_terms(model, weights, states, prompt)
    rows = rows / jnp.maximum(prompt.label_weights.sum(-1), 1)
    return rows.sum() / draws + (
      0.0 if choice.log_prob is None else estimators.leave_one_out(rows, choice.log_prob, draws)
    )

  d_scores, through_rows = jax.grad(objective, (0, 1))(scores, pool.memories)
  d_query, through_scores = back(d_scores)

  def norm(x):
    return jnp.sqrt(jnp.square(x.astype(jnp.float32)).sum(range(1, x.ndim)))

  one, two = norm(through_scores), norm(through_rows)
  product = (through_scores.astype(jnp.float32) * through_rows.astype(jnp.float32)).sum(
    range(1, through_rows.ndim)
  )

  # [B, K, N]: the softmax of each slot, and whether an earlier one has the document.
  k = model.config.top_k
  indices = jax.lax.top_k(scores, k)[1]
  soft = jax.vmap(
    lambda s, i: jax.vmap(lambda j: soft_choice(s, i, j, tau, model.config.masking))(jnp.arange(k))
  )(scores, indices)
  taken = jnp.cumsum(jax.nn.one_hot(indices, scores.shape[-1]), axis=1)[:, :-1]
  spread = 1 - jnp.square(soft).sum(-1)
  shown = {
    "path_i": one,
    "path_ii": two,
    "path_cosine": product / jnp.maximum(one * two, 1e-30),
    "query_gradient": norm(d_query),
    "soft_mass_on_taken": (soft[:, 1:] * taken).sum(-1).mean(-1)
    if k > 1
    else jnp.zeros(len(scores)),
    "saturation": soft.max(-1).mean(-1),
    "vanishing": (spread < SATURATED).all(-1),
  }
  return {name: Mean.of(value, valid(batch)) for name, value in shown.items()} | {
    "temperature": Mean(jnp.asarray(tau), jnp.ones(()))
  }
