"""Our own checkpoints, leaf by leaf: opened without being read, and a base written without being
held.

Orbax keeps each leaf as a Zarr array. Opening one through TensorStore gives any part of it; and a
base larger than the host is written by letting Orbax save a skeleton, whose arrays are then
replaced one layer at a time.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from clara_jax import io
from clara_jax.checkpoints import families, lazy
from clara_jax.checkpoints.keymap import Path, base_name, base_place
from clara_jax.checkpoints.tensors import tensor_hash, tree_hash
from clara_jax.checkpoints.workdir import (
  OF_ORBAX,
  Checkpointer,
  CheckpointError,
  is_checkpoint,
  read_config,
)
from clara_jax.config import ModelConfig

_CHUNK = 1024
_IN_FLIGHT = 3


class StoredArray:
  """A leaf on disk; see `lazy.py`."""

  def __init__(self, store: ts.TensorStore):
    self._store = store
    self.shape, self.dtype = tuple(store.shape), np.dtype(store.dtype.numpy_dtype)

  def __getitem__(self, index: lazy.Index) -> np.ndarray:
    layers = range(self.shape[0])[index[0]]
    # A stacked matrix lies column-major on disk: read so, nothing is turned.
    if len(self.shape) < 3 or len(layers) == 1:
      return self._store[index].read(order="F" if len(self.shape) == 3 else "C").result()
    value = np.empty([len(range(n)[i]) for n, i in zip(self.shape, index, strict=True)], self.dtype)
    for row, layer in enumerate(layers):  # one at a time, or all chunks would be in memory at once
      value[row] = self._store[(layer, *index[1:])].read().result()
    return value


# Within a checkpoint that holds a base: config.json and generation_config.json of the Hugging Face
# model that it was.
HF_FOLDER = "hf"


def base_config(
  base: str, dtype: str | None = None, allow: Sequence[str] = (), tokenizer: str | None = None
) -> ModelConfig:
  """The shape of a base: a Hugging Face directory, or a checkpoint of ours.

  Args:
    base: its directory.
    dtype: compute and storage dtype; by default the base's.
    allow, tokenizer: see `families.model_config`.
  """
  if is_checkpoint(base):
    return dataclasses.replace(read_config(base)[0].clara.model, **families.with_dtype(dtype))
  return families.model_config(base, allow=allow, tokenizer=tokenizer, **families.with_dtype(dtype))


def hf_files(base: str | None) -> str | None:
  """The directory with the Hugging Face config.json that a base came with, None where there is
  none."""
  if base is None or not is_checkpoint(base):
    return base
  kept = os.path.join(base, HF_FOLDER)
  return kept if epath.Path(kept).is_dir() else None


def open_weights(directory: str) -> dict[str, Any]:
  """All groups of a checkpoint's last step, as trees of leaves that are read when they are indexed.

  Raises:
    CheckpointError: there is no step, or a leaf is damaged.
  """
  checkpointer = Checkpointer(directory, read_only=True)
  step = checkpointer.latest_step()
  checkpointer.close()
  if step is None:
    raise CheckpointError(f"{directory}: has no saved step yet")
  folder = _absolute(directory) / "checkpoints" / str(step) / "weights"
  # One process reads it all, the others their parts.
  if jax.process_index() == 0 and (problem := io.damage(folder.parent, "weights")):
    raise CheckpointError(f"{directory}: step {step} is damaged: {problem}")
  try:
    keys = json.loads((folder / "_METADATA").read_text())["tree_metadata"].values()
    paths = [tuple(part["key"] for part in key["key_metadata"]) for key in keys]
    return lazy.nest(
      {
        path: StoredArray(
          ts.open({"driver": "zarr", "kvstore": _kvstore(folder, path), "open": True}).result()
        )
        for path in paths
      }
    )
  except (OSError, KeyError, ValueError) as error:
    raise CheckpointError(
      f"{folder}: not a whole checkpoint: {str(error).splitlines()[0]}"
    ) from None


def write_weights(
  directory: str,
  weights: Mapping[str, Any],
  step: int = 0,
  hashed: str | None = None,
  on_written: Callable[[int], None] = lambda _: None,
) -> str | None:
  """Writes groups as a checkpoint to use, holding a few layers of a leaf at a time.

  Args:
    directory: of the checkpoint; its config.json is written elsewhere.
    weights: groups of leaves.
    step: its number.
    hashed: a group whose hash (`huggingface.base_hash`) is made on the way.
    on_written: called with the bytes of each piece.

  Returns:
    That hash.
  """
  flat = dict(lazy.leaves(weights))
  folder = _absolute(directory) / "checkpoints"
  skeleton = lazy.nest(
    {path: np.zeros((1,) * len(leaf.shape), leaf.dtype) for path, leaf in flat.items()}
  )
  manager = ocp.CheckpointManager(
    folder, item_handlers={"weights": ocp.PyTreeCheckpointHandler(use_ocdbt=False)}
  )
  manager.save(step, args=ocp.args.Composite(weights=ocp.args.PyTreeSave(skeleton)))
  manager.close()
  waiting: list[ts.Future] = []
  hashes: dict[str, str] = {}
  try:
    for path, leaf in flat.items():
      stacked = len(leaf.shape) == 3
      # Column-major chunks: a linear weight comes transposed from Hugging Face's order and goes to
      # disk without being turned.
      store = ts.open(
        {
          "driver": "zarr",
          "kvstore": _kvstore(folder / str(step) / "weights", path),
          "create": True,
          "delete_existing": True,
          "metadata": {
            "shape": list(leaf.shape),
            "chunks": [
              1 if stacked and i == 0 else min(max(n, 1), _CHUNK) for i, n in enumerate(leaf.shape)
            ],
            "dtype": leaf.dtype.name if leaf.dtype.name == "bfloat16" else leaf.dtype.str,
            "compressor": None,
            "order": "F" if stacked else "C",
          },
        }
      ).result()
      layered = path[1:2] == ("layers",)
      for layer in range(leaf.shape[0]) if layered else (None,):
        whole = (slice(None),) * len(leaf.shape)
        index = (slice(layer, layer + 1), *whole[1:]) if layered else whole
        value = leaf[index]
        if path[0] == hashed:
          name = base_name(path[1:], layer)
          tensor = value[0] if layered else value
          hashes[name] = tensor_hash(tensor.T if base_place(name).transpose else tensor)
        if len(waiting) >= _IN_FLIGHT:
          waiting.pop(0).result()
        waiting.append(store[index].write(value))
        on_written(value.nbytes)
  finally:  # whoever removes the directory after an error must not race with a write
    problems = [error for future in waiting if (error := future.exception()) is not None]
  if problems:
    raise problems[0]
  io.seal_folder(folder / str(step), but=OF_ORBAX)
  return tree_hash(hashes) if hashed else None


def _absolute(directory: str) -> epath.Path:
  return epath.Path(directory if "://" in str(directory) else os.path.abspath(directory))


def _kvstore(folder: epath.Path, path: Path) -> Any:
  name = ".".join(path)
  ocdbt = (folder / "manifest.ocdbt").exists()
  if "://" in str(folder):
    return (
      {"driver": "ocdbt", "base": f"{folder}/", "path": f"{name}/"}
      if ocdbt
      else f"{folder}/{name}/"
    )
  # By its parts and not as a URL, in which #, ? and % mean something.
  here = {"driver": "file", "path": f"{folder}/" if ocdbt else f"{folder}/{name}/"}
  return {"driver": "ocdbt", "base": here, "path": f"{name}/"} if ocdbt else here
