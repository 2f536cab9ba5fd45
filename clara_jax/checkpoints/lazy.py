"""Trees of weights that are read when they are indexed.

A leaf has `shape`, `dtype` and `leaf[index]`, where the index is a tuple of slices, one an axis: a
numpy array is one, and so are the classes below. A device's shard is read by its own index
(`sharding.place`), and a conversion goes through a tree layer by layer (`named_tensors`), so that
no host holds a whole model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from clara_jax.checkpoints.keymap import KeyMapError, Path, Place, check_coverage

Index = tuple[slice, ...]


class Layers:
  """Y tensors as one leaf [Y, ...]; with `transpose` each one's two axes are exchanged."""

  def __init__(self, tensors: Sequence[Any], transpose: bool):
    self._tensors, self._transpose = tensors, transpose
    one = tuple(tensors[0].shape)
    self.shape = (len(tensors), *(one[::-1] if transpose else one))
    self.dtype = np.dtype(tensors[0].dtype)

  def __getitem__(self, index: Index) -> np.ndarray:
    layers = range(self.shape[0])[index[0]]
    if len(layers) == 1:  # a view: nothing is copied twice
      return self._layer(layers[0], index[1:])[None]
    parts = [range(n)[i] for n, i in zip(self.shape, index, strict=True)]
    value = np.empty([len(p) for p in parts], self.dtype)
    for row, layer in enumerate(layers):
      value[row] = self._layer(layer, index[1:])
    return value

  def _layer(self, layer: int, index: Index) -> np.ndarray:
    value = self._tensors[layer][index[::-1] if self._transpose else index]
    return value.T if self._transpose else value


class Transposed:
  """A matrix with its axes exchanged."""

  def __init__(self, tensor: Any):
    self._tensor = tensor
    self.shape, self.dtype = tuple(tensor.shape)[::-1], np.dtype(tensor.dtype)

  def __getitem__(self, index: Index) -> np.ndarray:
    return self._tensor[index[::-1]].T


class Rows:
  """The first `count` entries of a leaf along one axis, followed by those of `more`."""

  def __init__(self, leaf: Any, count: int, more: np.ndarray, axis: int):
    self._leaf, self._count, self._more, self._axis = leaf, count, more, axis
    shape = list(leaf.shape)
    shape[axis] = count + more.shape[axis]
    self.shape, self.dtype = tuple(shape), np.dtype(leaf.dtype)

  def __getitem__(self, index: Index) -> np.ndarray:
    start, stop, _ = index[self._axis].indices(self.shape[self._axis])
    parts = []
    for source, first, last in (
      (self._leaf, start, min(stop, self._count)),
      (self._more, max(start - self._count, 0), stop - self._count),
    ):
      if first < last:
        part = source[
          tuple(slice(first, last) if axis == self._axis else i for axis, i in enumerate(index))
        ]
        parts.append(part.astype(self.dtype, copy=False))
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=self._axis)


class Cast:
  """A leaf in another type."""

  def __init__(self, leaf: Any, dtype: Any):
    self._leaf = leaf
    self.shape, self.dtype = tuple(leaf.shape), np.dtype(jnp.dtype(dtype))

  def __getitem__(self, index: Index) -> np.ndarray:
    return self._leaf[index].astype(self.dtype, copy=False)


def read(leaf: Any) -> np.ndarray:
  """The whole leaf."""
  return leaf[(slice(None),) * len(leaf.shape)]


