"""The estimators that come with clara_jax. Each runs in memory linear in N."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from clara_jax.axes import Array
from clara_jax.ops.estimators.api import NEG_INF, Selection, best_k, gather, scaled_scores, weighted
from clara_jax.ops.estimators.registry import register
from clara_jax.ops.topk import Masking, soft_choice, straight_through_top_k

Scores = Float[Array, "B N"]
Temperature = float | Float[Array, ""]


def _straight_through(
  scores: Scores, k: int, temperature: Temperature, masking: Masking
) -> Selection:
  def rows(memories):
    return jax.vmap(lambda s, m: straight_through_top_k(s, m, k, temperature, masking)[0])(
      scores, memories
    )

  return Selection(best_k(scores, k), rows)


@register("algorithm1")
def algorithm1(
  scores: Scores, k: int, temperature: Temperature, rng: jax.Array | None = None
) -> Selection:
  """Straight-through top-k as in the paper's Algorithm 1 and the released code: p_j = softmax(θ +
  log(1 - taken + ε)); `ops/topk.py`."""
  return _straight_through(scores, k, temperature, "algorithm1")


@register("equation33")
def equation33(
  scores: Scores, k: int, temperature: Temperature, rng: jax.Array | None = None
) -> Selection:
  """Straight-through top-k as in the paper's Eq. 3.3: p_j = softmax((s + log(1 - taken + ε))/τ), a
  taken document is really gone."""
  return _straight_through(scores, k, temperature, "equation33")


@register("selected_only")
def selected_only(
  scores: Scores, k: int, temperature: Temperature, rng: jax.Array | None = None
) -> Selection:
  """A plain gather: the gradient reaches what was selected and never the scores. The control
  without a learning signal."""
  del temperature
  indices = best_k(scores, k)
  return Selection(indices, lambda memories: gather(memories, indices))


@register("softmax")
def softmax_mixture(
  scores: Scores, k: int, temperature: Temperature, rng: jax.Array | None = None, hard: bool = False
) -> Selection:
  """Soft attention in each slot (Bahdanau et al., arXiv 1409.0473): row j = Σ_n p_jn m_n, with
  p_j of Eq. 3.3. Exact for what it computes; the generator reads mixtures. `hard=True` is
  'equation33'."""
  indices = best_k(scores, k)

  def one(s, i):
    return jax.vmap(lambda slot: soft_choice(s, i, slot, temperature, "equation33"))(jnp.arange(k))

  return weighted(indices, jax.vmap(one)(scores.astype(jnp.float32), indices), hard)


@register("gumbel")
def gumbel(scores: Scores, k: int, temperature: Temperature, rng: jax.Array) -> Selection:
  """Straight-through Gumbel top-k (Kool et al., arXiv 1903.06059; Jang et al., arXiv 1611.01144).

  The K best of θ + g, g ~ Gumbel(0, 1), are a draw from the Plackett–Luce distribution of θ;
  backward as Algorithm 1, at the perturbed scores.
  """
  noise = jax.random.gumbel(rng, scores.shape, jnp.float32)
  return _straight_through(
    scores.astype(jnp.float32) + temperature * noise, k, temperature, "algorithm1"
  )


@register("iterated_softmax")
def iterated_softmax(
  scores: Scores,
  k: int,
  temperature: Temperature,
  rng: jax.Array | None = None,
  hard: bool = False,
  noise: bool = False,
) -> Selection:
  """Relaxed top-k by repeated softmax (Plötz and Roth, arXiv 1810.12575, §3): α_0 = θ, p_j =
  softmax(α_j), α_{j+1} = α_j + log(1 - p_j), W_j = p_j. Other than with Algorithm 1, the gradient
  also runs through what earlier slots took. With `noise`, of θ + g, g ~ Gumbel(0, 1): the subset
  sampling of Xie and Ermon (arXiv 1901.10517) with a relaxation temperature of 1."""
  theta, _ = scaled_scores(scores, temperature)
  if noise:
    theta = theta + jax.random.gumbel(rng, theta.shape, jnp.float32)

  def slot(alpha, _):
    p = jax.nn.softmax(alpha)
    return alpha + jnp.log1p(-jnp.minimum(p, 1 - 1e-6)), p

  _, weights = jax.lax.scan(slot, theta, length=k)
  return weighted(best_k(theta, k), jnp.moveaxis(weights, 0, 1), hard)


@register("optimal_transport")
def optimal_transport(
  scores: Scores,
  k: int,
  temperature: Temperature,
  rng: jax.Array | None = None,
  hard: bool = False,
  iterations: int = 50,
) -> Selection:
  """Relaxed sorted top-k by entropic optimal transport (Xie et al., arXiv 2002.06504; Cuturi et
  al., arXiv 1905.11885).

  N scores of mass 1 are carried to K + 1 places y = 1, (K-1)/K, …, 1/K, 0, of mass 1 each and N - K
  at the last, at cost (s_n - y_j)²/2: Γ = argmax ⟨Γ, s yᵀ⟩/τ + entropy, by Sinkhorn's iterations in
  the log domain; W_j = Γ_·j. The gradient runs through the iterations, whose potentials alone are
  kept.
  """
  theta, _ = scaled_scores(scores, temperature)
  n = scores.shape[-1]
  places = jnp.arange(k, -1 if k < n else 0, -1, dtype=jnp.float32) / k
  mass = jnp.log(jnp.where(places > 0, 1.0, n - k).astype(jnp.float32)) if k < n else jnp.zeros(k)

  @jax.checkpoint
  def update(g, _):
    # [B, N]: every document is carried off
    f = -jax.nn.logsumexp(theta[..., None] * places + g[:, None, :], axis=-1)
    # [B, K+1]: every place is full
    return mass - jax.nn.logsumexp(theta[..., None] * places + f[..., None], axis=-2), f

  g, f = jax.lax.scan(update, jnp.zeros((*theta.shape[:-1], len(places))), length=iterations)
  plan = jnp.exp(theta[..., None] * places[:k] + f[-1][..., None] + g[:, None, :k])
  return weighted(best_k(theta, k), jnp.moveaxis(plan, -1, -2), hard)


@register("perturbed")
def perturbed(
  scores: Scores,
  k: int,
  temperature: Temperature,
  rng: jax.Array,
  samples: int = 8,
  hard: bool = False,
) -> Selection:
  """Perturbed top-k (Berthet et al., arXiv 2002.08676, Prop. 3.1), S samples: W = E[W(s + τ z)], z
  ~ N(0, 1), whose Jacobian is E[W(s + τ z) zᵀ]/τ. W(s) is subtracted within the expectation, which
  changes no mean and takes variance away. The generator reads the mean of the samples, or with
  `hard` the K best."""
  _, tau = scaled_scores(scores, temperature)
  scores32 = scores.astype(jnp.float32)
  best = best_k(scores, k)
  z = jax.random.normal(rng, (samples, *scores.shape), jnp.float32)
  drawn = jax.lax.stop_gradient(jax.vmap(lambda noise: best_k(scores32 + tau * noise, k))(z))
  pull = (z * scores32).sum(-1) / tau
  pull = pull - jax.lax.stop_gradient(pull)  # [S, B]: 0, with the derivative z/τ

  def rows(memories):
    first = gather(memories, best)
    taken = jax.vmap(lambda i: gather(memories, i))(drawn).astype(jnp.float32)
    weight = pull.reshape(*pull.shape, *[1] * (memories.ndim - 1))
    signal = (weight * jax.lax.stop_gradient(taken - first.astype(jnp.float32))).mean(0)
    return ((first if hard else taken.mean(0)) + signal).astype(memories.dtype)

  return Selection(best, rows)


@register("score_function")
def score_function(
  scores: Scores, k: int, temperature: Temperature, rng: jax.Array, draws: int = 4
) -> Selection:
  """REINFORCE (Williams, 1992) with a leave-one-out baseline (Kool et al., 2019, "Buy 4 REINFORCE
  samples, get a baseline for free!").

  A subset is drawn from the Plackett–Luce distribution of θ (Gumbel top-k), p(i_1 … i_K) = Π_j
  softmax over what is left; the loss of each of a row's `draws` subsets less the mean of the
  others' multiplies ∂ log p. Unbiased for the expected loss; each draw costs a pass of the
  generator.
  """
  del draws  # the caller gives every row so many times
  theta, _ = scaled_scores(scores, temperature)
  indices = best_k(
    jax.lax.stop_gradient(theta) + jax.random.gumbel(rng, theta.shape, jnp.float32), k
  )
  return Selection(
    indices, lambda memories: gather(memories, indices), plackett_luce(theta, indices)
  )


def plackett_luce(theta: Scores, indices: Int[Array, "B K"]) -> Float[Array, " B"]:
  """log p of an ordered choice: θ [B, N], indices [B, K] -> [B]."""

  def one(theta, indices):
    def slot(left, i):
      return left.at[i].set(NEG_INF), theta[i] - jax.nn.logsumexp(left)

    return jax.lax.scan(slot, theta, indices)[1].sum()

  return jax.vmap(one)(theta, indices)


def leave_one_out(
  losses: Float[Array, " B"], log_prob: Float[Array, " B"], draws: int
) -> Float[Array, ""]:
  """A term of value 0 whose gradient is REINFORCE's with the leave-one-out baseline.

  Args:
    losses: [B · draws], the draws of a row side by side.
    log_prob: [B · draws].
    draws: S.

  Returns:
    Scalar: Σ_b 1/S Σ_s (L_bs - mean_{r≠s} L_br) log p_bs, less itself.
  """
  losses = jax.lax.stop_gradient(losses).reshape(-1, draws)
  others = (losses.sum(-1, keepdims=True) - losses) / max(1, draws - 1)
  term = ((losses - (others if draws > 1 else 0.0)) * log_prob.reshape(-1, draws)).sum() / draws
  return term - jax.lax.stop_gradient(term)


@register("simple")
def simple(
  scores: Scores, k: int, temperature: Temperature, rng: jax.Array, sample: bool = True
) -> Selection:
  """Exact marginals of k-subsets (SIMPLE; Ahmed et al., arXiv 2210.01941), slot by slot.

  Subsets z have p(z) ∝ exp(Σ_{n∈z} θ_n). Forward, one is drawn exactly (or the K best are taken),
  in order of score. Backward, W is the exact probability that document n is the j-th best of a
  subset, P_jn ∝ e_j(above n) exp(θ_n) e_{K-1-j}(below n), with e_j the elementary symmetric
  polynomials of exp(θ), multiplied together by an associative scan in the log domain: O(N K²)
  memory.
  """
  theta, _ = scaled_scores(scores, temperature)
  order = jnp.argsort(-theta, axis=-1)
  descending = jnp.take_along_axis(theta, order, axis=-1)
  descending = descending - jax.lax.stop_gradient(descending[:, :1])
  above, below = _polynomials(descending, k), _polynomials(descending[:, ::-1], k)[:, ::-1]
  slots = jnp.arange(k)
  # [B, K, N]: log e_j(above n) + θ_n + log e_{K-1-j}(below n)
  logits = jnp.moveaxis(
    above[..., slots] + descending[..., None] + below[..., k - 1 - slots], -1, -2
  )
  weights = jnp.take_along_axis(
    jax.nn.softmax(logits), jnp.argsort(order, axis=-1)[:, None, :], axis=-1
  )
  if not sample:
    return weighted(best_k(theta, k), weights, hard=True)
  places = jnp.arange(theta.shape[-1])

  def draw(last, inputs):
    slot, key = inputs
    at = jax.lax.stop_gradient(descending + jnp.take(below, k - 1 - slot, axis=-1))
    noise = jax.random.gumbel(key, at.shape, jnp.float32)
    # NEG_INF is as good as no document is left; fewer than that are never needed, as the polynomial
    # below is 0 then.
    chosen = jnp.argmax(jnp.where(places > last[:, None], at + noise, -jnp.inf), axis=-1)
    return chosen, chosen

  _, chosen = jax.lax.scan(draw, jnp.full(theta.shape[0], -1), (slots, jax.random.split(rng, k)))
  indices = jnp.take_along_axis(order, chosen.T, axis=-1).astype(jnp.int32)
  return weighted(indices, weights, hard=True)


def _polynomials(theta: Scores, k: int) -> Float[Array, "B N K"]:
  """log e_0 … e_{K-1} of the exp(θ) before each place: [B, N] -> [B, N, K]."""
  n = theta.shape[-1]
  one = jnp.full((*theta.shape, k), NEG_INF).at[..., 0].set(0.0)
  if k > 1:
    one = one.at[..., 1].set(theta)
  degree = jnp.arange(k)
  # Of the second factor, by [degree of the product, of the first].
  difference = degree[:, None] - degree

  def multiply(a, b):
    terms = a[..., None, :] + jnp.where(
      difference >= 0, b[..., jnp.maximum(difference, 0)], NEG_INF
    )
    return jax.nn.logsumexp(jnp.maximum(terms, NEG_INF), axis=-1)

  product = jax.lax.associative_scan(multiply, one, axis=1)
  nothing = jnp.full((theta.shape[0], 1, k), NEG_INF).at[..., 0].set(0.0)
  return jnp.concatenate([nothing, product[:, : n - 1]], axis=1)
