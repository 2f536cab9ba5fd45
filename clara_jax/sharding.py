"""The mesh, and which logical axis lies on which mesh axis.

One device is the smallest mesh; nothing else in the project knows how many there are. Parameters
and activations carry the logical names of `axes.py`; `RULES` sends them to mesh axes. Linen's own
look-up is silent on an unknown name and on a mesh axis used twice, so `spec` checks both and names
the parameter.
"""

import contextlib
import fractions
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from clara_jax import axes
from clara_jax.config import ConfigError, MeshConfig, ModelConfig

MESH_AXES = ("slice", "data", "fsdp", "tensor")

RULES: dict[str, tuple[str, ...] | str | None] = {
  axes.BATCH: ("slice", "data", "fsdp"),
  axes.LENGTH: None,
  axes.WIDTH: "fsdp",
  axes.MLP: "tensor",
  axes.HEADS: "tensor",
  axes.KV_HEADS: "tensor",
  axes.VOCAB: "tensor",
  axes.RANK: None,
  # Adapters and their optimizer slots have one long axis: all of it is divided. In the other order
  # XLA's partitioner (Shardy, JAX 0.10.2) makes wrong products of some batches on meshes with
  # data, fsdp and tensor (tests/test_inference_mesh.py).
  axes.LORA: ("fsdp", "tensor"),
  axes.LAYERS: None,
  axes.MEMORY: None,
}

# Activations are divided by batch; their width stays whole, or each layer would gather it twice.
ACTIVATION_RULES = {**RULES, axes.WIDTH: None}

# Sizes by preset; -1 takes what the others leave. Weights are copied along slice and data: beyond
# 32 chips a finer division saves less than a gigabyte of a 7 B base, and data parallelism between
# slices is all that their slow network can carry.
PRESETS = {
  None: {"data": -1},
  "chip": {},
  "host": {"fsdp": -1},
  "pod": {"data": -1, "fsdp": 32},
  "slices": {"slice": -1, "fsdp": -1},
}


def mesh_sizes(config: MeshConfig, devices: int, slices: int = 1) -> dict[str, int]:
  """Sizes by axis name.

  Args:
    config: a preset and what overrides it.
    devices: how many there are.
    slices: among how many slices they are.

  Raises:
    ConfigError: sizes that do not multiply to the number of devices.
  """
  sizes = {axis: 1 for axis in MESH_AXES} | PRESETS[config.preset]
  sizes |= {axis: size for axis in MESH_AXES if (size := getattr(config, axis)) is not None}
  if sizes["slice"] == -1:
    sizes["slice"] = slices
  if any(size < 1 and size != -1 for size in sizes.values()):
    raise ConfigError(f"mesh: {sizes}: sizes are 1 or more, or -1 for what the others leave")
  known = math.prod(size for size in sizes.values() if size != -1)
  open_axes = [axis for axis, size in sizes.items() if size == -1]
  if len(open_axes) > 1:
    raise ConfigError(f"mesh: {' and '.join(open_axes)} are both -1; name one of them")
  if open_axes and devices % known == 0:
    sizes[open_axes[0]] = devices // known
  if min(sizes.values()) < 1 or math.prod(sizes.values()) != devices:
    shown = {axis: "the rest" if size == -1 else size for axis, size in sizes.items()}
    raise ConfigError(
      f"mesh: {shown} does not fit {devices} devices; choose slice, data, fsdp and tensor so that "
      f"their product is {devices}"
    )
  return sizes


def make_mesh(
  config: MeshConfig | None = None, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """A mesh with the axes slice, data, fsdp and tensor. Neighbors along tensor and fsdp are
  neighbors in the network; only `slice` crosses between slices.

  Args:
    config: by default data parallel over all devices.
    devices: by default all of them; the preset 'chip' takes the first.

  Raises:
    ConfigError: sizes that do not multiply to the number of devices.
  """
  config = config or MeshConfig()
  devices = list(devices if devices is not None else jax.devices())
  if config.preset == "chip":
    devices = devices[:1]
  slices = len({getattr(d, "slice_index", 0) for d in devices})
  sizes = mesh_sizes(config, len(devices), slices)
  types = (AxisType.Auto,) * len(MESH_AXES)
  if slices > 1 and sizes["slice"] == slices:
    within = [1, *list(sizes.values())[1:]]
    return Mesh(
      mesh_utils.create_hybrid_device_mesh(within, [slices, 1, 1, 1], devices),
      MESH_AXES,
      axis_types=types,
    )
  return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=types, devices=devices)


def num_batch_shards(mesh: Mesh) -> int:
  """Into how many parts a batch is divided."""
  return math.prod(mesh.shape[axis] for axis in RULES[axes.BATCH])


def spec(
  names: Sequence[str | None], where: str, rules: Mapping[str, Any] = RULES
) -> PartitionSpec:
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
        raise ConfigError(
          f"{where}: axes {used[mesh_axis]!r} and {name!r} are both on mesh axis {mesh_axis!r}"
        )
      used[mesh_axis] = name
    parts.append(target)
  return PartitionSpec(*parts)


