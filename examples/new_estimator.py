"""An estimator of one's own: ReinMax (Liu et al., arXiv 2304.08612), slot by slot.
docs/gradients.md builds it up.

    clara gradients --out lab --estimators algorithm1 gumbel examples/new_estimator.py:reinmax
    clara train --config … --config.estimator=examples/new_estimator.py:reinmax --config.estimator_args.sharpness=1.0

or, as a script, its audit beside two others: `python examples/new_estimator.py`.
"""  # noqa: E501

import tempfile

import jax
import jax.numpy as jnp

from clara_jax.ops.estimators import Selection, weighted


def reinmax(scores, k, temperature, rng, sharpness: float = 1.0) -> Selection:
  """Second-order straight-through: with D the document that was drawn and π the softmax it was
  drawn from, the gradient is twice that through (π + D)/2 less half of that through π. Exact for
  losses that are quadratic in the weights of a single slot (K = 1)."""
  theta = sharpness * scores.astype(jnp.float32) / temperature
  noise = jax.random.gumbel(rng, theta.shape)
  indices = jax.lax.top_k(theta + noise, k)[1]  # a draw from Plackett–Luce

  drawn = jax.nn.one_hot(indices, theta.shape[-1])  # [B, K, N]
  taken = jnp.cumsum(drawn, axis=1) - drawn  # by earlier slots
  logits = jnp.where(taken > 0, -1e9, theta[:, None])
  pi = jax.nn.softmax(logits)
  middle = jax.lax.stop_gradient(jnp.log((pi + drawn) / 2 + 1e-20) - logits)
  return weighted(indices, 2 * jax.nn.softmax(logits + middle) - pi / 2)


if __name__ == "__main__":
  from clara_jax.experiments.laboratory import laboratory

  with tempfile.TemporaryDirectory() as out:
    laboratory.run_audit(
      out, ("algorithm1", "gumbel", "score_function", f"{__file__}:reinmax"), draws=500, varied=()
    )
    print(open(f"{out}/gradients.md", encoding="utf-8").read())
