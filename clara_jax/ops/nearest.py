"""Exact nearest neighbors by inner product, over vectors that are divided along a mesh.

Each device finds the k best of its own vectors, block by block, and only those travel: k numbers
and k places a device and query, never a row of scores over the corpus. Ties go to the lower slot,
on any number of devices.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int, Shaped

from clara_jax.axes import Array

BLOCK = 16_384  # vectors scored at once: bounds the scores that exist, [Q, BLOCK]


def slots_needed(count: int, ways: int) -> int:
  """The smallest number of slots >= count that divides over `ways` devices and into blocks."""
  each = -(-max(count, 1) // ways)
  return ways * (each if each <= BLOCK else -(-each // BLOCK) * BLOCK)


def nearest(
  vectors: Shaped[Array, "S d"],
  scale: Float[Array, " S"],
  queries: Float[Array, "Q d"],
  k: int,
  recall_target: float = 1.0,
) -> tuple[Int[Array, "Q k"], Float[Array, "Q k"]]:
  """The k vectors with the largest scale · ⟨query, vector⟩.

  Call it under `jax.set_mesh`; vectors and scale are divided over all axes of the mesh
  (`slots_needed`), queries are on every device.

  Args:
    vectors: [S, d]; those in bfloat16 or int8 are multiplied in bfloat16 and summed in float32.
    scale: [S] float32, 1/norm for cosines (for int8 also what one step of it is worth); 0 or less
      where a slot is empty.
    queries: [Q, d].
    k: how many, at most S.
    recall_target: below 1, `lax.approx_max_k` of each block (arXiv 2206.14286), which is faster on
      TPU; elsewhere it is exact.

  Returns:
    (slots [Q, k] int32, scores [Q, k] float32), best first; an empty slot has the score -inf.
  """
  local = functools.partial(_nearest_here, k=k, recall_target=recall_target)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return local(vectors, scale, queries)
  axes = mesh.axis_names

  def merge(vectors, scale, queries):
    slots, scores = local(vectors, scale, queries)
    slots += jax.lax.axis_index(axes) * vectors.shape[0]
    slots, scores = (jax.lax.all_gather(x, axes, axis=1, tiled=True) for x in (slots, scores))
    scores, places = jax.lax.top_k(scores, k)
    return jnp.take_along_axis(slots, places, axis=1), scores

  rows = PartitionSpec(axes)
  return jax.shard_map(
    merge, in_specs=(rows, rows, PartitionSpec()), out_specs=PartitionSpec(), check_vma=False
  )(vectors, scale, queries)


def take(vectors: Shaped[Array, "S d"], slots: Int[Array, "*B"]) -> Shaped[Array, "*B d"]:
  """Vectors [..., d] of slots [...], on every device; only these travel. See `nearest` for where
  vectors [S, d] lie."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return vectors[slots]
  axes = mesh.axis_names

  def here(vectors, slots):
    local = slots - jax.lax.axis_index(axes) * vectors.shape[0]
    mine = (local >= 0) & (local < vectors.shape[0])
    rows = vectors[jnp.where(mine, local, 0)]
    return jax.lax.psum(jnp.where(mine[..., None], rows, 0), axes)

  return jax.shard_map(
    here,
    in_specs=(PartitionSpec(axes), PartitionSpec()),
    out_specs=PartitionSpec(),
    check_vma=False,
  )(vectors, slots)


def _nearest_here(vectors, scale, queries, k, recall_target):
  """Within one device's vectors; fewer than k are filled up with slot 0 and -inf."""
  size = min(BLOCK, vectors.shape[0])
  blocks = vectors.shape[0] // size
  count = min(k, size)

  def best(block):
    number, vectors, scale = block
    dtype = jnp.float32 if vectors.dtype == jnp.float32 else jnp.bfloat16
    scores = jnp.einsum(
      "qd,nd->qn",
      queries.astype(dtype),
      vectors.astype(dtype),
      preferred_element_type=jnp.float32,
    )
    scores = jnp.where(scale > 0, scores * scale, -jnp.inf)
    if recall_target < 1:
      scores, places = jax.lax.approx_max_k(scores, count, recall_target=recall_target)
    else:
      scores, places = jax.lax.top_k(scores, count)
    return places + number * size, scores

  slots, scores = jax.lax.map(
    best, (jnp.arange(blocks), vectors.reshape(blocks, size, -1), scale.reshape(blocks, size))
  )
  slots, scores = (jnp.moveaxis(x, 0, 1).reshape(len(queries), -1) for x in (slots, scores))
  scores, places = jax.lax.top_k(scores, min(k, scores.shape[1]))
  slots = jnp.take_along_axis(slots, places, axis=1)
  missing = ((0, 0), (0, k - scores.shape[1]))
  return jnp.pad(slots, missing), jnp.pad(scores, missing, constant_values=-jnp.inf)
