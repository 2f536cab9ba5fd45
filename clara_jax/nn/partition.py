"""Where activations lie: their logical names, as the rules of the context send them to the mesh.

Outside of a mesh nothing here does anything. An axis that its mesh axes do not divide (a batch of
one question on eight devices, say) is left whole.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec


def partition(names: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec | None:
  """The partition of an activation with these axes; None outside of a mesh or of rules."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or not nn.get_logical_axis_rules():
    return None
  parts = []
  for part, size in zip(nn.logical_to_mesh_axes(names), shape, strict=True):
    mesh_axes = (part,) if isinstance(part, str) else part or ()
    divides = size % math.prod(mesh.shape[axis] for axis in mesh_axes) == 0
    parts.append(part if divides else None)
  return PartitionSpec(*parts)


def constrain(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
  """x, divided by the logical names of its axes."""
  parts = partition(names, x.shape)
  return x if parts is None else jax.lax.with_sharding_constraint(x, parts)
