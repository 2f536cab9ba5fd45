"""Hugging Face models: a base read from safetensors, and a role merged into a plain model that transformers loads."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from clara_jax.config import ClaraConfig, ConfigError, LoraConfig, ModelConfig
from clara_jax.interop import families, lazy
from clara_jax.interop.keymap import EMBEDDING, HEAD, KeyMapError, Path, base_name, base_place
from clara_jax.interop.tensors import TensorFiles, tensor_hash, tree_hash, write_tensors
from clara_jax.model import Clara


def leaf_shapes(model: Clara, group: str) -> dict[Path, tuple[int, ...]]:
  """Shape of every leaf of a group."""
  tree = jax.eval_shape(lambda: model.init(jax.random.key(0), (group,)))[group]
  return {path: tuple(leaf.shape) for path, leaf in lazy.leaves(tree)}


def read_base(model: Clara, directory: str) -> dict[str, Any]:
  """The group 'base' of a Hugging Face directory without CLaRa's special tokens, as leaves that are read when they are indexed.

  Raises:
    KeyMapError: a tensor that is missing, unknown, doubled or of the wrong shape; a damaged file; by name.
  """
  config = model.config.model
  files = TensorFiles(directory)
  expected = leaf_shapes(model, "base")
  expected[("embedding",)] = (None, config.width)
  if not config.tie_embeddings:
    expected[("head",)] = (config.width, None)
  tensors = {name: files[name] for name in files if not (config.tie_embeddings and name == HEAD)}
  return lazy.stack(tensors, base_place, expected, directory)


def special_tokens(config: ClaraConfig) -> dict[str, np.ndarray]:
  """Fresh rows of CLaRa's special tokens: {'embedding': [M+3, D], 'head': [D, M+3]} (no head where it is tied)."""
  model, count = config.model, config.vocab_size - config.model.vocab_size
  rows = np.asarray(jax.random.normal(jax.random.key(0), (count, model.width))) * model.initializer_range
  made = {"embedding": rows.astype(_numpy_type(model.param_dtype))}
  if not model.tie_embeddings:
    made["head"] = np.zeros((model.width, count), _numpy_type(model.param_dtype))
  return made


def with_special_tokens(base: Mapping[str, Any], special: Mapping[str, Any], config: ClaraConfig) -> dict[str, Any]:
  """A base whose embedding and head end with the given rows and columns.

  Args:
    base: leaves; more words than the vocabulary are left out (some models pad theirs).
    special: as from `special_tokens`, or with the whole vocabulary where it is not the base's.
    config: the method's configuration.

  Raises:
    ConfigError: the base has fewer words than the configuration's vocabulary.
  """
  base = dict(base)
  for name, axis in (("embedding", 0), ("head", 1)):
    if name not in special:
      continue
    more = special[name]
    count = config.vocab_size - more.shape[axis]
    have = base[name].shape[axis]
    if have < count:
      raise ConfigError(f"the base has {have} words, but the checkpoint was made for {count}")
    base[name] = lazy.Rows(base[name], count, lazy.read(more), axis)
  return base


def base_tensors(base: Mapping[str, Any]) -> list[lazy.Named]:
  """A base's tensors under their Hugging Face names."""
  return lazy.named_tensors(base, base_name, base_place)


def base_hash(base: Mapping[str, Any]) -> str:
  """The content of a base without special tokens: names, types, shapes and bytes, however it is stored."""
  return tree_hash({tensor.name: tensor_hash(tensor.read()) for tensor in base_tensors(base)})


def merged(base: Mapping[str, Any], role: Mapping[str, Any], lora: LoraConfig) -> dict[str, Any]:
  """The base with a role folded in, W + (alpha / rank) · A B in float32 and rounded to W's type; lazy."""
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


def write_model(directory: str, base: Mapping[str, Any], config: ModelConfig, tokenizer: Any, metadata: Mapping[str, str],
                on_written: Callable[[int], None] = lambda _: None) -> dict[str, str]:
  """Writes a model that `AutoModelForCausalLM.from_pretrained` loads; returns the hash of each tensor.

  Args:
    directory: where; it must exist.
    base: leaves, special tokens included.
    config: its shape.
    tokenizer: a Hugging Face tokenizer, or None.
    metadata: for the safetensors' headers.
    on_written: called with the bytes of each tensor.
  """
  tensors = {t.name: t for t in base_tensors(base)}
  special = {name: getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
  values = families.config_json(config, tensors[EMBEDDING].shape[0], special)
  hashes = write_tensors(directory, [(t.name, t.shape, t.dtype) for t in tensors.values()], lambda name: tensors[name].read(),
                         metadata=metadata, on_written=on_written)
  folder = epath.Path(directory)
  (folder / "config.json").write_text(json.dumps(values, indent=2))
  (folder / "generation_config.json").write_text(json.dumps({"_from_model_config": True, **special}, indent=2))
  if tokenizer is not None:
    tokenizer.save_pretrained(directory)
  return hashes


def _numpy_type(name: str) -> np.dtype:
  return np.dtype(jax.numpy.dtype(name))
