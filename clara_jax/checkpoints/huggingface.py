"""Hugging Face models: a base read from safetensors, and a role merged into a plain model that
transformers loads."""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from clara_jax.checkpoints import families, lazy
from clara_jax.checkpoints.keymap import EMBEDDING, HEAD, KeyMapError, Path, base_name, base_place
from clara_jax.checkpoints.tensors import TensorFiles, tensor_hash, tree_hash, write_tensors
from clara_jax.config import ClaraConfig, LoraConfig, ModelConfig
from clara_jax.model import Clara


def leaf_shapes(model: Clara, group: str) -> dict[Path, tuple[int, ...]]:
  """Shape of every leaf of a group."""
  tree = jax.eval_shape(lambda: model.init(jax.random.key(0), (group,)))[group]
  return {path: tuple(leaf.shape) for path, leaf in lazy.leaves(tree)}


# Buffers in older files, which are computed.
_BUFFER = re.compile(
  r"model\.(layers\.\d+\.self_attn\.)?(rotary_emb\.(inv_freq|cos_cached|sin_cached)|bias|masked_bias)"
)


def read_base(model: Clara, directory: str) -> dict[str, Any]:
  """The group 'base' of a Hugging Face directory without CLaRa's special tokens, as leaves that are
  read when they are indexed.

  Raises:
    KeyMapError: a tensor that is missing, unknown, doubled or of the wrong shape; a damaged file;
      by name.
  """
  tied = model.config.model.tie_embeddings
  files = TensorFiles(
    directory, passed_over=lambda name: bool(_BUFFER.fullmatch(name)) or (tied and name == HEAD)
  )
  rows, said = (
    files[EMBEDDING].shape[0] if EMBEDDING in set(files) else None,
    families.read_json(directory).get("vocab_size"),
  )
  if rows is not None and rows != said:
    raise KeyMapError(
      f"{directory}: {EMBEDDING} has {rows} rows, but {families.CONFIG_FILE} says vocab_size={said}"
    )
  return base_leaves(model, {name: files[name] for name in files}, directory)


def base_leaves(model: Clara, tensors: Mapping[str, Any], where: str) -> dict[str, Any]:
  """The group 'base' from tensors under their Hugging Face names; see `read_base`."""
  config = model.config.model
  expected = leaf_shapes(model, "base")
  expected[("embedding",)] = (None, config.width)
  if not config.tie_embeddings:
    expected[("head",)] = (config.width, None)
  return lazy.stack(tensors, base_place, expected, where)


def special_tokens(config: ClaraConfig) -> dict[str, np.ndarray]:
  """Fresh rows of CLaRa's special tokens: {'embedding': [M+3, D], 'head': [D, M+3]} (no head where
  it is tied)."""
  model, count = config.model, config.vocab_size - config.model.vocab_size
  rows = (
    np.asarray(jax.random.normal(jax.random.key(0), (count, model.width))) * model.initializer_range
  )
  tables = {"embedding": rows.astype(_numpy_type(model.param_dtype))}
  if not model.tie_embeddings:
    tables["head"] = np.zeros((model.width, count), _numpy_type(model.param_dtype))
  return tables


def with_special_tokens(
  base: Mapping[str, Any], special: Mapping[str, Any], config: ClaraConfig
) -> dict[str, Any]:
  """A base whose embedding and head end with the given rows and columns.

  Args:
    base: leaves; rows beyond the words of the tokenizer are left out (many models pad theirs),
      words without a row (tokens that were added to the tokenizer alone) get zeros.
    special: as from `special_tokens`, or with the whole vocabulary where it is not the base's.
    config: the method's configuration.
  """
  base = dict(base)
  for name, axis in (("embedding", 0), ("head", 1)):
    if name not in special:
      continue
    more = lazy.read(special[name])
    count = config.vocab_size - more.shape[axis]
    if count == 0:  # all of it, in its own type
      base[name] = more
      continue
    have = min(base[name].shape[axis], count)
    if have < count:
      more = np.concatenate(
        [
          np.zeros_like(
            more, shape=[count - have if i == axis else n for i, n in enumerate(more.shape)]
          ),
          more,
        ],
        axis,
      )
    base[name] = lazy.Rows(base[name], have, more, axis)
  return base


def base_tensors(base: Mapping[str, Any]) -> list[lazy.Named]:
  """A base's tensors under their Hugging Face names."""
  return lazy.named_tensors(base, base_name, base_place)


