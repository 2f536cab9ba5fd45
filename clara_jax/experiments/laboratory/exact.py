"""The exact gradient of the expected loss, by enumeration of all ordered choices of K among N
documents.

A policy gives every ordered choice (i_1 … i_K) a probability that depends on the scores s; the
expected loss is J(s) = Σ p(i; s) L(i), and its gradient is what an estimator is held against.
Choices number N!/(N-K)!: 11,880 for N = 12, K = 4.

Axes: P choices, N documents, K slots.
"""

import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from clara_jax.config import ConfigError
from clara_jax.ops.estimators import plackett_luce

LIMIT = 200_000  # choices
HALF_WIDTH = math.sqrt(3.0)  # of uniform noise of variance 1

Policy = Callable[[jax.Array, np.ndarray | jax.Array, float | jax.Array], jax.Array]


def choices(n: int, k: int) -> np.ndarray:
  """[P, K] int32: all ordered choices.

  Raises:
    ConfigError: there are more than can be enumerated.
  """
  if not 1 <= k <= n:
    raise ConfigError(f"k={k} among N={n}: expected 1 <= k <= N")
  if (count := math.perm(n, k)) > LIMIT:
    raise ConfigError(
      f"N={n}, k={k}: {count:,} ordered choices, at most {LIMIT:,} can be enumerated"
    )
  return np.array(list(itertools.permutations(range(n), k)), np.int32).reshape(-1, k)


def plackett_luce_policy(
  scores: jax.Array, selections: np.ndarray | jax.Array, temperature: float | jax.Array
) -> jax.Array:
  """The K best of s + τ g, g ~ Gumbel(0, 1): each slot is a softmax over what is left.

  Args:
    scores: [N].
    selections: [P, K] of `choices`.
    temperature: τ.

  Returns:
    [P] probabilities.
  """
  return jnp.exp(
    jax.vmap(lambda i: plackett_luce((scores / temperature)[None], i[None])[0])(
      jnp.asarray(selections)
    )
  )


def subset_policy(
  scores: jax.Array, selections: np.ndarray | jax.Array, temperature: float | jax.Array
) -> jax.Array:
  """Subsets with p ∝ exp(Σ θ), in order of score; see `plackett_luce_policy` for the arguments. The
  distribution of 'simple'."""
  theta = scores / temperature
  picked = theta[jnp.asarray(selections)]
  place = jnp.argsort(jnp.argsort(-scores))[jnp.asarray(selections)]  # ties: the lower index first
  in_order = (place[:, 1:] > place[:, :-1]).all(-1)
  return jax.nn.softmax(jnp.where(in_order, picked.sum(-1), -jnp.inf))


def uniform_noise_policy(
  scores: jax.Array, selections: np.ndarray | jax.Array, temperature: float | jax.Array
) -> jax.Array:
  """The K best of s + τ u, u uniform with mean 0 and variance 1; see `plackett_luce_policy` for the
  arguments.

  p(i) = ∫ f_{i_1}(x_1) ∫^{x_1} f_{i_2}(x_2) … ∫^{x_{K-1}} f_{i_K}(x_K) Π_{r∉i} F_r(x_K). Between
  neighboring ends of the N intervals everything is a polynomial of degree at most N, which N + 1
  Gauss–Legendre nodes integrate exactly.
  """
  n, k = scores.shape[0], selections.shape[1]
  width = HALF_WIDTH * jnp.asarray(temperature)
  nodes, weights = np.polynomial.legendre.leggauss(n + 1)
  # [D, D]: ∫_{-1}^{x_i} of the polynomial through values at the nodes.
  antiderivatives = np.stack(
    [(np.polynomial.Polynomial.basis(d).integ(lbnd=-1))(nodes) for d in range(n + 1)], -1
  )
  cumulative = jnp.asarray(antiderivatives @ np.linalg.inv(np.vander(nodes, increasing=True)))
  ends = jnp.sort(jnp.concatenate([scores - width, scores + width]))
  half = (ends[1:] - ends[:-1]) / 2
  x = (ends[:-1] + half)[:, None] + half[:, None] * nodes  # [pieces, D]
  density = (jnp.abs(x - scores[:, None, None]) < width) / (2 * width)  # [N, pieces, D]
  below = jnp.clip((x - scores[:, None, None] + width) / (2 * width), 0.0, 1.0)

  def integral(values):
    """Up to each node, and altogether."""
    pieces = half * (values @ jnp.asarray(weights))
    before = jnp.cumsum(pieces) - pieces
    return before[:, None] + half[:, None] * (values @ cumulative.T), pieces.sum()

  def one(chosen):
    is_chosen = jnp.zeros(n, bool).at[chosen].set(True)
    rest = jnp.where(is_chosen[:, None, None], 1.0, below).prod(0)
    for slot in range(k - 1, -1, -1):
      rest, total = integral(density[chosen[slot]] * rest)
    return total

  return jax.lax.map(one, jnp.asarray(selections), batch_size=256)


POLICIES: dict[str, Policy] = {
  "plackett_luce": plackett_luce_policy,
  "uniform_noise": uniform_noise_policy,
  "subsets": subset_policy,
}


def expected_loss(
  policy: Policy,
  scores: jax.Array,
  losses: jax.Array,
  selections: np.ndarray | jax.Array,
  temperature: float | jax.Array,
) -> jax.Array:
  """J(s): scores [N], losses [P] of the choices [P, K] -> scalar; differentiable."""
  return jnp.vdot(policy(scores, selections, temperature), losses)


def exact_gradient(
  policy: Policy,
  scores: jax.Array,
  losses: jax.Array,
  selections: np.ndarray | jax.Array,
  temperature: float | jax.Array,
) -> jax.Array:
  """∂J/∂s [N]."""
  return jax.grad(lambda s: expected_loss(policy, s, losses, selections, temperature))(scores)
