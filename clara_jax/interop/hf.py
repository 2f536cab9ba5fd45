"""Hugging Face base models (safetensors) as the group 'base'."""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from clara_jax.config import ClaraConfig, ConfigError, ModelConfig
from clara_jax.interop.keymap import KeyMapError, Place, base_place, check_coverage
from clara_jax.model import Clara

# Fields of config.json that change what is computed: a value other than these cannot be honoured.
_SUPPORTED = {
    "model_type": ("mistral",),
    "hidden_act": ("silu",),
    "rope_scaling": (None,),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
}


def model_config(directory: str, **overrides: Any) -> ModelConfig:
  """The `ModelConfig` of a Hugging Face directory's config.json.

  Args:
    directory: holds config.json.
    **overrides: fields to set otherwise, such as dtype.

  Raises:
    ConfigError: no config.json, or a field whose value is not supported, by name.
  """
  file = epath.Path(directory) / "config.json"
  if not file.exists():
    raise ConfigError(f"{file}: no such file; expected a Hugging Face model directory")
  values = json.loads(file.read_text())
  for field, allowed in _SUPPORTED.items():
    if values.get(field) not in allowed:
      raise ConfigError(f"{file}: {field}={values.get(field)!r} is not supported; expected {' or '.join(map(repr, allowed))}")
  rope = values.get("rope_parameters") or {}
  if rope.get("rope_type", "default") != "default":
    raise ConfigError(f"{file}: rope_parameters.rope_type={rope['rope_type']!r} is not supported; expected 'default'")
  try:
    heads, width = values["num_attention_heads"], values["hidden_size"]
    fields = {
        "vocab_size": values["vocab_size"],
        "width": width,
        "num_layers": values["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": values.get("num_key_value_heads") or heads,
        "head_dim": values.get("head_dim") or width // heads,
        "mlp_dim": values["intermediate_size"],
        "rope_theta": float(rope.get("rope_theta") or values.get("rope_theta") or 10_000.0),
        "norm_eps": values.get("rms_norm_eps", 1e-6),
        "sliding_window": values.get("sliding_window"),
        "tie_embeddings": bool(values.get("tie_word_embeddings", False)),
        "max_positions": values.get("max_position_embeddings", 4096 * 32),
        "initializer_range": values.get("initializer_range", 0.02),
    }
  except KeyError as error:
    raise ConfigError(f"{file}: the field {error} is missing") from None
  return ModelConfig(**{**fields, **overrides})


def stack(model: Clara, group: str, tensors: Iterable[tuple[str, Any]], place_of: Callable[[str], Place], where: str
          ) -> dict[str, Any]:
  """Puts named tensors into the tree of a group, in the tree's types; shapes and coverage are checked.

  Args:
    model: says which tree.
    group: 'base' or a role.
    tensors: (name, numpy array) pairs.
    place_of: a function of `keymap.py`.
    where: for messages.

  Returns:
    The group's tree of numpy arrays. Rows of the embedding and columns of the head beyond those on disk are zero.

  Raises:
    KeyMapError: a name or a shape that does not fit, by name.
  """
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), (group,)))[group]
  flat, treedef = jax.tree_util.tree_flatten_with_path(shapes)
  shape_of = {tuple(k.key for k in path): leaf for path, leaf in flat}
  leaves = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in shape_of.items()}
  places = []
  for name, tensor in tensors:
    place = place_of(name)
    places.append(place)
    if place.path not in leaves:
      raise KeyMapError(f"{where}: {name}: this model has no {'/'.join(place.path)}")
    target = leaves[place.path] if place.layer is None else leaves[place.path][place.layer:place.layer + 1][0:1]
    value = np.asarray(tensor)
    value = value.T if place.transpose else value
    if place.layer is not None:
      if place.layer >= leaves[place.path].shape[0]:
        raise KeyMapError(f"{where}: {name}: the model has only {leaves[place.path].shape[0]} layers")
      target = leaves[place.path][place.layer]
    if place.path == ("embedding",):
      target = target[:value.shape[0]]
    elif place.path == ("head",):
      target = target[:, :value.shape[1]]
    if target.shape != value.shape:
      raise KeyMapError(f"{where}: {name}: expected shape {target.shape} (as stored here), got {value.shape}")
    target[...] = value
  expected = [(path, i) for path, leaf in shape_of.items() for i in (range(leaf.shape[0]) if path[0] == "layers" else (None,))]
  check_coverage(places, expected, where)
  return jax.tree_util.tree_unflatten(treedef, [leaves[tuple(k.key for k in path)] for path, _ in flat])


def read_safetensors(directory: str) -> Iterable[tuple[str, np.ndarray]]:
  """(name, array) of every tensor in a directory's safetensors files, memory-mapped, one at a time.

  Raises:
    KeyMapError: no such files, or one that is damaged, by name.
  """
  folder = epath.Path(directory)
  index = folder / "model.safetensors.index.json"
  if index.exists():
    files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
  else:
    files = sorted(f.name for f in folder.glob("*.safetensors"))
  if not files:
    raise KeyMapError(f"{directory}: no *.safetensors files")
  for file in files:
    path = folder / file
    if not path.exists():
      raise KeyMapError(f"{path}: named by {index.name} but not there")
    try:
      with safe_open(path, framework="np") as tensors:
        for name in tensors.keys():
          yield name, tensors.get_tensor(name)
    except SafetensorError as error:
      raise KeyMapError(f"{path}: not a whole safetensors file: {error}") from None


def read_base(model: Clara, directory: str, rng: jax.Array) -> dict[str, Any]:
  """The group 'base' from a Hugging Face directory; the rows of CLaRa's special tokens are drawn from `rng`."""
  tied = model.config.model.tie_embeddings
  tensors = ((n, t) for n, t in read_safetensors(directory) if not (tied and n == "lm_head.weight"))
  base = stack(model, "base", tensors, base_place, directory)
  config = model.config
  new = np.asarray(jax.random.normal(rng, (config.vocab_size - config.model.vocab_size, config.model.width)))
  base["embedding"][config.model.vocab_size:] = new * config.model.initializer_range
  return base


def check_vocabulary(config: ClaraConfig, directory: str) -> None:
  """Refuses a base whose vocabulary is not the configuration's."""
  on_disk = model_config(directory).vocab_size
  if on_disk != config.model.vocab_size:
    raise ConfigError(f"{directory}: vocab_size={on_disk}, but the checkpoint was made for {config.model.vocab_size}")


def with_dtype(values: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
  """Overrides of `model_config` for a type of computation and storage."""
  return {**values, **({"dtype": dtype, "param_dtype": dtype} if dtype else {})}
