"""Causal attention behind one function; the backend is an argument."""

import jax
import jax.numpy as jnp


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    positions: jax.Array | None = None,
    window: int | None = None,
    backend: str = "xla",
) -> jax.Array:
  """Causal grouped-query attention.

  Slot s of the keys holds the token at position s. Rows are padded on the right, so that the causal mask alone keeps real
  tokens from seeing padding; outputs at padding are finite and meaningless.

  Args:
    q: [B, T, H, P].
    k: [B, S, G, P], H a multiple of G.
    v: [B, S, G, P].
    positions: [B, T] int32, the queries' positions; None when T = S and query t stands at position t.
    window: a token sees itself and the `window - 1` tokens before it; None is unlimited.
    backend: 'xla' or 'cudnn' (`jax.nn.dot_product_attention`).

  Returns:
    [B, T, H, P] in q's type; the softmax is in float32.
  """
  left = None if window is None else window - 1
  if positions is None:
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=None if left is None else (left, 0), implementation=backend)
  slots = jnp.arange(k.shape[1], dtype=positions.dtype)
  visible = slots <= positions[:, :, None]
  if left is not None:
    visible &= slots >= positions[:, :, None] - left
  return jax.nn.dot_product_attention(q, k, v, mask=visible[:, None], implementation=backend)
