"""The straight-through top-k: hard documents forward, a softmax backward (paper §3.2, Eq. 3.3 and
Algorithm 1).

The algebra. For scores s in R^N, temperature τ and slots j = 0 … K-1 filled in order of score, let
`taken_j` be the documents of the slots before j. The soft choice of slot j is

    p_j = softmax(s/τ + log(1 - taken_j + ε))        masking 'algorithm1' (the released code)
    p_j = softmax((s + log(1 - taken_j + ε)) / τ)    masking 'equation33'

and the selection matrix is W = hard + soft - stop_gradient(soft), so that `selected = W · memories`
equals the taken documents exactly. With G_jn = ⟨∂L/∂selected_j, memory_n⟩ the cotangent of W, the
scores receive

    ∂L/∂s_n = (1/τ) Σ_j p_jn (G_jn - Σ_m p_jm G_jm)

for both maskings, and the temperature, where it is learned, ∂L/∂τ = -(1/τ) Σ_n s_n ∂L/∂s_n. Neither
W nor p over all slots at once is ever formed: forward is a gather, and backward walks over the K
slots with one [B, N] softmax each, in memory linear in N.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from clara_jax.axes import Array

Masking = Literal["algorithm1", "equation33"]
EPSILON = 1e-8


def soft_choice(
  scores: Float[Array, " N"],
  indices: Int[Array, " K"],
  slot: int | Int[Array, ""],
  temperature: float | Float[Array, ""],
  masking: Masking,
) -> Float[Array, " N"]:
  """p_j of the module docstring: the softmax of one slot with the documents of earlier slots
  masked.

  Args:
    scores: [N] float32.
    indices: [K] int, documents in order of score.
    slot: j.
    temperature: τ.
    masking: see the module docstring.

  Returns:
    [N] float32.
  """
  earlier = jnp.arange(indices.shape[0]) < slot
  taken = jnp.zeros(scores.shape, bool).at[indices].set(earlier)
  penalty = jnp.where(taken, math.log(EPSILON), 0.0)  # log(1 + ε) is 0 in float32
  logits = (
    scores / temperature + penalty if masking == "algorithm1" else (scores + penalty) / temperature
  )
  return jax.nn.softmax(logits)


def straight_through_top_k(
  scores: Float[Array, "..."],
  memories: Float[Array, "..."],
  k: int,
  temperature: float | Float[Array, ""],
  masking: str = "algorithm1",
) -> tuple[Float[Array, " K ..."], Int[Array, " K"]]:
  """The K best documents, exactly; their gradient reaches the scores through a softmax.

  Written for one row; `jax.vmap` it over a batch (`select` in `model.py` does). Ties go to the
  lower index.

  Args:
    scores: [N] float, cosine similarities.
    memories: [N, ...] float, what is selected (memory tokens [N, M, D]).
    k: K.
    temperature: τ; an array where it is learned or changes from step to step.
    masking: how documents taken by earlier slots are masked in the backward softmax.

  Returns:
    (selected [K, ...], indices [K] int32), in order of score.

  Raises:
    ValueError: if k > N, k < 1 or the masking is unknown.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> selected, indices = straight_through_top_k(jnp.array([0.1, 0.9, 0.5]), jnp.eye(3), 2, 0.02)
    >>> indices.tolist()
    [1, 2]
  """
  if scores.ndim != 1 or memories.shape[:1] != scores.shape:
    raise ValueError(
      f"expected scores [N] and memories [N, ...], got {scores.shape} and {memories.shape}"
    )
  if not 1 <= k <= scores.shape[0]:
    raise ValueError(f"top-k of k={k} among N={scores.shape[0]} candidates: expected 1 <= k <= N")
  if masking not in ("algorithm1", "equation33"):
    raise ValueError(f"masking={masking!r}: expected 'algorithm1' or 'equation33'")
  if isinstance(temperature, (int, float)) and temperature <= 0:
    raise ValueError(f"temperature={temperature}: expected a positive number")
  return _select(scores, memories, jnp.asarray(temperature, jnp.float32), k, masking)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _select(scores, memories, temperature, k, masking):
  return _forward(scores, memories, temperature, k, masking)[0]


def _forward(scores, memories, temperature, k, masking):
  del masking  # of the backward pass
  _, indices = jax.lax.top_k(scores, k)
  return (memories[indices], indices), (scores, memories, temperature, indices)


def _backward(k, masking, residuals, cotangents):
  scores, memories, temperature, indices = residuals
  d_selected, _ = cotangents
  scores32 = scores.astype(jnp.float32)
  flat = memories.reshape(memories.shape[0], -1)

  def add_slot(slot, d_scores):
    p = soft_choice(scores32, indices, slot, temperature, masking)
    d_row = jnp.matmul(
      flat, d_selected[slot].reshape(-1).astype(flat.dtype), preferred_element_type=jnp.float32
    )
    return d_scores + p * (d_row - jnp.vdot(p, d_row)) / temperature

  d_scores = jax.lax.fori_loop(0, k, add_slot, jnp.zeros_like(scores32))
  d_memories = jnp.zeros_like(memories).at[indices].add(d_selected.astype(memories.dtype))
  d_temperature = -jnp.vdot(scores32, d_scores) / temperature
  return d_scores.astype(scores.dtype), d_memories, d_temperature


_select.defvjp(_forward, _backward)


def push(
  scores: Float[Array, " N"],
  memories: Float[Array, "N ..."],
  indices: Int[Array, " K"],
  d_selected: Float[Array, "K ..."],
  temperature: float,
  masking: Masking,
) -> Float[Array, " N"]:
  """-∂L/∂scores [N]: how hard the answer's loss pulls each candidate up; see
  `training/stages/losses.py` for its use as a metric."""
  d_scores, *_ = _backward(
    indices.shape[0], masking, (scores, memories, temperature, indices), (d_selected, None)
  )
  return -d_scores
