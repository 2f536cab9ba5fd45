"""The mesh, and which logical axis lies on which mesh axis.

One device is the smallest mesh; nothing else in the project knows how many there are. Parameters and activations carry the logical
names of `axes.py`; `RULES` sends them to mesh axes. Linen's own look-up is silent on an unknown name and on a mesh axis used twice,
so `spec` checks both and names the parameter.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from clara_jax import axes
from clara_jax.config import ConfigError

MESH_AXES = ("data", "fsdp", "tensor")

RULES: dict[str, tuple[str, ...] | str | None] = {
    axes.BATCH: ("data", "fsdp"),
    axes.LENGTH: None,
    axes.WIDTH: "fsdp",
    axes.MLP: "tensor",
    axes.HEADS: "tensor",
    axes.KV_HEADS: "tensor",
    axes.VOCAB: "tensor",
    axes.RANK: None,
    axes.LAYERS: None,
    axes.MEMORY: None,
}

# Activations are divided by batch; their width stays whole, or each layer would gather it twice.
ACTIVATION_RULES = {**RULES, axes.WIDTH: None}


def make_mesh(shape: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh with the axes data, fsdp and tensor.

  Args:
    shape: sizes by axis name; missing ones are 1, and 'data' takes what is left when it is not named.
    devices: by default all of them.

  Raises:
    ConfigError: an unknown axis, or sizes that do not multiply to the number of devices.
  """
  devices = list(devices if devices is not None else jax.devices())
  shape = dict(shape or {})
  if unknown := set(shape) - set(MESH_AXES):
    raise ConfigError(f"mesh: unknown axes {sorted(unknown)}; known: {list(MESH_AXES)}")
  sizes = {axis: int(shape.get(axis, 1)) for axis in MESH_AXES}
  if "data" not in shape:
    sizes["data"] = max(1, len(devices) // math.prod(sizes.values()))
  if math.prod(sizes.values()) != len(devices):
    raise ConfigError(f"mesh: {sizes} has {math.prod(sizes.values())} places for {len(devices)} devices")
  return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def spec(names: Sequence[str | None], where: str, rules: Mapping[str, Any] = RULES) -> PartitionSpec:
  """The partition of an array whose axes have these logical names.

  Raises:
    ConfigError: an unknown name, or two axes on one mesh axis; `where` names the array.
  """
  used: dict[str, str] = {}
  parts = []
  for name in names:
    if name is not None and name not in rules:
      raise ConfigError(f"{where}: unknown logical axis {name!r}; known: {sorted(rules)}")
    target = rules[name] if name is not None else None
    for mesh_axis in (target,) if isinstance(target, str) else target or ():
      if mesh_axis in used:
        raise ConfigError(f"{where}: axes {used[mesh_axis]!r} and {name!r} are both on mesh axis {mesh_axis!r}")
      used[mesh_axis] = name
    parts.append(target)
  return PartitionSpec(*parts)


def tree_shardings(boxed: Any, mesh: Mesh) -> Any:
  """Shardings of a tree whose leaves carry logical names (`Clara.init_boxed` under `jax.eval_shape`); others are replicated."""
  def leaf(path, value):
    where = jax.tree_util.keystr(path)
    if isinstance(value, nn.LogicallyPartitioned):
      return NamedSharding(mesh, spec(value.names, where))
    return NamedSharding(mesh, PartitionSpec())
  return jax.tree_util.tree_map_with_path(leaf, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def place(leaf: Any, sharding: jax.sharding.Sharding, dtype: Any = None) -> jax.Array:
  """An array on devices. What is not a `jax.Array` is read by the index of each shard (numpy, or a leaf of `interop/lazy.py`), so
  that no host reads what none of its devices holds."""
  if isinstance(leaf, jax.Array):
    return jax.device_put(jnp.array(leaf, dtype, copy=True), sharding)  # a copy: the caller may donate it
  # Shard by shard, so that the host holds one at a time beside what is on the devices; copies of a shard are read once.
  devices: dict[str, list[jax.Device]] = {}
  indices: dict[str, Any] = {}
  for device, index in sharding.addressable_devices_indices_map(tuple(leaf.shape)).items():
    devices.setdefault(str(index), []).append(device)
    indices[str(index)] = index
  shards = []
  for key, index in indices.items():
    value = np.ascontiguousarray(leaf[index]).astype(dtype or leaf.dtype, copy=False)
    shards += [jax.block_until_ready(jax.device_put(value, device)) for device in devices[key]]
  return jax.make_array_from_single_device_arrays(tuple(leaf.shape), sharding, shards)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Batches are divided along their first axis."""
  return NamedSharding(mesh, PartitionSpec(RULES[axes.BATCH]))


def activation_rules() -> Any:
  """Context in which activations' logical names mean mesh axes; wrap traced calls in it."""
  return nn.logical_axis_rules(tuple(ACTIVATION_RULES.items()))