def base_hash(base: Mapping[str, Any]) -> str:
  """The content of a base without special tokens: names, types, shapes and bytes, however it is
  stored."""
  return tree_hash({tensor.name: tensor_hash(tensor.read()) for tensor in base_tensors(base)})


def merged(base: Mapping[str, Any], role: Mapping[str, Any], lora: LoraConfig) -> dict[str, Any]:
  """The base with a role folded in, W + (alpha / rank) · A B in float32 and rounded to W's type;
  lazy."""
  deltas: dict[Path, dict[str, Any]] = {}
  for path, leaf in lazy.leaves(role):
    deltas.setdefault(path[:-1], {})[path[-1]] = leaf
  flat = dict(lazy.leaves(base))
  for path, ab in deltas.items():
    kernel = (*path, "kernel")
    if kernel not in flat:
      raise KeyMapError(f"{'/'.join(path)}: the role adapts a layer that the base does not have")
    flat[kernel] = _Merged(flat[kernel], ab["a"], ab["b"], lora.scale)
  return lazy.nest(flat)


class _Merged:
  def __init__(self, kernel, a, b, scale):
    self._kernel, self._a, self._b, self._scale = kernel, a, b, scale
    self.shape, self.dtype = kernel.shape, np.dtype(kernel.dtype)

  def __getitem__(self, index):
    layers, rows, columns = index
    full = slice(None)
    a = np.asarray(self._a[layers, rows, full], np.float32)
    b = np.asarray(self._b[layers, full, columns], np.float32)
    return (np.asarray(self._kernel[index], np.float32) + self._scale * (a @ b)).astype(self.dtype)


def write_model(
  directory: str,
  base: Mapping[str, Any],
  config: ModelConfig,
  tokenizer: Any,
  metadata: Mapping[str, str],
  source: str | None = None,
  on_written: Callable[[int], None] = lambda _: None,
) -> dict[str, str]:
  """Writes a model that `AutoModelForCausalLM.from_pretrained` loads; returns the hash of each
  tensor.

  Args:
    directory: where; it must exist.
    base: leaves, special tokens included.
    config: its shape.
    tokenizer: a Hugging Face tokenizer that is written with it, or None.
    metadata: for the safetensors' headers.
    source: a directory with the config.json, and perhaps the generation_config.json, that the model
      came with.
    on_written: called with the bytes of each tensor.
  """
  tensors = {t.name: t for t in base_tensors(base)}
  special = {
    name: getattr(tokenizer, name, None)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id")
  }
  rows, dtype = tensors[EMBEDDING].shape[0], main_type(tensors.values())
  if source:
    values = families.written_config(families.read_json(source), rows, dtype)
  else:
    values = families.config_json(config, rows, special, dtype)
  hashes = write_tensors(
    directory,
    [(t.name, t.shape, t.dtype) for t in tensors.values()],
    lambda name: tensors[name].read(),
    metadata=metadata,
    on_written=on_written,
  )
  folder = epath.Path(directory)
  (folder / families.CONFIG_FILE).write_text(json.dumps(values, indent=2))
  if source is None:
    (folder / families.GENERATION_FILE).write_text(
      json.dumps({"_from_model_config": True, **special}, indent=2)
    )
  else:
    copy_files(source, directory, (families.GENERATION_FILE,))
  if tokenizer is not None:
    tokenizer.save_pretrained(directory)
  return hashes


def main_type(tensors: Iterable[Any]) -> str:
  """The type that most bytes are of."""
  sizes: dict[str, int] = {}
  for tensor in tensors:
    dtype = np.dtype(tensor.dtype)
    sizes[dtype.name] = sizes.get(dtype.name, 0) + math.prod(tensor.shape) * dtype.itemsize
  return max(sizes, key=sizes.__getitem__)


def keep_files(source: str, folder: str) -> None:
  """Copies the config.json and the generation_config.json that a base came with."""
  os.makedirs(folder, exist_ok=True)
  copy_files(source, folder, (families.CONFIG_FILE, families.GENERATION_FILE))


def copy_files(source: str, directory: str, names: Iterable[str]) -> None:
  """Copies files and folders, those of them that are there, as they are."""
  for name in names:
    path = os.path.join(source, name)
    if os.path.isdir(path):
      shutil.copytree(path, os.path.join(directory, name), copy_function=shutil.copyfile)
    elif os.path.exists(path):
      shutil.copyfile(path, os.path.join(directory, name))


def _numpy_type(name: str) -> np.dtype:
  return np.dtype(jax.numpy.dtype(name))
