"""Rotary position embeddings (arXiv 2104.09864), in the half-split layout of Hugging Face
checkpoints."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from clara_jax.axes import Array
from clara_jax.config import RopeScaling


def rotary_angles(
  positions: Int[Array, "B T"], rotary_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]:
  """Cosines and sines of the rotation angles.

  Args:
    positions: [B, T] int32.
    rotary_dim: rotated dimensions of a head, even.
    theta: base of the geometric progression of wavelengths.
    scaling: how the frequencies are stretched; None for plain RoPE.

  Returns:
    (cos, sin), each [B, T, 1, rotary_dim/2] float32, ready to broadcast over heads.
  """
  plain = (theta ** (-np.arange(0, rotary_dim, 2, dtype=np.float32) / rotary_dim)).astype(
    np.float32
  )
  frequencies: Any = plain
  amplitude = 1.0
  if scaling is None:
    pass
  elif scaling.kind == "linear":
    frequencies = plain / np.float32(scaling.factor)
  elif scaling.kind == "llama3":
    frequencies = llama3_frequencies(plain, scaling)
  elif scaling.kind == "yarn":
    frequencies, amplitude = _yarn(plain, rotary_dim, theta, scaling)
  else:
    # As in transformers, the longest sequence of the call decides for all of it.
    short, long = (
      plain / np.asarray(f, np.float32) for f in (scaling.short_factor, scaling.long_factor)
    )
    frequencies = jnp.where(positions.max() < scaling.original_max_positions, short, long)
    amplitude = scaling.attention_factor
    if amplitude is None:
      amplitude = (
        math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_max_positions))
        if scaling.factor > 1
        else 1.0
      )
  angles = positions[..., None, None].astype(jnp.float32) * frequencies
  return jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude


def llama3_frequencies(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
  """Long wavelengths are stretched, short ones kept, those between interpolated. [P/2] -> [P/2]
  float32."""
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  # Of a frequency within the original context.
  turns = scaling.original_max_positions * frequencies / (2 * math.pi)
  kept = np.clip((turns - low) / (high - low), 0, 1)
  return ((1 - kept) * frequencies / scaling.factor + kept * frequencies).astype(np.float32)


def _yarn(
  frequencies: np.ndarray, rotary_dim: int, theta: float, scaling: RopeScaling
) -> tuple[np.ndarray, float]:
  """Frequencies by parts (arXiv 2309.00071 §3.2), with a ramp over dimensions as in the paper's
  code, and the attention factor (§3.4)."""

  def dimension(turns: float) -> float:  # that turns so often within the original context
    return (
      rotary_dim
      * math.log(scaling.original_max_positions / (turns * 2 * math.pi))
      / (2 * math.log(theta))
    )

  def temperature(weight: float = 1.0) -> float:
    return 0.1 * weight * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

  low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
  if scaling.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, rotary_dim - 1)
  high += 0.001 * (low == high)
  divided = np.clip((np.arange(rotary_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
  amplitude = scaling.attention_factor
  if amplitude is None:
    both = scaling.mscale and scaling.mscale_all_dim
    amplitude = (
      temperature(scaling.mscale) / temperature(scaling.mscale_all_dim) if both else temperature()
    )
  return (frequencies / scaling.factor * divided + frequencies * (1 - divided)).astype(
    np.float32
  ), amplitude


def rotate(
  x: Float[Array, "B T H P"], cos: Float[Array, "#B T 1 half"], sin: Float[Array, "#B T 1 half"]
) -> Float[Array, "B T H P"]:
  """Rotates the two halves of each head's first rotary_dim dimensions; the rest stays.

  x: [B, T, H, P], any float type; computed in float32, returned in x's type.
  """
  turned, rest = jnp.split(x, [2 * cos.shape[-1]], axis=-1)
  a, b = jnp.split(turned.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
  return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned
