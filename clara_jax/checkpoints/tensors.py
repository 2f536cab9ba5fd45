"""Safetensors directories, one tensor at a time: nothing here ever holds more than one tensor.

Reading goes through the safetensors library; each access maps the file anew, so that pages which
were read do not stay resident. Writing is done here, because the library wants all tensors of a
file at once (the format is a length, a JSON header, the bytes).
"""

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from clara_jax.checkpoints.keymap import KeyMapError
from clara_jax.io import parse_json

MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
_BLOCK = 1 << 18
_TO_NUMPY = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "I64": np.int64,
  "I32": np.int32,
}
_FROM_NUMPY = {np.dtype(v): k for k, v in _TO_NUMPY.items()}


class TensorFiles:
  """The tensors of a directory by name.

  Args:
    directory: where the files are.
    files: which; by default those that transformers would read: model.safetensors, or the shards
      that the index names.
    passed_over: whether a tensor is left out, by its name.

  Raises:
    KeyMapError: no files; a damaged or missing one; an index that names another directory or leaves
      a file out; by name.
  """

  def __init__(
    self,
    directory: str,
    files: Sequence[str] | None = None,
    passed_over: Callable[[str], bool] = lambda _: False,
  ):
    folder = epath.Path(directory)
    names = sorted(f.name for f in folder.iterdir()) if folder.is_dir() else []
    tensor_files = [name for name in names if name.endswith(".safetensors")]
    index = folder / INDEX
    claimed: dict[str, str] | None = None
    if files is not None:
      if lost := [f for f in files if f not in tensor_files]:
        raise KeyMapError(f"{folder / lost[0]}: no such file{_instead(names)}")
      tensor_files = list(files)
    elif MODEL in tensor_files:
      tensor_files = [MODEL]
    elif index.exists():
      try:
        claimed = parse_json(index.read_bytes())["weight_map"]
        if not all(isinstance(name, str) for pair in claimed.items() for name in pair):
          raise ValueError("names that are no text")
      except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise KeyMapError(f"{index}: not an index with a weight_map: {error}") from None
      for file in sorted(set(claimed.values())):
        if "/" in file or "\\" in file or file in ("", ".", ".."):
          raise KeyMapError(f"{index}: names {file!r}, which leaves the directory")
        if file not in tensor_files:
          raise KeyMapError(f"{folder / file}: named by {INDEX} but not there")
      if left := [
        f for f in tensor_files if f not in set(claimed.values()) and f.startswith("model-")
      ]:
        raise KeyMapError(f"{folder / left[0]}: a shard that {INDEX} does not name")
      tensor_files = sorted(set(claimed.values()))
    else:
      tensor_files = [name for name in tensor_files if name.startswith("model-")]
    if not tensor_files:
      raise KeyMapError(f"{directory}: no model.safetensors{_instead(names)}")
    self._file: dict[str, epath.Path] = {}
    self._about: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for file in tensor_files:
      path = folder / file
      with _opened(path) as tensors:
        for name in tensors.keys():
          if passed_over(name):
            continue
          if name in self._file:
            raise KeyMapError(f"{path}: {name} is also in {self._file[name].name}")
          view = tensors.get_slice(name)
          if view.get_dtype() not in _TO_NUMPY:
            raise KeyMapError(
              f"{path}: {name} has the type {view.get_dtype()}; expected one of {sorted(_TO_NUMPY)}"
            )
          self._file[name] = path
          self._about[name] = tuple(view.get_shape()), np.dtype(_TO_NUMPY[view.get_dtype()])
    if claimed is not None and (
      lost := {name for name in claimed if not passed_over(name)} ^ set(self._file)
    ):
      name = sorted(lost)[0]
      raise KeyMapError(
        f"{index}: {name} is "
        f"{'named, but in no file' if name in claimed else 'in a file, but not named'}"
      )

  def __iter__(self) -> Iterator[str]:
    return iter(self._file)

  def __len__(self) -> int:
    return len(self._file)

  def __getitem__(self, name: str) -> "Tensor":
    return Tensor(self, name, *self._about[name])

  def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
    """A tensor or a part of it, copied out of the file.

    Raises:
      KeyMapError: it holds NaN or infinity, which no weight may.
    """
    with _opened(self._file[name]) as tensors:
      value = tensors.get_slice(name)[index] if index else tensors.get_tensor(name)
    if not is_finite(value):
      raise KeyMapError(f"{self._file[name]}: {name} holds NaN or infinity")
    return value


