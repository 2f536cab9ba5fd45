"""The method's formulas as the paper writes them, with every matrix formed."""

import jax
import jax.numpy as jnp

from clara_jax.ops.topk import EPSILON


def straight_through_top_k(
  scores: jax.Array, memories: jax.Array, k: int, temperature: float, masking: str
) -> tuple[jax.Array, jax.Array]:
  """W = hard + soft - stop_gradient(soft) of scores (N,), memories (N, …) (paper, Algorithm 1).

  Returns:
    The selection (k, …) and the indices (k,).
  """
  n = scores.shape[0]
  scores = scores.astype(jnp.float32)
  taken = jnp.zeros(n)
  rows = []
  order = jax.lax.top_k(scores, k)[1]
  for j in range(k):
    mask = jnp.log(jnp.where(taken > 0, EPSILON, 1.0))
    logits = (
      scores / temperature + mask if masking == "algorithm1" else (scores + mask) / temperature
    )
    soft = jax.nn.softmax(logits)
    hard = jax.nn.one_hot(order[j], n)
    rows.append(hard + soft - jax.lax.stop_gradient(soft))
    taken = taken + hard
  return jnp.tensordot(jnp.stack(rows), memories.astype(jnp.float32), 1), order
