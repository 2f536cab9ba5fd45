"""Rotary position embeddings (arXiv 2104.09864), in the half-split layout of Hugging Face checkpoints."""

import jax
import jax.numpy as jnp


def rotary_angles(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines of the rotation angles.

  Args:
    positions: [B, T] int32.
    head_dim: P, even.
    theta: base of the geometric progression of wavelengths.

  Returns:
    (cos, sin), each [B, T, 1, P/2] float32, ready to broadcast over heads.
  """
  frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  angles = positions[..., None, None].astype(jnp.float32) * frequencies
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates the two halves of each head; x: [B, T, H, P], any float type; computed in float32, returned in x's type."""
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
