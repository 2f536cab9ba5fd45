"""What a gradient estimator is: a function that selects K of N documents and says how a gradient
finds its way back.

Axes: B rows, N candidates, K slots. θ = s/τ are the scores over the temperature. W [K, N] is the
selection matrix: `selected = W · memories`.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from clara_jax.axes import Array

NEG_INF = -1e30  # log 0, with a finite gradient


class Selection(NamedTuple):
  """What was chosen, and how a gradient finds its way back.

  Attributes:
    indices: [B, K] int32, the chosen documents, slot by slot.
    rows: memories [B, N, ...] -> what the generator reads, [B, K, ...]. Its derivative is the
      estimator: a cotangent on the result becomes one on the memories and, through the scores that
      it holds, one on the scores.
    log_prob: [B], log-probability of the indices where they were drawn and the losses of several
      draws are wanted, so that (loss - that of the others) · log_prob teaches the scores; else
      None.
  """

  indices: Int[Array, "B K"]
  rows: Callable[[Float[Array, "B N *rest"]], Float[Array, "B K *rest"]]
  log_prob: Float[Array, " B"] | None = None


@runtime_checkable
class EstimatorFn(Protocol):
  """An estimator: hard or soft selection forward, and what reaches the scores backward."""

  def __call__(
    self,
    scores: Float[Array, "B N"],
    k: int,
    temperature: float | Float[Array, ""],
    rng: Any,
    /,
  ) -> Selection:
    """Selects K documents for each row.

    Args:
      scores: [B, N] cosines.
      k: K.
      temperature: τ.
      rng: a key, for estimators that draw.

    Further arguments, each with its default, are `estimator_args` of the configuration.
    """


@dataclasses.dataclass(frozen=True)
class Estimator:
  """A function with its arguments.

  Attributes:
    name: as it was asked for.
    function: see the module docstring.
    arguments: (name, value) pairs.
    samples: how many draws of each row it compares.
  """

  name: str
  function: EstimatorFn
  arguments: tuple[tuple[str, Any], ...] = ()

  @property
  def samples(self) -> int:
    parameters = inspect.signature(self.function).parameters
    return (
      dict(self.arguments).get("draws", parameters["draws"].default) if "draws" in parameters else 1
    )

  def __call__(
    self,
    scores: Float[Array, "B N"],
    k: int,
    temperature: float | Float[Array, ""],
    rng: jax.Array | None,
  ) -> Selection:
    """See the module docstring.

    Raises:
      ValueError: if k > N or k < 1.
    """
    if not 1 <= k <= scores.shape[-1]:
      raise ValueError(
        f"top-k of k={k} among N={scores.shape[-1]} candidates: expected 1 <= k <= N"
      )
    return self.function(scores, k, temperature, rng, **dict(self.arguments))


# ---- building blocks -----------------------------------------------------------------------------


def best_k(scores: Float[Array, "B N"], k: int) -> Int[Array, "B K"]:
  """[B, K]: the K best, in order."""
  return jax.lax.top_k(scores, k)[1].astype(jnp.int32)


def gather(
  memories: Float[Array, "B N *rest"], indices: Int[Array, "B K"]
) -> Float[Array, "B K *rest"]:
  """memories [B, N, ...], indices [B, K] -> [B, K, ...]."""
  return jax.vmap(lambda m, i: m[i])(memories, indices)


def mix(
  weights: Float[Array, "B K N"], memories: Float[Array, "B N *rest"]
) -> Float[Array, "B K *rest"]:
  """weights [B, K, N] float32, memories [B, N, ...] -> [B, K, ...]: W · memories."""
  flat = memories.reshape(*memories.shape[:2], -1)
  mixed = jnp.einsum("bkn,bnd->bkd", weights, flat, preferred_element_type=jnp.float32)
  return mixed.reshape(*weights.shape[:2], *memories.shape[2:]).astype(memories.dtype)


def weighted(
  indices: Int[Array, "B K"], weights: Float[Array, "B K N"], hard: bool = True
) -> Selection:
  """A selection by soft weights, which is all that most estimators need.

  Args:
    indices: [B, K] int32, the chosen documents.
    weights: W [B, K, N] float32, a function of the scores.
    hard: straight-through, the documents themselves forward and W backward; otherwise the generator
      reads W · memories.
  """

  def rows(memories):
    if not hard:
      return mix(weights, memories)
    soft = mix(weights, jax.lax.stop_gradient(memories))
    return gather(memories, indices) + (soft - jax.lax.stop_gradient(soft))

  return Selection(indices, rows)


def scaled_scores(
  scores: Float[Array, "B N"], temperature: float | Float[Array, ""]
) -> tuple[Float[Array, "B N"], Float[Array, ""]]:
  """θ [B, N] and τ, in float32."""
  temperature = jnp.asarray(temperature, jnp.float32)
  return scores.astype(jnp.float32) / temperature, temperature
