"""A whole store on the devices, for joint training that retrieves from it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clara_jax.batch import Corpus
from clara_jax.config import ClaraConfig, ConfigError, DataConfig
from clara_jax.memory.store import MemoryStore
from clara_jax.ops.nearest import slots_needed


def check_store(config: ClaraConfig, store: MemoryStore) -> None:
  """Refuses a store that a run cannot take candidates from.

  Raises:
    ConfigError: the store has another M or D.
  """
  manifest = store.manifest
  if (manifest.num_memory_tokens, manifest.width) != (config.num_memory_tokens, config.model.width):
    raise ConfigError(
      f"data.store={store.location!r}: {manifest.num_memory_tokens} memory tokens of width "
      f"{manifest.width}, expected "
      f"{config.num_memory_tokens} of {config.model.width}"
    )


def shapes(config: ClaraConfig, data: DataConfig, mesh: Mesh, store: MemoryStore) -> Corpus:
  """The corpus's shapes, with their shardings.

  Raises:
    ConfigError: the store has another M or D, or fewer documents than candidates.
  """
  check_store(config, store)
  if len(store) < data.candidates:
    raise ConfigError(
      f"data.store={store.location!r}: {len(store)} documents, but "
      f"data.candidates={data.candidates}"
    )
  if config.center_scores:
    raise ConfigError(
      "clara.center_scores: the mean over candidates is not known before they are retrieved; "
      "data.retrieve='store' goes "
      "without it"
    )
  slots = slots_needed(len(store), mesh.size)
  by_slot = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  return Corpus(
    jax.ShapeDtypeStruct(
      (slots, config.num_memory_tokens, config.model.width),
      jnp.dtype(config.model.dtype),
      sharding=by_slot,
    ),
    {
      m: jax.ShapeDtypeStruct((slots,), np.float32, sharding=by_slot)
      for m in config.nested_memory or (config.num_memory_tokens,)
    },
    data.candidates,
  )


def place(expected: Corpus, store: MemoryStore) -> Corpus:
  """The corpus as `shapes` has it: each process reads only the documents of its own devices, shard
  by shard."""

  def memories_of(index):
    first, last, _ = index[0].indices(expected.memories.shape[0])
    out = np.zeros((last - first, *expected.memories.shape[1:]), expected.memories.dtype)
    rows = store.rows[first:last]
    for start in range(0, len(rows), 4096):
      part = rows[start : start + 4096]
      out[start : start + len(part)] = store.memories(part)
    return out

  memories = jax.make_array_from_callback(
    expected.memories.shape, expected.memories.sharding, memories_of
  )

  @functools.partial(jax.jit, static_argnums=1)
  def inverse_norm(x, m):
    norm = jnp.linalg.norm(x[:, :m].astype(jnp.float32).reshape(x.shape[0], -1), axis=-1)
    return jnp.where(norm > 0, 1 / jnp.maximum(norm, 1e-12), 0)

  return expected.replace(
    memories=memories, scales={m: inverse_norm(memories, m) for m in expected.scales}
  )
