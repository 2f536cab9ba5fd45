"""The only LoRA of the project (arXiv 2106.09685, Eq. 3).

    y = x W + (alpha / rank) · dropout(x) A B        W [in, out],  A [in, R],  B [R, out]

`W` lives in the collection 'params' and `A`, `B` in the collection 'lora', so that a role is data:
the same module applied to `{'params': base, 'lora': adapters[role]}`. No adapter is ever switched
on. A is drawn as by PEFT (Kaiming uniform with a = sqrt(5), that is U(±1/sqrt(in))) and B is zero,
so that a fresh adapter leaves the base as it is. Merging is W + scale · A B.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from clara_jax import axes
from clara_jax.config import LoraConfig
from clara_jax.errors import InputError


class MissingAdapterError(InputError):
  """A module with LoRA was applied without its weights."""


def _lora_a_init(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
  bound = shape[0] ** -0.5
  return jax.random.uniform(key, shape, dtype, -bound, bound)


def merge(base: Any, lora: Any, scale: float) -> Any:
  """Parameters of a plain decoder that computes what a role does: W + scale · A B, made in float32,
  in W's type.

  Args:
    base: the decoder's parameters.
    lora: a role's, {…: {'a': [Y, in, R], 'b': [Y, R, out]}} at the places of the kernels.
    scale: alpha / rank.
  """
  if "a" in lora:
    kernel = base["kernel"]
    return {
      **base,
      "kernel": (kernel.astype(jnp.float32) + scale * (lora["a"] @ lora["b"])).astype(kernel.dtype),
    }
  return {
    name: merge(value, lora[name], scale) if name in lora else value for name, value in base.items()
  }


class Linear(nn.Module):
  """x: [..., in] -> [..., features], with LoRA where `lora` is given.

  Attributes:
    features: width of the output.
    kernel_axes: logical names of the kernel's two axes (`axes.py`).
    lora: adapter shape, or None for the plain layer.
    dtype: compute dtype.
    param_dtype: type of the base kernel; adapters are float32.
    use_bias: whether the base adds a bias [features].
    quantized: the base kernel is int8 with a float32 scale [features] (made in
      `training/program.py`).
    initializer_range: standard deviation of a fresh kernel.

  Raises:
    MissingAdapterError: applied with `lora` but without the collection 'lora'; the message has the
      module's path.
  """

  features: int
  kernel_axes: tuple[str, str]
  lora: LoraConfig | None = None
  dtype: jnp.dtype = jnp.bfloat16
  param_dtype: jnp.dtype = jnp.bfloat16
  initializer_range: float = 0.02
  use_bias: bool = False
  quantized: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
    width = x.shape[-1]
    init, dtype = nn.initializers.normal(self.initializer_range), self.param_dtype
    if self.quantized:
      init, dtype = nn.initializers.zeros, jnp.int8
    kernel = self.param(
      "kernel", nn.with_logical_partitioning(init, self.kernel_axes), (width, self.features), dtype
    )
    y = x @ kernel.astype(self.dtype)
    if self.quantized:
      scale = self.param(
        "scale",
        nn.with_logical_partitioning(nn.initializers.ones, self.kernel_axes[1:]),
        (self.features,),
        jnp.float32,
      )
      y = y * scale.astype(self.dtype)
    if self.use_bias:
      bias = self.param(
        "bias",
        nn.with_logical_partitioning(nn.initializers.zeros, self.kernel_axes[1:]),
        (self.features,),
        self.param_dtype,
      )
      y = y + bias.astype(self.dtype)
    if self.lora is None:
      return y
    if not self.is_initializing() and not self.has_variable("lora", "a"):
      raise MissingAdapterError(
        f"{'/'.join(self.path)}: no LoRA weights; pass {{'params': base, 'lora': adapters[role]}}"
      )
    a = self._adapter("a", _lora_a_init, (width, self.lora.rank), (axes.LORA, axes.RANK))
    b = self._adapter(
      "b", nn.initializers.zeros, (self.lora.rank, self.features), (axes.RANK, axes.LORA)
    )
    # Rows of one matrix: with two axes of rows XLA copies y's cotangent, transposed, for the
    # gradient of B. Scaled where it is narrow.
    rows = nn.Dropout(self.lora.dropout, deterministic=deterministic)(x).reshape(-1, width)
    narrow = rows @ a.astype(self.dtype) * jnp.asarray(self.lora.scale, self.dtype)
    return y + (narrow @ b.astype(self.dtype)).reshape(y.shape)

  def _adapter(
    self,
    name: str,
    init: nn.initializers.Initializer,
    shape: tuple[int, int],
    names: tuple[str, str],
  ) -> jax.Array:
    """A LoRA matrix, float32."""

    def fresh():
      return nn.with_logical_partitioning(init, names)(self.make_rng("params"), shape, jnp.float32)

    return self.variable("lora", name, fresh).value
