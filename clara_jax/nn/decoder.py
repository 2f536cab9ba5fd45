"""The decoder of Mistral and its relatives: grouped-query attention, rotary positions, RMSNorm,
SwiGLU; layers are scanned.

Every linear layer may carry LoRA (`linear.py`). The module reads token embeddings and gives last
hidden states, *after* the final norm; embedding tokens and reading logits are methods of their own,
because CLaRa splices memory tokens in between.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from clara_jax import axes
from clara_jax.config import LoraConfig, ModelConfig
from clara_jax.nn.linear import Linear
from clara_jax.nn.partition import constrain, partition
from clara_jax.ops.attention import attend, attend_cached
from clara_jax.ops.rope import rotary_angles, rotate

REMAT_POLICIES = {
  "full": None,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


EMPTY = 2**30  # the position of a slot that holds no token: after every other


class KeyValues(NamedTuple):
  """What a decoder has read: slots with keys and values of every layer, [Y, B, G, S, P] each, and
  the positions of their tokens, [B, S] int32 (`EMPTY`: none)."""

  keys: jax.Array
  values: jax.Array
  positions: jax.Array


class RMSNorm(nn.Module):
  """x / sqrt(mean(x²) + ε) · scale (arXiv 1910.07467), in float32, returned in x's type. x: [...,
  D]."""

  epsilon: float
  param_dtype: jnp.dtype
  axis: str | None = axes.WIDTH

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param(
      "scale",
      nn.with_logical_partitioning(nn.initializers.ones, (self.axis,)),
      x.shape[-1:],
      self.param_dtype,
    )
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
    return scale.astype(x.dtype) * normed.astype(x.dtype)


def _linear(
  config: ModelConfig,
  lora: LoraConfig | None,
  name: str,
  features: int,
  kernel_axes: tuple[str, str],
  use_bias: bool = False,
) -> Linear:
  return Linear(
    features,
    kernel_axes,
    lora=lora if lora and name in lora.targets else None,
    dtype=jnp.dtype(config.dtype),
    param_dtype=jnp.dtype(config.param_dtype),
    initializer_range=config.initializer_range,
    use_bias=use_bias,
    quantized=config.base_quantization == "int8",
    name=name,
  )


class Attention(nn.Module):
  """Grouped-query attention; x: [B, T, D] -> ([B, T, D], keys and values of x [B, G, T, P] where
  they are kept)."""

  config: ModelConfig
  lora: LoraConfig | None

  @nn.compact
  def __call__(self, x, cos, sin, positions, cache, deterministic, return_kv, windowed):
    config = self.config
    batch, length, width = x.shape

    def project(name, count, axis):
      return _linear(
        config, self.lora, name, count * config.head_dim, (axes.WIDTH, axis), config.qkv_bias
      )(x, deterministic)

    num_q, num_kv = config.num_heads, config.num_kv_heads
    if config.fused_projections:
      fused = project("qkv", num_q + 2 * num_kv, axes.HEADS)
      q, k, v = jnp.split(
        fused, [num_q * config.head_dim, (num_q + num_kv) * config.head_dim], axis=-1
      )
    else:
      q, k, v = (
        project("q", num_q, axes.HEADS),
        project("k", num_kv, axes.KV_HEADS),
        project("v", num_kv, axes.KV_HEADS),
      )
    q, k, v = (z.reshape(batch, length, -1, config.head_dim) for z in (q, k, v))
    if config.qk_norm:
      q, k = (
        RMSNorm(config.norm_eps, jnp.dtype(config.param_dtype), axis=None, name=name)(z)
        for name, z in (("q_norm", q), ("k_norm", k))
      )
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    # Kept where a caller asks for the collection (evaluation/explain.py).
    self.sow("queries", "rotated", q)
    q = constrain(q, (axes.BATCH, axes.LENGTH, axes.HEADS, None))
    k, v = (constrain(z, (axes.BATCH, axes.LENGTH, axes.KV_HEADS, None)) for z in (k, v))
    if cache is None:
      parts = partition((axes.BATCH, axes.LENGTH, axes.HEADS, None), q.shape)
      # A kernel's mesh does not divide the one token of `init`.
      backend = "xla" if self.is_initializing() else config.attention
      mix = functools.partial(attend, backend=backend, partition=parts)
    else:
      mix = lambda q, k, v, window: attend_cached(q, k, v, positions, *cache, window=window)
    # Kernels want to know their window, the layers are one program: both, of which one runs.
    if config.full_attention_layers:
      mixed = jax.lax.cond(
        windowed,
        functools.partial(mix, window=config.sliding_window),
        functools.partial(mix, window=None),
        q,
        k,
        v,
      )
    else:
      mixed = mix(q, k, v, window=config.sliding_window)
    mixed = mixed.reshape(batch, length, config.num_heads * config.head_dim)
    # Only what is new leaves the loop over layers: the cache is read there and written once, after
    # it.
    new = (jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)) if return_kv else None
    return _linear(config, self.lora, "o", width, (axes.HEADS, axes.WIDTH))(
      mixed, deterministic
    ), new


class Mlp(nn.Module):
  """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) · up(x)). x: [B, T, D]."""

  config: ModelConfig
  lora: LoraConfig | None

  @nn.compact
  def __call__(self, x, deterministic):
    config = self.config

    def project(name, features):
      return _linear(config, self.lora, name, features, (axes.WIDTH, axes.MLP))(x, deterministic)

    if config.fused_projections:
      gate, up = jnp.split(project("gate_up", 2 * config.mlp_dim), 2, axis=-1)
    else:
      gate, up = project("gate", config.mlp_dim), project("up", config.mlp_dim)
    hidden = constrain(nn.silu(gate) * up, (axes.BATCH, axes.LENGTH, axes.MLP))
    return _linear(config, self.lora, "down", x.shape[-1], (axes.MLP, axes.WIDTH))(
      hidden, deterministic
    )


class Layer(nn.Module):
  """One pre-norm transformer layer, in the form `nn.scan` wants: (carry, what is its own) ->
  (carry, its keys and values)."""

  config: ModelConfig
  lora: LoraConfig | None
  deterministic: bool
  return_kv: bool

  @nn.compact
  def __call__(self, x, own, cos, sin, positions, cached_positions):
    cached, windowed = own
    config = self.config
    cache = None if cached is None else (*cached, cached_positions)

    def norm(name):
      return RMSNorm(config.norm_eps, jnp.dtype(config.param_dtype), name=name)

    mixed, new = Attention(config, self.lora, name="attention")(
      norm("attention_norm")(x),
      cos,
      sin,
      positions,
      cache,
      self.deterministic,
      self.return_kv,
      windowed,
    )
    x = x + mixed
    x = x + Mlp(config, self.lora, name="mlp")(norm("mlp_norm")(x), self.deterministic)
    return constrain(x, (axes.BATCH, axes.LENGTH, axes.WIDTH)), new


class Decoder(nn.Module):
  """The base model, with or without LoRA.

  Attributes:
    config: shapes and types.
    vocab_size: V, special tokens included.
    lora: shape of the adapters; None for the plain base.
  """

  config: ModelConfig
  vocab_size: int
  lora: LoraConfig | None = None

  def setup(self):
    config = self.config
    dtype = jnp.dtype(config.param_dtype)
    init = nn.initializers.normal(config.initializer_range)
    rows = config.table_size(self.vocab_size)
    self.embedding = self.param(
      "embedding",
      nn.with_logical_partitioning(init, (axes.VOCAB, axes.WIDTH)),
      (rows, config.width),
      dtype,
    )
    if not config.tie_embeddings:
      self.head = self.param(
        "head",
        nn.with_logical_partitioning(init, (axes.WIDTH, axes.VOCAB)),
        (config.width, rows),
        dtype,
      )
    self.final_norm = RMSNorm(config.norm_eps, dtype)

  def embed(self, tokens: jax.Array) -> jax.Array:
    """tokens: [...] int -> [..., D] in the compute type."""
    return self.embedding[tokens].astype(self.config.dtype)

  def output_matrix(self) -> jax.Array:
    """[D, V] in the compute type, gathered along D once, so that no logits or their gradients are
    gathered instead."""
    head = self.embedding.T if self.config.tie_embeddings else self.head
    return constrain(head.astype(self.config.dtype), (axes.WIDTH, axes.VOCAB))

  def logits(self, hidden: jax.Array, output_matrix: jax.Array | None = None) -> jax.Array:
    """hidden: [..., D], after the final norm -> [..., V] float32. Padding vocabulary entries
    (`vocab_multiple`) get a logit that no softmax sees. `output_matrix` may be given where many
    calls share it."""
    matrix = self.output_matrix() if output_matrix is None else output_matrix
    logits = jnp.matmul(hidden, matrix, preferred_element_type=jnp.float32)
    logits = constrain(logits, (axes.BATCH, *[None] * (logits.ndim - 2), axes.VOCAB))
    words = logits.shape[-1]
    return (
      logits
      if words == self.vocab_size
      else jnp.where(jnp.arange(words) < self.vocab_size, logits, -1e30)
    )

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    positions: jax.Array | None = None,
    cache: KeyValues | None = None,
    deterministic: bool = True,
    return_kv: bool = False,
  ) -> tuple[jax.Array, KeyValues | None]:
    """Token embeddings to last hidden states.

    Args:
      x: [B, T, D] embeddings.
      positions: [B, T] int32, consecutive; None for 0 … T-1, as without a cache they must be.
      cache: the tokens before x; None to attend within x.
      deterministic: False turns LoRA dropout on (needs the rng 'dropout').
      return_kv: whether the keys and values of x are returned; with a cache they always are.

    Returns:
      ([B, T, D] hidden states after the final norm, keys and values of x or None; `extend` puts
      them into a cache).
    """
    config = self.config
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    cos, sin = rotary_angles(positions, config.rotary_dim, config.rope_theta, config.rope_scaling)
    layer = Layer
    if config.remat != "none":
      layer = nn.remat(Layer, policy=REMAT_POLICIES[config.remat], prevent_cse=False)
    layers = nn.scan(
      layer,
      variable_axes={"params": 0, "lora": 0, "queries": 0},
      split_rngs={"params": True, "dropout": True},
      in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
      out_axes=0,
      length=config.num_layers,
      unroll=config.scan_unroll,
      metadata_params={nn.PARTITION_NAME: axes.LAYERS},
    )(config, self.lora, deterministic, return_kv or cache is not None, name="layers")
    x = constrain(x.astype(config.dtype), (axes.BATCH, axes.LENGTH, axes.WIDTH))
    cached, cached_positions = (None, None) if cache is None else (cache[:2], cache.positions)
    windowed = jnp.isin(
      jnp.arange(config.num_layers), jnp.array(config.full_attention_layers, jnp.int32), invert=True
    )
    x, new = layers(x, (cached, windowed), cos, sin, positions, cached_positions)
    return self.final_norm(x), None if new is None else KeyValues(*new, positions)


def extend(cache: KeyValues, new: KeyValues, slot: jax.Array | int) -> KeyValues:
  """Writes T tokens into slots slot … slot + T - 1, the same of every row; `new` with one row is
  written to all."""

  def write(slots, values, axis):
    values = jnp.broadcast_to(
      values, (*slots.shape[:axis], values.shape[axis], *slots.shape[axis + 1 :])
    ).astype(slots.dtype)
    return jax.lax.dynamic_update_slice_in_dim(slots, values, slot, axis)

  return KeyValues(*(write(a, b, axis) for a, b, axis in zip(cache, new, (3, 3, 1), strict=True)))


def first_slots(cache: KeyValues, count: int) -> KeyValues:
  """The first `count` slots of a cache."""
  return KeyValues(
    cache.keys[..., :count, :], cache.values[..., :count, :], cache.positions[:, :count]
  )