def leaves(tree: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
  """(path, leaf) of a nested dict."""
  for name, value in tree.items():
    if isinstance(value, Mapping):
      yield from leaves(value, (*path, name))
    else:
      yield (*path, name), value


def nest(flat: Mapping[Path, Any]) -> dict[str, Any]:
  """The nested dict of (path, leaf) pairs."""
  tree: dict[str, Any] = {}
  for path, leaf in flat.items():
    node = tree
    for name in path[:-1]:
      node = node.setdefault(name, {})
    node[path[-1]] = leaf
  return tree


def stack(
  tensors: Mapping[str, Any],
  place_of: Callable[[str], Place],
  expected: Mapping[Path, tuple[int, ...]],
  where: str,
) -> dict[str, Any]:
  """Named tensors as a tree of lazy leaves; names, coverage and shapes are checked, nothing is
  read.

  Args:
    tensors: by name, each with shape, dtype and indexing.
    place_of: a function of `keymap.py`.
    expected: shape of each leaf; None for an axis that may differ.
    where: for messages.

  Raises:
    KeyMapError: a name, a shape or a type that does not fit, by name.
  """
  most = max((shape[0] for path, shape in expected.items() if path[0] == "layers"), default=0)
  if most > len(tensors):  # before anything is made for each of them
    raise KeyMapError(
      f"{where}: the model has {most} layers, but there are only {len(tensors)} tensors"
    )
  places = {name: place_of(name) for name in tensors}
  keys = [
    (path, layer)
    for path, shape in expected.items()
    for layer in (range(shape[0]) if path[0] == "layers" else (None,))
  ]
  for name, spot in places.items():
    if spot.path not in expected:
      raise KeyMapError(f"{where}: {name}: this model has no {'/'.join(spot.path)}")
    if spot.layer is not None and spot.layer >= expected[spot.path][0]:
      raise KeyMapError(f"{where}: {name}: the model has only {expected[spot.path][0]} layers")
    have = tuple(tensors[name].shape)[:: -1 if spot.transpose else 1]
    want = expected[spot.path][0 if spot.layer is None else 1 :]
    if len(have) != len(want) or any(
      w is not None and h != w for h, w in zip(have, want, strict=True)
    ):
      order = -1 if spot.transpose else 1
      raise KeyMapError(
        f"{where}: {name}: expected shape "
        f"{tuple('*' if w is None else w for w in want)[::order]}, got {have[::order]}"
      )
  check_coverage(places.values(), keys, where)
  by_place = {(spot.path, spot.layer): name for name, spot in places.items()}
  flat = {}
  for path, shape in expected.items():
    if path[0] != "layers":
      name = by_place[path, None]
      flat[path] = Transposed(tensors[name]) if places[name].transpose else tensors[name]
      continue
    names = [by_place[path, layer] for layer in range(shape[0])]
    if len({np.dtype(tensors[n].dtype) for n in names}) > 1:
      raise KeyMapError(f"{where}: {names[0]} and the other layers' have different types")
    flat[path] = Layers([tensors[n] for n in names], places[names[0]].transpose)
  return nest(flat)


class Named(NamedTuple):
  """A tensor under its name on disk: shape and type in that form, and how to read it."""

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]


def named_tensors(
  tree: Mapping[str, Any],
  name_of: Callable[[Path, int | None], str],
  place_of: Callable[[str], Place],
) -> list[Named]:
  """The tensors of a tree of leaves under their names on disk, layer after layer: the inverse of
  `stack`."""
  entries: list[tuple[tuple[int, int], Named]] = []
  for path, leaf in leaves(tree):
    for layer in range(leaf.shape[0]) if path[0] == "layers" else (None,):
      name = name_of(path, layer)
      turned = place_of(name).transpose

      def value(leaf=leaf, layer=layer, turned=turned):
        whole = (slice(None),) * len(leaf.shape)
        one = leaf[whole] if layer is None else leaf[(slice(layer, layer + 1), *whole[1:])][0]
        one = np.asarray(one)
        return one.T if turned else one

      shape = tuple(leaf.shape)[0 if layer is None else 1 :]
      order = (-1 if path == ("embedding",) else 10**9) if layer is None else layer
      entries.append(
        (
          (order, len(entries)),
          Named(name, shape[::-1] if turned else shape, np.dtype(leaf.dtype), value),
        )
      )
  return [tensor for _, tensor in sorted(entries, key=lambda x: x[0])]
