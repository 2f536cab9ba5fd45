"""Causal attention behind two functions: within a text, where the backend is an argument, and with
a cache before it."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from clara_jax.axes import Array

_LANES = 128  # a TPU's vector registers: splash attention's lengths are multiples of it


def attend(
  q: Float[Array, "B T H P"],
  k: Float[Array, "B T G P"],
  v: Float[Array, "B T G P"],
  *,
  window: int | None = None,
  backend: str = "auto",
  partition: PartitionSpec | None = None,
) -> Float[Array, "B T H P"]:
  """Causal grouped-query attention within a text.

  Rows are padded on the right, so that the causal mask alone keeps real tokens from seeing padding;
  outputs at padding are finite and meaningless.

  Args:
    q: [B, T, H, P].
    k: [B, T, G, P], H a multiple of G.
    v: [B, T, G, P].
    window: a token sees itself and the `window - 1` tokens before it; None is unlimited.
    backend: 'xla' or 'cudnn' (`jax.nn.dot_product_attention`); 'splash', JAX's kernel for TPU,
      which never writes scores to the main memory (P a multiple of 128); 'grouped', the heads of a
      group in one product, by far the fastest on CPU; 'auto', the one for the mesh's platform
      (docs/performance.md).
    partition: how q, k and v lie on the mesh; kernels have to be told.

  Returns:
    [B, T, H, P] in q's type; the softmax is in float32.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if backend == "auto":
    platform = jax.default_backend() if mesh.empty else _platform(mesh.abstract_device.device_kind)
    backend = {"cpu": "grouped", "tpu": "xla" if q.shape[-1] % _LANES else "splash"}.get(
      platform, "xla"
    )
  if backend == "splash":
    kernel = functools.partial(_splash, window=window)
    if mesh.empty:
      return kernel(q, k, v)
    partition = partition or PartitionSpec()
    return jax.shard_map(kernel, in_specs=(partition,) * 3, out_specs=partition, check_vma=False)(
      q, k, v
    )
  if backend != "grouped":
    return jax.nn.dot_product_attention(  # type: ignore[call-overload]
      q,
      k,
      v,
      is_causal=True,
      local_window_size=None if window is None else (window - 1, 0),
      implementation=backend,
    )
  keys, values = (jnp.moveaxis(x, 1, 2) for x in (k, v))
  grouped = _by_group(q, k.shape[2])
  scores = _masked(_scores(grouped, keys), _causal(q.shape[1], window))
  return _heads(_mix(jax.nn.softmax(scores, axis=-1), values))


def _platform(device_kind: str) -> str:
  """Of a mesh's devices, which need not be here; JAX 0.10.0 names their kind alone."""
  kind = device_kind.lower()
  return "tpu" if kind.startswith("tpu") else "cpu" if kind == "cpu" else "gpu"


def _splash(q, k, v, window):
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  length, heads = q.shape[1:3]
  padded = -(-length // _LANES) * _LANES  # after the last token: no real one sees it
  block = _LANES * math.gcd(padded // _LANES, 4)
  blocks = splash.BlockSizes(
    block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, use_fused_bwd_kernel=True
  )
  mask = (
    masks.CausalMask((padded, padded))
    if window is None
    else masks.LocalMask((padded, padded), (window - 1, 0), 0)
  )
  kernel = splash.make_splash_mha(
    masks.MultiHeadMask([mask] * heads), block_sizes=blocks, head_shards=1, q_seq_shards=1
  )
  q, k, v = (
    jnp.pad(jnp.moveaxis(x, 1, 2), ((0, 0), (0, 0), (0, padded - length), (0, 0)))
    for x in (q * q.shape[-1] ** -0.5, k, v)
  )
  return jnp.moveaxis(jax.vmap(kernel)(q, k, v), 1, 2)[:, :length]


def attend_cached(
  q: Float[Array, "B T H P"],
  k: Float[Array, "B T G P"],
  v: Float[Array, "B T G P"],
  positions: Int[Array, "B T"],
  cached_k: Float[Array, "B G S P"],
  cached_v: Float[Array, "B G S P"],
  cached_positions: Int[Array, "B S"],
  *,
  window: int | None = None,
) -> Float[Array, "B T H P"]:
  """Causal attention of a few tokens to each other and to those before them. The cache is only
  read.

  Args:
    q: [B, T, H, P].
    k, v: [B, T, G, P], of the same tokens.
    positions: [B, T] int32, consecutive.
    cached_k, cached_v: [B, G, S, P], in any order.
    cached_positions: [B, S] int32; slots that hold no token before those of q have larger ones.
    window: see `attend`.

  Returns:
    [B, T, H, P] in q's type; the softmax is in float32.
  """
  length, slots = q.shape[1], cached_k.shape[2]
  keys, values = (jnp.moveaxis(x, 1, 2) for x in (k, v))
  grouped = _by_group(q, k.shape[2])
  before = cached_positions[:, None] < positions[..., None]
  if window is not None:
    before &= cached_positions[:, None] > positions[..., None] - window
  old = _masked(_scores(grouped, cached_k), before)
  new = _masked(_scores(grouped, keys), _causal(length, window))
  weights = jax.nn.softmax(jnp.concatenate([old, new], axis=-1), axis=-1)
  return _heads(_mix(weights[..., :slots], cached_v) + _mix(weights[..., slots:], values))


# The queries of all heads that share keys are rows of one matrix: batches of plain products, [B, G,
# R·T, P] with R = H / G.


def _by_group(q, groups):
  """[B, T, H, P] -> [B, G, R, T, P]"""
  batch, length, heads, width = q.shape
  return jnp.moveaxis(q.reshape(batch, length, groups, heads // groups, width), 1, 3)


def _scores(q, keys):
  """[B, G, R, T, P], [B, G, S, P] -> [B, G, R, T, S] float32"""
  batch, groups, ratio, length, width = q.shape
  flat = q.reshape(batch, groups, ratio * length, width)
  scores = (
    jnp.einsum("bgrp,bgsp->bgrs", flat, keys.astype(q.dtype), preferred_element_type=jnp.float32)
    * width**-0.5
  )
  return scores.reshape(batch, groups, ratio, length, -1)


def _mix(weights, values):
  """[B, G, R, T, S], [B, G, S, P] -> [B, G, R, T, P]"""
  batch, groups, ratio, length, slots = weights.shape
  flat = weights.reshape(batch, groups, ratio * length, slots).astype(values.dtype)
  return jnp.einsum("bgrs,bgsp->bgrp", flat, values).reshape(batch, groups, ratio, length, -1)


def _heads(x):
  """[B, G, R, T, P] -> [B, T, H, P]"""
  batch, groups, ratio, length, width = x.shape
  return jnp.moveaxis(x, 3, 1).reshape(batch, length, groups * ratio, width)


def _causal(length, window):
  """[1, T, T] bool"""
  at = jnp.arange(length)
  visible = at <= at[:, None]
  return (visible if window is None else visible & (at > at[:, None] - window))[None]


def _masked(scores, visible):
  """[B, G, R, T, S] where [B, T, S] says so"""
  return jnp.where(visible[:, None, None], scores, -1e30)
