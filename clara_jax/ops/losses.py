"""Losses as pure functions of arrays (paper §3.1 and §3.2)."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from clara_jax.axes import Array


def cross_entropy(
  logits: Float[Array, "*B V"], targets: Int[Array, "*B"]
) -> tuple[Float[Array, "*B"], Bool[Array, "*B"]]:
  """Cross entropy of each token, and whether its target is the greedy choice (the first of the
  largest logits).

  Only sums, maxima and comparisons run along V, so that logits whose V is divided over devices stay
  where they are.

  Args:
    logits: [..., V], computed in float32.
    targets: [...] int, token ids.

  Returns:
    ([...] float32, [...] bool).
  """
  logits = logits.astype(jnp.float32)
  words = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
  picked = jnp.where(words == targets[..., None], logits, 0).sum(-1)
  largest = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
  log_sum = jnp.log(jnp.exp(logits - largest).sum(-1)) + largest[..., 0]
  greedy = jnp.where(logits >= largest, words, logits.shape[-1]).min(-1)
  return log_sum - picked, greedy == targets


def masked_mean(
  x: Float[Array, "*B L D"], mask: Bool[Array, "*B L"] | Float[Array, "*B L"]
) -> Float[Array, "*B D"]:
  """Mean of x: [..., L, D] over the positions where mask: [..., L] is true; float32, [..., D]."""
  mask = mask.astype(jnp.float32)[..., None]
  return (x.astype(jnp.float32) * mask).sum(-2) / jnp.maximum(mask.sum(-2), 1)


def alignment_mse(
  hidden: Float[Array, "B L D"], is_document: Bool[Array, "B L"], is_memory: Bool[Array, "B L"]
) -> Float[Array, " B"]:
  """Distance between the mean document state and the mean memory state (paper §3.1, L_MSE).

  Mean over width, as in the released code; the paper writes the squared norm, D times larger.

  Args:
    hidden: [B, L, D], last hidden states of the compressor.
    is_document: [B, L] bool, document tokens with `<ENC>`, `<s>` and `</s>`, without padding and
      memory tokens.
    is_memory: [B, L] bool.

  Returns:
    [B] float32; its mean over the batch is L_MSE.
  """
  difference = masked_mean(hidden, is_document) - masked_mean(hidden, is_memory)
  return jnp.square(difference).mean(-1)


def contrastive(
  scores: Float[Array, "B N"], is_gold: Bool[Array, "B N"], temperature: float
) -> Float[Array, ""]:
  """-log(Σ_gold e^{s/τ} / Σ_all e^{s/τ}), mean over rows (Sup-Instruct baseline).

  Args:
    scores: [B, N] cosines.
    is_gold: [B, N] bool. Rows without a gold document do not count.
    temperature: τ.

  Returns:
    A float32 scalar.
  """
  scaled = scores.astype(jnp.float32) / temperature
  # A finite floor: -inf would turn the gradient of rows without gold into NaN.
  gold = jax.nn.logsumexp(jnp.where(is_gold, scaled, -1e30), axis=-1)
  has_gold = is_gold.any(-1)
  losses = jnp.where(has_gold, jax.nn.logsumexp(scaled, axis=-1) - gold, 0.0)
  return losses.sum() / jnp.maximum(has_gold.sum(), 1)
