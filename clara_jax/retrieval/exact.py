"""Exact search in JAX: all cosines, block by block, over vectors that are divided along the devices
(`ops/nearest.py`)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from clara_jax.ops.nearest import nearest, slots_needed
from clara_jax.sharding import make_mesh

GROWTH = 1.3


class ExactIndex:
  """All vectors on the devices of all processes, [S, d], divided evenly; each process reads its
  part. Slots beyond the documents are free.

  Args:
    dimension: d.
    capacity: slots to begin with.
    mesh: by default all devices.
    recall_target: see `nearest`.
    dtype: of the vectors: 'float32', 'bfloat16', or 'int8' with a step for each vector.
  """

  def __init__(
    self,
    dimension: int,
    capacity: int = 0,
    mesh: jax.sharding.Mesh | None = None,
    recall_target: float = 1.0,
    dtype: str = "float32",
  ):
    self._dtype = jnp.dtype(dtype)
    self._mesh = mesh or make_mesh()
    self._by_row = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
    self._recall_target = recall_target
    self._vectors: jax.Array | None = None
    self._row_of_slot = np.full(slots_needed(capacity, self._mesh.size), -1, np.int64)
    self._step_of_slot: np.ndarray | None = None  # int8: what one step is worth
    if self._dtype == jnp.int8:
      self._step_of_slot = np.zeros(len(self._row_of_slot), np.float32)
    self._dimension = dimension

  @property
  def rows(self) -> np.ndarray:
    """See `base.Retriever`."""
    return np.sort(self._row_of_slot[self._row_of_slot >= 0])

  def __len__(self) -> int:
    return int((self._row_of_slot >= 0).sum())

  def fill(self, rows: np.ndarray, vectors_of: Callable[[np.ndarray], np.ndarray]) -> None:
    """Puts the vectors of rows into an empty index, read shard by shard: no host holds more than
    one."""
    self._row_of_slot = np.full(slots_needed(len(rows), self._mesh.size), -1, np.int64)
    self._row_of_slot[: len(rows)] = rows

    if self._step_of_slot is not None:
      self._step_of_slot = np.zeros(len(self._row_of_slot), np.float32)

    def shard(index):
      here = self._row_of_slot[index[0]]
      values = np.zeros((len(here), self._dimension), self._dtype)
      taken = here[here >= 0]
      first = index[0].start or 0
      for start in range(0, len(taken), 4096):
        rows = taken[start : start + 4096]
        values[start : start + len(rows)] = self._stored(
          np.arange(first + start, first + start + len(rows)), vectors_of(rows)
        )
      return values

    shape = (len(self._row_of_slot), self._dimension)
    self._vectors = jax.make_array_from_callback(shape, self._by_row, shard)
    if self._step_of_slot is not None and self._mesh.is_multi_process:
      # Each process knows those of its own slots.
      self._step_of_slot = np.asarray(multihost_utils.process_allgather(self._step_of_slot)).max(0)

  def _stored(self, slots: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Vectors as the devices hold them in these slots."""
    vectors = np.asarray(vectors, np.float32)
    if self._step_of_slot is None:
      return vectors.astype(self._dtype)
    steps = np.maximum(np.abs(vectors).max(axis=1), 1e-30) / 127
    self._step_of_slot[slots] = steps
    return np.rint(vectors / steps[:, None]).astype(np.int8)

  def add(self, rows: np.ndarray, vectors: np.ndarray) -> None:
    """See `base.Retriever`."""
    free = np.flatnonzero(self._row_of_slot < 0)
    if self._vectors is None or len(free) < len(rows):
      self._grow(len(self) + len(rows))
      free = np.flatnonzero(self._row_of_slot < 0)
    slots = free[: len(rows)]
    self._row_of_slot[slots] = rows
    put = jax.jit(
      lambda old, slots, new: old.at[slots].set(new), donate_argnums=0, out_shardings=self._by_row
    )
    self._vectors = put(self._vectors, slots, self._stored(slots, vectors))

  def _grow(self, count: int) -> None:
    have = len(self._row_of_slot)
    want = slots_needed(count if self._vectors is None else round(count * GROWTH), self._mesh.size)
    missing = max(0, want - have)
    self._row_of_slot = np.concatenate([self._row_of_slot, np.full(missing, -1, np.int64)])
    if self._step_of_slot is not None:
      self._step_of_slot = np.concatenate([self._step_of_slot, np.zeros(missing, np.float32)])
    if self._vectors is None:
      shape = (have + missing, self._dimension)
      self._vectors = jax.jit(lambda: jnp.zeros(shape, self._dtype), out_shardings=self._by_row)()
    else:
      self._vectors = jax.jit(
        lambda old: jnp.pad(old, ((0, missing), (0, 0))), out_shardings=self._by_row
      )(self._vectors)

  def remove(self, rows: np.ndarray) -> None:
    """See `base.Retriever`."""
    self._row_of_slot[np.isin(self._row_of_slot, rows)] = -1

  def search(
    self, queries: np.ndarray, k: int, among: np.ndarray | None = None
  ) -> tuple[np.ndarray, np.ndarray]:
    """See `base.Retriever`."""
    mask = (
      self._row_of_slot >= 0
      if among is None
      else np.isin(self._row_of_slot, among) & (self._row_of_slot >= 0)
    )
    k_found = min(k, int(mask.sum()))
    rows, scores = (
      np.full((len(queries), k), -1, np.int64),
      np.full((len(queries), k), -np.inf, np.float32),
    )
    if k_found:
      scales = mask * (np.float32(1) if self._step_of_slot is None else self._step_of_slot)
      scale = jax.make_array_from_callback(
        mask.shape, self._by_row, lambda index: scales[index].astype(np.float32)
      )
      with jax.set_mesh(self._mesh):
        slots, top_scores = _search(
          self._vectors, scale, np.asarray(queries, np.float32), k_found, self._recall_target
        )
      rows[:, :k_found], scores[:, :k_found] = (
        self._row_of_slot[np.asarray(slots)],
        np.asarray(top_scores),
      )
    return rows, scores

  def save(self, directory: str) -> None:
    """Nothing: the store has the vectors."""


@functools.partial(jax.jit, static_argnums=(3, 4))
def _search(vectors, scale, queries, k, recall_target):
  return nearest(vectors, scale, queries, k, recall_target)