class Tensor:
  """A tensor that is read when it is indexed; shape and dtype are known before."""

  def __init__(self, files: TensorFiles, name: str, shape: tuple[int, ...], dtype: np.dtype):
    self._files, self._name = files, name
    self.shape, self.dtype = shape, dtype

  def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
    return self._files.read(self._name, index)

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    value = self._files.read(self._name)
    return value if dtype is None else value.astype(dtype)


def _instead(names: Sequence[str]) -> str:
  """What to do with the weights that are there."""
  if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
    return (
      "; its weights are PyTorch files, which are not read: transformers writes safetensors "
      "(AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW))"
    )
  if files := [name for name in names if name.endswith(".gguf")]:
    return f"; it has {files[0]}, which can be converted: clara convert DIR/{files[0]} NEW --to hf"
  if files := [name for name in names if name.endswith(".safetensors")]:
    return f"; {files[0]} is not a file that transformers reads"
  return ""


def _opened(path: epath.Path) -> Any:
  try:
    return safe_open(path, framework="numpy")
  except (SafetensorError, OSError) as error:
    raise KeyMapError(f"{path}: not a whole safetensors file: {error}") from None


def is_finite(value: np.ndarray) -> bool:
  """Whether no element is NaN or infinite; in blocks that stay in the cache."""
  if value.dtype.kind in "iu":
    return True
  flat = value.reshape(-1)
  for first in range(0, flat.size, _BLOCK):
    block = flat[first : first + _BLOCK]
    if block.dtype == ml_dtypes.bfloat16:  # finite is: the exponent is not all ones
      if (block.view(np.uint16) & 0x7FFF).max() >= 0x7F80:
        return False
    elif not np.isfinite(block).all():
      return False
  return True


def write_tensors(
  directory: str,
  tensors: Iterable[tuple[str, tuple[int, ...], Any]],
  read: Any,
  *,
  stem: str = "model",
  shard_bytes: int = SHARD_BYTES,
  metadata: Mapping[str, str] | None = None,
  on_written: Callable[[int], None] = lambda _: None,
) -> dict[str, str]:
  """Writes safetensors shards with an index (one file and no index where all fits in one).

  Args:
    directory: where; it must exist.
    tensors: (name, shape, dtype) of all tensors, in the order in which they are written.
    read: a function from a name to its array; called once for each, when it is written.
    stem: of the files' names.
    shard_bytes: most bytes of a file; a larger tensor has a file of its own.
    metadata: for the header.
    on_written: called with the bytes of each tensor.

  Returns:
    name -> sha256 of its bytes.
  """
  shards: list[list[tuple[str, tuple[int, ...], np.dtype]]] = [[]]
  size = 0
  for name, shape, dtype in tensors:
    dtype = np.dtype(dtype)
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if shards[-1] and size + count > shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append((name, shape, dtype))
    size += count
  hashes, weight_map, total = {}, {}, 0
  for number, shard in enumerate(shards, 1):
    file = (
      f"{stem}.safetensors"
      if len(shards) == 1
      else f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
    )
    header, offset = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0
    for name, shape, dtype in shard:
      end = offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
      header[name] = {
        "dtype": _FROM_NUMPY[dtype],
        "shape": list(shape),
        "data_offsets": [offset, end],
      }
      weight_map[name] = file
      offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with (epath.Path(directory) / file).open("wb") as out:
      out.write(struct.pack("<Q", len(text)) + text)
      for name, shape, dtype in shard:
        value = np.ascontiguousarray(read(name))
        if value.shape != tuple(shape) or value.dtype != dtype:
          raise KeyMapError(
            f"{name}: expected {dtype} {tuple(shape)}, got {value.dtype} {value.shape}"
          )
        if not is_finite(value):
          raise KeyMapError(f"{name}: holds NaN or infinity; nothing is written")
        data = value.reshape(-1).view(np.uint8)
        hashes[name] = tensor_hash(value)
        out.write(data)
        on_written(len(data))
    total += offset
  if len(shards) > 1:
    (epath.Path(directory) / f"{stem}.safetensors.index.json").write_text(
      json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    )
  return hashes


def tensor_hash(value: np.ndarray) -> str:
  """sha256 of type, shape and bytes."""
  value = np.ascontiguousarray(value)
  digest = hashlib.sha256(f"{value.dtype.name} {value.shape} ".encode())
  digest.update(value.reshape(-1).view(np.uint8))
  return digest.hexdigest()


def tree_hash(hashes: Mapping[str, str]) -> str:
  """One hash of many tensors, whatever their order."""
  return hashlib.sha256(
    "\n".join(f"{name} {hashes[name]}" for name in sorted(hashes)).encode()
  ).hexdigest()