def tree_shardings(boxed: Any, mesh: Mesh) -> Any:
  """Shardings of a tree whose leaves carry logical names (`Clara.init_boxed` under
  `jax.eval_shape`); others are replicated.

  Raises:
    ConfigError: an axis that does not divide over its mesh axes, by the parameter's name.
  """

  def leaf(path, value):
    where = jax.tree_util.keystr(path)
    if not isinstance(value, nn.LogicallyPartitioned):
      return NamedSharding(mesh, PartitionSpec())
    parts = spec(value.names, where)
    for name, size, part in zip(value.names, value.value.shape, parts, strict=True):
      ways = math.prod(
        mesh.shape[axis] for axis in ((part,) if isinstance(part, str) else part or ())
      )
      if size % ways:
        hint = "; set clara.model.vocab_multiple to a multiple of it" if name == axes.VOCAB else ""
        raise ConfigError(
          f"{where}: its axis {name!r} of size {size} does not divide over the {ways} devices of "
          f"mesh axis {part}{hint}"
        )
    return NamedSharding(mesh, parts)

  return jax.tree_util.tree_map_with_path(
    leaf, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
  )


def check_heads(config: ModelConfig, mesh: Mesh) -> None:
  """Refuses a mesh whose `tensor` would cut through heads.

  Raises:
    ConfigError: naming the field.
  """
  for field in ("num_heads", "num_kv_heads"):
    if getattr(config, field) % mesh.shape["tensor"]:
      raise ConfigError(
        f"mesh.tensor={mesh.shape['tensor']}: clara.model.{field}={getattr(config, field)} does "
        f"not divide over it"
      )


def place(leaf: Any, sharding: jax.sharding.Sharding, like: Any = None) -> jax.Array:
  """An array on devices, in the shape and type of `like` (by default its own); where the leaf is
  smaller it is filled up with zeros.

  What is not a `jax.Array` is read by the index of each shard (numpy, or a leaf of
  `checkpoints/lazy.py`), so that no host reads what none of its devices holds.
  """
  like = leaf if like is None else like
  if isinstance(leaf, jax.Array):
    filled = jnp.pad(
      leaf, [(0, want - have) for have, want in zip(leaf.shape, like.shape, strict=True)]
    )
    # A copy: the caller may donate it.
    return jax.device_put(jnp.array(filled, like.dtype, copy=True), sharding)
  # Shard by shard, so that the host holds one at a time beside what is on the devices; copies of a
  # shard are read once.
  devices: dict[str, list[jax.Device]] = {}
  indices: dict[str, Any] = {}
  for device, index in sharding.addressable_devices_indices_map(tuple(like.shape)).items():
    devices.setdefault(str(index), []).append(device)
    indices[str(index)] = index
  shards = []
  for key, index in indices.items():
    bounds = [i.indices(size)[:2] for i, size in zip(index, like.shape, strict=True)]
    inside = tuple(
      slice(min(a, have), min(b, have)) for (a, b), have in zip(bounds, leaf.shape, strict=True)
    )
    value = np.ascontiguousarray(leaf[inside]).astype(like.dtype, copy=False)
    missing = [(0, b - a - (i.stop - i.start)) for (a, b), i in zip(bounds, inside, strict=True)]
    if any(more for _, more in missing):
      value = np.pad(value, missing)
    shards += [jax.block_until_ready(jax.device_put(value, device)) for device in devices[key]]
  return jax.make_array_from_single_device_arrays(tuple(like.shape), sharding, shards)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Batches are divided along their first axis."""
  return NamedSharding(mesh, PartitionSpec(RULES[axes.BATCH]))


def rows_needed(sharding: NamedSharding, rows: int) -> np.ndarray:
  """The rows of a batch that this process's devices hold, in order."""
  indices = sharding.addressable_devices_indices_map((rows,)).values()
  return np.unique(np.concatenate([np.arange(rows)[index] for index in indices]))


def put_batch(batch: Any, sharding: NamedSharding, rows: int, positions: np.ndarray) -> Any:
  """A batch on the devices of all processes, each giving its part.

  Args:
    batch: arrays whose first axis is this process's rows, or p/q times as many documents that these
      share.
    sharding: of the whole batch.
    rows: B.
    positions: which rows of the whole batch these are.
  """
  if jax.process_count() == 1:
    return jax.device_put(batch, sharding)

  def leaf(value):
    here = positions_of(len(value), positions)
    place_of = np.full(rows * len(value) // len(positions), -1)
    place_of[here] = np.arange(len(here))

    def part(index):
      return value[(place_of[index[0]], *index[1:])]

    return jax.make_array_from_callback((len(place_of), *value.shape[1:]), sharding, part)

  return jax.tree.map(leaf, batch)


def positions_of(count: int, positions: np.ndarray) -> np.ndarray:
  """Places in the whole batch of what belongs to some of its rows: the rows themselves, or p/q
  times as many documents that they share, p of them for each block of q rows.

  Args:
    count: how many things there are.
    positions: [n], of the rows; whole blocks, ascending.

  Returns:
    [count].
  """
  share = fractions.Fraction(count, len(positions))
  p, q = share.numerator, share.denominator
  return (positions[::q, None] // q * p + np.arange(p)).reshape(-1)


def jit(function: Any, mesh: Mesh | None, *, gather: bool = True, **options: Any) -> Any:
  """`jax.jit` for a computation on weights that lie on a mesh; None: on one device.

  Args:
    function: of weights and of what every process has.
    mesh: where the weights lie.
    gather: several processes: whether results are whole on each of them.
    options: of `jax.jit`.
  """
  if mesh is None:
    return jax.jit(function, **options)
  if gather and mesh.is_multi_process:
    options["out_shardings"] = NamedSharding(mesh, PartitionSpec())
  compiled = jax.jit(function, **options)

  def on_mesh(*arguments):
    with context(mesh):
      return compiled(*arguments)

  return on_mesh


@contextlib.contextmanager
def context(mesh: Mesh | None) -> Iterator[None]:
  """Where traced calls know the mesh and the logical names; None: nothing."""
  if mesh is None:
    yield
    return
  with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(ACTIVATION_RULES.items())):
    yield
